"""Circuit breaker of a backend, and the choice between backends. Pure: no clock, no socket, no wait.

Three states besides well, each with its own remedy. *Resting* (open): it failed three times in a row and gets no
requests, longer each time. *Doubtful* (half-open): rested, one request at a time until one is answered. *Silent*
(unresponsive): it accepts connections but answers no PING, as a clamd does that reloads its database; new requests go
elsewhere while another backend is well.
"""

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from contentfilter.endpoint import Address
from contentfilter.errors import Cause

REST_AFTER = 3  # failures in a row
FIRST_REST, LONGEST_REST = 1.0, 10.0  # seconds
FAIR_TRY = 5.0  # a time-out sooner than this says more about the message's budget than about the backend

_NOT_ITS_FAULT = frozenset({Cause.TOO_BIG, Cause.LIMITS, Cause.BUSY, Cause.RELOADING})


@dataclass(frozen=True, slots=True)
class Patience:
    """Limits of a backend's silence, in seconds. Answers to mail count too, so a busy one gets no PING."""

    look: float = 0.5  # between two checks whether a PING is due
    suspect: float = 1.0  # without an answer until a PING: to one that failed or is silent
    quiet: float = 3.0  # … to one that holds requests
    idle: float = 30.0  # … to one that is idle
    short: float = 2.0  # without an answer to PING until no more mail is sent there
    move: float = 10.0  # … until the requests that it holds are sent elsewhere
    long: float = 30.0  # one PING waits so long: its answer says immediately that a reload has ended


USUAL = Patience()


@dataclass(frozen=True, slots=True)
class Health:
    """State of the breaker, by the last answers. Times are seconds of the limiter's clock."""

    failures: int = 0  # in a row
    rest_until: float = 0.0
    cause: Cause = Cause.DOWN  # of the last failure
    since: float = 0.0  # when the first of them was
    last: float = 0.0
    proven: bool = False  # it answered a PING since
    absent: bool = False  # the last failure: nothing listened there

    def resting(self, now: float) -> bool:
        return now < self.rest_until

    def doubtful(self) -> bool:
        """Rested, but not yet proven well: one request at a time."""
        return self.failures >= REST_AFTER

    def failed(self, cause: Cause, now: float, seconds: float, *, absent: bool = False) -> "Health":
        """After a failure that took ``seconds``. ``absent``: the request was never sent.

        Failures during a rest are requests that were already under way: one crash, counted once.
        """
        if cause in _NOT_ITS_FAULT or self.resting(now) or (cause is Cause.TIMEOUT and seconds < FAIR_TRY):
            return self
        failures = self.failures + 1
        beyond = min(failures - REST_AFTER, 16)
        rest = min(FIRST_REST * 2**beyond, LONGEST_REST) if beyond >= 0 else 0.0
        return Health(failures, now + rest, cause, self.since if self.failures else now, now, absent=absent)

    def answered_ping(self) -> "Health":
        """It is there. Whether it can scan only a scan tells, so its failures are not forgotten.

        One that was not there need not rest any longer.
        """
        return replace(self, proven=True, rest_until=0.0 if self.absent else self.rest_until)


@dataclass(frozen=True, slots=True)
class BackendHealth:
    """State of one backend for status and monitoring. Times are seconds that have passed."""

    scanner: str
    backend: str
    state: (
        str  # well, doubtful (it failed, and has not answered since), silent (not even to PING), resting (left alone)
    )
    failures: int  # in a row
    cause: str  # of the last of them; empty without
    since: float  # the first of them
    failed: float  # the last of them
    answered: float | None  # its last sound answer; None: there was none yet
    outstanding: int
    limit: int
    waiting: int  # requests that wait for a slot at any backend of this scanner
    wanted: bool = True  # there is mail that needs this scanner


@dataclass(slots=True, eq=False)
class Backend:
    """One endpoint, its slots and its breaker."""

    address: Address
    limit: int  # concurrent requests
    outstanding: int = 0
    given_up: int = 0  # of those: attempts that go on although the caller stopped waiting
    turn: int = 0  # when it was last chosen: breaks ties, so that equals share the load
    health: Health = field(default_factory=Health)
    watched: bool = False  # PINGs find out about it, so no mail needs to
    heard: float = float("-inf")  # its last answer, or the request that began its silence
    answered: float | None = None  # when it last gave a sound answer
    silent_since: float | None = None  # when it left a PING unanswered
    movable: set[asyncio.Timeout] = field(default_factory=set)  # requests that may still be sent elsewhere

    def free(self) -> bool:
        if self.outstanding >= self.limit:
            return False
        return not self.health.doubtful() or self.outstanding == self.given_up

    @property
    def silent(self) -> bool:
        return self.silent_since is not None

    def trusted(self) -> bool:
        """Mail may go there without paying for the discovery that it is not well."""
        return not self.silent and not (self.watched and self.unproven())

    def unproven(self) -> bool:
        return self.health.doubtful() and not self.health.proven


def due(backend: Backend, now: float, patience: Patience) -> bool:
    """Has it been silent long enough for a PING?"""
    if backend.health.resting(now) and not backend.health.absent:
        return False
    if backend.silent or (backend.health.failures and not backend.health.proven):
        limit = patience.suspect
    else:
        limit = patience.quiet if backend.outstanding else patience.idle
    return now - backend.heard >= limit


def usable(backends: Sequence[Backend], now: float, avoid: Collection[Backend] = ()) -> list[Backend]:
    """Backends that may be asked now or as soon as they have a free slot. Trusted ones only, if there are any."""
    rested = [b for b in backends if b not in avoid and not b.health.resting(now)]
    return [b for b in rested if b.trusted()] or rested


def choose(backends: Sequence[Backend], now: float, avoid: Collection[Backend] = ()) -> Backend | None:
    """The best one with a free slot: proven before unproven, then the least outstanding, then the longest unused."""
    free = [b for b in usable(backends, now, avoid) if b.free()]
    return min(free, key=lambda b: (b.unproven(), b.outstanding, b.turn), default=None)


def describe(service: str, backend: Backend, now: float, silence: Cause, waiting: int) -> BackendHealth:
    """``silence``: the cause reported for a backend that answers no PING."""
    health, silent = backend.health, backend.silent_since
    since, last, cause = (health.since, health.last, health.cause) if silent is None else (silent, silent, silence)
    sick = health.failures > 0 or silent is not None
    state = "resting" if health.resting(now) else "silent" if backend.silent else "doubtful" if sick else "well"
    return BackendHealth(
        scanner=service,
        backend=str(backend.address),
        state=state,
        failures=max(health.failures, int(sick)),
        cause=cause.value if sick else "",
        since=now - since if sick else 0.0,
        failed=now - last if sick else 0.0,
        answered=None if backend.answered is None else now - backend.answered,
        outstanding=backend.outstanding,
        limit=backend.limit,
        waiting=waiting,
    )
