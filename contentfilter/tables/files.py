"""The text files of the recipient tables, read for a snapshot; and how a file is replaced.

Reading never takes half a file for a whole one: a file that changes while it is read is read again. A file
that is not there is an empty table; one that cannot be read is an error, because empty would mean unprotected.
"""

import asyncio
import os

from contentfilter.errors import Problem
from contentfilter.files import SourceState, file_state, first_line, read_file
from contentfilter.policy.options import OPTIONS
from contentfilter.tables.owners import PREFS, parse_owners
from contentfilter.tables.rows import TABLES, Rows, parse_table

MAX_SIZE = 256 << 20  # bytes of one table file
_DOMAIN = ("envnoathost", "me")


def sources(control: str) -> tuple[SourceState, ...]:
    """The present state of all files that tables are made of. Compare with that of a snapshot's header."""
    return tuple(file_state(os.path.join(control, name)) for name in (*TABLES, PREFS, *_DOMAIN))


async def load_tables(control: str) -> tuple[Rows, tuple[Problem, ...]]:
    """Both tables and the list of owners from the directory ``control``, and lines that were skipped or look odd.

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


async def default_domain(control: str) -> tuple[bytes, tuple[SourceState, ...]]:
    """The domain that qmail-send will give to a recipient without one, and the state of the files that say so."""
    files = [await read_file(os.path.join(control, name), MAX_SIZE) for name in _DOMAIN]
    found = next(filter(None, (first_line(text) for text, _ in files)), b"")
    return found.lower(), tuple(state for _, state in files)
