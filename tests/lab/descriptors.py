"""Descriptors as a hostile user passes them. Imports nothing of the project: test_untrusted.py runs it as a program."""

import socket
import struct


def rights(*fds: int) -> list[tuple[int, int, bytes]]:
    """Ancillary data that passes ``fds``."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))]


def lingering() -> tuple[socket.socket, socket.socket]:
    """A TCP socket whose close() blocks for an hour, and its other end, which must stay open for that."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        here = socket.socket()
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        here.connect(listener.getsockname())
        there, _ = listener.accept()
    here.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
    here.setblocking(False)
    try:
        while True:
            here.send(b"x" * 65536)
    except BlockingIOError:
        return here, there


def nested(inner: int) -> socket.socket:
    """A socket in whose queue the descriptor ``inner`` waits; closing it closes that too."""
    one, other = socket.socketpair()
    with one:
        one.sendmsg([b"."], rights(inner))
    return other
