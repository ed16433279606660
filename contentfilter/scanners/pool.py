"""A pool of backends for one service: whom to ask next, how many at once, and when to leave one alone.

Deciding is apart from acting: health.py decides, :class:`Pool` keeps the books and the queue. A message is asked
about once more elsewhere when a backend fails it, and anywhere where nobody took the question. Messages
wait in our own queue, not in the daemon's, and no longer than their deadline. :meth:`Pool.watch` sends
PINGs where there is doubt, so that mail need not find out who is well.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, Cause
from contentfilter.scanners.health import USUAL, Backend, Health, Patience, choose, describe, due, usable
from contentfilter.scanners.health import BackendHealth as BackendHealth
from contentfilter.scanners.stream import ClosedError, UnreachableError

T = TypeVar("T")
Ping = Callable[[Address, Deadline], Awaitable[object]]
"""Returns when the backend has answered. Raises BackendError."""

_NO_RETRY = frozenset({Cause.TOO_BIG, Cause.LIMITS})
Tried = frozenset[Backend]


class BackendPool:
    """Backends of one service, at most ``concurrency`` questions at once for each.

    ``silence``: why a backend answers no PING, in the failure table's terms; a clamd that does not is most likely
    reloading.
    """

    def __init__(
        self,
        service: str,
        addresses: Sequence[Address],
        concurrency: int,
        clock: Callable[[], float] = time.monotonic,
        silence: Cause = Cause.TIMEOUT,
        patience: Patience = USUAL,
    ) -> None:
        self.backends = tuple(Backend(address, concurrency) for address in addresses)
        self._service = service
        self._clock = clock
        self._silence = silence
        self._patience = patience
        self._turn = 0
        self._waiting: deque[tuple[asyncio.Future[Backend], Tried]] = deque()

    async def run(self, ask: Callable[[Address], Awaitable[T]], deadline: Deadline) -> T:
        """What ``ask`` returns for the backend chosen. Raises BackendError.

        Two backends at most take the question: what kills or blocks a scanner must not do so to all of them. A
        lone one is asked again when it closed without a byte. Those that cannot be reached cost no try.
        """
        tried: Tried = frozenset()
        taken = 0
        while True:
            backend = await self._acquire(deadline, tried)
            started = self._clock()
            try:
                answer = await self._asked(ask, backend, movable=not taken)
            except BackendError as error:
                now = self._clock()
                seconds = now - started if deadline.expired() else math.inf  # inf: its own limit ended it
                self._failed(backend, error, started, now, seconds)
                taken += not isinstance(error, UnreachableError)
                if taken > 1 or error.cause in _NO_RETRY or deadline.expired():
                    raise
                tried |= {backend}
                if not usable(self.backends, now, tried):
                    if not isinstance(error, ClosedError) or backend.health.resting(now):
                        raise
                    tried = frozenset()
            else:
                backend.health = Health()
                self._heard(backend)
                backend.answered = backend.heard
                return answer
            finally:
                self._release(backend)

    async def _asked(self, ask: Callable[[Address], Awaitable[T]], backend: Backend, *, movable: bool) -> T:
        """One question, which :meth:`_move` may end where it is ``movable``."""
        scope = asyncio.timeout(None)
        try:
            async with scope:
                if movable:
                    backend.movable.add(scope)
                return await ask(backend.address)
        except TimeoutError:
            if not scope.expired():
                raise
            text = f"no answer to PING for {self._patience.move:g} s; asked elsewhere"
            raise BackendError(self._silence, str(backend.address), text) from None
        except BackendError as error:
            if backend.silent and error.cause is Cause.TIMEOUT and not isinstance(error, UnreachableError):
                raise BackendError(self._silence, error.backend, f"{error.detail}, not even to PING") from error
            raise
        finally:
            backend.movable.discard(scope)

    def describe(self) -> tuple[BackendHealth, ...]:
        """How each backend stands right now."""
        now = self._clock()
        return tuple(describe(self._service, b, now, self._silence, len(self._waiting)) for b in self.backends)

    # Watching

    async def watch(self, ping: Ping) -> None:
        """Until it is cancelled: keep what is known about the backends fresh, at most one PING at a time for each."""
        for backend in self.backends:
            backend.watched = True
        async with asyncio.TaskGroup() as group:
            for backend in self.backends:
                group.create_task(self._watch(backend, ping))

    async def _watch(self, backend: Backend, ping: Ping) -> None:
        while True:
            await asyncio.sleep(self._patience.look)
            if due(backend, self._clock(), self._patience):
                await self.probe(backend, ping)

    async def probe(self, backend: Backend, ping: Ping) -> None:
        """One PING, and what follows from its answer or from none."""
        loop, began = asyncio.get_running_loop(), self._clock()
        alarms = (
            loop.call_later(self._patience.short, self._set_aside, backend, began),
            loop.call_later(self._patience.move, self._move, backend, began),
        )
        try:
            await ping(backend.address, Deadline.after(self._patience.long))
        except BackendError as error:
            if backend.heard <= began:  # else mail was answered meanwhile
                self._failed(backend, error, began, self._clock(), math.inf)
                self._hand_out()  # who waits for it may have to hear that there is nobody
        else:
            backend.health = backend.health.answered_ping()
            self._heard(backend)
            self._hand_out()
        finally:
            for alarm in alarms:
                alarm.cancel()

    def _set_aside(self, backend: Backend, began: float) -> None:
        if backend.heard <= began and not backend.silent:
            backend.silent_since = began
            self._hand_out()

    def _move(self, backend: Backend, began: float) -> None:
        """End the questions that a silent backend holds, if another one will do."""
        others = usable(self.backends, self._clock(), {backend})
        if backend.heard <= began and any(other.trusted() for other in others):
            moving, backend.movable = backend.movable, set()
            for scope in moving:
                scope.reschedule(asyncio.get_running_loop().time())

    def _heard(self, backend: Backend) -> None:
        backend.heard = self._clock()
        backend.silent_since = None

    def _failed(self, backend: Backend, error: BackendError, began: float, now: float, seconds: float) -> None:
        if error.cause is not Cause.TIMEOUT and backend.health.failures and began < backend.health.last:
            return  # put before the last failure was known: one trouble, counted once
        absent = isinstance(error, UnreachableError) and error.cause is Cause.DOWN
        backend.health = backend.health.failed(error.cause, now, seconds, absent=absent)
        if error.cause in (Cause.DOWN, Cause.BAD_REPLY, Cause.MEMORY):
            backend.silent_since = None  # it is not silent but broken
            backend.heard = now

    # The queue

    async def _acquire(self, deadline: Deadline, tried: Tried) -> Backend:
        self._refuse_if_hopeless(tried)
        if not self._waiting:
            backend = choose(self.backends, self._clock(), tried)
            if backend is not None:
                return self._book(backend)
        future: asyncio.Future[Backend] = asyncio.get_running_loop().create_future()
        entry = (future, tried)
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

    def _forget(self, entry: tuple[asyncio.Future[Backend], Tried]) -> None:
        """Give up waiting. A place that was already given goes back."""
        future = entry[0]
        if entry in self._waiting:
            self._waiting.remove(entry)
        elif future.done() and not future.cancelled() and future.exception() is None:
            self._release(future.result())

    def _book(self, backend: Backend) -> Backend:
        self._turn += 1
        backend.turn = self._turn
        if not backend.outstanding and not backend.silent:
            backend.heard = max(backend.heard, self._clock())  # its silence begins with the question
        backend.outstanding += 1
        return backend

    def _release(self, backend: Backend) -> None:
        backend.outstanding -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        """Give free places to those who wait, first come first served."""
        for entry in list(self._waiting):
            future, tried = entry
            if not future.done():  # done: cancelled, and about to take itself away
                try:
                    self._refuse_if_hopeless(tried)
                except BackendError as error:
                    future.set_exception(error)
                else:
                    chosen = choose(self.backends, self._clock(), tried)
                    if chosen is None and not tried:
                        return
                    if chosen is None:
                        continue  # this one waits for another backend; the next may not
                    future.set_result(self._book(chosen))
            self._waiting.remove(entry)

    def _refuse_if_hopeless(self, tried: Tried) -> None:
        """BackendError when there is nobody to wait for: every backend rests."""
        now = self._clock()
        if usable(self.backends, now, tried):
            return
        if not self.backends:
            raise BackendError(Cause.DOWN, self._service, "no backend configured")
        next_up = min(self.backends, key=lambda b: b.health.rest_until)
        rest = max(0.0, next_up.health.rest_until - now)
        text = f"left alone for {rest:.1f} s after {next_up.health.failures} failures"
        raise BackendError(next_up.health.cause, str(next_up.address), text)
