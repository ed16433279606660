"""Interface to systemd: notifications, the watchdog, and sockets that are passed in.

Standard library only. Everything is a no-op outside systemd. Sources: sd_notify(3),
sd_listen_fds(3), sd_watchdog_enabled(3), systemd.service(5) for ``Type=notify-reload``.
"""

import os
import socket
import time
from collections.abc import MutableMapping

FIRST_FD = 3  # SD_LISTEN_FDS_START


class Notifier:
    """Sends state lines to the service manager. A lost datagram never disturbs the daemon."""

    def __init__(self, address: str = "") -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> "Notifier":
        """Take ``NOTIFY_SOCKET`` out of ``environ``, so that no child speaks for us."""
        return cls(environ.pop("NOTIFY_SOCKET", ""))

    def send(self, *lines: str) -> None:
        """One datagram with all ``lines`` (``NAME=value``)."""
        if self._socket is None:
            return
        try:
            self._socket.sendto("\n".join(lines).encode(), self._address)
        except OSError:
            pass  # the manager is restarting or its queue is full; the next state line corrects it

    def ready(self, status: str) -> None:
        self.send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Must be followed by :meth:`ready`, also when the reload failed."""
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        self.send("STOPPING=1")

    def status(self, text: str) -> None:
        self.send(f"STATUS={text}")

    def alive(self) -> None:
        self.send("WATCHDOG=1")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def watchdog_interval(environ: MutableMapping[str, str], pid: int) -> float:
    """Seconds between two signs of life (half the manager's limit), or 0.0 when none are expected."""
    limit = environ.pop("WATCHDOG_USEC", "")
    meant_for = environ.pop("WATCHDOG_PID", "") or str(pid)
    if not limit.isdecimal() or meant_for != str(pid):
        return 0.0
    return int(limit) / 2_000_000


def listen_fds(environ: MutableMapping[str, str], pid: int) -> list[tuple[str, int]]:
    """The descriptors passed to process ``pid``, each with its name, in the manager's order.

    The variables are removed and the descriptors made close-on-exec, so that children get nothing by accident.
    """
    count, meant_for = environ.pop("LISTEN_FDS", ""), environ.pop("LISTEN_PID", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if not count.isdecimal() or meant_for != str(pid) or int(count) > 1024:
        return []
    fds = list(range(FIRST_FD, FIRST_FD + int(count)))
    for fd in fds:
        os.set_inheritable(fd, False)
    return [(names[i] if i < len(names) and names[i] else "unknown", fd) for i, fd in enumerate(fds)]
