"""Sockets inside the daemon: workers and supervisor over ZeroMQ, the event feed, and the command line's control socket.

Each worker is a DEALER whose identity is its pid, the supervisor is their ROUTER: reports one way, commands the other,
in order. The event feed has a process of its own (bus/publisher.py). The control socket is a plain Unix socket: one
question and one reply for each connection. Sending never waits: above the high-water mark a message is lost, mail is
not. Messages carry no mail. Only the daemon's user can open the socket of the workers; contexts are made after exec.
"""

import asyncio
import errno
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import zmq

from contentfilter.bus.messages import (
    COMMANDS,
    REPLIES,
    REPORTS,
    Event,
    EventBatch,
    Question,
    Reply,
    WorkerCommand,
    WorkerReport,
    decode,
    encode,
)
from contentfilter.deadline import Deadline
from contentfilter.errors import RemoteProtocolError

HIGH_WATER = 10_000  # messages
LIMIT = 64 * 1024 * 1024  # bytes in one message; a configuration with long signature lists is the largest
MENDS = 100  # times that removed sockets are bound again
BATCH = 64  # events in one message
BATCH_DELAY = 0.05  # seconds


def addresses(run: str) -> dict[str, str]:
    """The sockets in the run directory. ``control`` does not speak ZeroMQ."""
    return {name: f"ipc://{run}/{name}.sock" for name in ("workers", "control", "events")}


def path_of(address: str) -> str:
    """The path of one of :func:`addresses`."""
    return address.removeprefix("ipc://")


class LoopSocket:
    """A ZeroMQ socket on the running event loop, without a future for each message (zmq.asyncio has one)."""

    def __init__(self, made: "zmq.Socket[bytes]") -> None:
        self._socket = made
        self._loop = asyncio.get_running_loop()
        self._readable = asyncio.Event()
        self._fd = int(made.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._look)

    def _look(self) -> None:
        """The descriptor tells only that something changed, and not again before it was looked at: see ZMQ_FD."""
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._readable.set()

    def send(self, *parts: bytes) -> None:
        """Raises ZMQError if it would have to wait, or if the peer is unknown."""
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK)
        finally:
            self._look()

    async def receive(self) -> list[bytes]:
        """The parts of the next message."""
        while True:
            try:
                return self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                self._readable.clear()
                await self._readable.wait()

    async def waiting(self, seconds: float) -> bool:
        """True if a message is there, or arrives within ``seconds``."""
        self._readable.clear()
        self._look()
        try:
            async with Deadline.after(seconds).timeout():
                await self._readable.wait()
        except TimeoutError:
            return False
        return True

    def close(self, linger: int) -> None:
        """``linger``: milliseconds for messages that are still to be sent."""
        self._loop.remove_reader(self._fd)
        self._socket.close(linger=linger)


class WorkerBus:
    """The worker's end. Reports go out immediately, events in small batches by :meth:`flush`."""

    def __init__(self, run: str, pid: int) -> None:
        self._context = zmq.Context(io_threads=1)
        self._pid = pid
        self._events: list[Event] = []
        self.lost = 0
        dealer = _limited(self._context.socket(zmq.DEALER))
        dealer.setsockopt(zmq.ROUTING_ID, _identity(pid))
        dealer.connect(addresses(run)["workers"])
        self._dealer = LoopSocket(dealer)

    def send(self, report: WorkerReport) -> None:
        try:
            self._dealer.send(encode(report))
        except zmq.Again:
            self.lost += 1

    def add(self, event: Event) -> bool:
        """Keep ``event`` for the next flush. True when the batch is full."""
        self._events.append(event)
        return len(self._events) >= BATCH

    def flush(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self.send(EventBatch(self._pid, events))

    async def command(self) -> WorkerCommand:
        """The next command. Raises RemoteProtocolError for a malformed one."""
        return decode((await self._dealer.receive())[-1], COMMANDS)

    def close(self) -> None:
        self.flush()
        self._dealer.close(linger=200)
        self._context.term()


class SupervisorBus:
    """The supervisor's end. Needs the lock on the run directory: binding takes the paths over."""

    def __init__(self, run: str) -> None:
        self._context = zmq.Context(io_threads=1)
        self._run = run
        self._mended = 0
        self._address = addresses(run)["workers"]
        self._router = _limited(self._context.socket(zmq.ROUTER))
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._bind()
        self._workers = LoopSocket(self._router)

    def _bind(self) -> None:
        with socket_mode(0o600):
            self._router.bind(self._address)

    def mend(self) -> tuple[str, ...]:
        """Bind again if the path was removed; returns it then. Connections stay. Raises OSError.

        Each time costs a descriptor: the old listener stays open, because closing it would remove the new path.
        """
        path = path_of(self._address)
        if os.path.exists(path) or self._mended >= MENDS:
            return ()
        self._mended += 1
        os.makedirs(self._run, 0o750, exist_ok=True)
        self._bind()
        return (path,)

    async def report(self) -> WorkerReport:
        """The next report of a worker. Raises RemoteProtocolError for a malformed one."""
        parts = await self._workers.receive()
        if len(parts) != 2:  # identity and report
            raise RemoteProtocolError(f"{len(parts)} parts")
        return decode(parts[1], REPORTS)

    async def waiting(self, seconds: float) -> bool:
        """True if a report is there, or arrives within ``seconds``."""
        return await self._workers.waiting(seconds)

    def command(self, command: WorkerCommand, pids: Iterable[int]) -> None:
        """To workers that have reported. One that is gone, or has not read HIGH_WATER commands, does not get it."""
        data = encode(command)
        for pid in pids:
            with suppress(zmq.ZMQError):
                self._workers.send(_identity(pid), data)

    def close(self) -> None:
        self._workers.close(linger=200)
        self._context.term()


def ask(run: str, question: Question, seconds: float) -> Reply | None:
    """One question to the running daemon, for the command line. None if there is no reply in time.

    Raises RemoteProtocolError for a malformed reply.
    """
    deadline, reply = Deadline.after(seconds), bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.settimeout(seconds)
            client.connect(path_of(addresses(run)["control"]))
            client.sendall(encode(question))
            client.shutdown(socket.SHUT_WR)
            while part := client.recv(1 << 16):
                reply += part
                client.settimeout(max(0.001, deadline.left()))
        except OSError:
            return None
    return decode(bytes(reply), REPLIES) if reply else None


def trouble_at(path: str) -> int:
    """The errno with which a socket cannot be reached, or 0. ZeroMQ would wait for it without an error."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            return error.errno or errno.EIO
    return 0


def _identity(pid: int) -> bytes:
    return str(pid).encode("ascii")


def _limited(made: Any) -> Any:
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.SNDHWM, HIGH_WATER),
        (zmq.RCVHWM, HIGH_WATER),
        (zmq.MAXMSGSIZE, LIMIT),
    ):
        made.setsockopt(option, value)
    return made


@contextmanager
def socket_mode(mode: int) -> Iterator[None]:
    """Sockets that are bound here get ``mode``."""
    before = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(before)
