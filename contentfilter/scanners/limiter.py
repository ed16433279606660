"""Whose question a scanner gets next, and whose it does not get at all because it would wait too long.

There are as many places as the backends take questions at once. Who waits for one is served in the order of
policy/admission.py, so a flood from one source does not delay the others here either. Who would have to wait longer
than policy/shedding.py allows is told so at once: BackendError with the cause BUSY.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from contentfilter.deadline import Deadline
from contentfilter.errors import BackendError, Cause
from contentfilter.model import Scanner
from contentfilter.policy.admission import AdmissionQueue, Priority, QueueEntry
from contentfilter.policy.shedding import expected_wait, mean_with, patience, what_is_shed

T = TypeVar("T")


class ScannerLimiter:
    """The line in front of one scanner. ``shed`` counts what was left out, by the words of policy/shedding.py."""

    def __init__(
        self,
        scanner: Scanner,
        places: int,
        max_wait: float,
        shed: Counter[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scanner = scanner
        self._max_wait = max_wait
        self._shed = shed
        self._clock = clock
        self._line: AdmissionQueue[asyncio.Future[None]] = AdmissionQueue(max(1, places))
        self._mean: float | None = None  # seconds that a question keeps its place

    async def run(self, claim: Priority, scan: Callable[[], Awaitable[T]], deadline: Deadline) -> T:
        """What ``scan`` returns, once it is its turn. Raises BackendError."""
        if not self._line.try_acquire(claim):
            await self._wait(claim, deadline)
        began = self._clock()
        try:
            return await scan()
        finally:
            self._mean = mean_with(self._mean, self._clock() - began)
            self._line.release(claim)
            self._hand_out()

    async def _wait(self, claim: Priority, deadline: Deadline) -> None:
        line = self._line
        allowed = patience(self._scanner, large=claim.large, max_wait=self._max_wait)
        wait = expected_wait(line.ahead(claim.rank), line.slots, self._mean or 0.0)
        if wait > min(allowed, deadline.left()):
            raise self._busy(claim, f"a place would be free in {wait:.0f} s only")
        ticket = QueueEntry(claim, asyncio.get_running_loop().create_future())
        line.enqueue(ticket)
        try:
            async with deadline.within(allowed).timeout():
                await ticket.waiter
        except TimeoutError:
            self._give_up(ticket)
            raise self._busy(claim, "no place was free in time") from None
        except BaseException:
            self._give_up(ticket)
            raise

    def _give_up(self, ticket: QueueEntry[asyncio.Future[None]]) -> None:
        """A place that was given in this very moment goes back."""
        if ticket.waiter.done() and not ticket.waiter.cancelled():
            self._line.release(ticket.priority)
        else:
            self._line.withdraw(ticket)
        self._hand_out()

    def _hand_out(self) -> None:
        while (ticket := self._line.next_ready()) is not None:
            if ticket.waiter.done():  # cancelled, and about to give up
                self._line.release(ticket.priority)
            else:
                ticket.waiter.set_result(None)

    def _busy(self, claim: Priority, detail: str) -> BackendError:
        self._shed[what_is_shed(self._scanner, large=claim.large)] += 1
        return BackendError(Cause.BUSY, self._scanner.value, detail)
