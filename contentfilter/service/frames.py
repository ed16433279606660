"""What workers, supervisor and command line say to each other: frozen frames, and how they are written.

A frame is one version byte and a msgpack map with a type tag. Nothing here opens a socket.
"""

from typing import Any, TypeVar

import msgspec

from contentfilter.errors import RemoteProtocolError
from contentfilter.tables.keeper import State

VERSION = b"\x01"


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
CHANGES = (AskReload,)
"""Questions that change something: for root and the user of the daemon only. The rest is for their group, too."""


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
    """It was done, or tried."""

    ok: bool
    generation: int
    problems: tuple[str, ...] = ()  # with ok: what is not as it should be all the same


class Refused(Frame, frozen=True):
    """Nothing was done."""

    why: str


Reply = Status | Done | Refused

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
