"""A real daemon around the trivial application, and a gate to hold a message in a worker."""

import socket
import sys
from pathlib import Path
from typing import Any

from lab.daemon import WAIT, Daemon

HERE = Path(__file__).resolve().parent


def trivial_daemon(settings: Any = None, **more: Any) -> Daemon:
    """A daemon (not started) that runs trivial.py."""
    return Daemon(settings, command=[sys.executable, "-P", str(HERE / "trivial.py")], **more)


class Gate:
    """Holds messages that WAIT until the test opens it."""

    def __init__(self, directory: Path) -> None:
        self._path = str(directory / "gate")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(self._path)
        self._socket.listen(16)
        self._socket.settimeout(WAIT)
        self._held: list[socket.socket] = []
        self.message = f"WAIT {self._path}\n".encode()

    def wait(self) -> int:
        """Until a message has arrived; the pid of the worker that holds it."""
        held, _ = self._socket.accept()
        held.settimeout(WAIT)
        self._held.append(held)
        return int(held.recv(32))

    def open(self) -> None:
        for held in self._held:
            held.send(b"!")
        self._held.clear()

    def close(self) -> None:
        for each in (*self._held, self._socket):
            each.close()
