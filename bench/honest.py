"""Honest mail at a fixed pace through the real hook, with the latency of each message. A program of its own.

``honest.py HOOK CONF STANDIN_DIR RATE PROTECTED OUT``: messages until its stdin is closed; then it waits for the last
ones. OUT gets a line for each: the time at which it was due (CLOCK_MONOTONIC), seconds from then to the hook's exit,
exit status, number. Latency counts from the time that was due, so that a load that falls behind shows it.
"""

import os
import select
import sys
import time
from typing import Any

from lab.system import SMTP

from contentfilter.wire import envelope

PROTECTED, UNPROTECTED = b"user@protected.example", b"none@mixed.example"
SIZES = (1500, 3000, 800, 2500, 30_000)  # bytes
LINE = b"A line as people write them, not long and not short.\n"


def message(number: int) -> bytes:
    """Below 64 KiB, so that it fits into a pipe."""
    return b"Subject: honest\nX-Number: %d\n\n" % number + LINE * (SIZES[number % len(SIZES)] // len(LINE))


class Load:
    """Starts hooks, and notes their ends."""

    def __init__(self, program: str, environ: dict[str, str], protected: bool, out: str) -> None:
        self._program, self._environ = program, environ
        self._recipients = (PROTECTED, UNPROTECTED) if protected else (UNPROTECTED,)
        self._out = open(out, "w", buffering=1)  # noqa: SIM115 - as long as the process
        self._poll = select.poll()
        self._running: dict[int, tuple[int, int, float]] = {}  # pidfd -> pid, number, when it was due

    def submit(self, number: int, due: float) -> None:
        block = envelope.build(b"sender@example.net", (self._recipients[number % len(self._recipients)],))
        ends = []
        for data in (message(number), block):
            out, into = os.pipe()
            os.write(into, data)
            os.close(into)
            ends.append(out)
        actions: list[Any] = [(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in enumerate(ends)]
        actions.append((os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0))
        pid = os.posix_spawn(self._program, [self._program], self._environ, file_actions=actions)
        for fd in ends:
            os.close(fd)
        pidfd = os.pidfd_open(pid)
        self._running[pidfd] = pid, number, due
        self._poll.register(pidfd, select.POLLIN)

    def wait(self, until: float) -> None:
        """Note what ends before ``until``."""
        while (left := until - time.monotonic()) > 0:
            for fd, _ in self._poll.poll(left * 1000):
                if fd == 0:
                    return
                self._ended(fd)

    def finish(self) -> None:
        while self._running:
            for fd, _ in self._poll.poll(1000):
                self._ended(fd)

    def _ended(self, pidfd: int) -> None:
        if pidfd not in self._running:
            return
        pid, number, due = self._running.pop(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._out.write(f"{due:.4f} {time.monotonic() - due:.4f} {status} {number}\n")
        self._poll.unregister(pidfd)
        os.close(pidfd)


def main() -> None:
    program, conf, standin, rate, protected, out = sys.argv[1:]
    environ = {"CONTENTFILTER_QUEUE_CONF": conf, "STANDIN_DIR": standin, **SMTP}
    load = Load(program, environ, protected == "1", out)
    began, number = time.monotonic(), 0
    ended = select.poll()
    ended.register(0, select.POLLIN)
    while not ended.poll(0):
        due = began + number / float(rate)
        load.wait(due)
        load.submit(number, due)
        number += 1
    load.finish()


if __name__ == "__main__":
    main()
