"""What workers, supervisor and command line say to each other: frozen frames, and how they are written.

A frame is one version byte and a msgpack map with a type tag. Nothing here opens a socket.
"""

from typing import Any, TypeVar

import msgspec

from contentfilter.errors import RemoteProtocolError
from contentfilter.model import OriginKind, Scanner
from contentfilter.policy.overrides import AllowEntry, Bypass, Drain
from contentfilter.scanners.cache_entries import CacheEntry, CacheKey
from contentfilter.scanners.pool import BackendHealth
from contentfilter.settings import FailureSettings
from contentfilter.tables.keeper import TableState
from contentfilter.verdict.record import ScanRecord

VERSION = b"\x01"


class BusMessage(msgspec.Struct, frozen=True, tag=True):
    """Base of all frames."""


CANARY_SEEN = "canary.seen"  # what a worker sends to the supervisor about a sample; never logged, in no feed


class CanarySeen(msgspec.Struct, frozen=True):
    """A worker's account of one sample."""

    nonce: str
    sample: str
    scans: tuple[ScanRecord, ...]


class Window(msgspec.Struct, frozen=True):
    """All that happened in some time, added up. Quantiles are in milliseconds, estimated; None: nothing to tell."""

    seconds: float  # the time that is told about, in whole minutes up to now
    messages: int
    bytes: int
    decisions: dict[str, int]  # queue, reject, defer, drop: each is there
    deferred: dict[str, int]  # by rule, most first
    rejected: dict[str, int]
    unchecked: dict[str, int]  # "scanner cause": passed without this check
    p50: float | None
    p95: float | None


# Worker to supervisor


class InFlight(msgspec.Struct, frozen=True):
    """A connection that a worker has open."""

    incident: str
    stage: str
    seconds: float


class Heartbeat(BusMessage, frozen=True):
    """A sign of life from a worker's event loop. The first one says that it accepts messages."""

    pid: int
    generation: int
    refused: int  # a generation that this worker could not build, or 0
    lag: float  # seconds by which the loop was late
    in_flight: tuple[InFlight, ...]  # the oldest ones
    open: int
    counters: dict[str, int]
    bytes: int = 0  # of the messages in flight
    backends: tuple[BackendHealth, ...] = ()  # as this worker knows them
    orders: int = 0  # the number of the orders that it follows
    waiting: int = 0  # messages that wait for a place
    short: str = ""  # what there is too little of to take mail: memory, disk space


class Event(msgspec.Struct, frozen=True):
    """Something that happened; ``fields`` are those of the log line, ``account`` (JSON) is what has no room there."""

    name: str
    fields: dict[str, Any]
    account: bytes = b""


class EventBatch(BusMessage, frozen=True):
    pid: int
    events: list[Event]


class CacheUpdate(BusMessage, frozen=True):
    """An answer that a worker keeps. The supervisor passes it on to all of them."""

    key: CacheKey
    kept: CacheEntry


WorkerReport = Heartbeat | EventBatch | CacheUpdate


# Supervisor to workers


class Overrides(BusMessage, frozen=True):
    """All overrides in force from now on. Repeated until every worker has them."""

    number: int  # grows with each change
    bypasses: tuple[Bypass, ...] = ()
    drain: Drain | None = None
    allowed: tuple[AllowEntry, ...] = ()


class Configure(BusMessage, frozen=True):
    """What holds from now on. Repeated until every worker has it."""

    generation: int
    blob: bytes


WorkerCommand = Configure | Overrides | CacheUpdate


# Command line to supervisor, and back


class Ping(BusMessage, frozen=True):
    pass


class AskStatus(BusMessage, frozen=True):
    pass


class AskFailures(BusMessage, frozen=True):
    """What the failure table in force is made of."""


class AskReload(BusMessage, frozen=True):
    """``restart`` also replaces every worker process, each new one before its old one goes."""

    restart: bool = False


class AskCanary(BusMessage, frozen=True):
    """Send every sample through the hook now, and say what became of it."""


class AskBypass(BusMessage, frozen=True):
    """Leave a scanner out for ``seconds``. In place of an earlier order for the same scanner."""

    scanner: Scanner
    seconds: float
    reason: str
    origins: tuple[OriginKind, ...] = ()
    claimed: str = ""  # who the asker says to be; believed by nobody, but noted


class AskBypassEnd(BusMessage, frozen=True):
    """Ask a scanner again; all of them where none is named."""

    scanner: Scanner | None = None
    claimed: str = ""


class AskDrain(BusMessage, frozen=True):
    """Accept no more mail, for ``seconds`` or until AskResume. What is under way is finished."""

    seconds: float | None = None
    reason: str = ""
    claimed: str = ""


class AskResume(BusMessage, frozen=True):
    """Accept mail again."""

    claimed: str = ""


class AskAllow(BusMessage, frozen=True):
    """Let a signature pass for ``seconds``. Replaces an earlier entry for the same signature."""

    signature: str
    seconds: float
    reason: str
    owner: str


class AskAllowEnd(BusMessage, frozen=True):
    """Block a signature again."""

    signature: str
    claimed: str = ""


Override = AskBypass | AskBypassEnd | AskDrain | AskResume | AskAllow | AskAllowEnd
Question = Ping | AskStatus | AskFailures | AskCanary | AskReload | Override
CHANGES = (AskReload, AskBypass, AskBypassEnd, AskDrain, AskResume, AskAllow, AskAllowEnd)
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
    in_flight: tuple[InFlight, ...]
    counters: dict[str, int]
    bytes: int = 0
    backends: tuple[BackendHealth, ...] = ()
    waiting: int = 0
    short: str = ""


class BackendStatus(msgspec.Struct, frozen=True):
    """How one backend stands, by all that workers and probes know. Moments are seconds since 1970."""

    scanner: str
    backend: str
    state: str  # well, failing, unknown (nobody has asked it yet)
    cause: str = ""  # of the last failure, while it is failing
    detail: str = ""
    since: float = 0.0  # failing since; 0 while it is not
    failures: int = 0  # in a row, those of all workers
    heard: float = 0.0  # its last sound answer, to a probe or a scan; 0: none yet
    outstanding: int = 0
    limit: int = 0
    waiting: int = 0
    wanted: bool = True  # there is mail that needs this scanner
    meanwhile: dict[str, str] = {}  # origin -> what a message of it gets that needs this scanner: defer, pass


class CanaryResult(msgspec.Struct, frozen=True):
    """What became of one of the canary's samples, the last time. Moments are seconds since 1970."""

    sample: str
    result: str  # see metrics.CANARY_RESULTS; skipped where its scanner is switched off
    ok: bool | None  # whether it was as it should be; None: skipped
    text: str  # the result for people
    seconds: float  # from handing it to the hook to the hook's end
    at: float
    last_success: float | None = None  # since the start of the daemon
    runs: dict[str, int] = {}  # results since the start


class Status(BusMessage, frozen=True):
    """The daemon at a glance."""

    version: str
    pid: int
    state: str  # starting, ready, drained, draining
    generation: int
    uptime: float
    socket: str
    restarts: int  # workers that died or were killed
    malformed: int  # frames dropped
    problems: tuple[str, ...]  # of the last reload; empty when it was good
    workers: tuple[WorkerStatus, ...]
    not_recorded: int = 0  # events that the journal lost
    tables: TableState | None = None  # the recipient tables in force
    wanted: int = 0  # workers
    deaths: dict[str, int] = {}  # restarts by reason
    backends: tuple[BackendStatus, ...] = ()
    waiting: int | None = None  # hooks that no worker has accepted yet; None where the kernel does not tell
    waiting_limit: int | None = None
    window: Window | None = None  # what came of the mail of the last 15 minutes
    recent: Window | None = None  # and of the last two
    bypasses: tuple[Bypass, ...] = ()  # those that hold now
    drain: Drain | None = None
    canary: tuple[CanaryResult, ...] = ()  # empty: off, or no round yet
    poison: tuple[str, ...] = ()  # fingerprints of messages that killed two workers and are isolated
    orders_problem: str = ""  # why orders do not survive a restart, or why older ones are not in force


class Failures(BusMessage, frozen=True):
    """``[failure]`` as it is in force."""

    generation: int
    failure: FailureSettings


class CanaryRound(BusMessage, frozen=True):
    """One result for each sample."""

    results: tuple[CanaryResult, ...]
    problem: str = ""  # why nothing was sent, and these are older


class Done(BusMessage, frozen=True):
    """It was done, or tried."""

    ok: bool
    generation: int
    problems: tuple[str, ...] = ()  # with ok: what is not as it should be all the same


class Ordered(BusMessage, frozen=True):
    """Orders as they are in force now."""

    bypasses: tuple[Bypass, ...]
    drain: Drain | None
    problems: tuple[str, ...] = ()  # what is not as it should be all the same
    in_flight: int = 0  # messages under way


class Refused(BusMessage, frozen=True):
    """Nothing was done."""

    why: str


Reply = Status | Failures | CanaryRound | Done | Ordered | Refused

T = TypeVar("T")


def encode(frame: BusMessage) -> bytes:
    return VERSION + msgspec.msgpack.encode(frame)


def decode(data: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    """Raises RemoteProtocolError."""
    if data[:1] != VERSION:
        raise RemoteProtocolError("frame of another version")
    try:
        return decoder.decode(memoryview(data)[1:])
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise RemoteProtocolError(str(e)) from e


REPORTS: msgspec.msgpack.Decoder[WorkerReport] = msgspec.msgpack.Decoder(WorkerReport)
OVERRIDES: msgspec.msgpack.Decoder[Overrides] = msgspec.msgpack.Decoder(Overrides)
COMMANDS: msgspec.msgpack.Decoder[WorkerCommand] = msgspec.msgpack.Decoder(WorkerCommand)
QUESTIONS: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
