"""Keeps the snapshot file in step with the source of the tables, and knows how far it is behind.

One lives in the supervisor. When the source cannot be read, or has what nobody should take over unseen, the snapshot
stays as it is, also across a restart: its time of change says when it was last known to be current.
"""

import os
import time
from contextlib import suppress
from functools import partial

import msgspec

from contentfilter.errors import ConfigError, Problem
from contentfilter.files import TRANSFER_TIMEOUT, FileAccess, SourceState
from contentfilter.settings import Settings
from contentfilter.tables import shrink
from contentfilter.tables.files import load_tables, sources
from contentfilter.tables.rows import Rows
from contentfilter.tables.snapshot import FILE, Header, Snapshot, compile_snapshot
from contentfilter.threads import in_thread


class TableState(msgspec.Struct, frozen=True):
    """The tables in force."""

    source: str  # files or mariadb
    loaded: bool  # False: there are none; mail that needs them is deferred
    clamav_rows: int
    spamd_rows: int
    age: float  # seconds since they were last known to be what the source has
    trouble: str  # why they cannot be updated; empty: they are current


class Keeper:
    """The snapshot below one state directory."""

    def __init__(self, files: FileAccess | None = None) -> None:
        self._files = files or FileAccess()
        self._path = ""
        self._source = ""
        self._header: Header | None = None
        self._checked = 0.0  # seconds since 1970
        self._trouble = ""
        self._held: tuple[SourceState, ...] = ()  # a state of the source that was refused, and need not be read again
        self._why_held = ""

    @property
    def path(self) -> str:
        """Of the snapshot; empty while there is none."""
        return self._path if self._header else ""

    def state(self) -> TableState:
        rows = (self._header.clamav_rows, self._header.spamd_rows) if self._header else (0, 0)
        age = max(0.0, time.time() - self._checked) if self._header else 0.0
        return TableState(self._source, self._header is not None, *rows, round(age, 1), self._trouble)

    async def update(self, settings: Settings, *, reread: bool) -> tuple[bool, tuple[Problem, ...]]:
        """Bring the snapshot up to date. Returns whether it is another one now, and the rows that were skipped.

        ``reread`` reads the source even where it looks unchanged. Raises ConfigError with ``reread`` for what does not
        mend itself: a table file that cannot be read, a snapshot that cannot be written. :meth:`state` reports
        everything else, and a full disk at the start where an earlier run left a sound snapshot.
        """
        path = os.path.join(settings.service.state, FILE)
        start = path != self._path
        if start:
            self._header, self._checked = await self._files.run(path, partial(_present, path), TRANSFER_TIMEOUT)
            self._path = path
        self._source = settings.tables.source
        known = () if reread or self._header is None else self._held or self._header.sources
        try:
            found = await read_source(settings, known, self._files)
            if found is not None:
                return await self._take(settings, *found)
            if self._held:
                self._trouble = self._why_held
            else:
                await self._current()
        except ConfigError as error:
            if reread and settings.tables.source == "files":
                raise
            self._trouble = str(error.problems[0])
        except OSError as error:
            self._trouble = f"cannot write the snapshot: {error.strerror}"
            problem = Problem(path, 0, self._trouble)
            if start and self._header is not None:
                return True, (problem,)
            if reread:
                raise ConfigError((problem,)) from error
        return False, ()

    async def _take(
        self, settings: Settings, rows: Rows, problems: tuple[Problem, ...]
    ) -> tuple[bool, tuple[Problem, ...]]:
        """Rows become the snapshot, unless most of them are invalid or too many are gone: some are better than none."""
        old, state = self._header, settings.service.state
        if old is not None and rows.damage:
            raise ConfigError((*rows.damage, *problems))
        now = (len(rows.clamav), len(rows.spamd))
        less = shrink.shrunk((old.clamav_rows, old.spamd_rows), now, settings.tables) if old else ""
        if less:
            name = await in_thread(partial(shrink.checksum, rows))
            if name != await self._files.run(state, partial(shrink.accepted, state)):
                self._held = rows.sources
                self._trouble = self._why_held = f"{less}; confirm it with: contentfilter clients accept {name}"
                return False, problems
        write = partial(compile_snapshot, rows, self._path)
        self._header = new = await self._files.run(self._path, write, TRANSFER_TIMEOUT)
        if less:
            await self._files.run(state, partial(shrink.forget, state))
        await self._current()
        same = old is not None and (old.checksum, old.default_domain) == (new.checksum, new.default_domain)
        return bool(problems) or not same, problems

    async def _current(self) -> None:
        self._checked, self._trouble, self._held, self._why_held = time.time(), "", (), ""
        with suppress(OSError):  # only the age after a restart depends on it
            await self._files.run(self._path, partial(os.utime, self._path))


async def read_source(
    settings: Settings, known: tuple[SourceState, ...] = (), files: FileAccess | None = None
) -> tuple[Rows, tuple[Problem, ...]] | None:
    """Both tables from where the settings say, and what is wrong in them; None where nothing changed since ``known``.

    Raises ConfigError where they cannot be read.
    """
    if settings.tables.source == "mariadb":
        from contentfilter.tables.mariadb import read_tables  # a large import, for those who use it

        return await read_tables(settings, known, files)
    files, control = files or FileAccess(), settings.service.control
    if known and await files.run(control, partial(sources, control)) == known:
        return None
    return await load_tables(control, files)


def _present(path: str) -> tuple[Header | None, float]:
    """The snapshot of an earlier run, if it is sound, and when it was current."""
    try:
        snapshot = Snapshot.open(path)
        snapshot.close()
        return snapshot.header, os.stat(path).st_mtime
    except (ConfigError, OSError):
        return None, 0.0
