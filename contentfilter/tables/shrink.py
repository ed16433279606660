"""A table that suddenly lost most of its rows is held back until somebody says that it is right.

A panel's failed export, a dropped partition or a wrong query would else leave people unprotected in silence. What is
confirmed is exactly one state of the tables, named by its checksum: when they change again, they are asked about again.
"""

import os
from hashlib import blake2b

from contentfilter.errors import ConfigError
from contentfilter.files import read_file, replace_file
from contentfilter.settings import TableSettings
from contentfilter.tables.rows import TABLES, Rows

FILE = "tables.accepted"
"""In the state directory: the checksum that was confirmed last."""


def checksum(rows: Rows) -> str:
    """Names these rows, in whatever order they come. Takes a second or two for a million."""
    digest = blake2b(digest_size=8)
    for name, table in zip(TABLES, (rows.clamav, rows.spamd), strict=True):
        digest.update(b"%b %d\n" % (name.encode(), len(table)))
        for key in sorted(table):
            digest.update(b"%b %b\n" % (key, table[key]))
    return digest.hexdigest()


def shrunk(before: tuple[int, int], now: tuple[int, int], limits: TableSettings) -> str:
    """Which table lost too much, in words; empty where none did. The numbers are those of rows."""
    for name, old, new in zip(TABLES, before, now, strict=True):
        lost = old - new
        if lost > limits.shrink_rows and lost * 100 > old * limits.shrink_percent:
            return f"{name} would shrink from {old} to {new} rows"
    return ""


def accepted(state: str) -> str:
    """The checksum that was confirmed last; empty where there is none."""
    try:
        return read_file(os.path.join(state, FILE), 64)[0].decode("ascii", "replace").strip()
    except ConfigError:
        return ""


def accept(state: str, name: str) -> None:
    """Confirm the rows of this checksum. Raises OSError."""
    replace_file(os.path.join(state, FILE), (name.encode("ascii") + b"\n",), 0o644)


def forget(state: str) -> None:
    """Forget a confirmation once it is in force."""
    try:
        os.unlink(os.path.join(state, FILE))
    except OSError:
        pass  # not ours to remove: it confirms nothing but these same rows
