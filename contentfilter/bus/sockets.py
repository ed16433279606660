"""The inside of the pool: what workers and supervisor say to each other over ZeroMQ, never a message's bytes.

Workers PUSH reports, the supervisor PUBlishes commands and the event feed, a ROUTER answers the command
line and learns from the kernel who asks. What cannot be decoded is
counted and dropped. Sending never waits: above the high-water mark a frame is lost, mail is not.
The sockets lie in the run directory with the modes given here; contexts are made after exec.
"""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import zmq
import zmq.asyncio

from contentfilter.bus.messages import (
    COMMANDS,
    QUESTIONS,
    REPLIES,
    REPORTS,
    VERSION,
    Event,
    EventBatch,
    Question,
    Reply,
    WorkerCommand,
    WorkerReport,
    decode,
    encode,
)
from contentfilter.errors import RemoteProtocolError

T = TypeVar("T")
HIGH_WATER = 10_000  # frames
LIMIT = 64 * 1024 * 1024  # bytes in one frame; a configuration with long signature lists is the largest
MENDS = 100  # times that removed sockets are made anew
BATCH = 64  # events in one frame
BATCH_DELAY = 0.05  # seconds


@dataclass(frozen=True, slots=True)
class Client:
    """Who put a question."""

    identity: bytes  # ZeroMQ's name for the connection
    uid: int  # as the kernel told it; -1 where it did not


def addresses(run: str) -> dict[str, str]:
    """The four sockets in the run directory."""
    names = ("reports", "commands", "control", "events")
    return {name: f"ipc://{run}/{name}.sock" for name in names}


class WorkerBus:
    """A worker's end. Reports go out at once, events in small batches by :meth:`flush`."""

    def __init__(self, run: str, pid: int) -> None:
        self._context = zmq.asyncio.Context(io_threads=1)
        self._pid = pid
        self._events: list[Event] = []
        self.lost = 0
        where = addresses(run)
        # A plain socket: zmq.asyncio's send costs a future per frame.
        self._push = zmq.Context(self._context).socket(zmq.PUSH)
        self._sub = self._context.socket(zmq.SUB)
        for each in (self._push, self._sub):
            _limits(each)
        self._push.connect(where["reports"])
        self._sub.subscribe(b"")
        self._sub.connect(where["commands"])

    def send(self, frame: WorkerReport) -> None:
        try:
            self._push.send(encode(frame), zmq.NOBLOCK)
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
        return decode(await self._sub.recv(), COMMANDS)

    def close(self) -> None:
        self.flush()
        self._push.close(linger=200)
        self._sub.close(linger=0)
        self._context.term()


class SupervisorBus:
    """The supervisor's end. Needs the lock on the run directory: binding takes the paths over."""

    def __init__(self, run: str) -> None:
        self._context = zmq.asyncio.Context(io_threads=1)
        self._run = run
        self._mended = 0
        self._bound: list[tuple[Any, str, int]] = []
        self.malformed = 0
        where = addresses(run)
        self._pull = self._bind(zmq.PULL, where["reports"], 0o600)
        self._commands = self._bind(zmq.PUB, where["commands"], 0o600)
        self._router = self._bind(zmq.ROUTER, where["control"], 0o660)
        # A plain socket, as the worker's: nobody waits for a PUB socket, which drops what a reader does not take.
        self._events = self._bind(zmq.PUB, where["events"], 0o660, zmq.Context(self._context))

    def _bind(self, kind: int, address: str, mode: int, context: zmq.Context[Any] | None = None) -> Any:
        each = (context or self._context).socket(kind)
        _limits(each)
        with _umask(0o777 & ~mode):
            each.bind(address)
        self._bound.append((each, address, mode))
        return each

    def mend(self) -> tuple[str, ...]:
        """Listen anew on paths that somebody removed; returns those. Who is connected stays so. Raises OSError.

        Each time costs a descriptor, for the old listener is kept: to close it would remove the new path.
        """
        gone = [(each, address, mode) for each, address, mode in self._bound if not os.path.exists(_path(address))]
        if not gone or self._mended >= MENDS:
            return ()
        self._mended += 1
        os.makedirs(self._run, 0o750, exist_ok=True)
        for each, address, mode in gone:
            with _umask(0o777 & ~mode):
                each.bind(address)
        return tuple(_path(address) for _, address, _ in gone)

    async def report(self) -> WorkerReport:
        """The next report of a worker. Raises RemoteProtocolError for a malformed one."""
        parts = await self._pull.recv_multipart()
        return self._decoded(parts, 1, REPORTS)

    async def waiting(self, seconds: float) -> bool:
        """Whether a report is there, or comes within so long."""
        return bool(await self._pull.poll(int(seconds * 1000)))

    async def question(self) -> tuple[Client, Question]:
        """The next question from the command line, and whom to answer."""
        parts = await self._router.recv_multipart(copy=False)
        question = self._decoded([part.bytes for part in parts], 2, QUESTIONS)
        return Client(parts[0].bytes, _peer_uid(parts[1])), question

    def _decoded(self, parts: list[bytes], count: int, decoder: msgspec.msgpack.Decoder[T]) -> T:
        try:
            if len(parts) != count:
                raise RemoteProtocolError(f"{len(parts)} parts")
            return decode(parts[-1], decoder)
        except RemoteProtocolError:
            self.malformed += 1
            raise

    async def answer(self, asker: Client, reply: Reply) -> None:
        await self._router.send_multipart([asker.identity, encode(reply)], zmq.NOBLOCK)

    async def command(self, frame: WorkerCommand, *, lossy: bool = False) -> None:
        """To every worker. Raises zmq.Again above the high-water mark, unless it does not matter."""
        try:
            await self._commands.send(encode(frame), zmq.NOBLOCK)
        except zmq.Again:
            if not lossy:
                raise

    def publish(self, event: Event) -> None:
        """To the event feed: the topic is the event's name. Never waits."""
        self._events.send_multipart([event.name.encode(), VERSION + msgspec.msgpack.encode(event)], zmq.NOBLOCK)

    def close(self) -> None:
        for each in (self._pull, self._commands, self._router, self._events):
            each.close(linger=200)
        self._context.term()


def ask(run: str, question: Question, seconds: float) -> Reply | None:
    """One question to the running daemon, for the command line. None when nobody answers in time."""
    address = addresses(run)["control"]
    if trouble_at(_path(address)):
        return None
    context = zmq.Context(io_threads=1)
    try:
        dealer = context.socket(zmq.DEALER)
        _limits(dealer)
        dealer.connect(address)
        dealer.send(encode(question))
        if not dealer.poll(int(seconds * 1000)):
            return None
        return decode(dealer.recv(), REPLIES)
    finally:
        context.destroy(linger=0)


def trouble_at(path: str) -> int:
    """The errno with which a socket cannot be reached, or 0. ZeroMQ would wait for it without a word."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            return error.errno or errno.EIO
    return 0


def _path(address: str) -> str:
    return address.removeprefix("ipc://")


def _peer_uid(frame: Any) -> int:
    """ZeroMQ keeps SO_PEERCRED of a Unix socket as ``host:uid:gid:pid``."""
    try:
        uid = int(frame.get("Peer-Address").rsplit(":", 3)[1])
    except (zmq.ZMQError, ValueError, IndexError):
        return -1
    return uid


def _limits(each: Any) -> None:
    each.setsockopt(zmq.LINGER, 0)
    each.setsockopt(zmq.SNDHWM, HIGH_WATER)
    each.setsockopt(zmq.RCVHWM, HIGH_WATER)
    each.setsockopt(zmq.MAXMSGSIZE, LIMIT)


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
