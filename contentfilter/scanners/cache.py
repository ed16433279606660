"""Asks a scanner only what is not known: a kept answer serves the retry, equal messages in flight share one scan.

What is remembered took long, or came after its message was given up: such a scan goes on for a while, and its answer
is there when the client comes again. So mail that is scanned quickly costs nothing: nothing is hashed unless a message
of the same size is in flight, or known.

What is answered from memory: the same scanner with the same settings, the same content (content.py), and
- CLEAN only while clamd says that it still has the database that it had before the scan;
- FOUND only to the same client: a signature may have met its name, and nobody shall have another's mail refused;
- never *unchecked*. Bypasses, allow-list and failure table act on what comes out of here, as on any answer.

In flight a scan is shared within one worker; answers that are kept are told to the others.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Literal

from contentfilter.deadline import Deadline
from contentfilter.errors import BackendError, Cause
from contentfilter.model import Message, ScanOutcome, ScanStatus
from contentfilter.scanners.cache_entries import SURE, CacheEntry, CacheKey, Memory
from contentfilter.scanners.content import Content, Digest
from contentfilter.scanners.stream import Leave, Pending
from contentfilter.settings import ReuseSettings

FRESH = 5.0  # seconds since a scan began in which its database need not be asked for again

Scan = Callable[[Leave | None], Awaitable[ScanOutcome]]


@dataclass(frozen=True, slots=True)
class ScanRequest:
    """What is asked of a scanner about a message, and what its answer depends on."""

    kind: bytes  # scanner, its settings, and what else is told to it
    message: Message
    one_try: float  # seconds that one backend may take
    by_client: bool = False  # does the answer depend on who delivers the message?
    goes_on: bool = True  # may the scan go on when its message is given up?
    database: Callable[[str, Deadline], Awaitable[str]] | None = None  # what a backend has now; None: it has none


@dataclass(slots=True, eq=False)
class InFlightScan:
    """A question that is out."""

    question: ScanRequest
    content: Content
    began: float
    led: bool = True  # somebody still waits for it who has put it
    kept: CacheEntry | None = None  # its answer
    landed: asyncio.Future[CacheEntry | None] | None = None  # made by the first who joins; None in it: no answer


class ScanCache:
    """One in each worker; it outlives configurations. ``tell`` carries what is kept to the other workers."""

    def __init__(
        self,
        tell: Callable[[CacheKey, CacheEntry], None] = lambda key, kept: None,
        ended: Callable[[ScanOutcome | BackendError, float], None] = lambda outcome, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``ended`` hears how a scan that went on came to its end, and after how many seconds."""
        self._tell, self._ended, self._clock = tell, ended, clock
        self._settings = ReuseSettings()
        self._memory = Memory(self._settings.keep, self._settings.entries)
        self._flights: dict[tuple[bytes, int], list[InFlightScan]] = {}
        self._late: dict[asyncio.Task[None], InFlightScan] = {}
        self._chores: set[asyncio.Task[None]] = set()

    def change(self, settings: ReuseSettings) -> None:
        """Other settings hold from now on. What other scanners or other settings of theirs said, nobody asks for."""
        self._settings = settings
        self._memory.change(settings.keep, settings.entries)

    def learn(self, key: CacheKey, kept: CacheEntry) -> None:
        """What another worker has to tell."""
        self._memory.put(key, kept, self._clock())

    async def aclose(self) -> None:
        """Give up what goes on. Nobody asks any more."""
        tasks = [*self._late, *self._chores]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def ask(self, question: ScanRequest, scan: Scan, deadline: Deadline) -> ScanOutcome:
        """The answer, from ``scan`` or not. Raises BackendError, as ``scan`` does."""
        if not self._settings.keep or not question.message.size:
            return await scan(None)
        started = self._clock()
        content = Content(question.message)
        place = question.kind, content.size
        joined: list[InFlightScan] = []
        # for others' scans together; they may hang, and time must be left for a scan of our own
        patience = deadline.within(min(question.one_try, deadline.left() / 2))
        while True:
            flights = self._flights.get(place, ())
            if not flights and not self._memory.may_know(*place):
                break
            digest = await content.digest()
            if digest is None:
                break
            key = _key(question, content, digest)
            kept = self._memory.get(key, self._clock())
            if kept is not None and await self._counts(kept, question, digest, deadline):
                return self._reused(kept, "kept", started)
            flight = await self._equal(question, place, digest, joined)
            if flight is None:
                break
            joined.append(flight)
            shared = await self._join(flight, patience)
            fresh = self._clock() - flight.began < FRESH
            if shared is not None and await self._counts(shared, question, digest, deadline, fresh=fresh):
                return self._reused(shared, "shared", started)
            if deadline.expired():
                raise BackendError(Cause.TIMEOUT, "", "no answer about an equal message in time")
        return await self._lead(question, content, place, scan, started)

    async def _counts(
        self, kept: CacheEntry, question: ScanRequest, digest: Digest, deadline: Deadline, *, fresh: bool = False
    ) -> bool:
        """Whether it is an answer to this question, too."""
        outcome = kept.outcome
        if question.database is None:
            return True
        if outcome.status is ScanStatus.FOUND:
            return kept.client == digest.client
        return fresh or (
            bool(outcome.database) and outcome.database == await question.database(outcome.backend, deadline)
        )

    def _reused(self, kept: CacheEntry, how: Literal["kept", "shared"], started: float) -> ScanOutcome:
        now = self._clock()
        detail = f"answer kept from {now - kept.at:.0f} s ago"
        if how == "shared":
            detail = f"shared with an equal message, asked {now - kept.began:.0f} s ago"
        return replace(kept.outcome, detail=detail, reused=how, seconds=now - started)

    # In flight

    async def _equal(
        self, question: ScanRequest, place: tuple[bytes, int], digest: Digest, joined: list[InFlightScan]
    ) -> InFlightScan | None:
        """Somebody else's question that is this one."""
        for flight in tuple(self._flights.get(place, ())):
            if flight in joined:
                continue
            other = await flight.content.digest()
            same = other is not None and other.core == digest.core
            if same and (not question.by_client or other == digest) and flight in self._flights.get(place, ()):
                return flight
        return None

    async def _join(self, flight: InFlightScan, deadline: Deadline) -> CacheEntry | None:
        """Wait for its answer. None: there is none, or not in time."""
        if flight.landed is None:
            flight.landed = asyncio.get_running_loop().create_future()
        try:
            async with deadline.timeout():
                return await asyncio.shield(flight.landed)
        except TimeoutError:
            return None

    async def _lead(
        self, question: ScanRequest, content: Content, place: tuple[bytes, int], scan: Scan, started: float
    ) -> ScanOutcome:
        flight = InFlightScan(question, content, self._clock())
        self._flights.setdefault(place, []).append(flight)
        try:
            outcome = await scan(lambda pending: self._left(flight, pending))
        except BaseException as error:
            flight.led = False
            if flight.kept is not None and isinstance(error, BackendError):
                return flight.kept.outcome  # a backend that was given up had the answer, and the next one has not
            if flight not in self._late.values():
                self._land(flight, None)
            raise
        kept = self._landed(flight, outcome)
        if kept is not None and kept.at - flight.began >= self._settings.slow:
            hashing = content.hashing()  # now: the message is closed when it is answered
            self._chore(self._remember(flight, kept, hashing))
        return outcome

    def _landed(self, flight: InFlightScan, outcome: ScanOutcome) -> CacheEntry | None:
        """An answer has come: whoever waits for it gets it."""
        kept = None
        if outcome.status in SURE:
            kept = flight.kept = CacheEntry(outcome, b"", flight.began, self._clock())
        self._land(flight, kept)
        for task, late in tuple(self._late.items()):
            if late is flight and task is not asyncio.current_task():
                task.cancel()
        return kept

    def _land(self, flight: InFlightScan, kept: CacheEntry | None) -> None:
        place = flight.question.kind, flight.content.size
        flights = self._flights.get(place, [])
        if flight not in flights:
            return  # another backend was quicker
        flights.remove(flight)
        if not flights:
            del self._flights[place]
        landed = flight.landed
        if landed is None:
            return
        if kept is None:
            landed.set_result(None)
        else:
            self._chore(self._share(flight, kept, landed))

    async def _share(self, flight: InFlightScan, kept: CacheEntry, landed: "asyncio.Future[CacheEntry | None]") -> None:
        digest = await flight.content.digest()  # who has joined has had it made
        landed.set_result(None if digest is None else replace(kept, client=digest.client))

    # What is remembered, and what goes on

    async def _remember(self, flight: InFlightScan, kept: CacheEntry, hashing: "asyncio.Future[Digest | None]") -> None:
        digest = await hashing
        if digest is None:
            return
        key, kept = _key(flight.question, flight.content, digest), replace(kept, client=digest.client)
        self._memory.put(key, kept, self._clock())
        self._tell(key, kept)

    def _left(self, flight: InFlightScan, pending: Pending) -> None:
        """A scan whose message is given up, or which is asked elsewhere by now."""
        settings = self._settings
        if not (flight.question.goes_on and settings.late) or len(self._late) >= settings.late_scans:
            pending.close()
            return
        hashing = flight.content.hashing()
        task = asyncio.get_running_loop().create_task(self._go_on(flight, pending, hashing))
        self._late[task] = flight
        task.add_done_callback(lambda task: self._over(task, flight, pending))

    async def _go_on(self, flight: InFlightScan, pending: Pending, hashing: "asyncio.Future[Digest | None]") -> None:
        try:
            outcome = await pending.finish(Deadline.after(self._settings.late))
        except BackendError as error:
            self._ended(error, self._clock() - flight.began)
            return
        kept = self._landed(flight, outcome)
        if kept is not None:
            await self._remember(flight, kept, hashing)
        self._ended(outcome, self._clock() - flight.began)

    def _over(self, task: asyncio.Task[None], flight: InFlightScan, pending: Pending) -> None:
        pending.close()  # it may not have begun
        del self._late[task]
        if not flight.led and flight not in self._late.values():
            self._land(flight, None)

    def _chore(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)


def _key(question: ScanRequest, content: Content, digest: Digest) -> CacheKey:
    return CacheKey(question.kind, content.size, digest.core + digest.client if question.by_client else digest.core)
