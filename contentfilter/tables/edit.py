"""Changes to the text files of the tables: all-or-nothing, one at a time, and comments and order stay.

A lock file in the control directory keeps two of us from overwriting each other; a change by somebody who knows
nothing of it (an editor, a panel) is noticed before the file is replaced, and the work is done again. Owner, mode
and a symbolic link in the file's place stay as they are.
"""

import fcntl
import os
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO

from contentfilter.deadline import Deadline
from contentfilter.errors import ConfigError, Problem
from contentfilter.files import ANSWER_TIMEOUT, FileAccess, ProblemCollector, file_state, read_file, replace_file
from contentfilter.policy.addresses import EXEMPT, PLAIN_KEYS
from contentfilter.tables.files import MAX_SIZE
from contentfilter.tables.rows import parse_row, row_text

LOCK = ".contentfilter-clients.lock"
_POLL = 0.02  # seconds; flock has no time limit of its own
_TRIES = 5
EDIT_TIMEOUT = 120.0  # seconds for reading, changing and writing a table of any size
_NEW_MODE = 0o644


@dataclass(frozen=True, slots=True)
class Edit:
    """Result of an edit: how many rows a change added, changed, removed and found as wanted."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    same: int = 0

    @property
    def differs(self) -> bool:
        return bool(self.added or self.changed or self.removed)


@asynccontextmanager
async def locked(control: str, deadline: Deadline) -> AsyncIterator[None]:
    """Nobody else changes the tables of ``control`` meanwhile. Raises ConfigError when that cannot be had in time."""
    path = os.path.join(control, LOCK)
    with await FileAccess().run(path, partial(_lock, path, deadline), deadline.left() + ANSWER_TIMEOUT):
        yield


def _lock(path: str, deadline: Deadline) -> IO[bytes]:
    try:
        file = open(path, "ab", opener=_private)  # noqa: SIM115 - for the caller, who closes it
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                if deadline.expired():
                    file.close()
                    raise ConfigError((Problem(path, 0, "somebody else is changing the tables; try again"),)) from e
                time.sleep(_POLL)
            else:
                return file
    except OSError as e:
        raise ConfigError((Problem(path, 0, f"cannot lock the tables: {e.strerror}"),)) from e


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


async def change_table(
    path: str, put: Mapping[bytes, bytes], drop: Collection[bytes] = (), *, only: bool = False, write: bool = True
) -> Edit:
    """Put the rows ``put`` (canonical key -> value) into the file, remove the keys ``drop``; call it under the lock.

    ``only`` removes all rows that are not in ``put``. Without ``write`` nothing is changed. Raises ConfigError.
    """
    return await FileAccess().run(path, partial(_change, path, put, drop, only, write), EDIT_TIMEOUT)


def _change(path: str, put: Mapping[bytes, bytes], drop: Collection[bytes], only: bool, write: bool) -> Edit:
    path = os.path.realpath(path)
    for _ in range(_TRIES):
        text, state = read_file(path, MAX_SIZE)
        changed, edit = edited(text, put, drop, only=only)
        if not (edit.differs and write):
            return edit
        if file_state(path) != state:
            continue
        try:
            status = os.stat(path) if state.size >= 0 else None
            owner = (status.st_uid, status.st_gid) if status else None
            replace_file(path, (changed,), status.st_mode & 0o7777 if status else _NEW_MODE, owner)
        except OSError as e:
            raise ConfigError((Problem(path, 0, f"cannot change it: {e.strerror}"),)) from e
        return edit
    raise ConfigError((Problem(path, 0, "somebody else keeps changing it"),))


def edited(
    text: bytes, put: Mapping[bytes, bytes], drop: Collection[bytes] = (), *, only: bool = False
) -> tuple[bytes, Edit]:
    """The new text, and what is different. Lines that are no rows stay; of a key that is put one line is left."""
    out: list[bytes] = []
    done: set[bytes] = set()
    added = changed = removed = same = 0
    silent = ProblemCollector("")
    lines = text.split(b"\n")
    last = lines.pop()  # empty, unless the file has no final newline
    if last:
        lines.append(last)
    for line in lines:
        folded = line.lower()
        if not only and folded not in put and folded not in drop and PLAIN_KEYS.fullmatch(folded + b"\n"):
            out.append(line)  # the quick way past most rows of a large table
            continue
        row = parse_row(line.removesuffix(b"\r").removeprefix(b"\xef\xbb\xbf"), 0, silent)
        if row is None:
            out.append(line)
            continue
        key, value = row
        if key in put and key not in done:
            done.add(key)
            if value == put[key] or (not put[key] and value != EXEMPT and not only):  # its own options stay
                same += 1
                out.append(line)
            else:
                changed += 1
                out.append(row_text(key, put[key]))
        elif key in put:  # a repetition; it would count, because later lines do
            changed += 1
        elif key in drop or only:
            removed += 1
        else:
            out.append(line)
    for key, value in put.items():
        if key not in done:
            added += 1
            out.append(row_text(key, value))
    return b"".join(line + b"\n" for line in out), Edit(added, changed, removed, same)
