"""The configuration in force, and the way of the next one: read, logged, sent, taken by every worker.

A bad one changes nothing, and each of its problems is logged once. Workers that start get the newest generation with
them; the others get it over the bus, and their heartbeats confirm it.
"""

import asyncio
from collections.abc import Callable
from operator import attrgetter
from typing import Literal

from contentfilter.bus import messages
from contentfilter.deadline import Deadline
from contentfilter.errors import ConfigError
from contentfilter.log import Logger
from contentfilter.monitor.samples import Sample
from contentfilter.policy.overrides import AllowEntry
from contentfilter.settings import Settings
from contentfilter.supervisor.source import ConfigSource, Loaded, Staleness
from contentfilter.supervisor.workers import Workers

RELOAD_WAIT = 10.0  # seconds to wait for all workers to take a new configuration
AT_START_ONLY = ("settings.listen", "settings.http", "settings.service.run", "settings.log", "sysfacility")
"""What a running daemon cannot change."""

Result = Literal["changed", "unchanged", "failed"]
Observer = Callable[[Result], None]
"""Called after each look at the source; with ``changed``, the new configuration is in force already."""


class Configuration:
    """``loaded`` is in force, as number ``generation``; ``problems`` keep a newer one out."""

    def __init__(self, source: ConfigSource, first: Loaded, log: Logger, workers: Workers) -> None:
        self.loaded = first
        self.generation = 1
        self.problems: tuple[str, ...] = ()
        self._source = source
        self._log = log
        self._workers = workers
        self._observers: list[Observer] = []
        self._reloading = asyncio.Lock()
        self._staleness = Staleness(log)
        self._log_problems(first)
        self._staleness.report(source.tables())

    def observe(self, observer: Observer) -> None:
        """Call ``observer`` from now on."""
        self._observers.append(observer)

    def settings(self) -> Settings:
        """The settings in force."""
        return self.loaded.settings

    def canary(self, allowed: tuple[AllowEntry, ...]) -> tuple[Settings, tuple[Sample, ...]]:
        """The settings in force, and the canary's samples for them and for these allow entries."""
        return self.loaded.settings, self.loaded.samples(allowed)

    async def reload(self) -> tuple[str, ...]:
        """Read everything again. Returns the workers that have not taken the new one in time, as text.

        ``problems`` has the reasons if the old one stays in force.
        """
        async with self._reloading:
            late: tuple[str, ...] = ()
            try:
                loaded = await self._source.load()
            except ConfigError as error:
                self._failed(error)
            else:
                self._take(loaded)
                processes = await self._workers.followed(self._taken, Deadline.after(RELOAD_WAIT))
                late = tuple(
                    f"worker {p.slot} (pid {p.pid}) has not taken configuration {self.generation} yet"
                    for p in processes
                )
            self._staleness.report(self._source.tables())
            return late

    async def watch_tables(self) -> None:
        """Look at the tables in intervals. Does not return."""
        while True:
            await asyncio.sleep(self.loaded.settings.tables.refresh)
            async with self._reloading:
                try:
                    loaded = await self._source.refresh()
                except ConfigError as error:
                    self._failed(error)
                    continue
                finally:
                    self._staleness.report(self._source.tables())
                if loaded is None:
                    self._notify("unchanged")
                else:
                    self._take(loaded)

    def _taken(self, beat: messages.Heartbeat) -> bool:
        return max(beat.generation, beat.refused) >= self.generation

    def _notify(self, result: Result) -> None:
        for observer in self._observers:
            observer(result)

    def _log_problems(self, loaded: Loaded) -> None:
        for problem in loaded.problems:
            self._log.warning("service.problem", path=problem.path, line=problem.line, text=problem.text)
        for name in loaded.unknown_users:
            self._log.warning("origin.unknown-user", name=name)

    def _failed(self, error: ConfigError) -> None:
        texts = tuple(str(problem) for problem in error.problems)
        if texts != self.problems:  # the same problems are logged once
            for problem in error.problems:
                self._log.error("service.problem", path=problem.path, line=problem.line, text=problem.text)
        self._notify("failed")
        self._log.error("service.reload-failed", problems=len(texts), generation=self.generation)
        self.problems = texts

    def _take(self, loaded: Loaded) -> None:
        self.problems = ()
        self._log_problems(loaded)
        before, self.loaded = self.loaded, loaded
        for name in AT_START_ONLY:
            if attrgetter(name)(before) != attrgetter(name)(loaded):
                self._log.warning("service.restart-needed", setting=name.removeprefix("settings."))
        self.generation += 1
        self._log.info("service.reload", generation=self.generation, bytes=len(loaded.blob))
        self._workers.send(messages.Configure(self.generation, loaded.blob))
        self._notify("changed")
