"""The inside of the pool: what workers and supervisor say to each other over ZeroMQ, never a message's bytes.

Workers PUSH reports, the supervisor PUBlishes commands and the event feed, a ROUTER answers the command
line. A frame is one version byte and a msgpack map with a type tag. What cannot be decoded is
counted and dropped. Sending never waits: above the high-water mark a frame is lost, mail is not.
The sockets lie in the run directory with the modes given here; contexts are made after exec.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import zmq
import zmq.asyncio

from contentfilter.errors import RemoteProtocolError
from contentfilter.tables.keeper import State

VERSION = b"\x01"
HIGH_WATER = 10_000  # frames
LIMIT = 64 * 1024 * 1024  # bytes in one frame; a configuration with long signature lists is the largest
BATCH = 64  # events in one frame
BATCH_DELAY = 0.05  # seconds


class Frame(msgspec.Struct, frozen=True, tag=True):
    """Base of all frames."""


# Worker to supervisor


class Busy(msgspec.Struct, frozen=True):
    """A connection that a worker has open."""

    incident: str
    stage: str
    seconds: float


class Heartbeat(Frame, frozen=True):
    """A sign of life from a worker's event loop. The first one says that it accepts messages."""

    pid: int
    generation: int
    refused: int  # a generation that this worker could not build, or 0
    lag: float  # seconds by which the loop was late
    in_flight: tuple[Busy, ...]  # the oldest ones
    open: int
    counters: dict[str, int]
    bytes: int = 0  # of the messages in flight


class Event(msgspec.Struct, frozen=True):
    """Something that happened; ``fields`` are those of the log line, ``account`` (JSON) is what has no room there."""

    name: str
    fields: dict[str, Any]
    account: bytes = b""


class Happened(Frame, frozen=True):
    pid: int
    events: list[Event]


Report = Heartbeat | Happened


# Supervisor to workers


class Configure(Frame, frozen=True):
    """What holds from now on. Repeated until every worker has it."""

    generation: int
    blob: bytes


Command = Configure


# Command line to supervisor, and back


class Ping(Frame, frozen=True):
    pass


class AskStatus(Frame, frozen=True):
    pass


class AskReload(Frame, frozen=True):
    """``restart`` also replaces every worker process, each new one before its old one goes."""

    restart: bool = False


Question = Ping | AskStatus | AskReload


class WorkerStatus(msgspec.Struct, frozen=True):
    slot: int
    pid: int
    state: str  # starting, ready, retiring
    generation: int
    age: float  # seconds since it was started
    silent: float  # seconds since its last heartbeat
    lag: float
    open: int
    in_flight: tuple[Busy, ...]
    counters: dict[str, int]
    bytes: int = 0


class Status(Frame, frozen=True):
    """The daemon at a glance."""

    version: str
    pid: int
    state: str  # starting, ready, draining
    generation: int
    uptime: float
    socket: str
    restarts: int  # workers that died or were killed
    malformed: int  # frames dropped
    problems: tuple[str, ...]  # of the last reload; empty when it was good
    workers: tuple[WorkerStatus, ...]
    not_recorded: int = 0  # events that the journal lost
    tables: State | None = None  # the recipient tables in force
    wanted: int = 0  # workers
    deaths: dict[str, int] = {}  # restarts by reason


class Done(Frame, frozen=True):
    """The answer to everything but AskStatus."""

    ok: bool
    generation: int
    problems: tuple[str, ...] = ()  # with ok: what is not as it should be all the same


Reply = Status | Done

T = TypeVar("T")


def encode(frame: Frame) -> bytes:
    return VERSION + msgspec.msgpack.encode(frame)


def decode(data: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    """Raises RemoteProtocolError."""
    if data[:1] != VERSION:
        raise RemoteProtocolError("frame of another version")
    try:
        return decoder.decode(memoryview(data)[1:])
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise RemoteProtocolError(str(e)) from e


REPORTS: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
QUESTIONS: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


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

    def send(self, frame: Heartbeat | Happened) -> None:
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
            self.send(Happened(self._pid, events))

    async def command(self) -> Command:
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
        self.malformed = 0
        where = addresses(run)
        self._pull = self._bind(zmq.PULL, where["reports"], 0o600)
        self._commands = self._bind(zmq.PUB, where["commands"], 0o600)
        self._router = self._bind(zmq.ROUTER, where["control"], 0o660)
        self._events = self._bind(zmq.PUB, where["events"], 0o660)

    def _bind(self, kind: int, address: str, mode: int) -> Any:
        each = self._context.socket(kind)
        _limits(each)
        with _umask(0o777 & ~mode):
            each.bind(address)
        return each

    async def report(self) -> Report:
        """The next report of a worker. Raises RemoteProtocolError for a malformed one."""
        parts = await self._pull.recv_multipart()
        return self._decoded(parts, 1, REPORTS)

    async def waiting(self, seconds: float) -> bool:
        """Whether a report is there, or comes within so long."""
        return bool(await self._pull.poll(int(seconds * 1000)))

    async def question(self) -> tuple[bytes, Question]:
        """The next question from the command line, and whom to answer."""
        parts = await self._router.recv_multipart()
        return parts[0], self._decoded(parts, 2, QUESTIONS)

    def _decoded(self, parts: list[bytes], count: int, decoder: msgspec.msgpack.Decoder[T]) -> T:
        try:
            if len(parts) != count:
                raise RemoteProtocolError(f"{len(parts)} parts")
            return decode(parts[-1], decoder)
        except RemoteProtocolError:
            self.malformed += 1
            raise

    async def answer(self, asker: bytes, reply: Reply) -> None:
        await self._router.send_multipart([asker, encode(reply)], zmq.NOBLOCK)

    async def command(self, frame: Command) -> None:
        await self._commands.send(encode(frame), zmq.NOBLOCK)

    async def publish(self, event: Event) -> None:
        """To the event feed: the topic is the event's name."""
        await self._events.send_multipart([event.name.encode(), VERSION + msgspec.msgpack.encode(event)], zmq.NOBLOCK)

    def close(self) -> None:
        for each in (self._pull, self._commands, self._router, self._events):
            each.close(linger=200)
        self._context.term()


def ask(run: str, question: Question, seconds: float) -> Reply | None:
    """One question to the running daemon, for the command line. None when nobody answers in time."""
    address = addresses(run)["control"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(address.removeprefix("ipc://"))  # ZeroMQ would wait for it to appear
        except OSError:
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
