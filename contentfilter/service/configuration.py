"""The configuration in force, and how the next one gets there: read, told, sent, taken by every worker.

A bad one changes nothing, and each of its problems is logged once. Workers that start get the newest generation with
them; the others get it over the bus, again and again until their heartbeat says that they have it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from operator import attrgetter
from typing import Literal

import zmq

from contentfilter.deadline import Deadline
from contentfilter.errors import ConfigError
from contentfilter.intake.origin import resolve
from contentfilter.ops.log import Logger
from contentfilter.service import frames
from contentfilter.service.process import Process
from contentfilter.service.source import Loaded, Source, Staleness

RELOAD_WAIT = 10.0  # seconds to wait for all workers to take a new configuration
REPEAT = 2.0  # seconds before a configuration is sent again to a worker that lacks it
AT_START_ONLY = ("settings.listen", "settings.http", "settings.service.run", "settings.log", "sysfacility")
"""What a running daemon cannot change."""


class Configuration:
    """``loaded`` is in force, as number ``generation``; ``problems`` keep a newer one out."""

    def __init__(
        self,
        source: Source,
        first: Loaded,
        log: Logger,
        send: Callable[[frames.Configure], Awaitable[None]],
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
        self._send = send
        self._processes = processes
        self._moved = moved
        self._adopt = adopt
        self._looked = looked
        self._last_sent = 0.0
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
                await self._taken(Deadline.after(RELOAD_WAIT))
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

    async def heard(self, process: Process) -> None:
        """A worker gave a sign of life; if it lacks the newest generation it gets that again."""
        if self._lacks(process) and time.monotonic() > self._last_sent + REPEAT:
            await self._spread()

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
        await self._spread()
        self._adopt(loaded)

    async def _spread(self) -> None:
        self._last_sent = time.monotonic()
        try:
            await self._send(frames.Configure(self.generation, self.loaded.blob))
        except zmq.Again:
            pass  # their heartbeats will ask for it again

    def _lacks(self, process: Process) -> bool:
        beat = process.beat
        return not process.retiring and (beat is None or max(beat.generation, beat.refused) < self.generation)

    async def _taken(self, deadline: Deadline) -> None:
        """Wait until every worker has, or has refused, the newest generation."""
        try:
            async with deadline.timeout():
                while any(map(self._lacks, self._processes())):
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            pass
