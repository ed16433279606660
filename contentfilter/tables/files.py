"""The text files of the recipient tables, read for a snapshot.

Reading never takes half a file for a whole one: a file that changes while it is read is read again. A file
that is not there is an empty table; one that cannot be read is an error, because empty would mean unprotected.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from contentfilter.errors import ConfigError, Problem
from contentfilter.files import TRANSFER_TIMEOUT, FileAccess, SourceState, file_state, first_line
from contentfilter.policy.addresses import normal
from contentfilter.policy.options import OPTIONS
from contentfilter.tables.owners import PREFS, only_owners
from contentfilter.tables.rows import TABLES, Rows, Table, read_table
from contentfilter.threads import in_thread

MAX_SIZE = 256 << 20  # bytes of one table file
_DOMAIN = ("envnoathost", "me")


def sources(control: str) -> tuple[SourceState, ...]:
    """The present state of all files that tables are made of. Compare with that of a snapshot's header."""
    return tuple(file_state(os.path.join(control, name)) for name in (*TABLES, PREFS, *_DOMAIN))


async def load_tables(control: str, files: FileAccess | None = None) -> tuple[Rows, tuple[Problem, ...]]:
    """Both tables and the list of owners from the directory ``control``, and lines that were skipped or look odd.

    A million rows take about a second, off the event loop. Raises ConfigError where a file cannot be read.
    """
    files = files or FileAccess()
    texts = [await files.read(os.path.join(control, name), MAX_SIZE, TRANSFER_TIMEOUT) for name in (*TABLES, PREFS)]
    rows, problems = await in_thread(partial(_parse, texts))
    domain, states = await default_domain(control, files)
    return replace(rows, default_domain=domain, sources=(*rows.sources, *states)), problems


def _parse(texts: Sequence[tuple[bytes, SourceState]]) -> tuple[Rows, tuple[Problem, ...]]:
    tables: list[Table] = []
    problems: list[Problem] = []
    damage: list[Problem] = []
    refused: list[Problem] = []
    for name, (text, state) in zip((*TABLES, PREFS), texts, strict=True):
        try:
            table, found, damaged = read_table(text, state.path, OPTIONS.get(name, ()))
        except ConfigError as e:
            refused += e.problems
            continue
        tables.append(table)
        problems += found
        damage += damaged
    if refused:
        raise ConfigError((*refused, *problems))
    clamav, spamd, listed = tables
    problems += only_owners(listed, texts[-1][1].path)
    states = tuple(state for _, state in texts)
    return Rows(clamav, spamd, sources=states, damage=tuple(damage), prefs=listed), tuple(problems)


async def default_domain(control: str, files: FileAccess) -> tuple[bytes, tuple[SourceState, ...]]:
    """The domain that qmail-send will give to a recipient without one, and the state of the files that say so."""
    found = [await files.read(os.path.join(control, name), MAX_SIZE) for name in _DOMAIN]
    domain = next(filter(None, (first_line(text) for text, _ in found)), b"")
    return normal(b"@" + domain)[1:], tuple(state for _, state in found)
