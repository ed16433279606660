"""The receiver process beside a worker that the test plays: what gets through, and what hurts only its sender."""

import itertools
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from lab.descriptors import lingering, nested, rights
from lab.offer import sealed

from contentfilter.doors.handover import CLOSED, GIVEN, KEY
from contentfilter.doors.origin import PEER
from contentfilter.model import Action
from contentfilter.wire import hook

MAIL, ENVELOPE = b"Subject: x\n\nhello\n", b"Fa@b.example\0Tc@d.example\0\0"
WAIT = 20.0


def readable(each: socket.socket) -> bool:
    poll = select.poll()
    poll.register(each, select.POLLIN)
    return bool(poll.poll(0))


class Bench:
    """A receiver process, the workers' socket, and hooks."""

    def __init__(self, directory: Path) -> None:
        self._open: list[socket.socket] = []
        self._numbers = itertools.count()
        self.queue = str(directory / "queue.sock")
        self.worker = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.worker.bind(self.queue)
        self.worker.listen(64)
        self.worker.settimeout(WAIT)
        self._handover, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reader, self._lifeline = os.pipe()
        self.reports, writer = os.pipe()
        words = ["--queue", self.queue, "--spool", str(directory), f"--handover={theirs.fileno()}"]
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "contentfilter.receiver",
                *words,
                f"--lifeline={reader}",
                f"--report={writer}",
            ],
            pass_fds=(theirs.fileno(), reader, writer),
        )
        theirs.close()
        os.close(reader)
        os.close(writer)

    def connect(self) -> socket.socket:
        """A hook's connection that a worker has handed over."""
        ours, accepted = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.closed(self.give(accepted))
        ours.settimeout(WAIT)
        self._open.append(ours)
        return ours

    def give(self, accepted: socket.socket, pid: int = 0) -> bytes:
        """The first half of a worker's handing over; the key of the batch."""
        key = KEY.pack(pid or os.getpid(), next(self._numbers))
        socket.send_fds(self._handover, [GIVEN + key], [accepted.fileno()])
        accepted.close()
        return key

    def closed(self, key: bytes) -> None:
        self._handover.send(CLOSED + key)

    def offer(self, message: bytes = MAIL, envelope: bytes = ENVELOPE) -> socket.socket:
        ours = self.connect()
        packet = hook.encode_request(hook.Request(0, 60.0, len(message), len(envelope), {b"PROTO": b"TCP"}))
        first, second = sealed(message), sealed(envelope)
        ours.sendmsg([packet], rights(first, second))
        os.close(first)
        os.close(second)
        return ours

    def accept(self) -> tuple[socket.socket, hook.Request, bytes, bytes]:
        """What a worker gets: the connection, the request, message and envelope."""
        connection, _ = self.worker.accept()
        self._open.append(connection)
        connection.settimeout(WAIT)
        packet, fds, _, _ = socket.recv_fds(connection, hook.REQUEST_MAX, 4)
        request = hook.decode_request(packet)
        message, envelope = (os.pread(fd, size, 0) for fd, size in zip(fds, (10_000_000, 10_000_000), strict=True))
        for fd in fds:
            os.close(fd)
        return connection, request, message, envelope

    def honest(self) -> float:
        """Seconds that an honest message takes to its answer."""
        began = time.monotonic()
        ours = None
        while not select.select([self.worker], [], [], 0.05)[0]:
            assert time.monotonic() < began + WAIT
            if ours is None or select.select([ours], [], [], 0)[0]:  # refused: offered again, as the hook does
                with suppress(BrokenPipeError):
                    ours = self.offer()
        assert ours is not None
        connection, *_ = self.accept()
        connection.send(hook.encode_answer(hook.Answer(Action.DROP)).packet)
        connection.close()
        assert hook.decode_answer(ours.recv(hook.PACKET_MAX)).action is Action.DROP
        ours.close()
        return time.monotonic() - began

    def close(self) -> None:
        os.close(self._lifeline)
        assert self.process.wait(WAIT) == 0
        for each in (*self._open, self._handover, self.worker):
            each.close()
        os.close(self.reports)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def test_a_message_gets_through_as_a_copy_with_its_senders_uid(bench: Bench) -> None:
    ours = bench.offer()
    connection, request, message, envelope = bench.accept()
    assert (message, envelope) == (MAIL, ENVELOPE)
    assert request.environ == {b"PROTO": b"TCP", PEER: b"%d %d" % (os.getuid(), os.getpid())}
    assert 0 < request.budget <= 60.0
    connection.send(hook.encode_answer(hook.Answer(Action.REJECT, text="no")).packet)
    assert hook.decode_answer(ours.recv(hook.PACKET_MAX)).text == "no"


def test_a_long_answer_and_the_report_are_passed_on(bench: Bench) -> None:
    ours = bench.offer()
    connection, *_ = bench.accept()
    body = sealed(b"a body")
    connection.sendmsg([b"packet"], rights(body))
    packet, fds, _, _ = socket.recv_fds(ours, hook.PACKET_MAX, 1)
    assert (packet, os.pread(fds[0], 100, 0)) == (b"packet", b"a body")
    for fd in (body, *fds):
        os.close(fd)
    ours.send(b"report")
    assert connection.recv(100) == b"report"
    ours.close()
    assert connection.recv(100) == b""


def test_a_worker_that_ends_closes_the_hooks_connection(bench: Bench) -> None:
    ours = bench.offer()
    bench.accept()[0].close()
    assert ours.recv(100) == b""


@pytest.mark.parametrize("packet", [b"garbage", b"", b"CFQ1" + b"\0" * 28, b"x" * 70_000])
def test_what_is_no_request_is_closed_and_reaches_no_worker(bench: Bench, packet: bytes) -> None:
    ours = bench.connect()
    if packet:
        ours.send(packet)
    else:
        ours.shutdown(socket.SHUT_WR)
    assert ours.recv(100) == b""
    assert not select.select([bench.worker], [], [], 0.2)[0]


@pytest.mark.parametrize(
    "arrange",
    [lambda bad, env: (bad, env), lambda bad, env: (env, bad), lambda bad, env: (env, env, bad)],
    ids=["message", "envelope", "surplus"],
)
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("request_", [True, False], ids=["request", "garbage"])
def test_descriptors_whose_close_blocks_hold_up_nobody_else(
    bench: Bench, arrange: Callable[[int, int], tuple[int, ...]], wrapped: bool, request_: bool
) -> None:
    bench.honest()  # it is up
    open_ends = []
    for _ in range(8):
        here, there = lingering()
        open_ends.append(there)
        if wrapped:
            bare, here = here, nested(here.fileno())
            bare.close()
        envelope = sealed(ENVELOPE)
        ours = bench.connect()
        packet = hook.encode_request(hook.Request(0, 60.0, 100, len(ENVELOPE), {})) if request_ else b"garbage"
        with suppress(BrokenPipeError):  # refused already
            ours.sendmsg([packet], rights(*arrange(here.fileno(), envelope)))
        here.close()
        os.close(envelope)
        open_ends.append(ours)
    assert max(bench.honest() for _ in range(5)) < 2.0
    for each in open_ends:
        each.close()


def test_no_connection_is_closed_before_the_worker_has_closed_it(bench: Bench) -> None:
    ours, accepted = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    key = bench.give(accepted)
    ours.send(b"garbage")
    assert not select.select([ours], [], [], 0.5)[0], "the worker's close() could be the last one, and block"
    bench.closed(key)
    assert select.select([ours], [], [], WAIT)[0]
    assert ours.recv(1) == b""
    ours.close()


def test_a_connection_of_a_worker_that_died_meanwhile_is_served(bench: Bench) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=subprocess.PIPE, check=True)
    ours, accepted = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    bench.give(accepted, int(ended.stdout))
    ours.send(b"garbage")
    assert select.select([ours], [], [], WAIT)[0]
    assert ours.recv(1) == b""
    ours.close()


def test_the_main_process_is_never_the_last_to_close(bench: Bench) -> None:
    """Connections whose close() blocks, far beyond the limits, so that children and sink die of them all the time."""
    open_ends = []
    for _ in range(200):
        here, there = lingering()
        ours = bench.connect()
        with suppress(BrokenPipeError):  # refused already
            ours.sendmsg([b"garbage"], rights(here.fileno()))
        here.close()
        open_ends += [there, ours]
        assert "wait_woken" not in Path(f"/proc/{bench.process.pid}/wchan").read_text()
    end = time.monotonic() + WAIT
    while not all(map(readable, open_ends[1::2])):
        assert time.monotonic() < end, "connections are still open"
        assert "wait_woken" not in Path(f"/proc/{bench.process.pid}/wchan").read_text()
        time.sleep(0.01)
    for each in open_ends:
        each.close()


def test_one_user_gets_no_more_than_its_connections_and_the_rest_is_closed(bench: Bench) -> None:
    idle = [bench.connect() for _ in range(60)]
    assert idle[59].recv(1) == b""  # before the first one is out of time
    assert idle[40].recv(1) == b""
    assert not select.select([idle[31]], [], [], 0.0)[0]
    assert select.select([bench.reports], [], [], WAIT)[0]
    refused = json.loads(os.read(bench.reports, 4096).partition(b"\n")[0])
    assert list(refused) == [str(os.getuid())]


def reported(bench: Bench) -> dict[str, int]:
    """The next report to the supervisor: refused connections by uid."""
    assert select.select([bench.reports], [], [], WAIT)[0]
    found: dict[str, int] = json.loads(os.read(bench.reports, 4096).partition(b"\n")[0])
    return found


def test_who_sends_garbage_or_unusable_descriptors_is_reported(bench: Bench) -> None:
    ours = bench.connect()
    ours.send(b"garbage")
    assert ours.recv(1) == b""
    assert reported(bench) == {str(os.getuid()): 1}
    ours = bench.connect()
    pipe, directory = os.pipe(), os.open("/", os.O_RDONLY)
    ours.sendmsg([hook.encode_request(hook.Request(0, 60.0, 18, 27, {}))], rights(pipe[0], directory))
    assert reported(bench) == {str(os.getuid()): 1}
    for fd in (*pipe, directory):
        os.close(fd)


def test_who_takes_too_long_is_reported(bench: Bench) -> None:
    """A child that hangs in a close() and is killed."""
    here, there = lingering()
    outer, inner = socket.socketpair()
    outer.sendmsg([b"."], rights(here.fileno()))
    outer.close()
    here.close()
    ours, envelope = bench.connect(), sealed(ENVELOPE)
    ours.sendmsg([hook.encode_request(hook.Request(0, 60.0, 100, len(ENVELOPE), {}))], rights(inner.fileno(), envelope))
    inner.close()
    os.close(envelope)
    assert reported(bench) == {str(os.getuid()): 1}
    there.close()


def test_a_sound_request_is_not_reported(bench: Bench) -> None:
    bench.honest()
    bench.connect().close()
    assert not select.select([bench.reports], [], [], 2.5)[0]


def test_the_bytes_of_one_user_are_bounded(bench: Bench) -> None:
    size = 200 * 1024 * 1024
    fds = [os.memfd_create("large") for _ in range(2)]
    envelope = sealed(ENVELOPE)
    answers = []
    for fd in fds:
        os.ftruncate(fd, size)
        ours = bench.connect()
        ours.sendmsg([hook.encode_request(hook.Request(0, 60.0, size, len(ENVELOPE), {}))], rights(fd, envelope))
        answers.append(ours)
    held, _ = bench.worker.accept()  # the first one is with the worker
    ready, _, _ = select.select(answers, [], [], WAIT)
    assert len(ready) == 1
    assert ready[0].recv(10) == b""  # the other has no room
    held.close()
    for fd in (*fds, envelope):
        os.close(fd)
