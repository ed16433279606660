"""A peer that does on purpose what real daemons do only on their worst day.

``with Peer(directory, talk, read_clamd) as peer:`` listens; each connection gets a thread that reads the
question with ``read_clamd`` or ``read_spamd`` and then follows ``talk``. ``peer.seen`` keeps what was
asked. A talk that stalls waits on ``peer.over``, so nothing sleeps and all threads end with the peer.
"""

import array
import contextlib
import itertools
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

Read = Callable[[socket.socket], bytes]
WAIT = 30.0  # seconds after which a stuck peer gives up, far beyond any test

_numbers = itertools.count(1)


@dataclass
class Peer:
    """One listening socket: a Unix socket in ``directory``, or TCP on an ephemeral port where it is None."""

    directory: Path | None
    talk: "Talk"
    read: Read
    backlog: int = 16
    over: threading.Event = field(default_factory=threading.Event)
    seen: list[bytes] = field(default_factory=list)
    connections: int = 0

    def __post_init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []
        if self.directory is None:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=self.backlog)
            self.backend = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        else:
            path = str(self.directory / f"peer{next(_numbers)}")  # the file outlives the peer
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(path)
            self._listener.listen(self.backlog)
            self.backend = f"unix:{path}"

    @property
    def path(self) -> str:
        return self.backend.removeprefix("unix:")

    def start(self) -> Self:
        """Begin to accept. Before that, connections pile up in the listen queue."""
        self._run(self._accept)
        return self

    def stop(self) -> None:
        """Close everything and join every thread."""
        self.over.set()
        for sock in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(WAIT)
            assert not thread.is_alive()
        self._listener.close()
        for sock in self._open:
            sock.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self.over.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(WAIT)
            self._open.append(sock)
            self.connections += 1
            self._run(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            self.talk(self, sock)


Talk = Callable[[Peer, socket.socket], None]


# ---------------------------------------------------------------- reading the question


def read_clamd(sock: socket.socket) -> bytes:
    """A whole clamd command: with FILDES also the descriptor (closed immediately), with INSTREAM all chunks."""
    data, ancillary, _, _ = sock.recvmsg(65_536, socket.CMSG_SPACE(16))
    for _, _, raw in ancillary:
        fds = array.array("i", raw)
        for fd in fds:
            socket.close(fd)
    while data.startswith(b"zINSTREAM\0") and not _all_chunks(data[10:]):
        more = sock.recv(65_536)
        if not more:
            break
        data += more
    return data


def _all_chunks(data: bytes) -> bool:
    position = 0
    while position + 4 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        if size == 0:
            return True
        position += 4 + size
    return False


def read_spamd(sock: socket.socket) -> bytes:
    """Everything up to the half-close."""
    data = b""
    while more := sock.recv(65_536):
        data += more
    return data


# ---------------------------------------------------------------- talking


def says(answer: bytes) -> Talk:
    """Reads the question, gives this answer, closes."""

    def talk(peer: Peer, sock: socket.socket) -> None:
        peer.seen.append(peer.read(sock))
        sock.sendall(answer)

    return talk


def says_and_stays(answer: bytes) -> Talk:
    """Gives this answer (or a part of one, or nothing) and then keeps the connection open in silence."""

    def talk(peer: Peer, sock: socket.socket) -> None:
        peer.seen.append(peer.read(sock))
        sock.sendall(answer)
        peer.over.wait(WAIT)

    return talk


def alive(talk: Talk) -> Talk:
    """A clamd that answers each VERSION; everything else is for ``talk``."""

    def answer(peer: Peer, sock: socket.socket) -> None:
        if sock.recv(9, socket.MSG_PEEK).startswith(b"zVERSION\0"):
            sock.sendall(b"ClamAV 1.4.0\0")
        else:
            talk(peer, sock)

    return answer


def drips(answer: bytes) -> Talk:
    """The answer in single bytes, each in a packet of its own."""

    def talk(peer: Peer, sock: socket.socket) -> None:
        peer.seen.append(peer.read(sock))
        for position in range(len(answer)):
            sock.sendall(answer[position : position + 1])

    return talk


def drips_forever(start: bytes, byte: bytes) -> Talk:
    """An answer without an end, slow enough that no size limit ends it."""

    def talk(peer: Peer, sock: socket.socket) -> None:
        peer.seen.append(peer.read(sock))
        sock.sendall(start)
        while not peer.over.wait(0.02):
            sock.sendall(byte)

    return talk


def floods(start: bytes, block: bytes) -> Talk:
    """An answer without an end, as fast as it is taken."""

    def talk(peer: Peer, sock: socket.socket) -> None:
        peer.seen.append(peer.read(sock))
        sock.sendall(start)
        while not peer.over.is_set():
            sock.sendall(block)

    return talk


def closes() -> Talk:
    """Accepts and closes immediately, with the question unread."""

    def talk(peer: Peer, sock: socket.socket) -> None:
        return

    return talk


def closes_after_question() -> Talk:
    return says(b"")


def answers_early(answer: bytes) -> Talk:
    """Answers before it has read anything, and never reads."""

    def talk(peer: Peer, sock: socket.socket) -> None:
        sock.sendall(answer)
        peer.over.wait(WAIT)

    return talk


def in_turn(*talks: Talk) -> Talk:
    """The first connection that comes here gets the first talk, and so on; the last one serves all that follow."""
    turns = itertools.count()

    def talk(peer: Peer, sock: socket.socket) -> None:
        talks[min(next(turns), len(talks) - 1)](peer, sock)

    return talk


def refuses_descriptor(answer: bytes) -> Talk:
    """A clamd that does not take descriptors, but streams."""

    def talk(peer: Peer, sock: socket.socket) -> None:
        question = peer.read(sock)
        peer.seen.append(question)
        sock.sendall(b"No file descriptor received. ERROR\0" if question.startswith(b"zFILDES") else answer)

    return talk


def fill_listen_queue(path: str) -> list[socket.socket]:
    """Connections to ``path`` until it takes no more. The caller closes them."""
    taken = []
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(path)
        except BlockingIOError:
            sock.close()
            return taken
        taken.append(sock)
