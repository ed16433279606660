"""Cost of the processes of a daemon: memory, descriptors and restarts, sampled by a thread."""

import os
import re
import threading
from collections import defaultdict
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

EVERY = 0.2  # seconds
LASTING = ("supervisor", "worker", "receiver", "remote_feed")  # the processes that live as long as the daemon


def role_of(pid: int) -> str:
    """Module that a process of the daemon runs; children of the receiver are "receiver child"."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    module = next((w for before, w in pairwise(words) if before == b"-m"), b"")
    role = {b"contentfilter": "supervisor"}.get(module, module.rpartition(b".")[2].decode())
    return role or words[0].decode().rpartition("/")[2]


def processes(pid: int) -> dict[int, str]:
    """The daemon's process tree: pid and role. Processes that end meanwhile are omitted."""
    found: dict[int, str] = {}
    todo = [(pid, "")]
    while todo:
        each, parent = todo.pop()
        with suppress(OSError):
            role = role_of(each)
            if not role:  # a zombie
                continue
            found[each] = f"{role} child" if role == parent else role
            for task in os.listdir(f"/proc/{each}/task"):
                children = Path(f"/proc/{each}/task/{task}/children").read_text().split()
                todo += [(int(child), role) for child in children]
    return found


def _field(pid: int, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


class Observer:
    """Samples from ``start`` to ``stop``: the largest resident set of one process of each role, in MiB, and counts."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.memory: dict[str, int] = defaultdict(int)
        self.most: dict[str, int] = defaultdict(int)  # processes of a role at the same time
        self.together = 0  # MiB, all processes together, at its largest

    def start(self) -> "Observer":
        self._thread.start()
        return self

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(EVERY):
            self._sample()

    def _sample(self) -> None:
        total = 0
        counts: dict[str, int] = defaultdict(int)
        for pid, role in processes(self._pid).items():
            with suppress(OSError):
                self.memory[role] = max(self.memory[role], _field(pid, "VmHWM") // 1024)
                total += _field(pid, "VmRSS") // 1024
                counts[role] += 1
        self.together = max(self.together, total)
        for role, count in counts.items():
            self.most[role] = max(self.most[role], count)

    def cpu(self) -> float:
        """CPU seconds that the processes of the daemon have used so far, with their ended children."""
        ticks = 0
        for pid in processes(self._pid):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, words[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def descriptors(self) -> dict[str, int]:
        """Open descriptors of the lasting processes now, the largest of each role."""
        found: dict[str, int] = defaultdict(int)
        for pid, role in processes(self._pid).items():
            if role in LASTING:
                with suppress(OSError):
                    found[role] = max(found[role], len(os.listdir(f"/proc/{pid}/fd")))
        return dict(found)

    def lasting(self) -> set[int]:
        """Pids of the lasting processes."""
        return {pid for pid, role in processes(self._pid).items() if role in LASTING and role != "receiver"}
