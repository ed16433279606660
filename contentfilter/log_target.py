"""Targets of log lines: a descriptor, journald behind one, or the local syslog. Writing never waits and never raises.

Sources: sd-daemon(3) for the ``<6>`` in front of a line and systemd.exec(5) for JOURNAL_STREAM; syslog(3) and RFC 3164
for what a local syslogd reads from /dev/log.
"""

import os
import select
import socket
import time
from collections.abc import Mapping
from typing import Literal, Protocol

TAG = b"contentfilter"
FACILITIES = {"": 2} | {f"LOG_LOCAL{number}": 16 + number for number in range(8)}
"""By the names that sysfacility may have; 2 is LOG_MAIL."""
SEVERITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


class Target(Protocol):
    @property
    def lost(self) -> int:
        """Lines that got nowhere since the last one that got through."""

    def write(self, line: bytes, level: str) -> None:
        """One finished line, with its end."""


class Stream:
    """A descriptor: one line is one write. Into a pipe whose reader has stalled nothing is written.

    ``marked``: each line begins with its severity, as journald reads it.
    """

    def __init__(self, fd: int, *, marked: bool = False) -> None:
        self._fd = fd
        self._marked = marked
        self._state = select.poll()
        self._state.register(fd, select.POLLOUT)
        self.lost = 0

    def write(self, line: bytes, level: str) -> None:
        try:
            if self._state.poll(0):
                os.write(self._fd, b"<%d>%b" % (SEVERITIES.get(level, 6), line) if self._marked else line)
                self.lost = 0
                return
        except OSError:
            pass
        self.lost += 1


class Syslog:
    """The local syslogd's datagram socket. A line that it does not take, for whatever reason, goes to ``instead``.

    A syslogd that was restarted has a new socket at the same path: a line that the old one refuses is sent to that.
    """

    def __init__(self, path: str, facility: str, instead: Target) -> None:
        self._facility = FACILITIES.get(facility.upper(), FACILITIES[""]) << 3
        self._instead = instead
        self._path = path
        self._socket: socket.socket | None = None

    @property
    def lost(self) -> int:
        return self._instead.lost

    def write(self, line: bytes, level: str) -> None:
        when = time.strftime("%b %e %H:%M:%S").encode("ascii", "replace")
        head = b"<%d>%b %b[%d]: " % (self._facility | SEVERITIES.get(level, 6), when, TAG, os.getpid())
        if not self._sent(head + line.rstrip(b"\n")):
            self._instead.write(line, level)

    def _sent(self, datagram: bytes) -> bool:
        for _ in range(2):
            try:
                self._connected().send(datagram)
            except BlockingIOError:
                return False  # it is there, and behind
            except OSError:
                self._drop()
            else:
                return True
        return False

    def _connected(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            self._socket.connect(self._path)
        return self._socket

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def open_target(
    to: Literal["stderr", "syslog"], path: str, facility: str, environ: Mapping[str, str], fd: int = 2
) -> Target:
    """Open the target that ``[log] to`` and ``socket`` and sysfacility select; ``fd`` is standard error."""
    stream = Stream(fd, marked=is_journal(fd, environ))
    return Syslog(path, facility, stream) if to == "syslog" else stream


def is_journal(fd: int, environ: Mapping[str, str]) -> bool:
    """Return True if ``fd`` is still the connection to journald that systemd made."""
    try:
        about = os.fstat(fd)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{about.st_dev}:{about.st_ino}"
