"""A message that kills workers is isolated after the second death, and no other mail suffers for it."""

import signal
import stat
import sys
from collections.abc import Callable
from os import getuid, kill
from pathlib import Path
from typing import Any

import pytest
from e2e.mails import PLAIN
from e2e.trouble import waiting_in
from lab.peers import Peer, alive, in_turn, read_clamd, says, says_and_stays
from lab.system import System

from contentfilter.bus import messages, sockets

REFUSED = 82
CLEAN = says(b"fd[10]: OK\0")
ONE = b"virus-only@mixed.example"
NOBODY = b"a@elsewhere.example"
HERE = Path(__file__).resolve().parent


@pytest.fixture
def poisoned(make_system) -> Callable[..., System]:
    """A system whose workers die of messages with a line that begins with POISON."""

    def make(**options: Any) -> System:
        service = {"workers": 2, "stuck_after": 5.0}
        settings = {"service": service} | options.pop("settings", {})
        command = [sys.executable, "-P", str(HERE / "poisoned.py")]
        controls = {"options": "clamglobal 1\nchksignature 1\n"}
        options = {"controls": controls, "environ": {"PYTHONPATH": str(HERE)}} | options
        made: System = make_system(settings=settings, command=command, **options)
        return made

    return make


def poison(how: str, received: bytes = b"from a by b; Thu, 1 Jan 1970") -> bytes:
    return b"Received: %b\n\tsomewhere\nSubject: poison\n\nPOISON %b\n" % (received, how.encode())


def status(system: System) -> messages.Status:
    said = sockets.ask(str(system.directory), messages.AskStatus(), 10.0)
    assert isinstance(said, messages.Status)
    return said


@pytest.mark.parametrize("how", ["segfault", "loop", "memory"])
def test_the_third_offer_is_deferred_and_the_workers_live_on(poisoned, how: str) -> None:
    system = poisoned()
    message = poison(how)
    d = system.deliver(message, NOBODY)
    assert (d.status, len(d.queued)) == (REFUSED, 0)
    assert "poison" in d.text
    died = system.daemon.wait_for("worker.died", 2)
    assert {line["status"] for line in died} == {-signal.SIGSEGV if how == "segfault" else -signal.SIGKILL}
    assert [line["deaths"] for line in system.daemon.wait_for("worker.suspect", 2)] == [1, 2]
    (isolated,) = system.daemon.wait_for("poison.isolated")
    assert (isolated["decision"], isolated["level"]) == ("defer", "error")
    kept = Path(isolated["kept"])
    assert kept.read_bytes() == message
    assert [stat.S_IMODE(path.stat().st_mode) for path in (kept, kept.parent)] == [0o600, 0o700]
    (record,) = system.daemon.wait_for("mail.done")
    assert (record["decision"], record["rule"]) == ("defer", "signatures: poison")
    assert status(system).poison == (isolated["fingerprint"],)

    again = system.deliver(poison(how, b"from a by b; a day later, and longer"), NOBODY)  # the client's next try
    assert again.status == REFUSED
    system.daemon.wait_for("poison.isolated", 2)
    assert system.deliver(PLAIN, NOBODY).status == 0
    assert len(system.daemon.log("worker.died")) == 2


def test_a_thread_that_kills_is_found_too(poisoned) -> None:
    system = poisoned(settings={"signatures": {"thread_above": 10}})
    assert system.deliver(poison("segfault"), NOBODY).status == REFUSED
    assert [line["deaths"] for line in system.daemon.wait_for("worker.suspect", 2)] == [1, 2]


def test_messages_that_only_waited_are_not_suspected_and_pass(poisoned, tmp_path: Path) -> None:
    with Peer(tmp_path, alive(in_turn(says_and_stays(b""), CLEAN)), read_clamd) as peer:
        system = poisoned(clamd=peer, settings={"service": {"workers": 1}})
        process, standin = system.start_hook(PLAIN, (ONE,))
        waiting_in(system.daemon, peer)
        assert system.deliver(poison("segfault"), NOBODY).status == REFUSED
        d = system.delivered(process.wait(90), standin)
        assert (d.status, len(d.queued)) == (0, 1)
        (isolated,) = system.daemon.wait_for("poison.isolated")
        suspects = system.daemon.wait_for("worker.suspect", 2)
        assert {line["fingerprint"] for line in suspects} == {isolated["fingerprint"]}


def test_a_worker_that_is_killed_while_all_messages_wait_leaves_no_suspect(poisoned, tmp_path: Path) -> None:
    with Peer(tmp_path, alive(in_turn(says_and_stays(b""), says_and_stays(b""), CLEAN)), read_clamd) as peer:
        system = poisoned(clamd=peer, settings={"service": {"workers": 1}})
        process, standin = system.start_hook(PLAIN, (ONE,))
        for served in (1, 2):
            waiting_in(system.daemon, peer, served)
            kill(system.daemon.workers()[0], signal.SIGKILL)
        assert system.delivered(process.wait(90), standin).status == 0
        assert len(system.daemon.wait_for("worker.died", 2)) == 2
        assert system.daemon.log("worker.suspect") == []


def test_by_policy_it_passes_untouched_and_marked_unchecked(poisoned) -> None:
    system = poisoned(settings={"failure": {"poison": "pass"}})
    message = b"X-ContentFilter: forged\n" + poison("segfault")
    d = system.deliver(message, NOBODY)
    assert d.status == 0
    head, body = d.only.message[: -len(message)], d.only.message[-len(message) :]
    assert body == message  # not a byte of it was looked at
    assert b"virus=unchecked; spam=unchecked\n" in head
    assert [record["rule"][:16] for record in system.daemon.wait_for("mail.done")] == ["passed unchecked"]


def test_a_bounce_that_kills_passes_unchecked_for_a_deferral_would_never_end(poisoned) -> None:
    system = poisoned(settings={"origin": {"smtp_users": [], "bounce_users": [str(getuid())]}})
    message = poison("segfault")
    d = system.deliver(message, NOBODY, sender=b"")
    assert d.status == 0
    assert d.only.message.endswith(message)
    assert b"virus=unchecked" in d.only.message
    (isolated,) = system.daemon.wait_for("poison.isolated")
    assert (isolated["decision"], Path(isolated["kept"]).read_bytes()) == ("queue", message)
    assert len(system.daemon.log("worker.died")) == 2


def test_new_workers_try_it_again(poisoned) -> None:
    system = poisoned()
    assert system.deliver(poison("segfault"), NOBODY).status == REFUSED
    assert isinstance(sockets.ask(str(system.directory), messages.AskReload(restart=True), 30.0), messages.Done)
    assert status(system).poison == ()
    assert system.deliver(poison("segfault"), NOBODY).status == REFUSED
    assert [line["deaths"] for line in system.daemon.wait_for("worker.suspect", 4)] == [1, 2, 1, 2]
