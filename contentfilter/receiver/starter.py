"""Starts the receiver's processes: a zygote that never holds a connection forks them, so that they inherit none.

The main process never waits for a fork: it asks for a process, and learns of its pid later. Only then it passes on
what may block, because until then the zygote, too, holds the process's end of the socket.
"""

import fcntl
import os
import resource
import signal
import socket
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress

Work = Callable[[socket.socket], None]
"""What a process does with its end of the socket, until it ends."""

HIGH = 200  # descriptor of a process's end; what ends with the process is closed in order, and this shall be last
_STARTED = struct.Struct("=Ii")  # number of the request; pid, 0: it could not be started


class Starter:
    """``works``: by a letter. :meth:`start` and :meth:`hear` in the main process, which has no connections yet."""

    def __init__(self, works: Mapping[bytes, Work]) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if not self._pid:
            _close_all_but(theirs.fileno())
            os.setpgid(0, 0)
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
            _fork_on_request(theirs, works)
            os._exit(0)
        theirs.close()
        self.socket.setblocking(False)
        self._number = 0
        self._ready: dict[int, Callable[[int], None]] = {}

    def start(self, letter: bytes, ready: Callable[[int], None]) -> socket.socket:
        """Our end of the socket of a new process. ``ready`` is called with its pid, or 0. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        number = self._number = (self._number + 1) % (1 << 32)
        with theirs:
            try:
                socket.send_fds(self.socket, [letter + struct.pack("=I", number)], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        self._ready[number] = ready
        return ours

    def hear(self) -> bool:
        """Call ``ready`` of the processes that were started. False: the zygote is gone."""
        with suppress(BlockingIOError):
            while packet := self.socket.recv(_STARTED.size):
                number, pid = _STARTED.unpack(packet)
                self._ready.pop(number)(pid)
            return False
        return True

    def end(self) -> None:
        """Kill the zygote and everything that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)  # it may not lead its group yet


def _fork_on_request(source: socket.socket, works: Mapping[bytes, Work]) -> None:
    while True:
        packet, fds, _, _ = socket.recv_fds(source, 5, 1)
        if not packet:
            return
        try:
            pid = os.fork()
        except OSError:
            pid = 0
        else:
            if not pid:
                source.close()
                _work(works[packet[:1]], fds[0])
        os.close(fds[0])  # nothing was passed over it yet: this cannot block
        source.send(_STARTED.pack(*struct.unpack("=I", packet[1:]), pid))


def _work(work: Work, fd: int) -> None:
    end = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH)
    os.close(fd)
    try:
        work(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=end))
    finally:
        os._exit(0)


def _close_all_but(kept: int) -> None:
    os.closerange(3, kept)
    os.closerange(kept + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
