"""Low-water marks of memory and disk, checked once a second beside the event loop: below them no mail is taken.

Memory is what the kernel calls available (proc(5), MemAvailable), or less if a cgroup of this process allows less; page
cache that can be reclaimed counts as free. Disk is what the daemon's user may still use on the file system of the state
directory. A value that cannot be read never keeps mail out. A disk may hang, so the check runs in a daemon thread.
"""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

EVERY = 1.0  # seconds
RECOVERED = 1.25  # times the mark must be free before an exhausted resource counts as sufficient again
MEMORY, DISK = RESOURCES = "memory", "disk"


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Bytes that must be free; 0: not checked."""

    memory: int
    disk: int
    state: str  # directory


def exhausted_resource(marks: Watermarks, exhausted: str = "") -> str:
    """MEMORY, DISK, or empty. ``exhausted``: the last result; that resource must recover to above its mark."""
    checks: tuple[tuple[str, int, Callable[[], int | None]], ...] = (
        (MEMORY, marks.memory, available_memory),
        (DISK, marks.disk, lambda: _available_disk(marks.state)),
    )
    for name, mark, available in checks:
        free = available() if mark else None
        if free is not None and free < mark * (RECOVERED if name == exhausted else 1.0):
            return name
    return ""


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes: the least of the machine's and of each cgroup's (version 2) above this process; None if unknown."""
    return min((*_machine(root), *_cgroups(root)), default=None)


def _machine(root: Path) -> Iterator[int]:
    try:
        words = _words(root / "proc/meminfo")
        yield words["MemAvailable:"] * 1024
    except (OSError, ValueError, KeyError):
        return


def _cgroups(root: Path) -> Iterator[int]:
    try:
        line = next(each for each in (root / "proc/self/cgroup").read_text().splitlines() if each.startswith("0::"))
    except (OSError, StopIteration):
        return
    mount = root / "sys/fs/cgroup"
    at = mount / line[3:].strip("/")
    for group in (at, *at.parents):
        try:
            limit, current = (group / "memory.max").read_text(), int((group / "memory.current").read_text())
            cache = _words(group / "memory.stat")
            yield int(limit) - current + cache["active_file"] + cache["inactive_file"]
        except (OSError, ValueError, KeyError):
            pass  # "max": no limit; the root group has no such files
        if group == mount:
            return


def _words(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) >= 2}


def _available_disk(state: str) -> int | None:
    try:
        found = os.statvfs(state)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


class ResourceMonitor:
    """Calls ``changed`` from its thread with the exhausted resource, or empty, whenever that has changed."""

    def __init__(self, marks: Callable[[], Watermarks], changed: Callable[[str], object]) -> None:
        self._marks = marks
        self._changed = changed
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watermarks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()

    def _run(self) -> None:
        exhausted = ""
        while not self._end.wait(EVERY):
            now = exhausted_resource(self._marks(), exhausted)
            if now != exhausted and not self._end.is_set():
                exhausted = now
                try:
                    self._changed(now)
                except RuntimeError:
                    return  # the event loop is closed
