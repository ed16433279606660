"""The text files of the recipient tables, read for a snapshot; and how a file is replaced.

Reading never takes half a file for a whole one: a file that changes while it is read is read again. A file
that is not there is an empty table; one that cannot be read is an error, because empty would mean unprotected.
"""

import asyncio
import os
import stat

import aiofiles

from contentfilter.errors import ConfigError, Problem
from contentfilter.tables.owners import PREFS, parse_owners
from contentfilter.tables.rows import OPTIONS, TABLES, Rows, Source, parse_table

MAX_SIZE = 256 << 20  # bytes of one table file
_TRIES = 5  # a file that changes under each of these reads is given up
_DOMAIN = ("envnoathost", "me")


def sources(control: str) -> tuple[Source, ...]:
    """The present state of all files that tables are made of. Compare with that of a snapshot's header."""
    return tuple(file_state(os.path.join(control, name)) for name in (*TABLES, PREFS, *_DOMAIN))


async def load_tables(control: str) -> tuple[Rows, tuple[Problem, ...]]:
    """Both tables and the list of owners from the directory ``control``, and lines that were left out or look odd.

    A million rows take about a second, off the event loop. Raises ConfigError where a file cannot be read.
    """
    texts = [await read_file(os.path.join(control, name), MAX_SIZE) for name in TABLES]
    (clamav, problems), (spamd, more) = await asyncio.to_thread(
        lambda: [
            parse_table(text, state.path, OPTIONS[name]) for name, (text, state) in zip(TABLES, texts, strict=True)
        ]
    )
    listed, place = await read_file(os.path.join(control, PREFS), MAX_SIZE)
    owners, odd = await asyncio.to_thread(parse_owners, listed, place.path)
    domain, files = await default_domain(control)
    states = (*(state for _, state in texts), place, *files)
    return Rows(clamav, spamd, domain, states, owners), (*problems, *more, *odd)


async def default_domain(control: str) -> tuple[bytes, tuple[Source, ...]]:
    """The domain that qmail-send will give to a recipient without one, and the state of the files that say so."""
    files = [await read_file(os.path.join(control, name), MAX_SIZE) for name in _DOMAIN]
    found = next(filter(None, (first_line(text) for text, _ in files)), b"")
    return found.lower(), tuple(state for _, state in files)


async def read_file(path: str, limit: int) -> tuple[bytes, Source]:
    """The whole file, and the state it was in; ``b""`` and size -1 where there is none.

    Raises ConfigError for a file that cannot be read, is not a regular file, or has more than ``limit`` bytes.
    """
    for _ in range(_TRIES):
        try:
            # Not blocking: nobody may make us wait for the other end of a named pipe.
            async with aiofiles.open(path, "rb", opener=_open_nonblocking) as file:
                before = os.fstat(file.fileno())
                if not stat.S_ISREG(before.st_mode):
                    raise ConfigError((Problem(path, 0, "not a regular file"),))
                if before.st_size > limit:
                    raise ConfigError((Problem(path, 0, f"{before.st_size} bytes; the limit is {limit}"),))
                data = await file.read(before.st_size + 1)
                after = os.fstat(file.fileno())
        except FileNotFoundError:
            return b"", Source(path)
        except OSError as e:
            raise ConfigError((Problem(path, 0, f"cannot read it: {e.strerror}"),)) from e
        if len(data) == before.st_size and _state(path, before) == _state(path, after):
            return data, _state(path, after)
    raise ConfigError((Problem(path, 0, "it keeps changing while it is read"),))


def first_line(data: bytes) -> bytes:
    """The value of a one-line control file, as qmail reads it."""
    return data.partition(b"\n")[0].rstrip(b" \t")


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _state(path: str, status: os.stat_result) -> Source:
    return Source(path, status.st_mtime_ns, status.st_size, status.st_ino)


def file_state(path: str) -> Source:
    """The present state of one file."""
    try:
        return _state(path, os.stat(path))
    except OSError:
        return Source(path)
