"""Prober of the supervisor: asks each clamd for its VERSION and each spamd for PING, apart from all mail.

The only active check of the backends. The status and the metrics show its results, and the workers' breakers take them
(scanners/health.py). One probe at a time for each backend; one that stays unanswered is reported while it waits, and
its answer says immediately that the backend is back. Times are seconds of the monotonic clock.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, Cause
from contentfilter.model import Scanner
from contentfilter.monitor.measure import Measurement
from contentfilter.scanners.clamd import ClamdScanner, database_of
from contentfilter.scanners.health import SILENT_AFTER, BackendHealth, ProbeResult
from contentfilter.scanners.spamd import SpamdScanner
from contentfilter.scanners.stream import Progress, UnreachableError
from contentfilter.settings import Settings
from contentfilter.wire.clamd import Version

EVERY = 30.0  # seconds between two probes while all is well
AGAIN = 1.0  # after a failure, or when a worker doubts it; also between two reports while a probe waits
LATER = 5.0  # after failures for longer than SOON
SOON = 10.0
FRESH = 5.0  # the age of a result that is good enough for a status
QUIET = 3.0  # seconds for which a backend may hold requests of mail without an answer until it is probed
LONGEST = 300.0  # seconds that one probe waits for its answer
UP = {Scanner.CLAMD: "contentfilter_clamd_up", Scanner.SPAMD: "contentfilter_spamd_up"}
VERSION_SHOWN = 64  # characters of clamd's version
_SILENCE = (Cause.TIMEOUT, Cause.BUSY)

Key = tuple[Scanner, str]


@dataclass(frozen=True, slots=True)
class Probed:
    """Result of the last probe of one backend."""

    at: float
    cause: Cause | None = None  # None: it answered
    detail: str = ""
    since: float = 0.0  # beginning of the first of the probes in a row that failed
    answered: float | None = None  # of the last one that did not
    asked: float = 0.0  # beginning of the probe; of the first one in a row without an answer
    absent: bool = False  # nothing listens there
    version: Version | None = None  # of a clamd that answered


@dataclass(slots=True, eq=False)
class _Target:
    """A backend that is probed."""

    key: Key
    address: Address
    began: float = float("-inf")  # of its last probe
    wanted: bool = False  # probe immediately
    suspected: bool = False  # probe soon
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class Prober:
    """:meth:`run` once, in the background. The rest is for the same event loop. ``publish`` gets all results."""

    def __init__(
        self,
        settings: Callable[[], Settings],
        publish: Callable[[tuple[ProbeResult, ...]], None] = lambda results: None,
    ) -> None:
        self._settings = settings
        self._publish = publish
        self.results: dict[Key, Probed] = {}
        self._mail: dict[Key, float] = {}  # last valid answer to mail of any worker
        self._targets: dict[Key, _Target] = {}
        self._running = False
        self._changed = asyncio.Event()
        self._probed = asyncio.Event()

    @property
    def samples(self) -> tuple[Measurement, ...]:
        """Metrics of the last results."""
        return tuple(sample for key, probed in self.results.items() for sample in _samples(*key, probed))

    def changed(self) -> None:
        """The settings changed: the results are stale."""
        self._changed.set()

    def heard(self, health: BackendHealth) -> None:
        """Take a worker's report. One that doubts a backend has it probed soon, unless that was done since."""
        key, now = (Scanner(health.scanner), health.backend), time.monotonic()
        if health.answered is not None:
            self._mail[key] = max(self._mail.get(key, 0.0), now - health.answered)
        target = self._targets.get(key)
        if target is None:
            return
        failed = health.failures > 0 and now - health.failed > target.began
        if failed or (health.outstanding and health.quiet > QUIET):
            target.suspected = True
            target.wake.set()

    async def fresh(self, deadline: Deadline) -> None:
        """Return when the results are fresh, or at the deadline, when the last ones must do."""
        oldest = time.monotonic() - FRESH
        try:
            async with deadline.timeout():
                while not self._fresh(oldest):
                    self._probed.clear()
                    await self._probed.wait()
        except TimeoutError:
            pass

    def _fresh(self, oldest: float) -> bool:
        """True if no result is older; otherwise a probe of those that are is on its way."""
        stale = [t for k, t in self._targets.items() if k not in self.results or self.results[k].at < oldest]
        for target in stale:
            if target.began < oldest:
                target.wanted = True
                target.wake.set()
        return self._running and not stale

    async def run(self) -> None:
        """Until it is cancelled. Raises ConfigError for TLS files that cannot be used."""
        while True:
            self._changed.clear()
            settings = self._settings()
            clamd, spamd = ClamdScanner(settings.clamd), SpamdScanner(settings.spamd, 1)
            keys = [(Scanner.CLAMD, name) for name in settings.clamd.backends]
            keys += [(Scanner.SPAMD, name) for name in settings.spamd.backends]
            self._targets = {key: _Target(key, Address.parse(key[1])) for key in keys}
            self.results = {key: probed for key, probed in self.results.items() if key in self._targets}
            self._running = True
            self._probed.set()
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._watch(t, clamd, spamd)) for t in self._targets.values()]
                while (settings.clamd, settings.spamd) == (self._settings().clamd, self._settings().spamd):
                    self._changed.clear()
                    await self._changed.wait()
                for task in tasks:
                    task.cancel()

    async def _watch(self, target: _Target, clamd: ClamdScanner, spamd: SpamdScanner) -> None:
        while True:
            target.wanted = target.suspected = False
            target.began = time.monotonic()
            progress = Progress(target.address)
            probe = asyncio.create_task(_ask(target.key[0], progress, clamd, spamd))
            try:
                patience = SILENT_AFTER
                while not (await asyncio.wait({probe}, timeout=patience))[0]:
                    self._record(target, progress.timed_out())
                    patience = AGAIN
                self._record(target, probe.result())
            finally:
                probe.cancel()
            await self._pause(target)

    async def _pause(self, target: _Target) -> None:
        probed = self.results[target.key]
        usual = EVERY if probed.cause is None else AGAIN if probed.at - probed.since < SOON else LATER
        while not target.wanted:
            end = target.began + (min(AGAIN, usual) if target.suspected else usual)
            target.wake.clear()
            try:
                async with Deadline(end).timeout():
                    await target.wake.wait()
            except TimeoutError:
                return

    def _record(self, target: _Target, answer: Version | BackendError | None) -> None:
        now, before = time.monotonic(), self.results.get(target.key)
        if not isinstance(answer, BackendError):
            probed = Probed(now, answered=now, asked=target.began, version=answer)
        else:
            again = before if before is not None and before.cause is not None else None
            since = again.since if again else target.began
            cause, asked = answer.cause, target.began
            if again and again.cause in _SILENCE and cause in _SILENCE:  # a listen queue may fill up meanwhile
                cause, asked = again.cause, again.asked
            absent = isinstance(answer, UnreachableError) and cause is Cause.DOWN
            answered = before.answered if before else None
            probed = Probed(now, cause, answer.detail, since, answered, asked, absent)
        self.results[target.key] = probed
        self._probed.set()
        self._publish(tuple(self._result(*item) for item in self.results.items()))

    def _result(self, key: Key, probed: Probed) -> ProbeResult:
        answered = max(probed.answered or 0.0, self._mail.get(key, 0.0))
        database = database_of(probed.version) if probed.version else ""
        return ProbeResult(*key, probed.asked, answered, probed.cause, probed.absent, database)


async def _ask(
    scanner: Scanner, progress: Progress, clamd: ClamdScanner, spamd: SpamdScanner
) -> Version | BackendError | None:
    deadline = Deadline.after(LONGEST)
    try:
        if scanner is Scanner.CLAMD:
            return await clamd.version(progress.address, deadline, progress)
        await spamd.probe(progress.address, deadline, progress)
    except BackendError as error:
        return error
    return None


def _samples(scanner: Scanner, backend: str, probed: Probed) -> list[Measurement]:
    """Metrics of a backend's answer; without one, only that it is not up."""
    labels = (backend,)
    samples: list[Measurement] = [(UP[scanner], labels, probed.cause is None)]
    if (version := probed.version) is not None:
        samples.append(("contentfilter_clamd_info", (backend, version.product[:VERSION_SHOWN]), 1))
        if version.database is not None:
            samples.append(("contentfilter_clamd_database_version", labels, version.database))
        if version.built is not None:
            samples.append(("contentfilter_clamd_database_timestamp_seconds", labels, version.built.timestamp()))
    return samples
