"""All kinds of descriptors that block, lie or change: none reaches a worker, and none holds up the mail of others."""

import array
import ctypes
import errno
import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from lab.offer import sealed
from receiver.test_receiver import ENVELOPE, Bench, lingering, rights

from contentfilter.model import Action
from contentfilter.wire import hook

SIZE = 100


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def system_call(number: int, *arguments: Any) -> int:
    """A descriptor from a system call that Python does not offer; skips the test where it is not permitted."""
    fd = ctypes.CDLL(None, use_errno=True).syscall(number, *arguments)
    if fd < 0:
        pytest.skip(os.strerror(ctypes.get_errno()))
    return fd


def fifo(path: Path) -> int:
    os.mkfifo(path / "fifo")
    return os.open(path / "fifo", os.O_RDWR)


def pseudo_terminal(_: Path) -> int:
    ours, theirs = os.openpty()
    os.close(ours)
    return theirs


def epoll_of_itself(_: Path) -> int:
    outer, inner = select.epoll(), select.epoll()
    outer.register(inner.fileno(), select.EPOLLIN)
    fd = os.dup(outer.fileno())
    outer.close()
    inner.close()
    return fd


def io_uring(_: Path) -> int:
    parameters = (ctypes.c_char * 120)()
    return system_call(425, 4, ctypes.byref(parameters))


def nested(_: Path) -> int:
    """A socket whose queue holds a socket whose queue holds a descriptor that blocks when it is closed."""
    innermost, there = lingering()
    held.append(there)
    fd = innermost.detach()
    for _ in range(3):
        outer, inner = socket.socketpair()
        outer.sendmsg([b"."], rights(fd))
        os.close(fd)
        outer.close()
        fd = inner.detach()
    return fd


def own_socket(_: Path) -> int:
    """A socket in its own queue: only the kernel's collector closes it."""
    one, other = socket.socketpair()
    one.sendmsg([b"."], rights(other.fileno()))
    one.close()
    return other.detach()


def path_only(path: Path) -> int:
    (path / "file").write_bytes(b"x" * SIZE)
    return os.open(path / "file", os.O_PATH)


held: list[socket.socket] = []
KINDS: dict[str, Callable[[Path], int]] = {
    "fifo": fifo,
    "pseudo terminal": pseudo_terminal,
    "directory": lambda path: os.open(path, os.O_RDONLY),
    "path only": path_only,
    "eventfd": lambda _: os.eventfd(0),
    "pidfd": lambda _: os.pidfd_open(os.getpid()),
    "epoll of an epoll": epoll_of_itself,
    "io_uring": io_uring,
    "userfaultfd": lambda _: system_call(323, os.O_CLOEXEC),
    "timerfd": lambda _: system_call(283, 1, 0),
    "proc, without a size": lambda _: os.open("/proc/self/status", os.O_RDONLY),
    "proc, memory": lambda _: os.open("/proc/self/mem", os.O_RDONLY),
    "proc, which blocks": lambda _: os.open("/proc/sys/kernel/random/uuid", os.O_RDONLY),
    "sys, which lies about its size": lambda _: os.open("/sys/kernel/mm/transparent_hugepage/enabled", os.O_RDONLY),
    "device": lambda _: os.open("/dev/zero", os.O_RDONLY),
    "nested sockets": nested,
    "a socket in its own queue": own_socket,
}


@pytest.mark.parametrize("place", ["message", "envelope", "surplus"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_descriptor_reaches_a_worker_or_holds_up_others(
    bench: Bench, tmp_path: Path, kind: str, place: str
) -> None:
    bad = KINDS[kind](tmp_path)
    size = os.fstat(bad).st_size or SIZE  # as the file itself says, so that only its kind is wrong
    good, envelope = sealed(b"x" * SIZE), sealed(ENVELOPE)
    fds = {"message": (bad, envelope), "envelope": (good, bad), "surplus": (good, envelope, bad)}[place]
    sizes = {"message": (size, len(ENVELOPE)), "envelope": (SIZE, size), "surplus": (SIZE, len(ENVELOPE))}[place]
    ours = bench.connect()
    packet = hook.encode_request(hook.Request(0, 60.0, *sizes, {}))
    try:
        ours.sendmsg([packet], rights(*fds))
    except OSError as error:
        if (kind, error.errno) != ("io_uring", errno.EINVAL):  # kernels from 6.7 on pass none at all
            raise
        ours.close()
    for fd in {bad, good, envelope}:
        os.close(fd)
    assert bench.honest() < 5.0
    if "socket" not in kind and ours.fileno() >= 0:
        said = ours.recv(hook.PACKET_MAX)
        assert not said or hook.decode_answer(said).action is Action.DEFER
    while held:
        held.pop().close()


def test_a_whole_family_of_descriptors_in_one_packet_is_closed(bench: Bench) -> None:
    with ExitStack() as stack:
        fds = []
        for _ in range(250):  # SCM_MAX_FD is 253
            one, other = stack.enter_context(socket.socket()), sealed(b"x")
            stack.callback(os.close, other)
            fds += [one.fileno(), other]
        ours = bench.connect()
        numbers = array.array("i", fds[:250])
        ours.sendmsg(
            [hook.encode_request(hook.Request(0, 60.0, 1, 1, {}))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)]
        )
        assert ours.recv(10) == b""
    assert bench.honest() < 5.0


def test_half_a_request_and_a_slow_one_end_in_time_and_hold_up_nobody(bench: Bench) -> None:
    packet = hook.encode_request(hook.Request(0, 60.0, SIZE, len(ENVELOPE), {b"A": b"b"}))
    half, slow = bench.connect(), bench.connect()
    half.send(packet[: len(packet) // 2])
    assert half.recv(10) == b""
    assert bench.honest() < 5.0
    assert slow.recv(10) == b"", "without a request it is closed after five seconds"


def test_a_user_that_never_reports_holds_its_own_connections_only(bench: Bench) -> None:
    waiting = []
    for _ in range(8):
        ours = bench.offer()
        connection, *_ = bench.accept()
        connection.send(hook.encode_answer(hook.Answer(Action.DROP)).packet)
        assert hook.decode_answer(ours.recv(hook.PACKET_MAX)).action is Action.DROP
        waiting.append((ours, connection))
    assert bench.honest() < 5.0
    for ours, connection in waiting:
        ours.close()
        assert connection.recv(10) == b""


def test_what_can_never_be_taken_over_is_deferred_with_the_reason(bench: Bench) -> None:
    for sizes, why in (((2 << 30, len(ENVELOPE)), "message of"), ((SIZE, 200 << 20), "envelope of"), ((SIZE, 5), "24")):
        message, envelope = sealed(b"x" * SIZE), sealed(b"Fa@b.example\0Ta@b.e\0\0\0\0\0")
        ours = bench.connect()
        ours.sendmsg([hook.encode_request(hook.Request(0, 60.0, *sizes, {}))], rights(message, envelope))
        os.close(message)
        os.close(envelope)
        answer = hook.decode_answer(ours.recv(hook.PACKET_MAX))
        assert answer.action is Action.DEFER
        assert why in answer.text
    assert not select.select([bench.worker], [], [], 0.2)[0]
