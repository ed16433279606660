"""The application that a worker runs, and the lease that closes it when its last message is answered."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from contentfilter.bus.messages import Event
from contentfilter.doors.admission import AcceptedMessage, IntakeLimits, PendingMessage
from contentfilter.doors.origin import resolve
from contentfilter.doors.watermarks import Watermarks
from contentfilter.log import Logger
from contentfilter.model import Envelope, OriginKind
from contentfilter.policy.overrides import AllowEntry, Bypass
from contentfilter.scanners.cache import ScanCache
from contentfilter.scanners.health import BackendHealth
from contentfilter.settings import Settings
from contentfilter.verdict.disposition import Disposition
from contentfilter.worker.crashes import DEATH_LIMIT, CrashAttribution, WorkerSlot, fingerprint


class Application(Protocol):
    """Handles messages under one configuration."""

    settings: Settings

    def recipient_limit(self, kind: OriginKind, /) -> int:
        """See doors.admission.Handler; as :meth:`rejected_busy`."""
        ...

    async def handle(self, accepted: AcceptedMessage, /) -> Disposition: ...

    async def isolate(self, accepted: AcceptedMessage, fingerprint: str, /) -> Disposition:
        """In place of :meth:`handle`, for a message that killed workers: decide without looking into it."""
        ...

    def rejected_busy(
        self, pending: PendingMessage, envelope: Envelope, why: str, text: str, seconds: float, /
    ) -> None: ...

    def backends(self) -> tuple[BackendHealth, ...]:
        """State of the scanners that it uses, for the heartbeat."""
        ...

    async def close(self) -> None:
        """Called once, when the last message under this configuration is answered."""


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """Shared dependencies that a worker gives to its applications."""

    log: Logger
    emit: Callable[[Event], None]  # to the supervisor and the event feed; never waits
    bypasses: Callable[[], tuple[Bypass, ...]] = tuple  # those in force at this moment
    allowed: Callable[[], tuple[AllowEntry, ...]] = tuple  # likewise
    recall: ScanCache = field(default_factory=ScanCache)  # the worker's, across configurations
    shed: Counter[str] = field(default_factory=Counter)  # the application counts here what it skips under load
    disk: Executor | None = None  # for calls that a hung disk may block; None: the event loop's threads


Build = Callable[[bytes, WorkerContext], Awaitable[Application]]
"""Makes an application from the configuration blob. May raise anything."""


class ApplicationLease:
    """Handler of the doors: a reference-counted application.

    A message that killed workers is isolated; every other one is attributed while it is handled (worker/crashes.py).
    """

    def __init__(
        self, application: Application, generation: int, slot: WorkerSlot, attribution: CrashAttribution
    ) -> None:
        self.application = application
        self.generation = generation
        self._slot = slot
        self._attribution = attribution
        self._in_use = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the application open meanwhile."""
        self._in_use += 1
        self._unused.clear()
        try:
            yield
        finally:
            self._in_use -= 1
            if not self._in_use:
                self._unused.set()

    def recipient_limit(self, kind: OriginKind) -> int:
        return self.application.recipient_limit(kind)

    async def handle(self, accepted: AcceptedMessage) -> Disposition:
        key = fingerprint(accepted.message.data)
        if self._slot.deaths(key) >= DEATH_LIMIT:
            return await self.application.isolate(accepted, key.hex())
        return await self._attribution.attribute(self.application.handle(accepted), key, accepted.incident)

    def rejected_busy(self, pending: PendingMessage, envelope: Envelope, why: str, text: str, seconds: float) -> None:
        self.application.rejected_busy(pending, envelope, why, text, seconds)

    async def release(self) -> None:
        """Close the application when its last message is answered. The doors must have another handler by now."""
        await self._unused.wait()
        await self.application.close()

    def limits(self) -> IntakeLimits:
        settings, service = self.application.settings, self.application.settings.service
        origin, _ = resolve(settings.origin)  # the supervisor has reported unknown names
        return IntakeLimits(
            self,
            origin,
            service.budget,
            service.max_in_flight,
            service.max_waiting,
            service.max_in_flight_bytes,
            service.max_message,
            service.admission_wait,
        )

    def watermarks(self) -> Watermarks:
        service = self.application.settings.service
        return Watermarks(service.memory_floor, service.disk_floor, service.state)
