"""Concurrency limiter of a scanner: grants slots at its backends by priority, picks the backend, and retries once.

Each backend takes a fixed number of requests at once. A scan that needs a slot waits in the order of
policy/admission.py, so a flood from one source does not delay the others here either. A scan that would have to wait
longer than policy/shedding.py allows fails immediately: BackendError with the cause BUSY. While all backends have
failed for longer than ``patience``, scans fail immediately with the cause of that.

An attempt holds its slot until it ends, even if the caller gave it up earlier and the scan goes on. What results say
about a backend, health.py decides.
"""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, Cause, UnresponsiveError
from contentfilter.model import Scanner, ScanOutcome
from contentfilter.policy.admission import UNLIMITED, AdmissionQueue, Priority, QueueEntry
from contentfilter.policy.shedding import expected_wait, mean_with, patience, what_is_shed
from contentfilter.scanners import health
from contentfilter.scanners.health import PATIENCE, Backend, BackendHealth, ProbeResult, State, choose, describe
from contentfilter.scanners.stream import ClosedError, Owner, Progress, UnreachableError

NEUTRAL = Priority(("", b""), 0, 0)
"""Priority of requests that do not come from mail."""
SLOW = 3.0  # a backend is not unresponsive before it has taken so many times its mean time for a scan

_NO_RETRY = frozenset({Cause.TOO_BIG, Cause.LIMITS})
Ask = Callable[[Address, Progress], Coroutine[Any, Any, ScanOutcome]]
"""One attempt at one backend. Raises BackendError. The limiter sets the time-out."""
Avoided = frozenset[Backend]
_NONE: Avoided = frozenset()


class ScannerLimiter:
    """Slots at the backends of one scanner, ``concurrency`` at each. ``shed`` counts scans that failed as BUSY.

    ``max_wait``: seconds that a scan may wait for a slot. ``patience``: [failure] patience, in seconds.
    """

    def __init__(
        self,
        scanner: Scanner,
        addresses: Sequence[Address],
        concurrency: int,
        *,
        max_wait: float = math.inf,
        shed: Counter[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        patience: float = PATIENCE,
    ) -> None:
        self.backends = tuple(Backend(address, concurrency) for address in addresses)
        self.clock = clock
        self._patience = patience
        self._scanner = scanner
        self._max_wait = max_wait
        self._shed = Counter() if shed is None else shed
        self._turn = 0
        self._mean: float | None = None  # seconds from the first slot of a scan to its answer
        self._slots = max(1, len(addresses) * concurrency)
        self._queue: AdmissionQueue[asyncio.Future[Backend]] = AdmissionQueue(UNLIMITED)  # the backends have limits
        self._retries: deque[tuple[asyncio.Future[Backend], Avoided]] = deque()  # they have had their turn

    async def run(
        self, priority: Priority, ask: Ask, timeout: float, deadline: Deadline, owner: Owner | None = None
    ) -> ScanOutcome:
        """The outcome of ``ask`` at the backend chosen; ``timeout``: seconds for one attempt. Raises BackendError.

        At most two backends take the request: what kills or blocks one scanner must not do so to all of them. A
        lone one is asked again if it closed without a byte. Those that cannot be reached cost no attempt. ``owner``
        takes over attempts that go on when they are given up.
        """
        avoided, taken = _NONE, 0
        backend = self._book_if_free(priority) or await self._acquire(priority, deadline)
        began, started = self.clock(), time.monotonic()
        while True:
            progress = Progress(backend.address, started, owner)  # the outcome's seconds include earlier attempts
            try:
                outcome = await self._attempt(backend, priority, ask, deadline, timeout, progress)
            except BackendError as error:
                taken += not isinstance(error, UnreachableError)
                if taken > 1 or error.cause in _NO_RETRY or deadline.expired():
                    raise
                avoided |= {backend}
                if not self._usable(avoided):
                    if not isinstance(error, ClosedError) or not self._usable(_NONE):
                        raise
                    avoided = _NONE
            else:
                self._mean = mean_with(self._mean, self.clock() - began)
                return outcome
            backend = await self._acquire_again(priority, deadline, avoided)

    async def _attempt(
        self, backend: Backend, priority: Priority, ask: Ask, deadline: Deadline, timeout: float, progress: Progress
    ) -> ScanOutcome:
        """One request, which :meth:`learn` may end. The result is recorded before the slot is released."""
        began, end = self.clock(), deadline.within(timeout).at
        scope = asyncio.timeout_at(end)
        backend.retryable.add(scope)
        try:
            async with scope:
                outcome = await ask(backend.address, progress)
        except BackendError as error:
            self._failed(backend, error, began, deadline)
            raise
        except TimeoutError:
            if scope.when() != end:
                text = f"no sign of life for {self.clock() - backend.silent_since:.0f} s"
                raise UnresponsiveError(backend.cause, str(backend.address), text) from None
            late = progress.timed_out()
            self._failed(backend, late, began, deadline)
            raise late from None
        else:
            backend.answer(self.clock())
            return outcome
        finally:
            backend.retryable.discard(scope)
            if progress.rest is None:
                self._release(backend, priority)
            else:
                backend.given_up += 1
                progress.rest.add_done_callback(partial(self._rest_ended, backend, priority))

    def _rest_ended(self, backend: Backend, priority: Priority, _: object) -> None:
        backend.given_up -= 1
        self._release(backend, priority)

    def describe(self) -> tuple[BackendHealth, ...]:
        """The state of each backend."""
        now, waiting = self.clock(), len(self._queue) + len(self._retries)
        return tuple(describe(self._scanner, backend, now, waiting) for backend in self.backends)

    # What is known of a backend

    def _failed(self, backend: Backend, error: BackendError, began: float, deadline: Deadline) -> None:
        """Record a failure. A time-out that the caller's own deadline caused says less about the backend."""
        now = self.clock()
        if error.cause is not Cause.TIMEOUT and backend.failures and began < backend.last:
            return  # sent before the last failure was known: one fault, counted once
        seconds = now - began if deadline.expired() else math.inf
        absent = isinstance(error, UnreachableError) and error.cause is Cause.DOWN
        backend.fail(error.cause, now, seconds, absent=absent)

    def learn(self, result: ProbeResult) -> None:
        """Take a result of the prober. Requests that an unresponsive backend holds are ended: asked elsewhere, or
        answered by the failure table."""
        for backend in self.backends:
            if str(backend.address) == result.backend:
                backend.learn(result, self.clock())
                if backend.state is State.UNRESPONSIVE and not backend.usable(self.clock(), self._longest()):
                    ending, backend.retryable = backend.retryable, set()
                    for scope in ending:
                        scope.reschedule(asyncio.get_running_loop().time())
        self.hand_out()

    def _longest(self) -> float:
        """Seconds without a sign of life that are no reason to give a backend up: a slow one gets more."""
        return max(self._patience, SLOW * (self._mean or 0.0))

    def _usable(self, avoided: Avoided) -> list[Backend]:
        return health.usable(self.backends, self.clock(), self._longest(), avoided)

    def _choose(self, avoided: Avoided) -> Backend | None:
        return choose(self.backends, self.clock(), self._longest(), avoided)

    # Slots

    def _book_if_free(self, priority: Priority) -> Backend | None:
        """A slot, if one is free and nobody waits."""
        if self._queue or self._retries or (backend := self._choose(_NONE)) is None:
            return None
        self._queue.acquire(priority)
        return self._book(backend)

    async def _acquire(self, priority: Priority, deadline: Deadline) -> Backend:
        self._refuse_if_hopeless(_NONE)
        allowed = patience(self._scanner, large=priority.large, max_wait=self._max_wait)
        wait = expected_wait(self._queue.ahead(priority.rank), self._slots, self._mean or 0.0)
        if wait > min(allowed, deadline.left()):
            raise self._busy(priority, f"a slot would be free in {wait:.0f} s only")
        waiter: asyncio.Future[Backend] = asyncio.get_running_loop().create_future()
        entry = QueueEntry(priority, waiter)
        self._queue.enqueue(entry)
        self.hand_out()
        try:
            async with deadline.within(allowed).timeout():
                return await waiter
        except BaseException as error:
            self._queue.withdraw(entry)
            self._give_back(waiter, priority)
            if isinstance(error, TimeoutError):
                raise self._busy(priority, "no slot was free in time") from None
            raise

    async def _acquire_again(self, priority: Priority, deadline: Deadline, avoided: Avoided) -> Backend:
        """A slot for the next attempt, at a backend that is not ``avoided``."""
        self._refuse_if_hopeless(avoided)
        future: asyncio.Future[Backend] = asyncio.get_running_loop().create_future()
        entry = (future, avoided)
        self._retries.append(entry)
        self.hand_out()
        try:
            async with deadline.timeout():
                backend = await future
        except BaseException as error:
            if entry in self._retries:
                self._retries.remove(entry)
            self._give_back(future, None)
            if isinstance(error, TimeoutError):
                raise self._busy(priority, "all backends busy until the deadline") from None
            raise
        self._queue.acquire(priority)
        return backend

    def _give_back(self, waiter: asyncio.Future[Backend], priority: Priority | None) -> None:
        """Release the slot if it was granted at this very moment."""
        if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            self._release(waiter.result(), priority)

    def _book(self, backend: Backend) -> Backend:
        self._turn += 1
        backend.turn = self._turn
        if not backend.outstanding:
            backend.busy_since = self.clock()
        backend.outstanding += 1
        return backend

    def _release(self, backend: Backend, priority: Priority | None) -> None:
        backend.outstanding -= 1
        if priority is not None:
            self._queue.release(priority)
        if self._queue or self._retries:
            self.hand_out()

    def hand_out(self) -> None:
        """Grant free slots: to retries first, as they have had their turn, then in the order of the queue."""
        for entry in tuple(self._retries):
            future, avoided = entry
            if self._grant(future, avoided):
                self._retries.remove(entry)
        while self._queue and (self._choose(_NONE) or not self._usable(_NONE)):
            waiting = self._queue.next_ready()
            if waiting is None:
                return
            self._grant(waiting.waiter, _NONE)
            if waiting.waiter.cancelled() or waiting.waiter.exception() is not None:
                self._queue.release(waiting.priority)

    def _grant(self, future: asyncio.Future[Backend], avoided: Avoided) -> bool:
        """Settle a waiter if there is a slot for it, or no hope for one."""
        if future.done():
            return True  # cancelled, and about to leave
        try:
            self._refuse_if_hopeless(avoided)
        except BackendError as error:
            future.set_exception(error)
            return True
        backend = self._choose(avoided)
        if backend is None:
            return False
        future.set_result(self._book(backend))
        return True

    def _refuse_if_hopeless(self, avoided: Avoided) -> None:
        """BackendError if there is no backend to wait for."""
        if self._usable(avoided):
            return
        if not self.backends:
            raise BackendError(Cause.DOWN, self._scanner.value, "no backend configured")
        now = self.clock()
        first = min(self.backends, key=lambda b: b.rest_until if b.state is State.OPEN else now)
        text = f"no sign of life for {now - first.silent_since:.0f} s"
        if first.state is State.OPEN:
            text = f"left alone for {first.rest_until - now:.1f} s after {first.failures} failures"
        elif first.state is State.HALF_OPEN:
            text = f"one request tests it after {first.failures} failures"
        raise BackendError(first.cause, str(first.address), text)

    def _busy(self, priority: Priority, detail: str) -> BackendError:
        """BUSY means that others are served. Where all are silent, that is the cause."""
        now = self.clock()
        first = self._usable(_NONE)[:1] or self.backends[:1]
        if first and not first[0].trusted(now):
            return BackendError(first[0].cause, str(first[0].address), detail)
        self._shed[what_is_shed(self._scanner, large=priority.large)] += 1
        return BackendError(Cause.BUSY, self._scanner.value, detail)
