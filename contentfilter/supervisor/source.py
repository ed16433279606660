"""Sources of the configuration, and the log about tables that are not current."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import msgspec

from contentfilter.config.controls import read_controls
from contentfilter.config.load import load_settings
from contentfilter.config.runtime import Runtime, make_runtime, unusable
from contentfilter.doors.origin import resolve
from contentfilter.errors import ConfigError, Problem
from contentfilter.files import FileAccess
from contentfilter.log import Logger, RateLimiter
from contentfilter.monitor.samples import Sample, make_samples
from contentfilter.policy.overrides import AllowEntry
from contentfilter.settings import Settings
from contentfilter.tables.keeper import Keeper, TableState

LOAD_TIMEOUT = 60.0  # seconds for all files together
LOG_AGAIN = 600.0  # seconds after which tables that are still not current are logged again


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration that may go live."""

    settings: Settings
    blob: bytes  # all that a worker needs; only the application knows what is in it
    problems: tuple[Problem, ...] = ()  # bad lines that were skipped
    samples: Callable[[tuple[AllowEntry, ...]], tuple[Sample, ...]] = lambda allowed: ()  # of the canary
    sysfacility: str = ""  # of a log in syslog
    unknown_users: tuple[str, ...] = ()  # names in [origin] that the user database does not have


class ConfigSource(Protocol):
    """Source of configurations. Loading raises ConfigError."""

    async def load(self) -> Loaded:
        """Read everything again."""

    async def refresh(self) -> Loaded | None:
        """Look at the tables only; None when nothing changed."""

    def tables(self) -> TableState | None:
        """The state of the tables in force; None if the source has no tables."""


class Staleness:
    """Logs when the tables are no longer current, again from time to time, and when they are current again."""

    def __init__(self, log: Logger) -> None:
        self._log = log
        self._reported = ""
        self._again = RateLimiter(LOG_AGAIN)

    def report(self, state: TableState | None) -> None:
        """Call after each look at the tables."""
        if state is None or not (state.trouble or self._reported):
            return
        rows = {"loaded": state.loaded, "clamav_rows": state.clamav_rows, "spamd_rows": state.spamd_rows}
        if not state.trouble:
            self._log.info("tables.current", **rows)
        else:
            if state.trouble != self._reported:
                self._again = RateLimiter(LOG_AGAIN)
            if self._again.allow() is not None:
                self._log.warning("tables.stale", why=state.trouble, age=state.age, **rows)
        self._reported = state.trouble


class ConfigLoader:
    """The configuration from files, for the supervisor. ``workers`` and ``socket`` override the settings."""

    def __init__(self, config_path: str, *, workers: int | None = None, socket: str | None = None) -> None:
        self._path = config_path
        self._workers = workers
        self._socket = socket
        self._files = FileAccess()
        self._keeper = Keeper(self._files)
        self._problems: tuple[Problem, ...] = ()
        self._unknown_users: tuple[str, ...] = ()
        self._runtime: Runtime | None = None

    async def load(self) -> Loaded:
        """Read everything again. Raises ConfigError."""
        async with self._bounded(LOAD_TIMEOUT):
            settings, runtime = await self._read()
        async with self._bounded(LOAD_TIMEOUT + settings.mariadb.load_timeout):
            _, table_problems = await self._keeper.update(settings, reread=True)
        self._runtime = runtime
        return self._loaded(runtime, table_problems)

    async def _read(self) -> tuple[Settings, Runtime]:
        settings = await self._files.run(self._path, partial(load_settings, self._path))
        if self._workers is not None:
            settings = msgspec.structs.replace(
                settings, service=msgspec.structs.replace(settings.service, workers=self._workers)
            )
        if self._socket is not None:
            settings = msgspec.structs.replace(
                settings, listen=msgspec.structs.replace(settings.listen, socket=self._socket)
            )
        if wrong := await self._files.run(self._path, partial(unusable, settings)):
            raise ConfigError(wrong)
        users = await self._files.run("[origin]: the user database", partial(resolve, settings.origin))
        controls, problems = await read_controls(settings.service.control, self._files)
        errors = tuple(problem for problem in problems if not problem.warning)
        if errors and self._runtime is not None:  # better the values in force than defaults; a start has only those
            raise ConfigError(errors)
        runtime, more = make_runtime(settings, controls, "")
        self._problems, self._unknown_users = (*problems, *more), users[1]
        return settings, runtime

    async def refresh(self) -> Loaded | None:
        """Look at the tables only."""
        runtime = self._runtime
        if runtime is None:
            return None
        async with self._bounded(LOAD_TIMEOUT + runtime.settings.mariadb.load_timeout):
            changed, problems = await self._keeper.update(runtime.settings, reread=False)
            return self._loaded(runtime, problems) if changed else None

    def tables(self) -> TableState:
        """The state of the tables in force."""
        return self._keeper.state()

    def _loaded(self, runtime: Runtime, table_problems: tuple[Problem, ...]) -> Loaded:
        runtime = msgspec.structs.replace(runtime, snapshot=self._keeper.path)
        blob = msgspec.msgpack.encode(runtime)
        samples = partial(make_samples, runtime.settings, runtime.signatures, runtime.loadertypes)
        problems = (*self._problems, *table_problems)
        return Loaded(runtime.settings, blob, problems, samples, runtime.sysfacility, self._unknown_users)

    @asynccontextmanager
    async def _bounded(self, seconds: float) -> AsyncIterator[None]:
        """Every end is in time, and every error a ConfigError: no file and no answer ends the supervisor."""
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                yield
        except ConfigError:
            raise
        except Exception as e:
            text = f"not read within {seconds:g} s" if limit.expired() else f"cannot be used: {type(e).__name__}: {e}"
            raise ConfigError((Problem(self._path, 0, text),)) from e
