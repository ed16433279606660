"""Messages between workers, supervisor and command line, and their encoding.

A message is one version byte and a msgpack map with a type tag. Nothing here opens a socket.
"""

from typing import Any, TypeVar

import msgspec

from contentfilter.errors import RemoteProtocolError
from contentfilter.model import OriginKind, Scanner
from contentfilter.policy.overrides import AllowEntry, Bypass, Drain
from contentfilter.scanners.cache_entries import CacheEntry, CacheKey
from contentfilter.scanners.health import BackendHealth, ProbeResult
from contentfilter.settings import FailureSettings
from contentfilter.tables.keeper import TableState
from contentfilter.verdict.record import ScanRecord

VERSION = b"\x01"


class BusMessage(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages."""


CANARY_SEEN = "canary.seen"  # an event from worker to supervisor; neither logged nor published


class CanarySeen(msgspec.Struct, frozen=True):
    """A worker's scans of one canary sample."""

    nonce: str
    sample: str
    scans: tuple[ScanRecord, ...]


class Window(msgspec.Struct, frozen=True):
    """Totals of a period. Quantiles are in milliseconds, estimated; None: no message."""

    seconds: float  # length of the period, in whole minutes up to now
    messages: int
    bytes: int
    decisions: dict[str, int]  # queue, reject, defer, drop: always all of them
    deferred: dict[str, int]  # by rule, most first
    rejected: dict[str, int]
    unchecked: dict[str, int]  # "scanner cause": passed without this check
    p50: float | None
    p95: float | None
    ago: dict[str, float] = {}  # seconds since the last message of each decision


# Worker to supervisor


class InFlight(msgspec.Struct, frozen=True):
    """A connection that a worker has open."""

    incident: str
    stage: str
    seconds: float


class Heartbeat(BusMessage, frozen=True):
    """Sent periodically by a worker's event loop. The first one means that the worker accepts messages."""

    pid: int
    generation: int
    refused: int  # a generation that this worker could not build, or 0
    lag: float  # seconds by which the loop was late
    in_flight: tuple[InFlight, ...]  # the oldest ones
    open: int
    counters: dict[str, int]
    bytes: int = 0  # of the messages in flight
    backends: tuple[BackendHealth, ...] = ()  # as this worker knows them
    orders: int = 0  # number of the overrides that it follows
    waiting: int = 0  # messages that wait for a slot
    short: str = ""  # the exhausted resource because of which it takes no mail: memory, disk


class Event(msgspec.Struct, frozen=True):
    """An event; ``fields`` are those of the log line, ``account`` (JSON) has the details that are too long for it."""

    name: str
    fields: dict[str, Any]
    account: bytes = b""


class EventBatch(BusMessage, frozen=True):
    pid: int
    events: list[Event]


class CacheUpdate(BusMessage, frozen=True):
    """A scan answer for the cache. The supervisor passes it on to all workers."""

    key: CacheKey
    kept: CacheEntry


WorkerReport = Heartbeat | EventBatch | CacheUpdate


# Supervisor to workers


class Overrides(BusMessage, frozen=True):
    """All overrides in force."""

    number: int  # grows with each change
    bypasses: tuple[Bypass, ...] = ()
    drain: Drain | None = None
    allowed: tuple[AllowEntry, ...] = ()


class Configure(BusMessage, frozen=True):
    """The configuration in force."""

    generation: int
    blob: bytes


class BackendNews(BusMessage, frozen=True):
    """The prober's last result for each backend. Sent when one changes, and every second while one is bad."""

    results: tuple[ProbeResult, ...] = ()


WorkerCommand = Configure | Overrides | CacheUpdate | BackendNews


# Command line to supervisor, and back


class Ping(BusMessage, frozen=True):
    pass


class AskStatus(BusMessage, frozen=True):
    pass


class AskFailures(BusMessage, frozen=True):
    """Ask for the failure table in force."""


class AskReload(BusMessage, frozen=True):
    """Reload; ``restart`` also replaces every worker process, each new one before its old one ends."""

    restart: bool = False


class AskCanary(BusMessage, frozen=True):
    """Send every canary sample through the hook now, and report the results."""


class AskBypass(BusMessage, frozen=True):
    """Bypass a scanner for ``seconds``. Replaces an earlier bypass of the same scanner."""

    scanner: Scanner
    seconds: float
    reason: str
    origins: tuple[OriginKind, ...] = ()
    claimed: str = ""  # name that the client claims; recorded, not trusted


class AskBypassEnd(BusMessage, frozen=True):
    """End the bypass of a scanner; of all if none is named."""

    scanner: Scanner | None = None
    claimed: str = ""


class AskDrain(BusMessage, frozen=True):
    """Accept no more mail, for ``seconds`` or until AskResume. Messages in flight are finished."""

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
"""Questions that change something: for root and the daemon's user only. The others are for its group, too."""


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
    """State of one backend, as workers and probes know it. Moments are seconds since 1970."""

    scanner: str
    backend: str
    state: str  # well, failing, unknown (not used yet)
    cause: str = ""  # of the last failure, while it is failing
    detail: str = ""
    since: float = 0.0  # start of the failure; 0 while it is not failing
    failures: int = 0  # in a row, of all workers
    heard: float = 0.0  # its last valid answer, to a probe or a scan; 0: none yet
    outstanding: int = 0
    limit: int = 0
    waiting: int = 0
    wanted: bool = True  # some mail needs this scanner
    meanwhile: dict[str, str] = {}  # origin -> action for its mail that needs this scanner: defer, pass


class CanaryResult(msgspec.Struct, frozen=True):
    """Last result of one canary sample. Moments are seconds since 1970."""

    sample: str
    result: str  # see metrics.CANARY_RESULTS; skipped where its scanner is switched off
    ok: bool | None  # as expected; None: skipped
    text: str  # the result for people
    seconds: float  # from handing it to the hook to the hook's end
    at: float
    last_success: float | None = None  # since the start of the daemon
    runs: dict[str, int] = {}  # results since the start


class Status(BusMessage, frozen=True):
    """State of the daemon."""

    version: str
    pid: int
    state: str  # starting, ready, drained, draining
    generation: int
    uptime: float
    socket: str
    restarts: int  # workers that died or were killed
    malformed: int  # malformed messages dropped
    problems: tuple[str, ...]  # of the last reload; empty if it succeeded
    workers: tuple[WorkerStatus, ...]
    not_recorded: int = 0  # events that the journal lost
    tables: TableState | None = None  # the recipient tables in force
    wanted: int = 0  # workers
    deaths: dict[str, int] = {}  # restarts by reason
    backends: tuple[BackendStatus, ...] = ()
    waiting: int | None = None  # hooks that no worker has accepted yet; None if the kernel does not tell
    waiting_limit: int | None = None
    window: Window | None = None  # the mail of the last 15 minutes
    recent: Window | None = None  # and of the last two
    bypasses: tuple[Bypass, ...] = ()  # in force now
    drain: Drain | None = None
    canary: tuple[CanaryResult, ...] = ()  # empty: off, or no round yet
    poison: tuple[str, ...] = ()  # fingerprints of messages that killed two workers and are isolated
    refused: dict[str, int] = {}  # connections lately refused for a local user's limits, by user
    refused_total: int = 0  # since the start
    allowed: tuple[AllowEntry, ...] = ()  # in force now
    socket_problem: str = ""  # why hooks cannot connect to the socket
    socket_remedy: str = ""  # a command
    orders_problem: str = ""  # why overrides do not survive a restart, or why older ones are not in force


class Failures(BusMessage, frozen=True):
    """``[failure]`` in force."""

    generation: int
    failure: FailureSettings


class CanaryRound(BusMessage, frozen=True):
    """One result for each sample."""

    results: tuple[CanaryResult, ...]
    problem: str = ""  # why nothing was sent; the results are older then


class Done(BusMessage, frozen=True):
    """Result of a reload or ping."""

    ok: bool
    generation: int
    problems: tuple[str, ...] = ()  # with ok: warnings


class Ordered(BusMessage, frozen=True):
    """The overrides in force."""

    bypasses: tuple[Bypass, ...]
    drain: Drain | None
    problems: tuple[str, ...] = ()  # warnings
    in_flight: int = 0  # messages in flight


class Refused(BusMessage, frozen=True):
    """Nothing was done."""

    why: str


Reply = Status | Failures | CanaryRound | Done | Ordered | Refused

T = TypeVar("T")


def encode(message: BusMessage) -> bytes:
    return VERSION + msgspec.msgpack.encode(message)


def decode(data: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    """Raises RemoteProtocolError."""
    if data[:1] != VERSION:
        raise RemoteProtocolError("message of another version")
    try:
        return decoder.decode(memoryview(data)[1:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:  # the last: nested too deeply
        raise RemoteProtocolError(str(e)) from e


REPORTS: msgspec.msgpack.Decoder[WorkerReport] = msgspec.msgpack.Decoder(WorkerReport)
OVERRIDES: msgspec.msgpack.Decoder[Overrides] = msgspec.msgpack.Decoder(Overrides)
COMMANDS: msgspec.msgpack.Decoder[WorkerCommand] = msgspec.msgpack.Decoder(WorkerCommand)
QUESTIONS: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
