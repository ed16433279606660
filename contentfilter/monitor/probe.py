"""Prober of the supervisor: asks each clamd and spamd, apart from all mail, for VERSION and PING.

Periodically for Prometheus, immediately when the status is requested, and every few seconds while one of them does not
answer or a worker reported a failure. A probe has a deadline, and so has every wait for it.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, Cause
from contentfilter.model import Scanner
from contentfilter.monitor.measure import Measurement
from contentfilter.scanners.clamd import ClamdScanner
from contentfilter.scanners.spamd import SpamdScanner
from contentfilter.settings import ClamdSettings, Settings, SpamdSettings
from contentfilter.wire.clamd import Version

EVERY = 120.0  # seconds between two probes while all is well
AGAIN = 5.0  # while it is not
FRESH = 5.0  # a probe so young is good enough for who asks
PATIENCE = 10.0  # seconds for one answer
UP = {Scanner.CLAMD: "contentfilter_clamd_up", Scanner.SPAMD: "contentfilter_spamd_up"}
VERSION_SHOWN = 64  # characters of clamd's version


@dataclass(frozen=True, slots=True)
class Probed:
    """Result of the last probe of one backend. Times are seconds of the monotonic clock."""

    at: float
    cause: Cause | None = None  # None: it answered
    detail: str = ""
    since: float = 0.0  # of the first of the probes in a row that failed
    answered: float | None = None  # of the last one that did not


class Prober:
    """:meth:`run` once, in the background. The rest is for the same event loop."""

    def __init__(self, settings: Callable[[], Settings]) -> None:
        self._settings = settings
        self.results: Mapping[tuple[Scanner, str], Probed] = {}
        self.samples: tuple[Measurement, ...] = ()
        self._config: tuple[ClamdSettings, SpamdSettings] | None = None
        self._last = float("-inf")  # when the last look began
        self._wanted = False
        self._suspected = False
        self._wake = asyncio.Event()
        self._looked = asyncio.Event()

    def changed(self) -> None:
        """The settings changed: the results are stale."""
        self._last = float("-inf")
        self._wake.set()

    def suspect(self, failed: float) -> None:
        """A worker could not use a backend, ``failed`` seconds ago. Probe soon, unless that is known already."""
        if time.monotonic() - failed > self._last:
            self._suspected = True
            self._wake.set()

    async def fresh(self, deadline: Deadline) -> None:
        """Return when the results are fresh, or at the deadline."""
        if time.monotonic() - self._last < FRESH:
            return
        self._looked.clear()
        self._wanted = True
        self._wake.set()
        try:
            async with deadline.timeout():
                await self._looked.wait()
        except TimeoutError:
            pass  # the last known must do

    async def run(self, *, rhythm: bool) -> None:
        """Until it is cancelled. Without ``rhythm`` only when there is a reason."""
        while True:
            self._wake.clear()
            try:
                async with self._due(rhythm).timeout():
                    await self._wake.wait()
            except TimeoutError:
                await self._look()

    def _due(self, rhythm: bool) -> Deadline:
        if self._wanted:
            return Deadline(0.0)
        if self._suspected or any(probed.cause for probed in self.results.values()):
            return Deadline(self._last + AGAIN)
        return Deadline(self._last + EVERY if rhythm else float("inf"))

    async def _look(self) -> None:
        self._last = time.monotonic()
        self._wanted = self._suspected = False
        settings = self._settings()
        if self._config != (settings.clamd, settings.spamd):
            self._config = settings.clamd, settings.spamd
            self._clamd, self._spamd = ClamdScanner(settings.clamd), SpamdScanner(settings.spamd, 1)
        backends = [(Scanner.CLAMD, name) for name in settings.clamd.backends]
        backends += [(Scanner.SPAMD, name) for name in settings.spamd.backends]
        answers = await asyncio.gather(*(self._asked(*backend) for backend in backends))
        self.results = {
            backend: self._probed(backend, answer) for backend, answer in zip(backends, answers, strict=True)
        }
        self.samples = tuple(
            sample for backend, answer in zip(backends, answers, strict=True) for sample in _samples(*backend, answer)
        )
        self._looked.set()

    async def _asked(self, scanner: Scanner, backend: str) -> Version | BackendError | None:
        address, deadline = Address.parse(backend), Deadline.after(PATIENCE)
        try:
            if scanner is Scanner.CLAMD:
                return await self._clamd.version(address, deadline)
            await self._spamd.probe(address, deadline)
        except BackendError as error:
            return error
        return None

    def _probed(self, backend: tuple[Scanner, str], answer: Version | BackendError | None) -> Probed:
        now = time.monotonic()
        if not isinstance(answer, BackendError):
            return Probed(now, answered=now)
        before = self.results.get(backend)
        since = before.since if before and before.cause else self._last
        return Probed(now, answer.cause, answer.detail, since, before.answered if before else None)


def _samples(scanner: Scanner, backend: str, answer: Version | BackendError | None) -> list[Measurement]:
    """Metrics of a backend's answer; without one, only that it is not up."""
    labels = (backend,)
    samples: list[Measurement] = [(UP[scanner], labels, not isinstance(answer, BackendError))]
    if isinstance(answer, Version):
        samples.append(("contentfilter_clamd_info", (backend, answer.product[:VERSION_SHOWN]), 1))
        if answer.database is not None:
            samples.append(("contentfilter_clamd_database_version", labels, answer.database))
        if answer.built is not None:
            samples.append(("contentfilter_clamd_database_timestamp_seconds", labels, answer.built.timestamp()))
    return samples
