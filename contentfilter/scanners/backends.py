"""A pool of backends for one service: whom to ask next, how many at once, and when to leave one alone.

Deciding is apart from acting: :class:`Health` and :func:`choose` are pure, :class:`Pool` keeps the
books and the queue. A backend that fails three times in a row rests; after its rest one question
tries it again (half-open). Messages wait in our own queue, not in the daemon's, and no longer
than their deadline.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from contentfilter.deadline import Deadline
from contentfilter.errors import BackendError, Cause
from contentfilter.scanners.stream import Address, ClosedError

T = TypeVar("T")

REST_AFTER = 3  # failures in a row
FIRST_REST, LONGEST_REST = 1.0, 10.0  # seconds
FAIR_TRY = 5.0  # a time-out sooner than this says more about the message's budget than about the backend

_NOT_ITS_FAULT = frozenset({Cause.TOO_BIG, Cause.LIMITS, Cause.BUSY})
_NO_RETRY = frozenset({Cause.TOO_BIG, Cause.LIMITS})


@dataclass(frozen=True, slots=True)
class Health:
    """What the last answers say about a backend. Times are seconds of the pool's clock."""

    failures: int = 0  # in a row
    rest_until: float = 0.0
    cause: Cause = Cause.DOWN  # of the last failure
    since: float = 0.0  # when the first of them was
    last: float = 0.0

    def resting(self, now: float) -> bool:
        return now < self.rest_until

    def doubtful(self) -> bool:
        """Rested, but not yet proven well: one question at a time."""
        return self.failures >= REST_AFTER

    def failed(self, cause: Cause, now: float, seconds: float) -> "Health":
        """After a failure that took ``seconds``.

        Failures during a rest are questions that were already under way: one crash, counted once.
        """
        if cause in _NOT_ITS_FAULT or self.resting(now) or (cause is Cause.TIMEOUT and seconds < FAIR_TRY):
            return self
        failures = self.failures + 1
        beyond = min(failures - REST_AFTER, 16)
        rest = min(FIRST_REST * 2**beyond, LONGEST_REST) if beyond >= 0 else 0.0
        return Health(failures, now + rest, cause, self.since if self.failures else now, now)


@dataclass(frozen=True, slots=True)
class BackendHealth:
    """How one backend stands, for whoever watches. Times are seconds that have passed."""

    scanner: str
    backend: str
    state: str  # well, doubtful (it failed, and has not answered since), resting (nobody asks it)
    failures: int  # in a row
    cause: str  # of the last of them; empty without
    since: float  # the first of them
    failed: float  # the last of them
    answered: float | None  # its last sound answer; None: there was none yet
    outstanding: int
    limit: int
    waiting: int  # questions that wait for a place at any backend of this scanner
    wanted: bool = True  # there is mail that needs this scanner


@dataclass(slots=True, eq=False)
class Backend:
    """One endpoint and the state of our dealings with it."""

    address: Address
    limit: int  # questions at once
    outstanding: int = 0
    turn: int = 0  # when it was last chosen: breaks ties, so that equals share the load
    health: Health = field(default_factory=Health)
    answered: float | None = None  # when it last gave a sound answer

    def free(self) -> bool:
        return self.outstanding < (1 if self.health.doubtful() else self.limit)


def usable(backends: Sequence[Backend], now: float, avoid: Backend | None = None) -> list[Backend]:
    """Those that may be asked now or as soon as they have room."""
    return [b for b in backends if b is not avoid and not b.health.resting(now)]


def choose(backends: Sequence[Backend], now: float, avoid: Backend | None = None) -> Backend | None:
    """The best one with room: healthy before doubtful, then the least outstanding, then the longest unused."""
    free = [b for b in usable(backends, now, avoid) if b.free()]
    return min(free, key=lambda b: (b.health.doubtful(), b.outstanding, b.turn), default=None)


class Pool:
    """Backends of one service, at most ``concurrency`` questions at once for each."""

    def __init__(
        self, service: str, addresses: Sequence[Address], concurrency: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.backends = tuple(Backend(address, concurrency) for address in addresses)
        self._service = service
        self._clock = clock
        self._turn = 0
        self._waiting: deque[tuple[asyncio.Future[Backend], Backend | None]] = deque()

    async def run(self, ask: Callable[[Address], Awaitable[T]], deadline: Deadline) -> T:
        """What ``ask`` returns for the backend chosen. Raises BackendError.

        One retry within the deadline: on another backend, or on the same one when it closed without a byte.
        """
        retried = False
        avoid: Backend | None = None
        while True:
            backend = await self._acquire(deadline, avoid)
            started = self._clock()
            try:
                answer = await ask(backend.address)
            except BackendError as error:
                now = self._clock()
                backend.health = backend.health.failed(error.cause, now, now - started)
                if retried or error.cause in _NO_RETRY or deadline.expired():
                    raise
                avoid = backend if usable(self.backends, now, avoid=backend) else None
                if avoid is None and (not isinstance(error, ClosedError) or backend.health.resting(now)):
                    raise
                retried = True
            else:
                backend.health = Health()
                backend.answered = self._clock()
                return answer
            finally:
                self._release(backend)

    def describe(self) -> tuple[BackendHealth, ...]:
        """How each backend stands right now."""
        now = self._clock()
        return tuple(self._described(backend, now) for backend in self.backends)

    def _described(self, backend: Backend, now: float) -> BackendHealth:
        health = backend.health
        sick = health.failures > 0
        return BackendHealth(
            scanner=self._service,
            backend=str(backend.address),
            state="resting" if health.resting(now) else "doubtful" if sick else "well",
            failures=health.failures,
            cause=health.cause.value if sick else "",
            since=now - health.since if sick else 0.0,
            failed=now - health.last if sick else 0.0,
            answered=None if backend.answered is None else now - backend.answered,
            outstanding=backend.outstanding,
            limit=backend.limit,
            waiting=len(self._waiting),
        )

    async def _acquire(self, deadline: Deadline, avoid: Backend | None) -> Backend:
        self._refuse_if_hopeless(avoid)
        if not self._waiting:
            backend = choose(self.backends, self._clock(), avoid)
            if backend is not None:
                return self._book(backend)
        future: asyncio.Future[Backend] = asyncio.get_running_loop().create_future()
        entry = (future, avoid)
        self._waiting.append(entry)
        self._hand_out()  # those before us may all wait for another backend than we
        try:
            async with deadline.timeout():
                return await future
        except TimeoutError:
            self._forget(entry)
            raise BackendError(Cause.BUSY, self._service, "all backends busy until the deadline") from None
        except BaseException:
            self._forget(entry)
            raise

    def _forget(self, entry: tuple[asyncio.Future[Backend], Backend | None]) -> None:
        """Give up waiting. A place that was already given goes back."""
        future = entry[0]
        if entry in self._waiting:
            self._waiting.remove(entry)
        elif future.done() and not future.cancelled() and future.exception() is None:
            self._release(future.result())

    def _book(self, backend: Backend) -> Backend:
        self._turn += 1
        backend.turn = self._turn
        backend.outstanding += 1
        return backend

    def _release(self, backend: Backend) -> None:
        backend.outstanding -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        """Give free places to those who wait, first come first served."""
        for entry in list(self._waiting):
            future, avoid = entry
            if not future.done():  # done: cancelled, and about to take itself away
                try:
                    self._refuse_if_hopeless(avoid)
                except BackendError as error:
                    future.set_exception(error)
                else:
                    chosen = choose(self.backends, self._clock(), avoid)
                    if chosen is None and avoid is None:
                        return
                    if chosen is None:
                        continue  # this one waits for another backend; the next may not
                    future.set_result(self._book(chosen))
            self._waiting.remove(entry)

    def _refuse_if_hopeless(self, avoid: Backend | None) -> None:
        """BackendError when there is nobody to wait for: every backend rests."""
        now = self._clock()
        if usable(self.backends, now, avoid):
            return
        if not self.backends:
            raise BackendError(Cause.DOWN, self._service, "no backend configured")
        next_up = min(self.backends, key=lambda b: b.health.rest_until)
        rest = max(0.0, next_up.health.rest_until - now)
        text = f"left alone for {rest:.1f} s after {next_up.health.failures} failures"
        raise BackendError(next_up.health.cause, str(next_up.address), text)
