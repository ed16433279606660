"""Retention of the quarantine: entries by age and by quota, oldest first; then what belongs to no entry.

Looks at names, sizes and times only. Sizes count once for equal messages, which share an inode.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from contentfilter.store.sidecar import valid_incident

NEW = ".new-"
"""Prefix of the name of an unfinished file."""
STALE = 3_600.0
"""Seconds after which an unfinished file belongs to nobody: far above the budget of a message."""


@dataclass(frozen=True, slots=True)
class RetentionLimits:
    """The rules: bytes (0: no limit), seconds, seconds."""

    quota: int
    retention: float
    protect: float


class StoredEntry(NamedTuple):
    """Size, age and name of an entry, for expiry; the oldest sorts first."""

    kept: float  # seconds since 1970
    incident: str
    size: int  # of the sidecar
    inode: int  # of the message


@dataclass(slots=True)
class Survey:
    """The entries, oldest first, and their sizes."""

    entries: list[StoredEntry] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)  # of the messages, by inode
    links: Counter[int] = field(default_factory=Counter)  # entries, by inode
    orphans: list[Path] = field(default_factory=list)  # old and without a sidecar, or unfinished
    used: int = 0  # bytes of all entries


def survey(directory: Path, now: float) -> Survey:
    """Look at all entries. Files that come or go meanwhile may or may not be in the result."""
    found = Survey()
    entries = directory / "entries"
    files = dict(scan(entries))
    for name, status in files.items():
        incident, _, kind = name.rpartition(".")
        if kind == "json" and valid_incident(incident):
            message = files.get(f"{incident}.eml")
            inode = message.st_ino if message is not None else 0
            found.sizes[inode] = message.st_size if message is not None else 0
            found.links[inode] += 1
            found.entries.append(StoredEntry(status.st_mtime, incident, status.st_size, inode))
            found.used += status.st_size
        elif now - status.st_ctime > STALE and (name.startswith(NEW) or f"{incident}.json" not in files):
            found.orphans.append(entries / name)
    found.used += sum(found.sizes.values())
    found.entries.sort()
    return found


def unreferenced(directory: Path, now: float) -> list[Path]:
    """Messages that no entry links to, and unfinished ones. An entry that links to one meanwhile keeps its bytes."""
    messages = directory / "messages"
    return [
        messages / folder / name
        for folder, _ in scan(messages)
        for name, status in scan(messages / folder)
        if (now - status.st_ctime > STALE if name.startswith(NEW) else status.st_nlink == 1)
    ]


def outdated(found: Survey, now: float, limits: RetentionLimits, room: int) -> tuple[tuple[str, ...], int]:
    """The incidents that may go so that ``room`` bytes are free below the quota, and the bytes then in use."""
    used, gone = found.used, []
    links = found.links.copy()
    for entry in found.entries:
        age = now - entry.kept
        over = 0 < limits.quota < used + room
        if age < limits.retention and (not over or age < limits.protect):
            break  # the others are younger still
        gone.append(entry.incident)
        used -= entry.size
        links[entry.inode] -= 1
        if not links[entry.inode]:
            used -= found.sizes[entry.inode]
    return tuple(gone), used


def scan(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Names and states. A folder that is not there is empty; a file that vanishes is skipped."""
    try:
        with os.scandir(folder) as files:
            for file in files:
                try:
                    yield file.name, file.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
    except (FileNotFoundError, NotADirectoryError):
        return
