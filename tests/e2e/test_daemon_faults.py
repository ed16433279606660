"""Disk, memory, run directory, supervisor, clock, scanners and clients fail around a daemon: mail goes on or waits."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from e2e.mails import PLAIN, VIRUS
from e2e.trouble import open_files, waiting_in
from lab import standin
from lab.compiler import compiled
from lab.crowd import most_memory
from lab.hook import until
from lab.offer import Offer
from lab.peers import (
    Peer,
    Read,
    Talk,
    alive,
    closes,
    closes_after_question,
    read_clamd,
    read_spamd,
    refuses_descriptor,
    says,
    says_and_stays,
)
from lab.system import System

from contentfilter.bus import messages, sockets
from contentfilter.model import Scanner

TOLD = 82
ONE = b"virus-only@mixed.example"
SPAM_ONLY = b"spam-only@mixed.example"
NOBODY = b"none@elsewhere.example"
MakeSystem = Callable[..., System]


# A disk that is full, or that nobody may write to


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of 2 MB of its own."""
    place.mkdir(exist_ok=True)
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=2m none {place} 2>/dev/null"):
        pytest.skip("cannot mount a small file system here")
    try:
        yield place
    finally:
        os.system(f"umount -l {place}")


def fill(place: Path) -> Path:
    """Not one byte more fits."""
    ballast = place / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    return ballast


def only_entries_are_lost(system: System) -> None:
    """While nothing can be written."""
    for _ in range(3):
        assert system.deliver(PLAIN, ONE).status == 0
        assert len(system.deliver(PLAIN, NOBODY).queued) == 1
    d = system.deliver(VIRUS, ONE)
    assert (d.status, d.text[:1], d.queued) == (TOLD, "Z", ()), "it cannot be kept, so it is not removed"
    system.daemon.wait_for("journal.failed")


def test_a_full_state_directory_costs_entries_and_no_mail(
    make_system: MakeSystem, clamd: Any, lab_directory: Path
) -> None:
    with small_disk(lab_directory / "state-full") as state:
        system = make_system(clamd=clamd, settings={"service": {"state": str(state)}, "clamd": {"action": "remove"}})
        assert system.deliver(PLAIN, ONE).status == 0

        ballast = fill(state)
        only_entries_are_lost(system)
        system.control("clamavclients", "late@elsewhere.example\n")
        system.daemon.reload()
        system.daemon.wait_for("service.reload-failed")
        d = system.deliver(VIRUS, ONE)
        assert (d.status, d.queued) == (TOLD, ()), "the tables in force stay"
        workers = system.daemon.workers()

        ballast.unlink()
        system.daemon.reload()
        system.daemon.wait_for("worker.reload", len(workers))
        d = system.deliver(VIRUS, b"late@elsewhere.example")
        assert (d.status, d.queued) == (0, ())
        assert len(list((state / "quarantine" / "entries").glob("*.eml"))) == 1
        assert system.daemon.workers() == workers
        system.daemon.stop()


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_daemon_starts_on_a_disk_that_takes_nothing(make_system: MakeSystem, lab_directory: Path, fault: str) -> None:
    """With the tables that it had."""
    with small_disk(lab_directory / f"start-{fault}") as state:
        system = make_system(settings={"service": {"state": str(state)}})
        assert system.daemon.stop() == 0
        if fault == "full":
            fill(state)
        else:
            assert os.system(f"mount -o remount,ro {state}") == 0
        system.daemon.start()
        assert len(system.deliver(PLAIN, NOBODY).queued) == 1
        system.daemon.stop()


@pytest.mark.parametrize("error", [errno.EIO, errno.EROFS, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_state_directory_that_takes_nothing_any_more_costs_entries_and_no_mail(
    make_system: MakeSystem, clamd: Any, lab_directory: Path, error: int
) -> None:
    """A disk that breaks, a file system that the kernel makes read-only, a quota that is used up."""
    state, broken = lab_directory / f"state-{error}", lab_directory / f"broken-{error}"
    state.mkdir()
    source = Path(standin.__file__).with_name("refuse.c")
    library = compiled(lab_directory, "refuse.so", ["gcc", "-shared", "-fPIC", "-O1", source, "-ldl"])
    environ = {"LD_PRELOAD": str(library), "REFUSE_UNDER": str(state), "REFUSE_WITH": str(broken)}
    settings = {"service": {"state": str(state)}, "clamd": {"action": "remove"}}
    system = make_system(clamd=clamd, settings=settings, environ=environ)
    assert system.deliver(PLAIN, ONE).status == 0

    broken.write_text(str(error))
    only_entries_are_lost(system)
    workers = system.daemon.workers()

    broken.unlink()
    d = system.deliver(VIRUS, ONE)
    assert (d.status, d.queued) == (0, ())
    assert len(list((state / "quarantine" / "entries").glob("*.eml"))) == 1
    assert system.daemon.workers() == workers


# Memory


def test_a_worker_without_memory_defers_or_is_replaced_and_loses_nothing(make_system: MakeSystem, clamd: Any) -> None:
    system = make_system(clamd=clamd, tracebacks_allowed=True, controls={"options": "chksignature 1\nclamglobal 1\n"})
    assert system.deliver(PLAIN, ONE).status == 0
    (worker,) = system.daemon.workers()
    size = int(Path(f"/proc/{worker}/statm").read_text().split()[0]) * 4096
    endless = resource.prlimit(worker, resource.RLIMIT_AS)[1]
    resource.prlimit(worker, resource.RLIMIT_AS, (size + (4 << 20), endless))
    for message in (PLAIN + b"x" * 30_000_000, PLAIN):
        d = system.deliver(message, ONE, budget=10)
        assert (d.status, d.text[:1]) in ((TOLD, "Z"), (0, "")), d
        assert len(d.queued) == (d.status == 0)
        assert all(b"virus=clean" not in q.message or q.message.endswith(message) for q in d.queued)
    if worker in system.daemon.workers():
        resource.prlimit(worker, resource.RLIMIT_AS, (endless, endless))
    assert system.deliver(PLAIN, ONE).status == 0


# The run directory, and the sockets in it


def test_the_run_directory_is_emptied_and_mail_goes_on(make_system: MakeSystem, lab_directory: Path) -> None:
    """The sockets in it are recreated: workers that start afterwards find the supervisor, and so does ``status``."""
    run = lab_directory / "run-emptied"
    run.mkdir()
    system = make_system(settings={"service": {"run": str(run), "stuck_after": 2.0}})
    shutil.rmtree(run)
    for _ in range(3):
        assert len(system.deliver(PLAIN, NOBODY).queued) == 1
    (line,) = system.daemon.wait_for("bus.mended")
    assert len(line["paths"]) == 3
    os.kill(system.daemon.workers()[0], signal.SIGKILL)
    system.daemon.wait_for("worker.ready", 2)
    began = time.monotonic()
    while time.monotonic() - began < 3.0:
        assert len(system.deliver(PLAIN, NOBODY).queued) == 1
    assert isinstance(sockets.ask(str(run), messages.AskStatus(), 5.0), messages.Status)
    assert system.daemon.log("worker.stuck") == []


def test_a_flood_of_reports_costs_no_mail_and_little_memory(make_system: MakeSystem) -> None:
    """From a process of the daemon's own user: nobody else may write there."""
    system = make_system()
    assert len(system.deliver(PLAIN, NOBODY).queued) == 1
    run = system.daemon.directory
    beat = messages.encode(messages.EventBatch(1, [messages.Event("mail.done", {"id": "x" * 1000})]))
    with zmq.Context() as context, context.socket(zmq.DEALER) as flood:
        flood.linger, flood.sndtimeo = 0, 5000
        flood.connect(sockets.addresses(str(run))["workers"])
        for count in range(60_000):
            flood.send((b"\xff" * 1000, beat)[count % 2])
            if count % 10_000 == 0:
                assert len(system.deliver(PLAIN, NOBODY).queued) == 1
        until(lambda: isinstance(sockets.ask(str(run), messages.AskStatus(), 5.0), messages.Status), "no answer")
    assert system.daemon.log("bus.malformed")
    assert system.daemon.log("worker.stuck") == []
    assert most_memory(system.daemon.pid) < 150e6


def test_the_queue_socket_is_removed_and_the_hook_says_so(make_system: MakeSystem) -> None:
    system = make_system()
    Path(system.daemon.socket).unlink()
    d = system.deliver(PLAIN, NOBODY, budget=1)
    assert (d.status, d.text[:1], d.queued) == (TOLD, "Z", ())
    assert "No such file or directory; is `contentfilter serve` running?" in d.stderr
    system.daemon.stop()
    system.daemon.start()
    assert len(system.deliver(PLAIN, NOBODY).queued) == 1


# The supervisor


def test_a_stopped_supervisor_stops_no_mail(make_system: MakeSystem) -> None:
    system = make_system(settings={"service": {"stuck_after": 2.0}})
    workers = system.daemon.workers()
    system.daemon.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        count = 0
        while time.monotonic() - began < 4.0:  # longer than a worker may be silent
            assert len(system.deliver(PLAIN, NOBODY).queued) == 1
            count += 1
    finally:
        system.daemon.signal(signal.SIGCONT)
    assert count > 5
    assert len(system.daemon.wait_for("mail.done", count)) == count
    assert isinstance(sockets.ask(str(system.directory), messages.AskStatus(), 30.0), messages.Status)
    assert system.daemon.workers() == workers
    assert system.daemon.log("worker.stuck") == []


# The clock

CLOCK = """
import os, time
_time, _ns = time.time, time.time_ns
def _ahead():
    try:
        with open(os.environ["CLOCK_AHEAD"]) as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0
time.time = lambda: _time() + _ahead()
time.time_ns = lambda: _ns() + _ahead() * 1_000_000_000
"""


@pytest.mark.parametrize("ahead", [400 * 86_400, -400 * 86_400], ids=["forward", "back"])
def test_a_clock_that_jumps_ends_no_deadline_and_every_bypass(
    make_system: MakeSystem, tmp_path: Path, ahead: int
) -> None:
    """Forward and back by a year, while a message waits for a scanner."""
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    clock = tmp_path / "ahead"
    environ = {"PYTHONPATH": str(tmp_path), "CLOCK_AHEAD": str(clock)}
    with Peer(
        tmp_path, lambda peer, sock: (says_and_stays(b"")(peer, sock), sock.sendall(b"fd[10]: OK\0")), read_clamd
    ) as peer:
        system = make_system(clamd=peer, environ=environ, settings={"service": {"stuck_after": 2.0}})
        workers = system.daemon.workers()
        process, standin = system.start_hook(PLAIN, (ONE,))
        waiting_in(system.daemon, peer)
        run = str(system.directory)
        ordered = sockets.ask(run, messages.AskBypass(Scanner.SPAMD, 3600.0, "test"), 30.0)
        assert isinstance(ordered, messages.Ordered)
        clock.write_text(str(ahead))
        system.daemon.wait_for("bypass.end")
        assert len(system.deliver(PLAIN, NOBODY).queued) == 1
        assert sockets.ask(run, messages.AskStatus(), 30.0).workers
        peer.over.set()
        d = system.delivered(process.wait(), standin)
        assert (d.status, len(d.queued)) == (0, 1)
        clock.write_text("0")
        assert len(system.deliver(PLAIN, NOBODY).queued) == 1
        assert len(system.daemon.wait_for("mail.done", 3)) == 3
        assert system.daemon.workers() == workers
        assert system.daemon.log("intake.internal-error") == []


# Scanners, through the whole system


def drips_each_second(answer: bytes) -> Talk:
    """One byte a second."""

    def talk(peer: Peer, sock: socket.socket) -> None:
        peer.seen.append(peer.read(sock))
        for position in range(len(answer)):
            sock.sendall(answer[position : position + 1])
            if peer.over.wait(1.0):
                return

    return talk


GOOD = {read_clamd: b"fd[10]: OK\0", read_spamd: b"SPAMD/1.1 0 EX_OK\r\nSpam: False ; 0.0 / 5.0\r\n\r\n"}
DAYS: dict[str, tuple[Callable[[bytes], Talk], str]] = {
    "drips": (drips_each_second, "timeout"),
    "hangs": (lambda good: says_and_stays(b""), "timeout"),
    "says half and hangs": (lambda good: says_and_stays(good[: len(good) // 2]), "timeout"),
    "says half and closes": (lambda good: says(good[: len(good) // 2]), "bad-reply"),
    "closes immediately": (lambda good: closes(), "down"),
    "closes after the question": (lambda good: closes_after_question(), "down"),
}


@pytest.mark.parametrize("day", DAYS)
@pytest.mark.parametrize("read", [read_clamd, read_spamd], ids=["clamd", "spamd"])
def test_a_scanner_on_its_worst_day_costs_its_own_time_and_no_more(
    make_system: MakeSystem, tmp_path: Path, read: Read, day: str
) -> None:
    make, cause = DAYS[day]
    name = "clamd" if read is read_clamd else "spamd"
    with Peer(tmp_path, make(GOOD[read]), read) as peer:
        system = make_system(settings={name: {"backends": [peer.backend], "timeout": 1.5}})
        began = time.monotonic()
        d = system.deliver(PLAIN, ONE if name == "clamd" else SPAM_ONLY)
        spent = time.monotonic() - began
        (record,) = system.daemon.wait_for("mail.done")
        assert spent < 8.0
    if name == "clamd":
        assert (d.status, d.text[:1], d.queued, record["rule"]) == (TOLD, "Z", (), f"clamd: {cause}")
    else:
        assert (d.status, record["rule"]) == (0, "passed unchecked: spamd")
        assert b"spam=unchecked" in d.only.message
        assert d.only.message.endswith(PLAIN)


@pytest.mark.parametrize("second", [b"fd[10]: OK\0", b"fd[10]: Eicar FOUND\0"], ids=["the same", "another"])
def test_a_clamd_that_answers_twice_is_not_believed_where_it_contradicts_itself(
    make_system: MakeSystem, tmp_path: Path, second: bytes
) -> None:
    with Peer(tmp_path, says(b"fd[10]: OK\0" + second), read_clamd) as peer:
        d = make_system(clamd=peer).deliver(PLAIN, ONE)
    assert (d.status, d.text[:1], d.queued) == (TOLD, "Z", ())


def test_a_spamd_that_answers_twice_is_not_believed(make_system: MakeSystem, tmp_path: Path) -> None:
    spam = b"SPAMD/1.1 0 EX_OK\r\nSpam: True ; 9.0 / 5.0\r\n\r\n"
    with Peer(tmp_path, says(GOOD[read_spamd] + spam), read_spamd) as peer:
        d = make_system(spamd=peer).deliver(PLAIN, SPAM_ONLY)
    assert d.status == 0
    assert b"spam=clean" not in d.only.message


def test_where_descriptors_are_refused_the_virus_is_found_in_the_stream(
    make_system: MakeSystem, tmp_path: Path
) -> None:
    """As under AppArmor: the descriptor does not arrive."""
    with Peer(tmp_path, refuses_descriptor(b"stream: Eicar FOUND\0"), read_clamd) as peer:
        d = make_system(clamd=peer).deliver(PLAIN, ONE)
        assert (d.status, d.text[:1], d.queued) == (TOLD, "D", ())
        assert PLAIN in peer.seen[-1]


# Clients that are gone


def test_a_client_that_is_gone_at_any_stage_leaves_nothing_and_queues_nothing(
    make_system: MakeSystem, tmp_path: Path
) -> None:
    with Peer(tmp_path, alive(says_and_stays(b"")), read_clamd) as peer:
        system = make_system(clamd=peer, settings={"reuse": {"late": 2.0}})
        assert len(system.deliver(PLAIN, NOBODY).queued) == 1
        before = open_files(system.daemon)

        # opening: a large message of a stranger's own, gone as soon as it is offered
        for _ in range(5):
            with Offer(system.daemon.socket) as offer:
                offer.send(PLAIN + b"x" * 20_000_000)

        # scanning
        for count in range(1, 4):
            different = b"X-Number: %d\n" % count + PLAIN  # an equal one would wait for the scan that goes on
            process, standin = system.start_hook(different, (ONE,))
            until(lambda: len(peer.seen) >= count, "not asked")  # noqa: B023
            process.kill()
            process.wait()
            assert standin.queued() == []
        system.daemon.wait_for("intake.client-gone", 3)

        # submitting several copies: the daemon waits for the report
        peer.talk = alive(says(b"fd[10]: OK\0"))
        knobs = {"at": "message", "stall": "1"}
        another = b"X-Another: one, which does not wait for the scans that go on\n" + PLAIN
        process, standin = system.start_hook(another, (ONE, b"none@mixed.example"), knobs=knobs)
        until(lambda: len(standin.stalled()) == 2, "not both copies were begun")
        process.kill()
        for pid in standin.stalled():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        assert system.daemon.wait_for("mail.report")[-1]["results"] is None
        assert standin.queued() == []

        until(lambda: open_files(system.daemon) <= before, f"{open_files(system.daemon)} open, {before} before")
        assert len(system.deliver(PLAIN, NOBODY).queued) == 1
