"""Shared by the tests of bad days: kills, open descriptors, and a continuous stream of mail."""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from lab.daemon import Daemon
from lab.hook import until
from lab.peers import Peer
from lab.system import Delivered, System

SPLIT = (b"virus-only@mixed.example", b"none@mixed.example")  # one is checked, the other is not


def kill_everything(daemon: Daemon) -> None:
    """SIGKILL for supervisor and workers together, as when a machine runs out of memory."""
    workers = daemon.workers()
    daemon.kill()
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    daemon.wait_exit()


def waiting_in(daemon: Daemon, peer: Peer, count: int = 1) -> None:
    """Wait until ``count`` requests have reached a scanner that does not answer: the daemon holds messages."""
    probes = b"zVERSION", b"PING"
    until(lambda: sum(not q.startswith(probes) for q in peer.seen) >= count, "no question reached the scanner")
    assert daemon.workers()


def targets(pid: int) -> list[str]:
    """Targets of the descriptors of a process. A container may not let root see those of other users' processes."""
    found = []
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(entry))
    except PermissionError:
        pytest.skip("cannot see another user's descriptors here (no CAP_SYS_PTRACE)")
    return found


def open_files(daemon: Daemon) -> int:
    """Descriptors of all workers together."""
    return sum(len(targets(pid)) for pid in daemon.workers())


def own_memory(daemon: Daemon) -> int:
    """Bytes of the workers' own memory: what is mapped from the hook's file does not count."""
    total = 0
    for pid in daemon.workers():
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total += int(line.split()[1]) * 1024
    return total


@contextlib.contextmanager
def watched(look: Callable[[], int]) -> Iterator[list[int]]:
    """Results of ``look`` while the block ran."""
    seen: list[int] = [look()]
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.005):
            with contextlib.suppress(OSError):
                seen.append(look())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@dataclass
class Load:
    """Messages that keep coming, from ``senders`` threads: each with bytes of its own, every other one split."""

    system: System
    senders: int = 3
    results: list[tuple[bytes, tuple[bytes, ...], Delivered]] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self._over = threading.Event()
        self._news = threading.Condition()
        self._threads = [threading.Thread(target=self._send, args=(number,)) for number in range(self.senders)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def more(self, count: int = 10) -> None:
        """Wait until ``count`` further messages have ended."""
        with self._news:
            goal = len(self.results) + count
            assert self._news.wait_for(lambda: len(self.results) >= goal, 60), "mail does not move"

    def _send(self, number: int) -> None:
        for count in itertools.count():
            if self._over.is_set():
                return
            message = b"Subject: load\n\nmessage %d of sender %d\n" % (count, number)
            to = SPLIT[: 1 + count % 2]
            delivered = self.system.deliver(message, *to)
            with self._news:
                self.results.append((message, to, delivered))
                self._news.notify_all()

    def nothing_went_wrong(self) -> None:
        """None lost, doubled, refused or deferred, and none changed; the hooks had nothing to complain of."""
        wrong = [(d.status, d.text, d.stderr) for _, _, d in self.results if d.status or d.stderr or d.text]
        assert not wrong, str(wrong[:5])
        for message, to, d in self.results:
            assert sorted(address for q in d.queued for address in q.envelope.recipients) == sorted(to)
            assert all(q.message.endswith(b"\n" + message) for q in d.queued)
