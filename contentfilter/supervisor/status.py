"""The daemon's state, and the status that it reports."""

import asyncio
import os
import time
from dataclasses import dataclass

from contentfilter import __version__
from contentfilter.bus.messages import Status
from contentfilter.config.runtime import worker_count
from contentfilter.log import Logger, RateLimiter
from contentfilter.monitor.canary import Canary
from contentfilter.supervisor.configuration import Configuration
from contentfilter.supervisor.overrides import OverrideManager
from contentfilter.supervisor.pool import WorkerPool
from contentfilter.supervisor.receiver import ReceiverProcess
from contentfilter.supervisor.recorder import Recorder
from contentfilter.supervisor.source import ConfigSource
from contentfilter.supervisor.workers import Workers
from contentfilter.worker.crashes import CrashTable


class Lifecycle:
    """starting -> ready -> draining, and the signals that ask for the end."""

    def __init__(self) -> None:
        self.state = "starting"
        self.began = time.monotonic()
        self.stop = asyncio.Event()  # finish what is under way and end
        self.hurry = asyncio.Event()  # end immediately

    def signalled(self) -> None:
        """SIGTERM or SIGINT. The second one hurries."""
        if self.stop.is_set():
            self.hurry.set()
        self.stop.set()


class MalformedMessages:
    """Counts the messages on the bus that could not be decoded, and logs some of them."""

    def __init__(self, log: Logger) -> None:
        self._log = log
        self._limiter = RateLimiter(10.0)
        self.count = 0

    def note(self, where: str, error: Exception) -> None:
        self.count += 1
        if (held := self._limiter.allow()) is not None:
            self._log.warning("bus.malformed", where=where, why=str(error), not_logged=held)


@dataclass(frozen=True, slots=True)
class StatusReporter:
    """Collects the status from the parts of the supervisor; monitor.Monitor adds what it measures."""

    lifecycle: Lifecycle
    malformed: MalformedMessages
    source: ConfigSource
    crashes: CrashTable
    workers: Workers
    configuration: Configuration
    overrides: OverrideManager
    recorder: Recorder
    pool: WorkerPool
    canary: Canary
    receiver: ReceiverProcess

    def summary(self) -> str:
        """One line for the service manager."""
        count, generation = worker_count(self.configuration.settings()), self.configuration.generation
        return f"{count} workers, configuration {generation}{self.overrides.summary()}"

    def status(self) -> Status:
        settings = self.configuration.settings()
        return Status(
            version=__version__,
            pid=os.getpid(),
            state=effective_state(self.lifecycle, self.overrides),
            generation=self.configuration.generation,
            uptime=round(time.monotonic() - self.lifecycle.began, 3),
            socket=settings.listen.socket,
            restarts=self.pool.restarts,
            malformed=self.malformed.count,
            not_recorded=self.recorder.dropped,
            wanted=worker_count(settings),
            deaths=dict(self.pool.deaths),
            problems=self.configuration.problems,
            workers=tuple(process.describe() for process in self.workers.processes),
            tables=self.source.tables(),
            bypasses=self.overrides.bypasses(),
            drain=self.overrides.orders.drain,
            allowed=self.overrides.allowed(),
            orders_problem=self.overrides.problem,
            canary=self.canary.results,
            poison=self.crashes.isolated(),
            refused=self.receiver.refused(),
            refused_total=self.receiver.refused_total,
        )


def effective_state(lifecycle: Lifecycle, overrides: OverrideManager) -> str:
    """``state`` of messages.Status."""
    return "drained" if overrides.orders.drain and lifecycle.state == "ready" else lifecycle.state
