"""The listening socket: opened by the supervisor under its lock, or inherited."""

import fcntl
import os
import socket
import stat
import time
from dataclasses import dataclass

from contentfilter.deadline import Deadline
from contentfilter.errors import ContentFilterError

ORPHANS = 2.0  # seconds that workers of a killed supervisor get to close the socket


class SocketError(ContentFilterError):
    """The listening socket is not available; the text says why and what to do."""


@dataclass(slots=True)
class OwnSocket:
    """A listening socket that this process bound to ``path``."""

    socket: socket.socket
    path: str
    inode: int

    def close(self) -> None:
        """Close, and remove the path if it is still ours."""
        self.socket.close()
        try:
            if os.stat(self.path).st_ino == self.inode:
                os.unlink(self.path)
        except OSError:
            pass


def hold_lock(path: str) -> int:
    """A descriptor that keeps ``path`` locked until it is closed. Raises SocketError if another process has it."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as e:
        raise SocketError(f"{path}: {e.strerror}") from e
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(lock)
        why = "another contentfilter is running" if isinstance(e, BlockingIOError) else e.strerror
        raise SocketError(f"{path}: {why}") from e
    return lock


def open_socket(path: str, mode: int, backlog: int) -> OwnSocket:
    """Listen on ``path``; the caller holds the lock. Blocks for at most ORPHANS seconds. Raises SocketError."""
    _clear(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    before = os.umask(0o777 & ~mode)
    try:
        listener.bind(path)
        listener.listen(backlog)
        return OwnSocket(listener, path, os.stat(path).st_ino)
    except OSError as e:
        listener.close()
        raise SocketError(f"{path}: {e.strerror or e}") from e
    finally:
        os.umask(before)


def _clear(path: str) -> None:
    """Remove a dead socket. Raises SocketError if it still answers after orphaned workers had time to end."""
    end = Deadline.after(ORPHANS)
    while True:
        try:
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise SocketError(f"{path}: exists and is not a socket; remove it")
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
                probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # its queue is full: a process has it open
        except OSError as e:
            raise SocketError(f"{path}: {e.strerror or e}") from e
        if end.expired():
            raise SocketError(f"{path}: another process listens there; stop it first")
        time.sleep(0.05)


def inherited_socket(fd: int) -> socket.socket:
    """The listening socket behind ``fd`` (from systemd or the supervisor). Raises SocketError."""
    try:
        listener = socket.socket(fileno=fd)
    except OSError as e:
        raise SocketError(f"descriptor {fd} is not a socket: {e.strerror}") from e
    accepting = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if listener.family != socket.AF_UNIX or listener.type != socket.SOCK_SEQPACKET or not accepting:
        listener.detach()
        raise SocketError(f"descriptor {fd} is not a listening sequential-packet socket (ListenSequentialPacket=)")
    listener.setblocking(False)
    return listener
