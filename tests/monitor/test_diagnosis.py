"""The verdict: which words, how bad, and which heading of the runbook."""

import re
from typing import Any

import msgspec
import pytest
from style.tree import ROOT

from contentfilter.bus.messages import BackendStatus, CanaryResult, Drain, InFlight, Status, Window, WorkerStatus
from contentfilter.cli.status import lines
from contentfilter.model import OriginKind, Scanner
from contentfilter.monitor.diagnosis import consequence, diagnose, length
from contentfilter.policy.overrides import Bypass
from contentfilter.tables.keeper import TableState

NOW = 1_790_000_000.0
DEFER = dict.fromkeys((kind.value for kind in OriginKind), "defer") | {"bounce": "pass"}
PASS = dict.fromkeys(DEFER, "pass")
TABLES = TableState("files", True, 3, 2, 5.0, "")
WORKER = WorkerStatus(0, 11, "ready", 1, 60.0, 0.1, 0.0, 0, (), {"answered": 7})


def window(messages: int = 5, **more: Any) -> Window:
    facts: dict[str, Any] = {"decisions": {"queue": messages}, "deferred": {}, "rejected": {}, "unchecked": {}}
    return Window(seconds=850.0, messages=messages, bytes=0, p50=1.0, p95=2.0, **(facts | more))


def backend(scanner: str = "clamd", state: str = "well", **more: Any) -> BackendStatus:
    facts = {"cause": "down", "since": NOW - 240, "meanwhile": DEFER if scanner == "clamd" else PASS}
    return BackendStatus(scanner, f"unix:/{scanner}", state, **((facts if state == "failing" else {}) | more))


CLAMD, SPAMD = backend(), backend("spamd")
NO_CLAMD, NO_SPAMD = backend(state="failing"), backend("spamd", "failing")


def status(**more: Any) -> Status:
    facts: dict[str, Any] = {
        "version": "1", "pid": 1, "state": "ready", "generation": 1, "uptime": 9000.0, "socket": "/s", "restarts": 0,
        "malformed": 0, "problems": (), "workers": (WORKER,), "tables": TABLES, "wanted": 1,
        "backends": (CLAMD, SPAMD), "window": window(), "recent": window(), "waiting": 0, "waiting_limit": 1024,
    }  # fmt: skip
    return Status(**(facts | more))


def bypass(*origins: OriginKind) -> Bypass:
    return Bypass(
        scanner=Scanner.CLAMD, since=NOW - 60, until=NOW + 600, reason="it is broken", by="joe", origins=origins
    )


def canary(sample: str, result: str, *, ok: bool | None) -> CanaryResult:
    return CanaryResult(sample, result, ok, "said so", 0.1, NOW - 5)


def deferrals(ago: dict[str, float]) -> Status:
    return status(recent=window(5, deferred={"quarantine: full": 3}, ago=ago))


CASES = {
    "well": (status(), "mail is flowing", True),
    "quiet": (status(window=window(0)), "no mail in the last 15 minutes", True),
    "young": (status(window=window(0), uptime=30.0), "ready; no mail since the start 30 s ago", True),
    "no clamd": (status(backends=(NO_CLAMD, SPAMD)), "MAIL IS DEFERRED: clamd unix:/clamd has been down since ", False),
    "no spamd": (
        status(backends=(CLAMD, NO_SPAMD)),
        "mail is flowing UNCHECKED: spamd unix:/spamd has been down since ",
        True,
    ),
    "second clamd": (status(backends=(NO_CLAMD, CLAMD)), "mail is flowing", True),
    "no clamd, nobody wants it": (status(backends=(backend(state="failing", wanted=False),)), "mail is flowing", True),
    "both": (status(backends=(NO_CLAMD, NO_SPAMD)), "MAIL IS DEFERRED: clamd", False),
    "bypassed": (
        status(backends=(NO_CLAMD,), bypasses=(bypass(),)),
        "mail is flowing UNCHECKED: clamd is bypassed for all mail until ",
        True,
    ),
    "bypassed in part": (
        status(backends=(NO_CLAMD,), bypasses=(bypass(OriginKind.LOCAL),)),
        "MAIL IS DEFERRED: clamd",
        False,
    ),
    "draining": (status(state="draining"), "THE DAEMON IS STOPPING", False),
    "drained": (status(state="drained", drain=Drain(NOW - 60, None, "move", "joe")), "DRAINED by joe since ", False),
    "starting": (status(state="starting", workers=()), "the daemon is starting", False),
    "no worker": (status(workers=()), "MAIL WAITS: no worker accepts mail", False),
    "silent worker": (status(workers=(msgspec.structs.replace(WORKER, silent=20.0),)), "MAIL WAITS", False),
    "no tables": (
        status(tables=TableState("files", False, 0, 0, 0.0, "gone")),
        "MAIL IS DEFERRED: no rec",
        False,
    ),
    "full quarantine": (
        status(recent=window(5, deferred={"quarantine: full": 3})),
        "MAIL IS DEFERRED: 3 of 5 mess",
        False,
    ),
    "hook cannot reach the daemon": (
        status(canary=(canary("clean", "failed", ok=False), canary("eicar", "failed", ok=False))),
        "MAIL DOES NOT REACH THE FILTER: the canary's clean sample: said so",
        False,
    ),
    "no worker got the sample": (
        status(canary=(canary("clean", "no-answer", ok=False),)),
        "MAIL DOES NOT REACH THE FILTER",
        False,
    ),
    "clean sample refused": (status(canary=(canary("clean", "caught", ok=False),)), "mail is flowing", True),
    "socket of another mode": (
        status(socket_problem="/s has mode 0600 instead of 0666", socket_remedy="chmod 0666 /s"),
        "MAIL DOES NOT REACH THE FILTER: /s has mode 0600",
        False,
    ),
    "deferrals just now": (deferrals({"defer": 2.0, "queue": 1.0}), "MAIL IS DEFERRED: 3 of 5 mess", False),
    "deferrals go on": (deferrals({"defer": 20.0, "queue": 30.0}), "MAIL IS DEFERRED: 3 of 5 mess", False),
    "deferrals are over": (deferrals({"defer": 20.0, "queue": 1.0}), "mail is flowing", True),
    "deferrals are over, says the canary": (
        msgspec.structs.replace(deferrals({"defer": 20.0}), canary=(canary("clean", "passed", ok=True),)),
        "mail is flowing",
        True,
    ),
    "blind": (
        status(canary=(canary("eicar", "passed", ok=False),)),
        "mail is flowing UNCHECKED: canary: the eicar sample was not caught as expected",
        True,
    ),
}


@pytest.mark.parametrize(("given", "verdict", "flowing"), CASES.values(), ids=CASES)
def test_the_first_line_is_the_verdict(given: Status, verdict: str, flowing: bool) -> None:
    seen = diagnose(given, NOW)
    shown = next(iter(lines(given, seen, NOW)))[1]
    assert shown == seen.verdict
    assert shown.startswith(verdict)
    assert seen.flowing is flowing


WRONG = {
    "one of two workers": (status(wanted=2), "1 of 2 workers accept mail"),
    "second clamd": (status(backends=(NO_CLAMD, CLAMD)), "another backend serves its mail"),
    "bypassed anyway": (status(backends=(NO_CLAMD,), bypasses=(bypass(),)), "; it is bypassed"),
    "problems": (status(problems=("a:1: x", "b", "c", "d", "e")), "not in force: a:1: x"),
    "more problems": (status(problems=("a:1: x", "b", "c", "d", "e")), "not in force: 2 more problems"),
    "old tables": (
        status(tables=TableState("files", True, 3, 2, 500.0, "no server")),
        "not been current for 8 min: no server",
    ),
    "orders": (status(orders_problem="cannot be saved"), "cannot be saved"),
    "allow-list": (status(orders_problem="/s/allow.json: damaged"), "damaged"),
    "many hooks": (status(waiting=300), "300 hooks wait for a worker, of at most 1024"),
    "slow": (
        status(workers=(msgspec.structs.replace(WORKER, in_flight=(InFlight("abc", "handling", 75.0),)),)),
        "message abc",
    ),
    "canary": (
        status(canary=(canary("clean", "caught", ok=False),)),
        "canary: the clean sample was not delivered as expected",
    ),
}


@pytest.mark.parametrize(("given", "what"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_told_with_a_remedy_though_mail_flows(given: Status, what: str) -> None:
    seen = diagnose(given, NOW)
    assert any(what in trouble.what for trouble in seen.troubles)
    assert (seen.ok, seen.flowing) == (False, True)
    assert all(trouble.remedy for trouble in seen.troubles)


@pytest.mark.parametrize(
    "given",
    [
        status(recent=window(5, deferred={"clamd: down": 5})),  # clamd is well again: that is over
        status(recent=window(500, deferred={"quarantine: full": 3})),
        status(waiting=200),
        status(canary=(canary("eicar", "bypassed", ok=False), canary("gtube", "skipped", ok=None))),
        status(workers=(msgspec.structs.replace(WORKER, in_flight=(InFlight("abc", "handling", 5.0),)),)),
        status(backends=(backend(state="unknown"),)),
        status(window=None, recent=None, waiting=None, waiting_limit=None, tables=None),
    ],
)
def test_what_is_over_or_ordinary_is_no_trouble(given: Status) -> None:
    seen = diagnose(given, NOW)
    assert (seen.troubles, seen.ok) == ((), True)
    assert list(lines(given, seen, NOW))


def test_each_trouble_names_a_heading_of_the_runbook() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    troubles = [t for given, *_ in (*CASES.values(), *WRONG.values()) for t in diagnose(given, NOW).troubles]
    slow = status(backends=(backend(state="failing", cause="timeout"),))
    named = {trouble.runbook for trouble in (*troubles, *diagnose(slow, NOW).troubles)}
    assert len(named) > 8
    assert named <= set(headings)


def test_what_the_failure_table_does_is_said_in_words() -> None:
    assert consequence(DEFER) == "mail that needs it is deferred (bounces pass unchecked)"
    assert consequence(PASS) == "mail that needs it passes unchecked"
    assert consequence({"stranger": "defer", "relay": "defer"}) == "mail that needs it is deferred"
    mixed = {"stranger": "defer", "local": "pass", "bounce": "pass"}
    assert consequence(mixed) == "mail of stranger origin is deferred, mail of local, bounce origin passes unchecked"


def test_the_same_is_not_said_twice() -> None:
    given = status(backends=(NO_CLAMD, SPAMD))
    text = [line for _, line in lines(given, diagnose(given, NOW), NOW)]
    assert sum("MAIL IS DEFERRED" in line for line in text) == 1
    assert any(line.startswith("  -> systemctl status clamav-daemon") for line in text)


def test_many_workers_still_fit_on_a_screen() -> None:
    busy = (InFlight("abc", "handling", 1.5),)
    workers = [msgspec.structs.replace(WORKER, slot=slot, pid=slot) for slot in range(200)]
    workers[150] = msgspec.structs.replace(workers[150], open=1, in_flight=busy)
    given = status(workers=tuple(workers), wanted=200)
    text = [line for _, line in lines(given, diagnose(given, NOW), NOW)]
    assert len(text) < 20
    assert any(line.startswith("worker 150 pid 150 ready, 1 in flight: abc handling for 1.6 s") for line in text)
    assert "and 199 more workers" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (0, "0 s"), (119, "119 s"), (240, "4 min"), (7300, "2 h"), (172_800, "2 days")],
)
def test_lengths_have_one_unit(seconds: float, text: str) -> None:
    assert length(seconds) == text


def test_a_self_test_that_failed_is_explained() -> None:
    given = status(backends=(backend(state="failing", cause="bad-reply", detail="did not detect EICAR"),))
    assert "has given invalid answers since" in diagnose(given, NOW).verdict
    assert "(4 min, did not detect EICAR)" in diagnose(given, NOW).verdict
