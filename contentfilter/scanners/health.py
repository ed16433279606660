"""Circuit breaker of a backend, and the choice between backends. Pure: no clock, no socket, no wait.

The breaker is passive: it follows the answers that mail gets. What the supervisor's prober knows (monitor/probe.py)
reaches it as :class:`ProbeResult`; without fresh results the breaker works alone. Times are seconds of the monotonic
clock, which all processes of a machine share.
"""

import asyncio
import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from contentfilter.endpoint import Address
from contentfilter.errors import Cause
from contentfilter.model import Scanner


class State(enum.Enum):
    """State of a breaker."""

    CLOSED = "closed"  # requests flow
    OPEN = "open"  # it failed several times in a row: no requests, longer each time
    HALF_OPEN = "half_open"  # one request at a time, until one is answered
    UNRESPONSIVE = "unresponsive"  # neither mail nor the prober gets an answer; other backends are preferred


class Event(enum.Enum):
    """What changes the state of a breaker."""

    ANSWERED = enum.auto()  # a valid answer to a scan
    TRIPPED = enum.auto()  # the OPEN_AFTER-th failure in a row, or a later one
    SILENT = enum.auto()  # the prober waits in vain, and no scan is answered
    FOUND = enum.auto()  # the prober got an answer
    RETRY = enum.auto()  # the rest is over, or a result of the prober has expired


TRANSITIONS = {
    (State.CLOSED, Event.TRIPPED): State.OPEN,
    (State.CLOSED, Event.SILENT): State.UNRESPONSIVE,
    (State.OPEN, Event.ANSWERED): State.CLOSED,
    (State.OPEN, Event.RETRY): State.HALF_OPEN,
    (State.HALF_OPEN, Event.ANSWERED): State.CLOSED,
    (State.HALF_OPEN, Event.TRIPPED): State.OPEN,
    (State.HALF_OPEN, Event.SILENT): State.UNRESPONSIVE,
    (State.UNRESPONSIVE, Event.ANSWERED): State.CLOSED,
    (State.UNRESPONSIVE, Event.TRIPPED): State.OPEN,
    (State.UNRESPONSIVE, Event.FOUND): State.CLOSED,
    (State.UNRESPONSIVE, Event.RETRY): State.HALF_OPEN,
}
"""Pairs that are not listed change nothing."""

OPEN_AFTER = 3  # failures in a row
FIRST_REST, LONGEST_REST = 1.0, 10.0  # seconds
FAIR_TRY = 5.0  # a time-out sooner than this says more about the message's budget than about the backend
PATIENCE = 10.0  # default of [failure] patience
SILENT_AFTER = 2.0  # seconds without a sign of life, while a probe waits for its answer
EXPIRES = 10.0  # seconds for which a result of the prober counts; bad ones are repeated every second

_NOT_ITS_FAULT = frozenset({Cause.TOO_BIG, Cause.LIMITS, Cause.BUSY, Cause.RELOADING})
_SILENCE = frozenset({Cause.TIMEOUT, Cause.BUSY})


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The prober's last result for one backend."""

    scanner: Scanner
    backend: str
    asked: float  # when the last probe began
    answered: float = 0.0  # the last valid answer, to a probe or to mail of any worker; 0: none
    cause: Cause | None = None  # None: the probe was answered
    absent: bool = False  # nothing listens there
    database: str = ""  # that clamd has; empty: unknown


@dataclass(frozen=True, slots=True)
class BackendHealth:
    """State of one backend for status and monitoring. Times are seconds that have passed."""

    scanner: str
    backend: str
    state: str  # a value of State
    failures: int  # in a row
    cause: str  # of the last of them; empty without
    since: float  # the first of them
    failed: float  # the last of them
    answered: float | None  # its last valid answer; None: there was none yet
    outstanding: int
    limit: int
    waiting: int  # requests that wait for a slot at any backend of this scanner
    wanted: bool = True  # there is mail that needs this scanner
    quiet: float = 0.0  # since its last sign of life, or since the request that began its silence


@dataclass(slots=True, eq=False)
class Backend:
    """One endpoint: its slots and its breaker."""

    address: Address
    limit: int  # concurrent requests
    outstanding: int = 0
    given_up: int = 0  # of those: requests that go on although the caller stopped waiting
    turn: int = 0  # when it was last chosen: breaks ties, so that equals share the load
    retryable: set[asyncio.Timeout] = field(default_factory=set)  # its requests, to be ended when it is unresponsive
    state: State = State.CLOSED
    failures: int = 0  # in a row
    cause: Cause = Cause.DOWN  # of the last one
    since: float = 0.0  # the first one
    last: float = 0.0
    rest_until: float = 0.0  # while open
    absent: bool = False  # the last failure: nothing listened there
    heard: float = float("-inf")  # its last sign of life
    busy_since: float = float("inf")  # since then it has had requests all the time
    silent_since: float = 0.0  # while unresponsive
    answered: float | None = None  # its last valid answer to a scan
    probed: float = float("-inf")  # beginning of the last probe that is known
    expires: float = float("-inf")  # until then the prober's result counts
    proven: bool = False  # it has answered a probe since its last failure

    def _after(self, event: Event) -> None:
        self.state = TRANSITIONS.get((self.state, event), self.state)

    def refresh(self, now: float) -> None:
        """Follow the clock."""
        if self.state is State.OPEN:
            if now >= self.rest_until:
                self._after(Event.RETRY)
        elif self.state is State.UNRESPONSIVE and now >= self.expires:
            self._after(Event.RETRY)

    def answer(self, now: float) -> None:
        """After a valid answer to a scan."""
        self.heard = self.answered = now
        if self.failures or self.state is not State.CLOSED:
            self._after(Event.ANSWERED)
            self.failures = 0

    def fail(self, cause: Cause, now: float, seconds: float, *, absent: bool = False) -> None:
        """After a failure that took ``seconds``. ``absent``: the request was never sent.

        Failures while it is open are requests that were already under way: one crash, counted once.
        """
        self.refresh(now)
        if cause in _NOT_ITS_FAULT or self.state is State.OPEN or (cause is Cause.TIMEOUT and seconds < FAIR_TRY):
            return
        if cause is not Cause.TIMEOUT:
            self.heard = now  # it is not silent but broken
        if not self.failures:
            self.since = now
        self.failures, self.cause, self.last, self.absent, self.proven = self.failures + 1, cause, now, absent, False
        beyond = min(self.failures - OPEN_AFTER, 16)
        if beyond >= 0:
            self.rest_until = now + min(FIRST_REST * 2**beyond, LONGEST_REST)
            self._after(Event.TRIPPED)

    def learn(self, result: ProbeResult, now: float) -> None:
        """Take a result of the prober. Only a scan proves that it can scan, so failures are not forgotten."""
        self.refresh(now)
        news, self.probed = result.asked > self.probed, max(self.probed, result.asked)
        self.expires = now + EXPIRES
        if result.cause is None:
            self.proven = True
            self.heard = max(self.heard, result.answered)
            if self.state is State.UNRESPONSIVE:
                self._after(Event.RETRY if self.failures >= OPEN_AFTER else Event.FOUND)
            elif self.absent:
                self._after(Event.RETRY)  # one that was not there need not rest any longer
        elif result.cause in _SILENCE:
            self._unanswered(result, now)
        elif news and self.heard <= result.asked:
            self.fail(result.cause, now, FAIR_TRY, absent=result.absent)

    def _unanswered(self, result: ProbeResult, now: float) -> None:
        """A probe waits for its answer. What mail gets meanwhile counts as well: a busy spamd has no child for it."""
        began = min(result.asked, self.busy_since) if self.outstanding else result.asked
        since = max(self.heard, result.answered, began)
        if now - since < SILENT_AFTER:
            if self.state is State.UNRESPONSIVE:
                self._after(Event.RETRY if self.failures >= OPEN_AFTER else Event.FOUND)
        elif self.state is State.UNRESPONSIVE:
            self.silent_since = max(self.silent_since, self.heard, result.answered)
        elif self.state is not State.OPEN:
            self._after(Event.SILENT)
            self.silent_since, self.cause = since, result.cause or Cause.TIMEOUT

    def free(self) -> bool:
        if self.outstanding >= self.limit:
            return False
        return self.state is not State.HALF_OPEN or self.outstanding == self.given_up

    def usable(self, now: float, patience: float) -> bool:
        """True if it may be asked now, or is worth waiting for: it has not failed for longer than ``patience``."""
        self.refresh(now)
        if self.state is State.UNRESPONSIVE:
            return now - self.silent_since < patience
        if self.state is State.HALF_OPEN:
            return self.free() or now - self.since < patience
        return self.state is State.CLOSED

    def trusted(self, now: float) -> bool:
        """True if mail need not find out that it is not well."""
        return self.state is State.CLOSED or (self.state is State.HALF_OPEN and (self.proven or now >= self.expires))

    def unproven(self) -> bool:
        return self.state is State.HALF_OPEN and not self.proven


def usable(
    backends: Sequence[Backend], now: float, patience: float = PATIENCE, avoid: Collection[Backend] = ()
) -> list[Backend]:
    """Backends that may be asked now or soon. Trusted ones only, if there are any."""
    found = [b for b in backends if b not in avoid and b.usable(now, patience)]
    return [b for b in found if b.trusted(now)] or found


def choose(
    backends: Sequence[Backend], now: float, patience: float = PATIENCE, avoid: Collection[Backend] = ()
) -> Backend | None:
    """The best one with a free slot: proven before unproven, then the least outstanding, then the longest unused."""
    if len(backends) == 1 and not avoid and (only := backends[0]).state is State.CLOSED:
        return only if only.free() else None
    free = [b for b in usable(backends, now, patience, avoid) if b.free()]
    return min(free, key=lambda b: (b.unproven(), b.outstanding, b.turn), default=None)


def describe(scanner: Scanner, backend: Backend, now: float, waiting: int) -> BackendHealth:
    """Its state for the heartbeat."""
    backend.refresh(now)
    silent = backend.state is State.UNRESPONSIVE and not backend.failures
    since, last = (backend.silent_since, backend.silent_since) if silent else (backend.since, backend.last)
    sick = silent or backend.failures > 0
    return BackendHealth(
        scanner=scanner.value,
        backend=str(backend.address),
        state=backend.state.value,
        failures=max(backend.failures, int(sick)),
        cause=backend.cause.value if sick else "",
        since=now - since if sick else 0.0,
        failed=now - last if sick else 0.0,
        answered=None if backend.answered is None else now - backend.answered,
        outstanding=backend.outstanding,
        limit=backend.limit,
        waiting=waiting,
        quiet=max(0.0, now - max(backend.heard, backend.busy_since)) if backend.outstanding else 0.0,
    )
