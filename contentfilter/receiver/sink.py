"""Closes connections in a process of its own, which is replaced when a close() blocks."""

import os
import signal
import socket
import time
from contextlib import suppress

from contentfilter.doors.handover import BATCH
from contentfilter.receiver.starter import Starter

LETTER = b"s"
SINK_WAIT = 2.0  # seconds that the sink may need for what it was given


class Sink:
    """The main process's side. What it takes stays open here until the sink is known to hold it."""

    def __init__(self, starter: Starter) -> None:
        self._starter = starter
        self._pid = 0
        self._socket: socket.socket | None = None  # set while a process is there, or being started
        self._waiting: list[list[int]] = []
        self._since = 0.0  # since when it has not confirmed
        self._outstanding = 0

    def take(self, fds: list[int]) -> None:
        """Have ``fds`` (at most BATCH) closed."""
        self._waiting.append(fds)
        self._pass_on()

    def check(self) -> None:
        """Replace a sink that hangs. Call about once in half a second."""
        if self._socket is not None:
            with suppress(OSError):
                while self._socket.recv(1):
                    self._outstanding -= 1
                    self._since = time.monotonic()
        if self._outstanding and time.monotonic() - self._since > SINK_WAIT:
            self._replace()
        self._pass_on()

    def _pass_on(self) -> None:
        if self._waiting and self._socket is None:
            with suppress(OSError):  # tried again by check()
                self._socket = self._starter.start(LETTER, self._started)
                self._socket.setblocking(False)
        while self._waiting and self._pid and self._socket is not None:
            fds = self._waiting[0]
            try:
                socket.send_fds(self._socket, [b"."], fds)
            except OSError:  # it is full, so it hangs, or it is gone
                return self._replace()
            del self._waiting[0]
            for fd in fds:
                os.close(fd)
            if not self._outstanding:
                self._since = time.monotonic()
            self._outstanding += 1
            with suppress(OSError):  # full: it hangs, and will be replaced
                self._socket.send(b"c")
        return None

    def _started(self, pid: int) -> None:
        self._pid = pid
        if not pid:
            self._replace()
        self._pass_on()

    def _replace(self) -> None:
        """Kill the sink: the kernel then closes what it holds, without waiting."""
        if self._pid:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        if self._socket is not None:
            self._socket.close()
        self._pid, self._socket, self._outstanding = 0, None, 0


def swallow(source: socket.socket) -> None:
    """In the sink: what comes in one packet is closed after the next packet, which says that the sender has."""
    held: list[int] = []
    while True:
        packet, fds, _, _ = socket.recv_fds(source, 1, BATCH)
        if not packet:
            return
        if packet == b".":
            held += fds
            continue
        while held:
            os.close(held.pop())
        source.send(b".")
