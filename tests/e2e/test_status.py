"""``contentfilter status`` on the real system: what stops, since when, what becomes of mail, and that it is over."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from e2e import mails
from e2e.trouble import waiting_in
from lab.clamd import Clamd
from lab.peers import Peer, read_clamd, says_and_stays
from lab.spamd import Spamd
from lab.system import System

WAIT = 30.0
PROTECTED, VIRUS_ONLY, NOBODY = b"user@protected.example", b"virus-only@mixed.example", b"nobody@elsewhere.example"


def command(system: System, *words: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-P", "-m", "contentfilter", "--config", str(system.daemon.config), *words]
    return subprocess.run(whole, capture_output=True, text=True, timeout=60, check=False)


def status(system: System) -> tuple[int, dict[str, Any]]:
    done = command(system, "status", "--json")
    return done.returncode, json.loads(done.stdout)


def status_until(system: System, true: Callable[[dict[str, Any]], bool], seconds: float = WAIT) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while not true(found := status(system)[1]):
        assert time.monotonic() < end, json.dumps(found, indent=1)
    return found


def backend(found: dict[str, Any], scanner: str) -> dict[str, Any]:
    (one,) = [each for each in found["backends"] if each["scanner"] == scanner]
    return one


def test_all_is_well_and_the_first_line_says_so(make_system: Callable[..., System], clamd: Clamd, spamd: Spamd) -> None:
    system = make_system(clamd=clamd, spamd=spamd)
    first = command(system, "status")
    assert (first.returncode, first.stdout.split(";")[0], first.stderr) == (0, "ready", "")
    system.deliver(mails.PLAIN)
    system.deliver(mails.VIRUS)
    found = status_until(system, lambda s: s["window"]["messages"] == 2)
    assert found["window"]["decisions"] == {"queue": 1, "reject": 1, "defer": 0, "drop": 0}
    done = command(system, "status")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "mail is flowing")
    assert f"clamd {clamd.backend}: healthy" in done.stdout
    assert f"spamd {spamd.backend}: healthy" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_stopped_clamd_is_reported_with_since_and_consequence_and_is_healthy_again_when_it_is_back(
    make_system: Callable[..., System], lab_directory: Path, spamd: Spamd
) -> None:
    directory = lab_directory / f"own{os.getpid()}"
    with Clamd(directory) as own:
        system = make_system(clamd=own, spamd=spamd)
        assert system.deliver(mails.PLAIN).status == 0
        assert status(system)[0] == 0
        own.stop()
        before = time.time()
        assert system.deliver(mails.PLAIN).status != 0
        found = status_until(system, lambda s: not s["flowing"], seconds=5)
        sick = backend(found, "clamd")
        assert (sick["state"], sick["cause"]) == ("failing", "down")
        assert before - 2 < sick["since"] < time.time()
        assert sick["meanwhile"]["stranger"] == "defer"
        assert sick["meanwhile"]["bounce"] == "pass"
        done = command(system, "status")
        first = done.stdout.splitlines()[0]
        assert done.returncode == 1
        assert first.startswith(f"MAIL IS DEFERRED: clamd {own.backend} has been down since ")
        assert "(bounces pass unchecked)" in first
        assert "runbook: clamd is down" in done.stdout
        assert "deferred: 1 by clamd: down" in done.stdout
        printed = backend(status(system)[1], "clamd")["since"]
        assert abs(printed - sick["since"]) < 2  # it does not restart with each look
        own.start()
        well = status_until(system, lambda s: s["ok"], seconds=15)  # no mail is needed for that
        assert (well["verdict"], backend(well, "clamd")["state"]) == ("mail is flowing", "well")
        assert well["window"]["deferred"] == {"clamd: down": 1}
        assert system.deliver(mails.PLAIN).status == 0


def test_a_clamd_that_is_down_is_known_before_the_first_mail_needs_it(make_system: Callable[..., System]) -> None:
    system = make_system(settings={"clamd": {"backends": ["unix:/nonexistent/clamd.ctl"]}})
    code, found = status(system)
    assert (code, found["flowing"]) == (1, False)
    assert backend(found, "clamd")["cause"] == "down"


def test_a_scanner_that_no_recipient_wants_worries_nobody(make_system: Callable[..., System], clamd: Clamd) -> None:
    controls = {"clamavclients": "@protected.example\n", "spamdclients": ""}
    settings = {"spamd": {"backends": ["tcp:127.0.0.1:1"]}}
    system = make_system(controls=controls, settings=settings, clamd=clamd)
    code, found = status(system)
    assert (code, backend(found, "spamd")["state"], found["troubles"]) == (0, "failing", [])
    assert "not used by any recipient" in command(system, "status").stdout


def test_a_stopped_spamd_lets_mail_pass_and_the_verdict_says_unchecked(
    make_system: Callable[..., System], clamd: Clamd
) -> None:
    system = make_system(clamd=clamd, settings={"spamd": {"backends": ["tcp:127.0.0.1:1"]}})
    assert system.deliver(mails.PLAIN).status == 0
    found = status_until(system, lambda s: s["window"]["unchecked"] == {"spamd down": 1})
    assert found["flowing"]
    assert found["verdict"].startswith("mail is flowing UNCHECKED: spamd tcp:127.0.0.1:1 has been down since ")
    assert command(system, "status").returncode == 1


def test_the_oldest_message_and_its_worker_are_shown(make_system: Callable[..., System], tmp_path: Path) -> None:
    with Peer(tmp_path, says_and_stays(b""), read_clamd) as peer:
        system = make_system(clamd=peer)
        process, _ = system.start_hook(mails.PLAIN, (VIRUS_ONLY,))
        waiting_in(system.daemon, peer)
        found = status_until(system, lambda s: s["oldest"] is not None)
        assert (found["oldest"]["stage"], found["oldest"]["worker"]) == ("handling", 0)
        text = command(system, "status").stdout
        assert f"oldest message: {found['oldest']['incident']}, handling for " in text
        assert f"1 in flight: {found['oldest']['incident']}" in text
        process.kill()


def test_hooks_that_wait_for_a_stuck_worker_are_reported(make_system: Callable[..., System]) -> None:
    system = make_system()
    (worker,) = system.daemon.workers()
    os.kill(worker, signal.SIGSTOP)
    try:
        waiting = [system.start_hook(mails.PLAIN, (NOBODY,)) for _ in range(3)]
        status_until(system, lambda s: s["waiting"] == 3)
        assert "3 hooks are waiting" in command(system, "status").stdout
    finally:
        os.kill(worker, signal.SIGCONT)
    assert [system.delivered(process.wait(), standin).status for process, standin in waiting] == [0, 0, 0]


def test_a_configuration_that_is_not_in_force_is_reported(make_system: Callable[..., System]) -> None:
    system = make_system()
    system.daemon.write_config(system.daemon.config.read_text() + "[nonsense]\n")
    system.daemon.reload()
    system.daemon.wait_for("service.reload-failed")
    done = command(system, "status")
    assert done.returncode == 1
    assert "! not in force: " in done.stdout
    assert "runbook: A new configuration is refused" in done.stdout


def test_without_a_daemon_the_remedy_is_shown(make_system: Callable[..., System]) -> None:
    system = make_system()
    assert system.daemon.stop() == 0
    done = command(system, "status")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no daemon answers" in done.stderr
    assert "systemctl start contentfilter" in done.stderr
