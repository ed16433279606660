"""Scan cache: answers that are kept for the retry, and a single scan for equal messages in flight.

An answer is kept if it took long, or came after its message was given up: such a scan goes on for a while, and its
answer is there when the client retries. So mail that is scanned quickly costs nothing: nothing is hashed unless a
message of the same size is in flight, or known.

An answer from memory requires the same scanner with the same settings, the same content (content.py), and
- CLEAN only while clamd says that it still has the database that it had before the scan;
- FOUND only to the same client: a signature may have matched its name, and no mail is refused for another client's;
- never *unchecked*. Bypasses, allow-list and failure table apply to what comes out of here, as to any answer.

In flight a scan is shared within one worker; answers that are kept are sent to the other workers.

Theory. The message that began a scan waits for it in its own task; equal messages wait for a future. When the message
that began it leaves, the cache takes over the attempts that the backend has received as a whole: each becomes a task,
which holds its slot until it ends. While anyone waits they go on. When the last one has gone, they go on for [reuse]
late seconds if that lets a retry find the answer, and if not too many do; otherwise they are cancelled.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from contentfilter.deadline import Deadline
from contentfilter.errors import BackendError, Cause, UnresponsiveError
from contentfilter.model import Message, ScanOutcome, ScanStatus
from contentfilter.scanners.cache_entries import SURE, CacheEntry, CacheKey, Memory
from contentfilter.scanners.content import Content, Digest
from contentfilter.scanners.stream import Owner, Progress
from contentfilter.settings import ReuseSettings

FRESH = 5.0  # seconds since a scan began in which its database need not be asked for again

Scan = Callable[[Owner | None], Awaitable[ScanOutcome]]
"""The scan, with the owner of attempts that go on; None: they end with it. Raises BackendError."""
Place = tuple[bytes, int]  # kind and size: only such requests can be equal


@dataclass(frozen=True, slots=True)
class ScanRequest:
    """A scan of a message, and what its answer depends on."""

    kind: bytes  # scanner, its settings, and everything else that it is told
    message: Message
    timeout: float  # seconds for one attempt
    reusable: bool = True  # False: always scan
    by_client: bool = False  # does the answer depend on who delivers the message?
    goes_on: bool = True  # may the scan go on when its message is given up?
    database: Callable[[str, Deadline], Awaitable[str]] | None = None  # what a backend has now; None: it has none


@dataclass(slots=True, eq=False)
class _Abandoned:
    """An attempt that its message no longer waits for."""

    timer: asyncio.TimerHandle | None = None
    expired: bool = False  # the timer ended it


@dataclass(slots=True, eq=False)
class InFlightScan:
    """A scan in progress, and the owner of its attempts that go on."""

    cache: "ScanCache"
    request: ScanRequest
    content: Content
    began: float
    place: Place
    led: bool = True  # the message that began it waits for it
    waiters: int = 1  # messages that wait for it, that one included
    entry: CacheEntry | None = None  # its answer
    completed: asyncio.Future[CacheEntry | None] | None = None  # made by the first that joins; None in it: no answer
    attempts: dict[asyncio.Task[ScanOutcome], Progress] = field(default_factory=dict)

    def take_over(self, rest: Coroutine[Any, Any, ScanOutcome], progress: Progress) -> asyncio.Task[ScanOutcome]:
        self.content.hashing()  # now: the message may be closed soon
        task = asyncio.create_task(rest)
        self.attempts[task] = progress
        self.cache.abandoned[task] = _Abandoned()
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[ScanOutcome]) -> None:
        self.cache.ended(self, task, self.attempts.pop(task))


class ScanCache:
    """One in each worker; it outlives configurations. ``publish`` sends what is kept to the other workers."""

    def __init__(
        self,
        publish: Callable[[CacheKey, CacheEntry], None] = lambda key, entry: None,
        report: Callable[[ScanOutcome | BackendError, float], None] = lambda outcome, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``report`` gets the result of a scan that went on, and its seconds."""
        self._publish, self._report, self._clock = publish, report, clock
        self._settings = ReuseSettings()
        self._memory = Memory(self._settings.keep, self._settings.entries, clock)
        self._in_flight: dict[Place, list[InFlightScan]] = {}
        self.abandoned: dict[asyncio.Task[ScanOutcome], _Abandoned] = {}  # for how long they go on, _limit decides
        self._background: set[asyncio.Task[None]] = set()

    def change(self, settings: ReuseSettings) -> None:
        """Apply other settings. Answers of other scanners, or with other settings of theirs, match no request."""
        self._settings = settings
        self._memory.change(settings.keep, settings.entries)

    def learn(self, key: CacheKey, entry: CacheEntry) -> None:
        """Keep an answer from another worker."""
        self._memory.put(key, entry)

    async def aclose(self) -> None:
        """Cancel what goes on."""
        tasks = [*self.abandoned, *self._background]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def get(self, request: ScanRequest, scan: Scan, deadline: Deadline) -> ScanOutcome:
        """The answer, from ``scan`` if it is not known. Raises BackendError, as ``scan`` does."""
        if not (self._settings.keep and request.reusable and request.message.size):
            return await scan(None)
        started, content = self._clock(), Content(request.message)
        place = request.kind, content.size
        if place in self._in_flight or self._memory.may_know(*place):
            known = await self._find(request, content, place, started, deadline)
            if known is not None:
                return known
        flight = InFlightScan(self, request, content, self._clock(), place)
        self._in_flight.setdefault(place, []).append(flight)
        try:
            outcome = await scan(flight)
        except BackendError as error:
            if flight.entry is not None:  # an attempt that was given up had the answer, and the next one has not
                return flight.entry.outcome
            if isinstance(error, UnresponsiveError):
                self._resolve(flight, None)
            raise
        else:
            entry = self._complete(flight, outcome)
            if entry is not None and entry.at - flight.began >= self._settings.slow:
                hashing = content.hashing()  # now: the message is closed when it is answered
                self._run(self._remember(flight, entry, hashing))
            return outcome
        finally:
            flight.led = False
            self._leave(flight)

    # Answers of other scans

    async def _find(
        self, request: ScanRequest, content: Content, place: Place, started: float, deadline: Deadline
    ) -> ScanOutcome | None:
        """An answer from memory, or of an equal scan in flight."""
        digest = await content.digest()
        if digest is None:
            return None
        key = _key(request, content, digest)
        joined: list[InFlightScan] = []
        # for others' scans together; they may hang, and time must be left for a scan of our own
        patience = deadline.within(min(request.timeout, deadline.left() / 2))
        while True:
            entry = self._memory.get(key)
            if entry is not None and await self._valid(entry, request, digest, deadline):
                return self._reused(entry, "kept", started)
            flight = await self._equal(request, place, digest, joined)
            if flight is None:
                return None
            joined.append(flight)
            entry = await self._join(flight, patience)
            fresh = self._clock() - flight.began < FRESH
            if entry is not None and await self._valid(entry, request, digest, deadline, fresh=fresh):
                return self._reused(entry, "shared", started)
            if deadline.expired():
                raise BackendError(Cause.TIMEOUT, "", "no answer about an equal message in time")

    async def _valid(
        self, entry: CacheEntry, request: ScanRequest, digest: Digest, deadline: Deadline, *, fresh: bool = False
    ) -> bool:
        """Is it an answer to this request, too?"""
        outcome = entry.outcome
        if request.database is None:
            return True
        if outcome.status is ScanStatus.FOUND:
            return entry.client == digest.client
        return fresh or (
            bool(outcome.database) and outcome.database == await request.database(outcome.backend, deadline)
        )

    def _reused(self, entry: CacheEntry, how: Literal["kept", "shared"], started: float) -> ScanOutcome:
        now = self._clock()
        detail = f"answer kept from {now - entry.at:.0f} s ago"
        if how == "shared":
            detail = f"shared with an equal message, asked {now - entry.began:.0f} s ago"
        return replace(entry.outcome, detail=detail, reused=how, seconds=now - started)

    async def _equal(
        self, request: ScanRequest, place: Place, digest: Digest, joined: list[InFlightScan]
    ) -> InFlightScan | None:
        """A scan in flight, not yet ``joined``, that answers this request."""
        for flight in tuple(self._in_flight.get(place, ())):
            if flight in joined:
                continue
            other = await flight.content.digest()
            same = other is not None and other.core == digest.core
            if same and (not request.by_client or other == digest) and flight in self._in_flight.get(place, ()):
                return flight
        return None

    async def _join(self, flight: InFlightScan, deadline: Deadline) -> CacheEntry | None:
        """Wait for its answer. None: there is none, or not in time."""
        if flight.completed is None:
            flight.completed = asyncio.get_running_loop().create_future()
        flight.waiters += 1
        try:
            async with deadline.timeout():
                return await asyncio.shield(flight.completed)
        except TimeoutError:
            return None
        finally:
            self._leave(flight)

    # The end of scans

    def _leave(self, flight: InFlightScan) -> None:
        """A message stops waiting for the scan."""
        flight.waiters -= 1
        if not flight.waiters:
            for task in tuple(flight.attempts):
                if task in self.abandoned:
                    self._limit(flight, task, self.abandoned[task])
        self._resolve_if_over(flight)

    def _limit(self, flight: InFlightScan, task: asyncio.Task[ScanOutcome], abandoned: _Abandoned) -> None:
        """No message waits for the attempt: limit its time, or cancel it."""
        settings = self._settings
        limited = sum(other.timer is not None for other in self.abandoned.values())
        if not (flight.request.goes_on and settings.late) or limited >= settings.late_scans:
            del self.abandoned[task]
            task.cancel()
        elif abandoned.timer is None:
            abandoned.timer = asyncio.get_running_loop().call_later(settings.late, self._expire, task, abandoned)

    def _expire(self, task: asyncio.Task[ScanOutcome], abandoned: _Abandoned) -> None:
        abandoned.expired = True
        task.cancel()

    def ended(self, flight: InFlightScan, task: asyncio.Task[ScanOutcome], progress: Progress) -> None:
        """An attempt that went on has ended: its answer is for those who joined, and for the retry."""
        abandoned = self.abandoned.pop(task, None)
        if abandoned is not None:
            if abandoned.timer is not None:
                abandoned.timer.cancel()
            self._finish(flight, task, progress, abandoned)
        self._resolve_if_over(flight)

    def _finish(
        self, flight: InFlightScan, task: asyncio.Task[ScanOutcome], progress: Progress, abandoned: _Abandoned
    ) -> None:
        seconds = self._clock() - flight.began
        if task.cancelled():
            if abandoned.expired:
                self._report(progress.timed_out(), seconds)
            return
        error = task.exception()
        if error is None:
            entry = self._complete(flight, task.result())
            if entry is not None:
                self._run(self._remember(flight, entry, flight.content.hashing()))
            self._report(task.result(), seconds)
        elif isinstance(error, BackendError):
            self._report(error, seconds)

    def _complete(self, flight: InFlightScan, outcome: ScanOutcome) -> CacheEntry | None:
        """An answer has come: everyone who waits for it gets it. None: it is unsure, or not the first."""
        if outcome.status not in SURE or flight.entry is not None:
            return None
        flight.entry = CacheEntry(outcome, b"", flight.began, self._clock())
        self._resolve(flight, flight.entry)
        return flight.entry

    def _resolve_if_over(self, flight: InFlightScan) -> None:
        if not flight.led and not flight.attempts:
            self._resolve(flight, None)

    def _resolve(self, flight: InFlightScan, entry: CacheEntry | None) -> None:
        """The scan is over for those who joined it, and no other message joins it."""
        flights = self._in_flight.get(flight.place, [])
        if flight not in flights:
            return
        flights.remove(flight)
        if not flights:
            del self._in_flight[flight.place]
        if flight.completed is None:
            return
        if entry is None:
            flight.completed.set_result(None)
        else:
            self._run(self._share(flight, entry, flight.completed))

    async def _share(
        self, flight: InFlightScan, entry: CacheEntry, completed: "asyncio.Future[CacheEntry | None]"
    ) -> None:
        digest = await flight.content.digest()  # the first message that joined had it computed
        completed.set_result(None if digest is None else replace(entry, client=digest.client))

    async def _remember(
        self, flight: InFlightScan, entry: CacheEntry, hashing: "asyncio.Future[Digest | None]"
    ) -> None:
        digest = await hashing
        if digest is None:
            return
        key, entry = _key(flight.request, flight.content, digest), replace(entry, client=digest.client)
        self._memory.put(key, entry)
        self._publish(key, entry)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _key(request: ScanRequest, content: Content, digest: Digest) -> CacheKey:
    return CacheKey(request.kind, content.size, digest.core + digest.client if request.by_client else digest.core)
