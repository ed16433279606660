"""The failure table through the real daemon: causes that scanners give, from every origin, by a table of rules."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.mails import PLAIN
from lab.peers import Peer, read_clamd, says_and_stays
from lab.scripted import scripted
from lab.system import System

from contentfilter.errors import Cause
from contentfilter.model import OriginKind, Scanner
from contentfilter.policy.failure import MEANINGS, failure_action
from contentfilter.settings import FailureSettings, FaultRule, Settings

# Script of a scanner -> the cause that must result.
CLAMD = {
    "gone": Cause.DOWN,
    "too-big": Cause.TOO_BIG,
    "limits": Cause.LIMITS,
    "nonsense": Cause.BAD_REPLY,
    "memory": Cause.MEMORY,
    "reloading": Cause.RELOADING,
    "late": Cause.TIMEOUT,
}
SPAMD = {
    "gone": Cause.DOWN,
    "database": Cause.DOWN,
    "busy": Cause.BUSY,
    "nonsense": Cause.BAD_REPLY,
    "cut": Cause.BAD_REPLY,
    "memory": Cause.MEMORY,
    "late": Cause.TIMEOUT,
}
CASES = [(Scanner.CLAMD, word, cause) for word, cause in CLAMD.items()]
CASES += [(Scanner.SPAMD, word, cause) for word, cause in SPAMD.items()]

# No two origins have the same row, and no scanner has the same action for all causes.
RULES: tuple[dict[str, Any], ...] = (
    {"action": "pass", "scanner": "clamd", "cause": ["down", "memory", "timeout"], "origin": "authenticated"},
    {"action": "pass", "scanner": "clamd", "cause": ["bad-reply", "reloading"], "origin": ["relay", "local"]},
    {"action": "defer", "cause": ["too-big", "limits"], "origin": "stranger"},
    {"action": "defer", "scanner": "spamd", "cause": ["down", "bad-reply"]},
    {"action": "pass", "scanner": "spamd", "cause": "down", "origin": "relay"},
    {"action": "defer", "scanner": "spamd", "cause": ["busy", "timeout", "memory"], "origin": "stranger"},
)
SETTINGS = Settings(
    failure=FailureSettings(
        rule=tuple(
            FaultRule(**{key: tuple(value) if isinstance(value, list) else value for key, value in rule.items()})
            for rule in RULES
        )
    )
)
ENVIRONMENTS = {
    OriginKind.STRANGER: {},
    OriginKind.RELAY: {"RELAYCLIENT": ""},
    OriginKind.AUTHENTICATED: {"SMTPAUTHUSER": "ann"},
    OriginKind.LOCAL: {},
    OriginKind.BOUNCE: {},
}


def toml_rules() -> str:
    lines = []
    for rule in RULES:
        lines.append("[[failure.rule]]")
        lines += [f"{key} = {value!r}".replace("'", '"') for key, value in rule.items()]
    return "\n".join(lines) + "\n"


def users(origin: OriginKind) -> dict[str, list[str]]:
    """Our origin as this daemon sees it."""
    me = [str(os.getuid())]
    return {
        "smtp_users": [] if origin in (OriginKind.LOCAL, OriginKind.BOUNCE) else me,
        "bounce_users": me if origin is OriginKind.BOUNCE else [],
    }


@pytest.fixture(scope="module")
def systems(lab_directory: Path) -> Iterator[dict[OriginKind, System]]:
    """One system for what comes over SMTP, one where we are a local user, one where we are qmail-send."""
    with contextlib.ExitStack() as stack:
        clamd, spamd = stack.enter_context(scripted(lab_directory))
        made: dict[OriginKind, System] = {}
        for origin in (OriginKind.STRANGER, OriginKind.LOCAL, OriginKind.BOUNCE):
            system = System(
                lab_directory / f"table-{origin.value}",
                controls={"options": "clamglobal 1\nspamglobal 1\n"},
                settings={
                    "service": {"workers": 1},
                    "origin": users(origin),
                    "clamd": {"backends": [clamd.backend], "timeout": 0.5},
                    "spamd": {"backends": [spamd.backend], "timeout": 0.5},
                },
                program=made[OriginKind.STRANGER].program if made else None,
            )
            system.daemon.write_config(system.daemon.config.read_text() + toml_rules())
            made[origin] = stack.enter_context(system)
        for origin in (OriginKind.RELAY, OriginKind.AUTHENTICATED):
            made[origin] = made[OriginKind.STRANGER]
        yield made


@pytest.mark.parametrize("origin", OriginKind, ids=lambda o: o.value)
@pytest.mark.parametrize(
    ("scanner", "word", "cause"), CASES, ids=[f"{scanner.value}-{word}" for scanner, word, _ in CASES]
)
def test_each_fault_does_what_its_cell_says(
    systems: dict[OriginKind, System], scanner: Scanner, word: str, cause: Cause, origin: OriginKind
) -> None:
    system = systems[origin]
    assert system.deliver(PLAIN).status == 0  # an answer between two faults: no backend is left alone for a while
    sender = f"{scanner.value}-{word}-{origin.value}@example.net"
    mail = b"X-Test: %s=%s\n" % (scanner.value.encode(), word.encode()) + PLAIN
    d = system.deliver(mail, sender=sender.encode(), env=ENVIRONMENTS[origin])
    (record,) = system.daemon.wait_for("mail.done", where=lambda r: r["sender"] == sender)
    assert record["origin"] == origin.value
    action = failure_action(scanner, cause, origin, SETTINGS)
    if action == "defer":
        assert (d.status, d.queued, record["decision"], record["rule"]) == (
            82,
            (),
            "defer",
            f"{scanner.value}: {cause.value}",
        )
        assert d.text.startswith("Z")
    else:
        assert (d.status, record["decision"], record["rule"]) == (0, "queue", f"passed unchecked: {scanner.value}")
        word = {Scanner.CLAMD: b"virus=unchecked", Scanner.SPAMD: b"spam=unchecked"}[scanner]
        assert word in d.only.message
        assert d.only.message.endswith(mail)


def test_these_cases_cover_every_cause_that_a_daemon_can_give() -> None:
    """Busy clamds and bypasses have tests of their own."""
    covered = {(scanner, cause) for scanner, _, cause in CASES}
    possible = {(s, cause) for cause, meaning in MEANINGS.items() for s in meaning.scanners}
    elsewhere = {(Scanner.CLAMD, Cause.BUSY), *((s, Cause.BYPASSED) for s in Scanner)}
    elsewhere |= {(s, Cause.POISON) for s in Scanner}  # test_poison.py
    elsewhere |= {(s, c) for s in (Scanner.SIGNATURES, Scanner.LOADERTYPES) for c in (Cause.TIMEOUT, Cause.LIMITS)}
    assert covered == possible - elsewhere


def test_no_two_origins_have_the_same_row() -> None:
    """So a daemon that mixed up two of them would fail the test above."""
    rows = {o: tuple(failure_action(s, c, o, SETTINGS) for s, _, c in CASES) for o in OriginKind}
    assert len(set(rows.values())) == len(OriginKind)


# One deadline for all


def test_a_clamd_that_hangs_leaves_spamd_its_time(make_system, tmp_path: Path) -> None:
    """clamd would take a minute, and the whole message has six seconds: spamd is asked all the same."""
    with Peer(tmp_path, says_and_stays(b""), read_clamd) as clamd, scripted(tmp_path) as (_, spamd):
        system = make_system(
            clamd=clamd,
            spamd=spamd,
            controls={"options": "clamglobal 1\nspamglobal 1\n"},
            settings={"service": {"budget": 6.0}, "failure": {"clamd": "pass"}},
        )
        d = system.deliver(b"X-Test: spamd=9/5\n" + PLAIN)
    assert d.status == 0
    assert b"virus=unchecked; spam=found" in d.only.message
