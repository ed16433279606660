"""Break-glass on the whole system: mail flows unchecked while a scanner is bypassed, and not a second longer."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.mails import PLAIN, SPAM, VIRUS, with_program
from e2e.trouble import Load, kill_everything
from lab.clamd import Clamd
from lab.hook import until
from lab.scrape import HTTP, address, get, scrape
from lab.system import System

from contentfilter.bus import messages, sockets

Make = Callable[..., System]
STOPPED = {"clamd": {"backends": ["unix:/nonexistent/clamd.sock"]}}
"""Settings: clamd is down."""
BYPASS = ("bypass", "clamd", "--for", "30m", "--reason", "clamd broke, ticket 7")


def run(system: System, *words: str, status: int = 0, **environ: str) -> str:
    command = [sys.executable, "-P", "-m", "contentfilter", "--config", str(system.daemon.config), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environ}
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def status(system: System) -> messages.Status:
    reply = sockets.ask(str(system.directory), messages.AskStatus(), 30)
    assert isinstance(reply, messages.Status)
    return reply


def audit(system: System) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (system.directory / "state" / "audit.jsonl").read_text().splitlines()]


@pytest.fixture
def own_clamd(lab_directory: Path) -> Iterator[Clamd]:
    with Clamd(lab_directory / "clamd-stopped") as clamd:
        yield clamd


def test_clamd_is_down_and_mail_must_flow(make_system: Make, own_clamd: Clamd) -> None:
    system = make_system(clamd=own_clamd, settings=HTTP)
    assert system.deliver(VIRUS).status == 82
    own_clamd.stop()
    assert system.deliver(PLAIN).text.startswith("Zvirus check not possible now (down)")

    printed = run(system, *BYPASS, SUDO_USER="alice")
    assert printed.startswith("clamd is bypassed for all mail until ")
    passed = system.deliver(PLAIN)
    assert passed.status == 0
    assert b"virus=unchecked" in passed.only.message
    assert passed.only.message.endswith(PLAIN)

    record = system.daemon.wait_for("mail.done", count=3)[2]
    scan = next(s for s in record["scans"] if s["scanner"] == "clamd")
    assert (scan["status"], scan["cause"]) == ("unchecked", "bypassed")
    assert "(says it is alice) until " in scan["detail"]
    assert scan["detail"].endswith(": clamd broke, ticket 7")
    until(lambda: system.records()[2]["id"] in why(system, record["id"]), "the journal has it")
    assert "unchecked, bypassed: by " in why(system, record["id"])
    assert "unchecked, bypassed: by " in explain(system)

    samples = scrape(system.daemon)
    assert samples.value("bypass_active", scanner="clamd") == 1
    assert samples.value("bypass_active", scanner="spamd") == 0
    assert 0 < samples.value("bypass_until_timestamp_seconds", scanner="clamd") - time.time() <= 1800
    assert samples.value("unchecked_total", scanner="clamd", cause="bypassed") == 1
    assert get(address(system.daemon), "/ready")[0] == 200, "a bypass is no reason to send no mail here"
    (listed,) = json.loads(run(system, "bypass", "--json"))["bypasses"]
    assert (listed["scanner"], listed["reason"]) == ("clamd", "clamd broke, ticket 7")
    assert run(system, "bypass").splitlines()[1].startswith("clamd\tall mail\t")
    assert "clamd is bypassed for all mail until " in run(system, "status", status=1)

    assert run(system, "bypass", "end", "all") == "every scanner is in use again\n"
    assert system.deliver(PLAIN).text.startswith("Zvirus check not possible now (down)")
    assert json.loads(run(system, "bypass", "list", "--json"))["bypasses"] == []
    assert run(system, "bypass", "list") == "nothing is bypassed\n"
    assert scrape(system.daemon).value("bypass_active", scanner="clamd") == 0
    assert "no such bypass" in run(system, "bypass", "end", "clamd", status=1)
    assert [(line["event"], line.get("ended", "")[:3]) for line in audit(system)] == [
        ("bypass.begin", ""),
        ("bypass.end", "by "),
    ]


def why(system: System, incident: str) -> str:
    return run(system, "why", incident)


def explain(system: System) -> str:
    path = system.directory / "message.eml"
    path.write_bytes(PLAIN)
    return run(system, "explain", "--recipient", "user@protected.example", str(path))


def test_a_bypass_ends_to_the_second_though_the_supervisor_sleeps(lab_directory: Path) -> None:
    passed = [mail_until_the_end(lab_directory / "ends-0", 4)]
    if not passed[-1]:  # a busy machine took longer than that to start
        passed.append(mail_until_the_end(lab_directory / "ends-1", 40))
    assert passed[-1], "mail has to pass before the end"


def mail_until_the_end(directory: Path, seconds: float) -> int:
    """Number of messages that a bypass of that length passed, the daemon's start included."""
    system = System(directory, controls={"options": "clamglobal 1\n"}, settings=STOPPED)
    end = time.time() + seconds
    order = {"scanner": "clamd", "since": end - 60, "until": end, "reason": "r", "by": "root", "origins": []}
    (system.directory / "state" / "bypass.json").write_text(json.dumps([order]))
    passed = 0
    with system:
        while True:
            before = time.time()
            if system.deliver(PLAIN).status:
                assert time.time() >= end, "deferred while the bypass still held"
                break
            assert before < end, "passed after the end"
            passed += 1
            system.daemon.signal(signal.SIGSTOP)
        system.daemon.signal(signal.SIGCONT)
        assert system.daemon.wait_for("bypass.end")[0]["ended"] == "expired"
        until(lambda: (system.directory / "state" / "bypass.json").read_text() == "[]\n", "the file is clean")
    return passed


def test_a_bypass_survives_a_kill_of_everything(make_system: Make) -> None:
    system = make_system(settings=STOPPED)
    run(system, *BYPASS)
    kill_everything(system.daemon)
    assert "systemctl start contentfilter" in run(system, *BYPASS, status=1), "nobody there: said with a remedy"
    system.daemon.start()
    assert system.daemon.wait_for("bypass.active")[0]["reason"] == "clamd broke, ticket 7"
    assert system.deliver(PLAIN).status == 0
    for pid in system.daemon.workers():
        os.kill(pid, signal.SIGKILL)
    assert system.deliver(PLAIN).status == 0, "a worker that is replaced has it, too"


def test_only_mail_of_the_origin_named_passes(make_system: Make) -> None:
    system = make_system(settings=STOPPED)
    run(system, *BYPASS, "--origin", "authenticated", "--origin", "local")
    assert system.deliver(PLAIN, env={"SMTPAUTHUSER": "joe"}).status == 0
    assert system.deliver(PLAIN).text.startswith("Zvirus check not possible now (down)")
    assert system.deliver(PLAIN, env={"RELAYCLIENT": ""}).status != 0


def test_signatures_means_both_lists_and_nothing_else(make_system: Make, clamd: Clamd) -> None:
    system = make_system(clamd=clamd)
    assert system.deliver(with_program()).status == 82
    run(system, "bypass", "signatures", "--for", "1h", "--reason", "false alarms")
    passed = system.deliver(with_program())
    assert b"virus=unchecked" in passed.only.message
    causes = {s["scanner"]: s.get("cause") for s in system.daemon.wait_for("mail.done", count=2)[1]["scans"]}
    assert causes == {"signatures": "bypassed", "loadertypes": "bypassed", "clamd": None}
    assert system.deliver(VIRUS).status == 82, "clamd is still asked"


def test_spam_passes_unchecked_while_spamd_is_bypassed(make_system: Make, spamd: Any) -> None:
    system = make_system(spamd=spamd, controls={"options": "spamglobal 1\n"})
    assert b"spam=found" in system.deliver(SPAM).only.message
    run(system, "bypass", "spamd", "--for", "1h", "--reason", "it hangs")
    assert b"spam=unchecked" in system.deliver(SPAM).only.message


def test_a_new_bypass_takes_the_place_of_the_old_and_both_are_audited(make_system: Make) -> None:
    system = make_system(settings=STOPPED)
    run(system, *BYPASS)
    run(system, "bypass", "clamd", "--for", "2h", "--reason", "still broken")
    (order,) = status(system).bypasses
    assert order.reason == "still broken"
    assert order.until - order.since == 7200
    lines = [(line["event"], line["reason"], line.get("ended", "").split(" by ")[0]) for line in audit(system)]
    assert lines == [
        ("bypass.begin", "clamd broke, ticket 7", ""),
        ("bypass.end", "clamd broke, ticket 7", "replaced"),
        ("bypass.begin", "still broken", ""),
    ]
    for event in ("bypass.begin", "bypass.end"):
        assert system.daemon.wait_for(event)


def test_a_bad_configuration_stops_no_bypass(make_system: Make) -> None:
    system = make_system(settings=STOPPED)
    system.daemon.write_config(system.daemon.config.read_text() + "[tables]\nrefresh = -1\n")
    system.daemon.reload()
    system.daemon.wait_for("service.reload-failed")
    run(system, *BYPASS)
    assert system.deliver(PLAIN).status == 0


def test_a_damaged_file_bypasses_nothing_and_the_next_order_mends_it(lab_directory: Path) -> None:
    system = System(lab_directory / "damaged", controls={"options": "clamglobal 1\n"}, settings=STOPPED)
    file = system.directory / "state" / "bypass.json"
    forever = {"scanner": "clamd", "since": 0, "until": time.time() + 100, "reason": "r", "by": "x", "origins": []}
    file.write_text(json.dumps([forever]))
    with system:
        assert system.daemon.wait_for("service.problem")[0]["path"] == str(file)
        assert system.deliver(PLAIN).status != 0
        assert "nothing is bypassed" in status(system).orders_problem
        run(system, *BYPASS)
        assert system.deliver(PLAIN).status == 0
        assert status(system).orders_problem == ""


def test_a_disk_that_refuses_does_not_keep_mail_from_flowing(make_system: Make) -> None:
    system = make_system(settings=STOPPED)
    (system.directory / "state" / "bypass.json").mkdir()
    printed = run(system, *BYPASS, status=1)
    assert "a restart forgets" in printed
    assert system.deliver(PLAIN).status == 0
    assert system.daemon.wait_for("orders.not-saved")
    assert status(system).orders_problem


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("bypass", "clamd", "--reason", "r"), "--for"),
        (("bypass", "clamd", "--for", "30m"), "--reason"),
        (("bypass", "clamd", "--for", "30m", "--reason", " "), "needs a reason"),
        (("bypass", "clamd", "--for", "8d", "--reason", "r"), "7 days"),
        (("bypass", "clamd", "--for", "59s", "--reason", "r"), "1 minute"),
        (("bypass", "clamd", "--for", "1h", "--reason", "a\nb"), "printable"),
        (("bypass", "clamd", "--for", "1h", "--reason", "r", "--origin", "mars"), "stranger"),
        (("bypass", "loadertypes", "--for", "1h", "--reason", "r"), "No such command"),
        (("bypass", "end", "mars"), "signatures"),
        (("drain", "--for", "8d"), "7 days"),
    ],
)
def test_wrong_use_is_reported_before_the_daemon_is_asked(system: System, words: tuple[str, ...], said: str) -> None:
    assert said in run(system, *words, status=2)
    assert status(system).bypasses == ()


def test_a_drain_under_load_loses_and_refuses_nothing(make_system: Make) -> None:
    system = make_system(controls={"options": "", "clamavclients": ""}, settings=HTTP | {"service": {"workers": 2}})
    with Load(system) as load:
        load.more()
        printed = run(system, "drain", "--reason", "new disk")
        assert printed.startswith("no mail is accepted until contentfilter resume")
        until(lambda: status(system).waiting == load.senders, "every hook waits in the queue")
        until(lambda: not any(worker.open for worker in status(system).workers), "every heartbeat is newer than that")
        drained = status(system)
        assert (drained.state, drained.drain and drained.drain.reason) == ("drained", "new disk")
        code, text = get(address(system.daemon), "/ready")
        assert (code, text.split(":")[0]) == (503, "draining")
        assert scrape(system.daemon).value("drained") == 1
        assert run(system, "bypass", "list").splitlines()[1].startswith("drained\tall mail\tresume\t")
        came = len(load.results)

        os.kill(system.daemon.workers()[0], signal.SIGKILL)
        system.daemon.wait_for("worker.ready", 3)
        run(system, "reload", "--restart")
        system.daemon.wait_for("worker.ready", 5)
        still = status(system)
        assert (still.waiting, sum(worker.open for worker in still.workers)) == (load.senders, 0)
        assert len(load.results) == came

        assert run(system, "resume") == "mail is accepted again\n"
        load.more()
        assert status(system).state == "ready"
    load.nothing_went_wrong()
    assert "nothing is drained" in run(system, "resume", status=1)


def test_a_restart_ends_a_drain_but_no_bypass(make_system: Make) -> None:
    system = make_system(settings=STOPPED)
    run(system, *BYPASS)
    run(system, "drain")
    hook, standin = system.start_hook(PLAIN)
    until(lambda: status(system).waiting == 1, "the hook waits")
    assert system.daemon.stop() == 0
    system.daemon.start()
    delivered = system.delivered(hook.wait(90), standin)
    assert (delivered.status, len(delivered.queued)) == (0, 1)
    assert status(system).drain is None


def test_a_drain_that_outlasts_the_hooks_budget_defers(make_system: Make) -> None:
    system = make_system()
    run(system, "drain")
    assert system.deliver(PLAIN, budget=1).text == "Zcontent filter not available, try again later (#4.3.0)"
    run(system, "resume")
