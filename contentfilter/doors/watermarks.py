"""Is there enough memory and disk to take mail? Looked at once a second, beside the event loop.

Memory is what the kernel calls available (proc(5), MemAvailable), or less where a cgroup of ours allows less; page
cache that can be given back counts as free. Disk is what the daemon's user may still use where the state directory
lies. What cannot be looked up is no reason to keep mail out. A disk may hang: the look is made in a thread of
its own that nobody waits for.
"""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

EVERY = 1.0  # seconds
RECOVERED = 1.25  # so many times the floor has to be there before it is enough again
MEMORY, DISK = RESOURCES = "memory", "disk"


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Bytes that must be free; 0: whatever is there is enough."""

    memory: int
    disk: int
    state: str  # directory


def exhausted_resource(floors: Watermarks, short: str = "") -> str:
    """MEMORY, DISK, or nothing. ``short``: what was short at the last look, which now needs some more."""
    looks: tuple[tuple[str, int, Callable[[], int | None]], ...] = (
        (MEMORY, floors.memory, available_memory),
        (DISK, floors.disk, lambda: _disk(floors.state)),
    )
    for name, floor, free in looks:
        found = free() if floor else None
        if found is not None and found < floor * (RECOVERED if name == short else 1.0):
            return name
    return ""


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes, by the machine and by each cgroup (version 2) above this process."""
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
            pass  # "max": no limit; the root has no such files
        if group == mount:
            return


def _words(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) >= 2}


def _disk(state: str) -> int | None:
    try:
        found = os.statvfs(state)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


class ResourceMonitor:
    """Calls ``changed`` from its thread whenever the answer is another one."""

    def __init__(self, floors: Callable[[], Watermarks], changed: Callable[[str], object]) -> None:
        self._floors = floors
        self._changed = changed
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="floors", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()

    def _run(self) -> None:
        short = ""
        while not self._end.wait(EVERY):
            now = exhausted_resource(self._floors(), short)
            if now != short and not self._end.is_set():
                short = now
                try:
                    self._changed(now)
                except RuntimeError:
                    return  # the event loop is closed
