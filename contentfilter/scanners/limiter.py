"""Concurrency limiter of a scanner: grants slots at its backends by priority, picks the backend, and retries once.

Each backend takes a fixed number of requests at once. A scan that needs a slot waits in the order of
policy/admission.py, so a flood from one source does not delay the others here either. A scan that would have to wait
longer than policy/shedding.py allows fails immediately: BackendError with the cause BUSY.

A slot belongs to an attempt, which is a task: it is released when the attempt ends, even if the caller gave it up
earlier and the scan goes on. What the results of attempts say about a backend, health.py decides.
"""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, Cause
from contentfilter.model import Scanner, ScanOutcome
from contentfilter.policy.admission import UNLIMITED, AdmissionQueue, Priority, QueueEntry
from contentfilter.policy.shedding import expected_wait, mean_with, patience, what_is_shed
from contentfilter.scanners.health import (
    USUAL,
    Backend,
    BackendHealth,
    Health,
    Patience,
    choose,
    describe,
    usable,
)
from contentfilter.scanners.stream import ClosedError, Progress, UnreachableError

NEUTRAL = Priority(("", b""), 0, 0)
"""Priority of requests that do not come from mail."""

_NO_RETRY = frozenset({Cause.TOO_BIG, Cause.LIMITS})
Ask = Callable[[Address, Progress], Coroutine[Any, Any, ScanOutcome]]
"""One attempt at one backend. Raises BackendError. The limiter sets the time-out."""
Avoided = frozenset[Backend]


class Attempts(Protocol):
    """Owner of the tasks that attempts run in."""

    def start(self, work: Coroutine[Any, Any, ScanOutcome], progress: Progress) -> asyncio.Task[ScanOutcome]: ...

    async def give_up(self, task: asyncio.Task[ScanOutcome]) -> None:
        """The caller does not wait for the attempt any longer: cancel it, or let it go on."""
        ...


class Cancelling:
    """Attempts that end when they are given up."""

    def start(self, work: Coroutine[Any, Any, ScanOutcome], progress: Progress) -> asyncio.Task[ScanOutcome]:
        return asyncio.create_task(work)

    async def give_up(self, task: asyncio.Task[ScanOutcome]) -> None:
        await cancelled(task)


async def cancelled(task: asyncio.Task[Any]) -> None:
    """Cancel ``task`` and wait until it has released what it holds."""
    task.cancel()
    await asyncio.wait({task})


@dataclass(slots=True, eq=False)
class _Attempt:
    """The limiter's record of a slot in use."""

    backend: Backend
    priority: Priority
    began: float
    deadline: Deadline  # of the caller, all attempts included
    progress: Progress
    over: asyncio.Future[None]  # what the caller waits for; a plain future costs less than asyncio.shield
    given_up: bool = False


class ScannerLimiter:
    """Slots at the backends of one scanner, ``concurrency`` at each. ``shed`` counts scans that failed as BUSY.

    ``max_wait``: seconds that a scan may wait for a slot. ``silence``: the cause reported for a backend that answers
    no PING; such a clamd is most likely reloading its database.
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
        silence: Cause = Cause.TIMEOUT,
        patience: Patience = USUAL,
    ) -> None:
        self.backends = tuple(Backend(address, concurrency) for address in addresses)
        self.clock = clock
        self.patience = patience
        self._scanner = scanner
        self._max_wait = max_wait
        self._shed = Counter() if shed is None else shed
        self._silence = silence
        self._turn = 0
        self._mean: float | None = None  # seconds that a scan needs once it has a slot
        self._slots = max(1, len(addresses) * concurrency)
        self._queue: AdmissionQueue[asyncio.Future[Backend]] = AdmissionQueue(UNLIMITED)  # the backends have limits
        self._retries: deque[tuple[asyncio.Future[Backend], Avoided]] = deque()  # they have had their turn

    async def run(
        self, priority: Priority, ask: Ask, timeout: float, deadline: Deadline, attempts: Attempts | None = None
    ) -> ScanOutcome:
        """The outcome of ``ask`` at the backend chosen; ``timeout``: seconds for one attempt. Raises BackendError.

        At most two backends take the request: what kills or blocks one scanner must not do so to all of them. A
        lone one is asked again if it closed without a byte. Those that cannot be reached cost no attempt.
        """
        owner = Cancelling() if attempts is None else attempts
        avoided: Avoided = frozenset()
        taken = 0
        backend = await self._acquire(priority, deadline)
        began, started = self.clock(), time.monotonic()
        try:
            while True:
                progress = Progress(backend.address, started)  # the outcome's seconds include earlier attempts
                over = asyncio.get_running_loop().create_future()
                attempt = _Attempt(backend, priority, self.clock(), deadline, progress, over)
                try:
                    return await self._attempt(attempt, ask, deadline.within(timeout), owner, movable=not taken)
                except BackendError as error:
                    taken += not isinstance(error, UnreachableError)
                    if taken > 1 or error.cause in _NO_RETRY or deadline.expired():
                        raise
                    avoided |= {backend}
                    if not usable(self.backends, self.clock(), avoided):
                        if not isinstance(error, ClosedError) or backend.health.resting(self.clock()):
                            raise
                        avoided = frozenset()
                backend = await self._acquire_again(priority, deadline, avoided)
        finally:
            self._mean = mean_with(self._mean, self.clock() - began)

    async def _attempt(
        self, attempt: _Attempt, ask: Ask, end: Deadline, attempts: Attempts, *, movable: bool
    ) -> ScanOutcome:
        """One request, which :meth:`move` may end if it is ``movable``."""
        backend, progress = attempt.backend, attempt.progress
        task = attempts.start(ask(backend.address, progress), progress)
        task.add_done_callback(partial(self._ended, attempt))
        scope = asyncio.timeout_at(end.at)
        try:
            async with scope:
                if movable:
                    backend.movable.add(scope)
                await attempt.over
            return task.result()
        except TimeoutError:
            if task.done():
                return task.result()  # at this very moment
            error = progress.timed_out()
            if scope.when() != end.at:
                text = f"no answer to PING for {self.patience.move:g} s; asked elsewhere"
                error = BackendError(self._silence, str(backend.address), text)
            elif backend.silent and progress.connected:
                error = BackendError(self._silence, str(backend.address), f"{error.detail}, not even to PING")
            self._failed(attempt, error)
            raise error from None
        finally:
            backend.movable.discard(scope)
            if not task.done():
                attempt.given_up = True
                backend.given_up += 1
                await attempts.give_up(task)

    def _ended(self, attempt: _Attempt, task: asyncio.Task[ScanOutcome]) -> None:
        """Record the result, then release the slot."""
        backend = attempt.backend
        if attempt.given_up:
            backend.given_up -= 1
        elif not task.cancelled():
            error = task.exception()
            if isinstance(error, BackendError):
                self._failed(attempt, error)
            elif error is None:
                backend.health = Health()
                self.heard(backend)
                backend.answered = backend.heard
        if not attempt.over.done():
            attempt.over.set_result(None)
        self._release(backend, attempt.priority)

    def describe(self) -> tuple[BackendHealth, ...]:
        """The state of each backend."""
        now, waiting = self.clock(), len(self._queue) + len(self._retries)
        return tuple(describe(self._scanner.value, b, now, self._silence, waiting) for b in self.backends)

    # What is known of a backend

    def _failed(self, attempt: _Attempt, error: BackendError) -> None:
        """A time-out that the caller's own deadline caused says less about the backend than one of the attempt."""
        seconds = self.clock() - attempt.began if attempt.deadline.expired() else math.inf
        self.failed(attempt.backend, error, attempt.began, seconds)

    def failed(self, backend: Backend, error: BackendError, began: float, seconds: float) -> None:
        """Record a failure after ``seconds``, of a request sent at ``began``."""
        now = self.clock()
        if error.cause is not Cause.TIMEOUT and backend.health.failures and began < backend.health.last:
            return  # sent before the last failure was known: one fault, counted once
        absent = isinstance(error, UnreachableError) and error.cause is Cause.DOWN
        backend.health = backend.health.failed(error.cause, now, seconds, absent=absent)
        if error.cause in (Cause.DOWN, Cause.BAD_REPLY, Cause.MEMORY):
            backend.silent_since = None  # it is not silent but broken
            backend.heard = now

    def heard(self, backend: Backend) -> None:
        backend.heard = self.clock()
        backend.silent_since = None

    def move(self, backend: Backend, began: float) -> None:
        """End the requests of a backend that has been silent since ``began``, if another one will do."""
        others = usable(self.backends, self.clock(), {backend})
        if backend.heard <= began and any(other.trusted() for other in others):
            moving, backend.movable = backend.movable, set()
            for scope in moving:
                scope.reschedule(asyncio.get_running_loop().time())

    # Slots

    async def _acquire(self, priority: Priority, deadline: Deadline) -> Backend:
        self._refuse_if_hopeless(frozenset())
        if not self._queue and not self._retries:
            backend = choose(self.backends, self.clock())
            if backend is not None:
                self._queue.acquire(priority)
                return self._book(backend)
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
        except TimeoutError:
            self._queue.withdraw(entry)
            self._give_back(waiter, priority)
            raise self._busy(priority, "no slot was free in time") from None
        except BaseException:
            self._queue.withdraw(entry)
            self._give_back(waiter, priority)
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
        if not backend.outstanding and not backend.silent:
            backend.heard = max(backend.heard, self.clock())  # its silence begins with the request
        backend.outstanding += 1
        return backend

    def _release(self, backend: Backend, priority: Priority | None) -> None:
        backend.outstanding -= 1
        if priority is not None:
            self._queue.release(priority)
        self.hand_out()

    def hand_out(self) -> None:
        """Grant free slots: to retries first, as they have had their turn, then in the order of the queue."""
        for entry in tuple(self._retries):
            future, avoided = entry
            if self._grant(future, avoided):
                self._retries.remove(entry)
        while self._queue and (choose(self.backends, self.clock()) or not usable(self.backends, self.clock())):
            waiting = self._queue.next_ready()
            if waiting is None:
                return
            self._grant(waiting.waiter, frozenset())
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
        backend = choose(self.backends, self.clock(), avoided)
        if backend is None:
            return False
        future.set_result(self._book(backend))
        return True

    def _refuse_if_hopeless(self, avoided: Avoided) -> None:
        """BackendError if there is no backend to wait for: each is left alone for a while."""
        now = self.clock()
        if usable(self.backends, now, avoided):
            return
        if not self.backends:
            raise BackendError(Cause.DOWN, self._scanner.value, "no backend configured")
        next_up = min(self.backends, key=lambda b: b.health.rest_until)
        rest = max(0.0, next_up.health.rest_until - now)
        text = f"left alone for {rest:.1f} s after {next_up.health.failures} failures"
        raise BackendError(next_up.health.cause, str(next_up.address), text)

    def _busy(self, priority: Priority, detail: str) -> BackendError:
        self._shed[what_is_shed(self._scanner, large=priority.large)] += 1
        return BackendError(Cause.BUSY, self._scanner.value, detail)
