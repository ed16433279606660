"""The configuration in force, and how the next one gets there: read, told, sent, taken by every worker.

A bad one changes nothing, and each of its problems is logged once. Workers that start get the newest generation with
them; the others get it over the bus, again and again until their heartbeat says that they have it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from operator import attrgetter
from typing import Literal

from contentfilter.bus import messages
from contentfilter.deadline import Deadline
from contentfilter.doors.origin import resolve
from contentfilter.errors import ConfigError
from contentfilter.log import Logger
from contentfilter.supervisor.process import Process
from contentfilter.supervisor.source import ConfigSource, Loaded, Staleness
from contentfilter.supervisor.spread import Spread

RELOAD_WAIT = 10.0  # seconds to wait for all workers to take a new configuration
AT_START_ONLY = ("settings.listen", "settings.http", "settings.service.run", "settings.log", "sysfacility")
"""What a running daemon cannot change."""


class Configuration:
    """``loaded`` is in force, as number ``generation``; ``problems`` keep a newer one out."""

    def __init__(
        self,
        source: ConfigSource,
        first: Loaded,
        log: Logger,
        send: Callable[[messages.Configure], Awaitable[None]],
        processes: Callable[[], Sequence[Process]],
        moved: asyncio.Event,
        adopt: Callable[[Loaded], None],
        looked: Callable[[Literal["changed", "unchanged", "failed"]], None],
    ) -> None:
        """``send``: to all workers. ``moved``: set when one has changed. ``adopt``: called for each new one.

        ``looked``: called after each look at the source.
        """
        self.loaded = first
        self.generation = 1
        self.problems: tuple[str, ...] = ()
        self._source = source
        self._log = log
        self._spread = Spread(
            lambda: send(messages.Configure(self.generation, self.loaded.blob)),
            lambda beat: max(beat.generation, beat.refused) >= self.generation,
            processes,
            moved,
        )
        self.heard = self._spread.heard  # to be told of each sign of life
        self._adopt = adopt
        self._looked = looked
        self._reloading = asyncio.Lock()
        self._staleness = Staleness(log)
        self._tell(first)
        self._staleness.tell(source.tables())

    async def reload(self, replace_workers: Callable[[], None] | None = None) -> tuple[str, ...]:
        """Read everything again. Returns the problems that kept the old one in force."""
        async with self._reloading:
            try:
                loaded = await self._source.load()
            except ConfigError as error:
                self._failed(error)
            else:
                await self._take(loaded)
                if replace_workers is not None:
                    replace_workers()
                await self._spread.followed(Deadline.after(RELOAD_WAIT))
            self._staleness.tell(self._source.tables())
            return self.problems

    async def watch_tables(self) -> None:
        """Look at the tables now and then. Does not return."""
        while True:
            await asyncio.sleep(self.loaded.settings.tables.refresh)
            async with self._reloading:
                try:
                    loaded = await self._source.refresh()
                except ConfigError as error:
                    self._failed(error)
                    continue
                finally:
                    self._staleness.tell(self._source.tables())
                if loaded is None:
                    self._looked("unchanged")
                else:
                    await self._take(loaded)

    def _tell(self, loaded: Loaded) -> None:
        for problem in loaded.problems:
            self._log.warning("service.problem", path=problem.path, line=problem.line, text=problem.text)
        for name in resolve(loaded.settings.origin)[1]:
            self._log.warning("origin.unknown-user", name=name)

    def _failed(self, error: ConfigError) -> None:
        texts = tuple(str(problem) for problem in error.problems)
        if texts != self.problems:  # the same trouble again and again is told once
            for problem in error.problems:
                self._log.error("service.problem", path=problem.path, line=problem.line, text=problem.text)
        self._looked("failed")
        self._log.error("service.reload-failed", problems=len(texts), generation=self.generation)
        self.problems = texts

    async def _take(self, loaded: Loaded) -> None:
        self.problems = ()
        self._tell(loaded)
        before, self.loaded = self.loaded, loaded
        self._looked("changed")
        for name in AT_START_ONLY:
            if attrgetter(name)(before) != attrgetter(name)(loaded):
                self._log.warning("service.restart-needed", setting=name.removeprefix("settings."))
        self.generation += 1
        self._log.info("service.reload", generation=self.generation, bytes=len(loaded.blob))
        await self._spread.send()
        self._adopt(loaded)
