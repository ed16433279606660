"""Lifeline: a watcher process that ends what this process started, however this process itself ends.

A parent-death signal cannot do this: clamd and spamd change their user, which clears it, and it fires already when the
thread that started the program ends. The watcher reads pids from a pipe; at its end, which comes even after SIGKILL,
it kills what is still running.
"""

import functools
import os
import select
import signal
import subprocess
import sys
from pathlib import Path


def end_with_us(pid: int) -> None:
    """Kill the child ``pid``, and its process group if it leads one, when this process ends."""
    os.write(_watcher(), b"%d\n" % pid)


def start() -> None:
    """Start the watcher now, so that its pipe does not look like a descriptor that a test left open."""
    _watcher()


@functools.cache
def _watcher() -> int:
    """Start the watcher. Returns the writing end of its pipe, which is never closed: the end of this process does."""
    reads, writes = os.pipe()
    subprocess.Popen(
        [sys.executable, "-I", "-S", Path(__file__).resolve()],
        stdin=reads,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in the terminal does not reach it
    )
    os.close(reads)
    return writes


def _watch(pipe: int) -> None:
    """Follow the children whose pids come from ``pipe``, and kill the rest at its end.

    A pidfd names one process even if its number is used again.
    """
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    children: dict[int, int] = {}  # pidfd: pid
    rest = b""
    while True:
        for fd, _ in poll.poll():
            if fd != pipe:  # it has ended
                poll.unregister(fd)
                del children[fd]
                os.close(fd)
                continue
            data = os.read(pipe, 65536)
            if not data:
                return _kill(children)
            *lines, rest = (rest + data).split(b"\n")
            for pid in map(int, lines):
                try:
                    pidfd = os.pidfd_open(pid)
                except ProcessLookupError:
                    continue
                children[pidfd] = pid
                poll.register(pidfd, select.POLLIN)


def _kill(children: dict[int, int]) -> None:
    for pidfd, pid in children.items():
        try:
            if os.getpgid(pid) == pid:
                os.killpg(pid, signal.SIGKILL)
            else:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _watch(sys.stdin.fileno())
