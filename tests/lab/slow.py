"""A clamd that takes its time: each question waits until the test says what it has found."""

import os
import re
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path

from lab.peers import WAIT, Peer, read_clamd

OK = b"OK"
DATABASE = b"ClamAV 1.4.0/27000/Mon Jan  1 00:00:00 2024"
NEWER = b"ClamAV 1.4.0/27001/Tue Jan  2 00:00:00 2024"


@dataclass
class Slow:
    """``with Slow(directory) as clamd``; ``clamd.says(OK)`` answers all questions, those to come included."""

    directory: Path
    database: bytes = DATABASE
    asked: list[bytes] = field(default_factory=list)  # the messages
    mute: bool = False  # to VERSION

    def __post_init__(self) -> None:
        self._answer = OK
        self._ready = threading.Event()
        self._peer = Peer(self.directory, self._talk, read_clamd)
        self.backend = self._peer.backend

    def says(self, word: bytes) -> None:
        self._answer = word
        self._ready.set()

    def thinks(self) -> None:
        """From now on, questions wait again."""
        self._ready.clear()

    def _talk(self, peer: Peer, sock: socket.socket) -> None:
        data, fds, _, _ = socket.recv_fds(sock, 4096, 4)
        if b"VERSION" in data:
            if self.mute:
                peer.over.wait(WAIT)
            return sock.sendall(self.database + b"\0")
        if b"PING" in data:
            return sock.sendall(b"PONG\0")
        message = os.pread(fds[0], 1 << 26, 0)
        os.close(fds[0])
        self.asked.append(message)
        while not self._ready.wait(0.02) and not peer.over.is_set():
            pass
        return sock.sendall(b"fd[10]: %s\0" % self._answer)

    def __enter__(self) -> "Slow":
        self._peer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._peer.stop()


def tried(message: bytes, minute: int, client: str = "mail.example.net", ip: str = "192.0.2.7") -> bytes:
    """``message`` as qmail-smtpd hands it on, with a Received field of this try on top."""
    return b"Received: from %s (HELO mx) (%s)\n  by in.example with SMTP; 20 Nov 2026 12:%02d:00 -0000\n%s" % (
        client.encode(),
        ip.encode(),
        minute,
        message,
    )


def without_received(message: bytes) -> bytes:
    return re.sub(rb"\AReceived: [^\n]*\n[^\n]*\n", b"", message)
