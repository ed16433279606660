"""Tools of the attackers: connections to the queue socket, descriptors of every kind, and a pace."""

import os
import resource
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lab.descriptors import rights

from contentfilter.wire import hook

MESSAGE = b"Subject: x\n\nhello\n"
ENVELOPE = b"Fa@b.example\0Tnone@mixed.example\0\0"
PAUSE = 0.002  # seconds after an error: a refused attacker goes on, but not in an endless loop


@dataclass(frozen=True, slots=True)
class Place:
    """Paths and processes of the daemon under attack; the same for every attacker."""

    queue: str  # the hook's socket
    run: str  # directory of the other sockets
    state: str
    control: str
    config: str
    hook: str  # the hook's program, and its configuration
    hook_conf: str
    scratch: str  # a directory where everybody may write
    http: int  # port
    daemon: int  # pids
    clamd: int
    feed: str = ""  # address of the event feed for other machines
    feed_key: str = ""  # secret key of the daemon and of the collector alike
    peer: str = ""  # where a hostile server listens

    def recorded(self) -> dict[str, str]:
        """Environment in which the stand-in for qmail-queue takes the attackers' own mail."""
        return {"CONTENTFILTER_QUEUE_CONF": self.hook_conf}


Act = Callable[[Place], None]


def many_descriptors() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Held:
    """Keeps the last ``most`` objects, and closes older ones."""

    def __init__(self, most: int) -> None:
        self._kept: deque[Any] = deque()
        self._most = most

    def add(self, *objects: Any) -> None:
        self._kept.extend(objects)
        while len(self._kept) > self._most:
            _close(self._kept.popleft())

    def drop(self) -> None:
        while self._kept:
            _close(self._kept.popleft())


def _close(each: Any) -> None:
    """Close a socket, or a descriptor. What lingers is not waited for."""
    if isinstance(each, socket.socket):
        if each.family == socket.AF_INET:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        each.close()
    else:
        os.close(each)


def forever(act: Callable[[], object], pause: float = 0.0) -> None:
    """``act`` again and again, ``pause`` seconds apart. Does not return."""
    while True:
        try:
            act()
        except OSError:
            time.sleep(PAUSE)
        if pause:
            time.sleep(pause)


def connect(path: str, kind: int = socket.SOCK_SEQPACKET, seconds: float = 5.0) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, kind)
    connection.settimeout(seconds)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def send(connection: socket.socket, packet: bytes, *fds: int) -> None:
    connection.sendmsg([packet], rights(*fds) if fds else [])


def request(
    size: int = len(MESSAGE),
    envelope: int = len(ENVELOPE),
    budget: float = 600.0,
    environ: dict[bytes, bytes] | None = None,
    attempt: int = 0,
) -> bytes:
    return hook.encode_request(hook.Request(attempt, budget, size, envelope, environ or {}))


def file(data: bytes = ENVELOPE, size: int = 0) -> int:
    """An unsealed memfd. ``size``: extended with a hole to this size."""
    fd = os.memfd_create("x")
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    if size:
        os.ftruncate(fd, size)
    return fd


def offer(place: Place, message: bytes, envelope: bytes = ENVELOPE, budget: float = 600.0) -> socket.socket:
    """A sound request; the connection is the caller's."""
    connection = connect(place.queue)
    fds = file(message), file(envelope)
    try:
        send(connection, request(len(message), len(envelope), budget), *fds)
    except OSError:
        connection.close()
        raise
    finally:
        for fd in fds:
            os.close(fd)
    return connection


def abandon(*fds: int) -> None:
    """Give up our copies of descriptors whose close() may block: a child that holds them, too, is killed."""
    child = os.fork()
    if not child:
        while True:
            time.sleep(60)
    for fd in fds:
        os.close(fd)
    os.kill(child, 9)
    os.waitpid(child, 0)


def nested(*inner: int) -> int:
    """A socket with descriptors in its queue. Nobody else refers to the queue."""
    one, other = socket.socketpair()
    send(one, b".", *inner)
    one.close()
    return other.detach()


def become(uid: int, gid: int) -> None:
    """Another user from now on, in one group only."""
    many_descriptors()
    if uid or gid:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)


def spawn_hook(place: Place, message: bytes, envelope: bytes, **conf: str) -> int:
    """Start the real hook with one message (below 64 KiB, as is the envelope). Returns its pid."""
    ends = []
    for data in (message, envelope):
        out, into = os.pipe()
        os.set_blocking(into, False)
        os.write(into, data)
        os.close(into)
        ends.append(out)
    actions: list[Any] = [(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in enumerate(ends)]
    actions.append((os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0))
    pid = os.posix_spawn(place.hook, [place.hook], place.recorded() | conf, file_actions=actions)
    for fd in ends:
        os.close(fd)
    return pid


def reap() -> None:
    """Collect children that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
