"""The listening socket and the accept loop: the socket is never stolen, and the loop neither spins nor overfills."""

import asyncio
import errno
import os
import resource
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab.offer import Offer, offer

from contentfilter.deadline import Deadline
from contentfilter.doors import listener as module
from contentfilter.doors import listening_socket
from contentfilter.doors.admission import AcceptedMessage
from contentfilter.doors.listening_socket import SocketError, hold_lock, inherited_socket, open_socket
from contentfilter.model import Action
from contentfilter.wire import hook

Listening = Callable[..., Any]
QUEUE = hook.Answer(Action.QUEUE, submissions=(hook.Submission(),))


def test_a_dead_sockets_path_is_taken_over_with_the_wanted_mode(tmp_path: Path) -> None:
    path = str(tmp_path / "q")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(path)
    own = open_socket(path, 0o620, 8)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o620
    Offer(path).close()
    own.close()
    assert not os.path.exists(path)


def test_a_live_socket_is_not_stolen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening_socket, "ORPHANS", 0.1)
    path = str(tmp_path / "q")
    own = open_socket(path, 0o600, 8)
    inode = os.stat(path).st_ino
    with pytest.raises(SocketError, match="another process listens there"):
        open_socket(path, 0o600, 8)
    assert os.stat(path).st_ino == inode
    own.close()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "q").write_text("precious")
    with pytest.raises(SocketError, match="not a socket"):
        open_socket(str(tmp_path / "q"), 0o600, 8)
    assert (tmp_path / "q").read_text() == "precious"


@pytest.mark.parametrize("path", ["missing/q", "x" * 200])
def test_a_path_that_cannot_be_is_a_clear_error(path: str, tmp_path: Path) -> None:
    with pytest.raises(SocketError, match=path[:10]):
        open_socket(str(tmp_path / path), 0o600, 8)


def test_closing_leaves_a_successors_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "q")
    own = open_socket(path, 0o600, 8)
    os.rename(path, path + ".old")
    successor = open_socket(path, 0o600, 8)
    own.close()
    assert os.path.exists(path)
    successor.close()


def test_the_lock_is_held_by_one(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    lock = hold_lock(path)
    with pytest.raises(SocketError, match="another contentfilter is running"):
        hold_lock(path)
    os.close(lock)
    os.close(hold_lock(path))


@pytest.mark.parametrize(
    "make",
    [
        lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
        lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    ],
    ids=["stream", "not listening", "internet"],
)
def test_an_unsuitable_inherited_socket_is_refused(make: Callable[[], socket.socket]) -> None:
    with make() as unsuitable, pytest.raises(SocketError, match="ListenSequentialPacket="):
        inherited_socket(unsuitable.fileno())


def test_an_inherited_descriptor_that_is_no_socket_is_refused(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(SocketError, match="not a socket"):
        inherited_socket(fd)
    os.close(fd)


@pytest.mark.asyncio
async def test_no_more_than_may_be_in_flight_are_accepted_and_the_others_wait(listening: Listening) -> None:
    go = asyncio.Event()
    most = 0

    async def wait(accepted: AcceptedMessage) -> hook.Answer:
        nonlocal most
        most = max(most, len(bench.listener.connections))
        await go.wait()
        return QUEUE

    async with listening(wait, max_in_flight=3, max_waiting=0) as bench:
        offers = [Offer(bench.path).send() for _ in range(10)]
        async with asyncio.timeout(10):
            while len(bench.listener.connections) < 3:
                await asyncio.sleep(0)
        assert bench.listener.counters.accepted == 3
        go.set()
        answers = await asyncio.gather(*(asyncio.to_thread(o.answer) for o in offers))
        for each in offers:
            each.close()
    assert answers == [QUEUE] * 10
    assert most == 3


@pytest.mark.asyncio
async def test_a_worker_that_is_woken_while_full_hands_the_connection_on(listening: Listening) -> None:
    """It was woken alone. The hook that is shed comes again, and finds a worker that listens."""
    go = asyncio.Event()

    async def wait(accepted: AcceptedMessage) -> hook.Answer:
        await go.wait()
        return QUEUE

    async with listening(wait, max_in_flight=1, max_waiting=0) as bench:
        with Offer(bench.path) as first:
            async with asyncio.timeout(10):
                while bench.listener.counters.accepted < 1:
                    await asyncio.sleep(0)
                first.send()  # on a connection that is open already: the worker becomes full, and still listens
                while {c.stage.value for c in bench.listener.connections} != {"handling"}:
                    await asyncio.sleep(0)
                assert bench.listener._accepting
                with Offer(bench.path) as late:
                    late.send()
                    assert await asyncio.to_thread(late.answer) is None
            assert bench.listener.counters.crowded == 1
            assert not bench.listener._accepting, "further connections wake other workers"
            with Offer(bench.path) as other:
                other.send()
                go.set()
                assert await asyncio.to_thread(first.answer) == QUEUE
                assert await asyncio.to_thread(other.answer) == QUEUE


@pytest.mark.asyncio
async def test_without_free_descriptors_accepting_pauses_and_recovers(listening: Listening) -> None:
    async def accept(accepted: AcceptedMessage) -> hook.Answer:
        return QUEUE

    async with listening(accept) as bench:
        first = await asyncio.to_thread(offer, bench.path)  # threads and imports are there now
        assert first == QUEUE
        pending = Offer(bench.path).send()
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        # The loop has not run since the connection was made: it meets the limit first.
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
        turns = 0
        began = time.monotonic()
        try:
            async with asyncio.timeout(10):
                while not bench.listener._pause:
                    await asyncio.sleep(0)
                while bench.listener._pause:
                    turns += 1
                    await asyncio.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert await asyncio.to_thread(pending.answer) == QUEUE
        pending.close()
        assert bench.log("intake.accept-failed")[0]["why"] == "Too many open files"
        assert turns > 3
        assert bench.listener._failure_log._held <= (time.monotonic() - began) / module.PAUSE, "it must pause, not spin"


class Refusing:
    """A listening socket whose accept fails a number of times, as when the machine has no descriptors left."""

    def __init__(self, true: Any, error: int, times: int) -> None:
        self._true, self._error, self.times = true, error, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._true, name)

    def accept(self) -> Any:
        if self.times:
            self.times -= 1
            raise OSError(self._error, os.strerror(self._error))
        return self._true.accept()


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [errno.ENFILE, errno.ENOMEM, errno.ENOBUFS], ids=errno.errorcode.get)
async def test_where_the_machine_has_no_descriptors_accepting_pauses_and_recovers(
    listening: Listening, error: int
) -> None:
    async def accept(accepted: AcceptedMessage) -> hook.Answer:
        return QUEUE

    async with listening(accept) as bench:
        bench.listener._socket = refusing = Refusing(bench.listener._socket, error, 2)
        began = time.monotonic()
        assert await asyncio.to_thread(offer, bench.path) == QUEUE
        assert refusing.times == 0
        assert time.monotonic() - began >= 2 * module.PAUSE
        assert bench.log("intake.accept-failed")[0]["why"] == os.strerror(error)


@pytest.mark.asyncio
async def test_a_stopped_listener_finishes_what_it_has_and_takes_no_more(listening: Listening) -> None:
    go = asyncio.Event()

    async def wait(accepted: AcceptedMessage) -> hook.Answer:
        await go.wait()
        return QUEUE

    async with listening(wait) as bench:
        with Offer(bench.path) as under_way, Offer(bench.path) as later:
            under_way.send()
            async with asyncio.timeout(10):
                while len(bench.listener.connections) < 2:
                    await asyncio.sleep(0)
            bench.listener.stop()
            later.send()
            with Offer(bench.path) as too_late:
                too_late.send()
                go.set()
                assert await asyncio.to_thread(under_way.answer) == QUEUE
                assert await asyncio.to_thread(later.answer) == QUEUE
        await bench.idle()
        assert bench.listener.counters.accepted == 2


@pytest.mark.asyncio
async def test_aborted_connections_close_without_an_answer(listening: Listening) -> None:
    async def wait(accepted: AcceptedMessage) -> hook.Answer:
        await asyncio.Event().wait()
        return QUEUE

    async with listening(wait) as bench:
        silent, busy = Offer(bench.path), Offer(bench.path).send()
        async with asyncio.timeout(10):
            while len(bench.listener.connections) < 2:
                await asyncio.sleep(0)
        with Offer(bench.path) as just_now:
            just_now.send()
            bench.listener._accept()  # its handling has not had its first step when the abort comes
            await bench.listener.abort("test", Deadline.after(5))
            for each in (silent, busy, just_now):
                assert await asyncio.to_thread(each.answer) is None
        silent.close()
        busy.close()
        assert not bench.listener.connections
