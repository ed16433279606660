"""Every edge of clamd that was measured, with its outcome. Real clamds; scripted peers only where those cannot.

Further ones are in test_clamd.py: not running, hanging, killed or ended, cut off, dripping, answering twice, a full
listen queue, descriptors open for writing only, StreamMaxLength, limits told as findings.
"""

import asyncio
import contextlib
import hashlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import clamd as clamd_package
import pytest
from lab import peers
from lab.clamd import EICAR, Clamd
from lab.peers import Peer, read_clamd
from lab.process import ask
from scanners.test_clamd import LETTER, PADDING, fault, scan, scanner

from contentfilter import settings
from contentfilter.deadline import Deadline
from contentfilter.errors import BackendError, Cause, LocalProtocolError
from contentfilter.model import Message, ScanOutcome, ScanStatus
from contentfilter.scanners.clamd import ClamdScanner
from contentfilter.wire import clamd as wire

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("nothing_left")]

LARGE = LETTER + PADDING * 380 + EICAR  # 24 MB, and the virus at the end: a scan that takes a while
WAYS = pytest.mark.parametrize("over", ["backend", "tcp_backend"], ids=["FILDES", "INSTREAM"])


@contextlib.contextmanager
def running(directory: Path, *extra: str) -> Iterator[Clamd]:
    with Clamd(directory, *extra) as own:
        yield own


async def at_work(own: Clamd, task: "asyncio.Task[ScanOutcome]", command: str) -> None:
    """Return when clamd says that it scans."""
    while not task.done():
        if command in await asyncio.to_thread(clamd_package.ClamdUnixSocket(own.socket).stats):
            return
    raise AssertionError("the scan was over before clamd could be disturbed")


async def stopped(pid: int) -> None:
    """Return when no thread of it runs any more: the signal does not wait for that."""
    end = time.monotonic() + 20
    tasks = list(Path(f"/proc/{pid}/task").glob("*/stat"))
    while any(task.read_text().rpartition(")")[2].split()[0] != "T" for task in tasks):
        assert time.monotonic() < end
        await asyncio.sleep(0.002)


# ---------------------------------------------------------------- ended while it scans


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["KILL", "TERM"])
@WAYS
async def test_a_virus_is_never_clean_because_clamd_ends_while_it_scans(
    lab_directory: Path, message, over: str, number: signal.Signals
) -> None:
    """With SCAN a clamd that is told to end answers OK; that is why peers let EICAR pass at each restart."""
    with running(lab_directory / f"end-{over[0]}{number}") as own:
        task = asyncio.create_task(scan(getattr(own, over), message(LARGE), 60.0))
        await at_work(own, task, "FILDES" if over == "backend" else "INSTREAM")
        os.kill(own.pid, number)
        (said,) = await asyncio.gather(task, return_exceptions=True)
    ended = isinstance(said, BackendError) and said.cause is Cause.DOWN
    assert ended or (number is signal.SIGTERM and getattr(said, "status", None) is ScanStatus.FOUND), said


@pytest.mark.parametrize("name", ["SCAN", "CONTSCAN", "MULTISCAN", "ALLMATCHSCAN", "IDSESSION", "STREAM", "SHUTDOWN"])
async def test_commands_that_lie_or_stall_are_never_given(name: str) -> None:
    """The path commands answer OK when clamd ends; a session stalls for good with 400 questions in it."""
    with pytest.raises(LocalProtocolError):
        wire.command(name)


# ---------------------------------------------------------------- limits and descriptors


async def test_above_max_file_size_clamd_says_ok_and_we_never_do(lab_directory: Path, message) -> None:
    with running(lab_directory / "blind", "MaxFileSize 1M") as blind:
        trap = await scan(blind.backend, message(PADDING * 20 + EICAR), max_size=0)
        assert trap.status is ScanStatus.CLEAN, "this clamd has no such trap any more"
        error = await fault(blind.backend, message(PADDING * 20 + EICAR), max_size=1 << 20)
        assert error.cause is Cause.TOO_BIG


async def test_where_the_descriptor_stands_makes_no_difference(clamd: Clamd, message) -> None:
    infected = message(LETTER + EICAR)
    os.lseek(infected.fd, 0, os.SEEK_END)
    assert (await scan(clamd.backend, infected)).status is ScanStatus.FOUND


async def test_what_is_no_regular_file_is_streamed(clamd: Clamd, message) -> None:
    infected = message(LETTER + EICAR)
    end, other = os.pipe()
    os.dup2(end, infected.fd)
    os.close(end)
    os.close(other)
    assert (await scan(clamd.backend, infected)).status is ScanStatus.FOUND


# ---------------------------------------------------------------- slow, busy, reloading


async def test_a_full_listen_queue_of_a_stopped_clamd_is_waited_for(lab_directory: Path, message) -> None:
    with running(lab_directory / "queue", "MaxConnectionQueueLength 2") as own:
        own.signal(signal.SIGSTOP)
        await stopped(own.pid)
        taken = peers.fill_listen_queue(own.socket)
        try:
            assert (await fault(own.backend, message(EICAR), 0.2)).cause is Cause.BUSY
            task = asyncio.create_task(scan(own.backend, message(EICAR), 20.0))
            await asyncio.sleep(0)
            assert not task.done()
        finally:
            for sock in taken:
                sock.close()
        own.signal(signal.SIGCONT)
        assert (await task).status is ScanStatus.FOUND


async def test_a_clamd_that_tires_of_waiting_says_timeout(lab_directory: Path) -> None:
    """The answer of the real one to a client that says nothing, read as it comes: it ends with LF, not NUL."""
    with running(lab_directory / "tired", "CommandReadTimeout 1") as own:
        said = await asyncio.to_thread(ask, own.socket, b"", 20.0)
    answer = wire.scan_reader().feed(said)
    assert isinstance(answer, wire.Failed)
    assert answer.cause is Cause.TIMEOUT


def _write_signatures(path: Path) -> None:
    bodies = (hashlib.sha256(b"%d" % number).hexdigest() for number in range(60_000))
    path.write_text("".join(f"Lab.{body[:8]}:0:*:{body[:20]}??{body[20:60]}\n" for body in bodies))


@pytest.mark.parametrize("concurrent", ["yes", "no"])
async def test_while_the_database_is_loaded_anew_viruses_are_found(
    lab_directory: Path, message, concurrent: str
) -> None:
    """clamd says nothing of it: it goes on with the old database, or lets everybody wait."""
    directory = lab_directory / f"reload-{concurrent}"
    database = directory / "database"
    database.mkdir(parents=True)
    await asyncio.to_thread(_write_signatures, database / "big.ndb")
    with running(directory, f"ConcurrentDatabaseReload {concurrent}") as own:
        assert ask(own.socket, b"zRELOAD\0") == b"RELOADING\0"
        one = scanner(own.backend)
        reloaded, times = False, 0
        while not reloaded or times < 10:
            reloaded = "Database correctly reloaded" in own.log.read_text("latin-1")
            infected, clean = await asyncio.gather(
                one.scan(message(LETTER + b"%d" % times + EICAR), Deadline.after(30)),
                one.scan(message(LETTER + b"%d" % times), Deadline.after(30)),
            )
            assert (infected.status, clean.status) == (ScanStatus.FOUND, ScanStatus.CLEAN)
            times += 1


async def test_a_clamd_that_says_that_it_reloads_is_reloading(tmp_path: Path, message) -> None:
    with Peer(tmp_path, peers.says(b"stream: Database reloading ERROR\0"), read_clamd) as peer:
        assert (await fault(peer.backend, message(LETTER))).cause is Cause.RELOADING


# ---------------------------------------------------------------- out of room


def limit(own: Clamd, what: str) -> None:
    """prlimit(1) on the running clamd; as its own user, because root may lack the right."""
    status = os.stat(f"/proc/{own.pid}")
    who = {"user": status.st_uid, "group": status.st_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    subprocess.run(["prlimit", "--pid", str(own.pid), what], check=True, **who)


async def test_a_clamd_without_memory_says_so(lab_directory: Path, message) -> None:
    with running(lab_directory / "memory") as own:
        assert (await scan(own.backend, message(LETTER))).status is ScanStatus.CLEAN
        used = int(Path(f"/proc/{own.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        limit(own, f"--as={used + (4 << 20)}:")
        error = await fault(own.backend, message(LARGE), 20.0)
        assert error.cause is Cause.MEMORY, error
        limit(own, "--as=unlimited:")
        assert (await scan(own.backend, message(LARGE), 60.0)).status is ScanStatus.FOUND


async def test_without_its_directory_for_temporary_files_a_streamed_message_is_never_clean(
    lab_directory: Path, message
) -> None:
    with running(lab_directory / "untidy") as own:
        shutil.rmtree(own.directory / "tmp")
        for content in (LETTER, LETTER + EICAR):
            assert (await fault(own.tcp_backend, message(content))).cause is Cause.DOWN
        (own.directory / "tmp").mkdir(mode=0o777)
        (own.directory / "tmp").chmod(0o777)
        assert (await scan(own.tcp_backend, message(LETTER + EICAR))).status is ScanStatus.FOUND


# ---------------------------------------------------------------- a clamd that says OK to everything


async def test_a_clamd_that_cannot_write_temporary_files_finds_nothing_and_is_not_believed(
    lab_directory: Path, message
) -> None:
    """Given a descriptor, it answers OK to EICAR itself."""
    with running(lab_directory / "blindly") as own:
        now = 0.0
        one = scanner(own.backend, proof=10.0)
        timed = ClamdScanner(settings.ClamdSettings(backends=(own.backend,)), clock=lambda: now)
        assert (await timed.scan(message(LETTER), Deadline.after(5))).status is ScanStatus.CLEAN
        shutil.rmtree(own.directory / "tmp")
        trap = await scan(own.backend, message(EICAR))
        assert trap.status is ScanStatus.CLEAN, "this clamd has no such trap any more"
        for content in (EICAR, LETTER + EICAR, LETTER):
            with pytest.raises(BackendError, match="does not find the test virus") as caught:
                await scanner(own.backend, proof=10.0).scan(message(content), Deadline.after(5))
            assert caught.value.cause is Cause.BAD_REPLY
        now += 10.0  # the first proof has run out
        with pytest.raises(BackendError, match="does not find the test virus"):
            await timed.scan(message(LETTER), Deadline.after(5))
        (own.directory / "tmp").mkdir(mode=0o777)
        (own.directory / "tmp").chmod(0o777)
        assert (await one.scan(message(LETTER), Deadline.after(5))).status is ScanStatus.CLEAN
        assert (await one.scan(message(LETTER + EICAR), Deadline.after(5))).status is ScanStatus.FOUND


def finds_eicar(peer: Peer, sock: socket.socket) -> None:
    """A clamd that counts the test viruses among what it is given."""
    data, fds, _, _ = socket.recv_fds(sock, 4096, 4)
    try:
        infected = os.pread(fds[0], 100, 0) == EICAR
    finally:
        os.close(fds[0])
    if infected:
        peer.seen.append(data)
    sock.sendall(b"fd[9]: Eicar FOUND\0" if infected else b"fd[9]: OK\0")


async def test_one_proof_serves_all_messages_of_its_time(tmp_path: Path, message) -> None:
    now = 0.0
    with Peer(tmp_path, finds_eicar, read_clamd, backlog=64) as peer:
        one = ClamdScanner(settings.ClamdSettings(backends=(peer.backend,)), clock=lambda: now)
        for proofs in (1, 2):
            scans = [one.scan(message(LETTER + b"%d" % number), Deadline.after(20)) for number in range(30)]
            assert {outcome.status for outcome in await asyncio.gather(*scans)} == {ScanStatus.CLEAN}
            assert len(peer.seen) == proofs
            now += 10.0
        assert (await one.scan(message(EICAR), Deadline.after(20))).status is ScanStatus.FOUND
        assert len(peer.seen) == 3, "what is found needs no proof"


async def test_a_clamd_that_hangs_over_the_proof_is_a_timeout(tmp_path: Path, message) -> None:
    talk = peers.in_turn(peers.says(b"fd[5]: OK\0"), peers.says_and_stays(b""))
    with Peer(tmp_path, talk, read_clamd) as peer:
        error = await fault(peer.backend, message(LETTER), 0.5, proof=10.0)
    assert error.cause is Cause.TIMEOUT


# ---------------------------------------------------------------- how long a try may take


def stalls_after_refusal(peer: Peer, sock: socket.socket) -> None:
    """Takes no descriptor, and is silent when the bytes come."""
    if peer.read(sock).startswith(b"zFILDES"):
        sock.sendall(b"No file descriptor received. ERROR\0")
    else:
        peer.over.wait(peers.WAIT)


async def took(backend: str, asked: Message, **changes: object) -> float:
    started = time.monotonic()
    assert (await fault(backend, asked, 20.0, **changes)).cause is Cause.TIMEOUT
    return time.monotonic() - started


async def test_a_small_message_is_given_up_sooner_than_a_large_one(tmp_path: Path, message) -> None:
    patience = {"timeout_base": 0.1, "timeout_per_megabyte": 0.4}
    with Peer(tmp_path, peers.says_and_stays(b""), read_clamd) as peer:
        small = await took(peer.backend, message(LETTER), **patience)
        large = await took(peer.backend, message(bytes(1_000_000)), **patience)
        capped = await took(peer.backend, message(bytes(4_000_000)), timeout=0.3, **patience)
    assert 0.1 <= small < 0.5 <= large
    assert 0.3 <= capped < 1.7


async def test_a_refused_descriptor_and_the_stream_after_it_are_one_try(tmp_path: Path, message) -> None:
    with Peer(tmp_path, stalls_after_refusal, read_clamd) as peer:
        assert 0.3 <= await took(peer.backend, message(LETTER), timeout_base=0.3) < 2.0


async def test_after_a_clamd_that_hangs_there_is_time_for_another_one(tmp_path: Path, clamd: Clamd, message) -> None:
    with Peer(tmp_path, peers.says_and_stays(b""), read_clamd) as peer:
        one = scanner(peer.backend, clamd.backend, timeout_base=0.2)
        outcome = await one.scan(message(LETTER + EICAR), Deadline.after(20))
    assert (outcome.status, outcome.backend, peer.connections) == (ScanStatus.FOUND, clamd.backend, 1)
    assert outcome.seconds >= 0.2, "what the first one took counts"
