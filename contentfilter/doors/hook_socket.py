"""The hook's packets on its socket: request in, answer out, report in (wire/hook.py has the formats).

No call here waits: what has not arrived yet raises BlockingIOError.
"""

import os
import socket
import struct

from contentfilter.doors.message import sealed_memfd
from contentfilter.errors import ProtocolError
from contentfilter.wire import hook

_CREDENTIALS = struct.Struct("=iII")
_ANCILLARY = socket.CMSG_SPACE(2 * 4)
_RECEIVE = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
_TRUNCATED = socket.MSG_TRUNC | socket.MSG_CTRUNC


def peer_credentials(connection: socket.socket) -> tuple[int, int]:
    """pid and uid of the process that connected (SO_PEERCRED, unix(7))."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid


def receive_request(connection: socket.socket) -> tuple[hook.Request, list[int]] | None:
    """The request and its descriptors, which the caller owns; None: the peer closed without sending anything.

    Raises ProtocolError, when all descriptors are closed, or OSError.
    """
    packet, ancillary, flags, _ = connection.recvmsg(hook.REQUEST_MAX + 1, _ANCILLARY, _RECEIVE)
    fds = _descriptors(ancillary)
    try:
        if flags & _TRUNCATED:
            raise ProtocolError("oversized packet, or descriptors that did not fit")
        return (hook.decode_request(packet), fds) if packet or fds else None
    except ProtocolError:
        for fd in fds:
            os.close(fd)
        raise


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.extend(fd for (fd,) in struct.iter_unpack("=i", data[: len(data) // 4 * 4]))
    return fds


def unexpected_event(connection: socket.socket) -> str:
    """``gone`` or ``out of turn`` if the peer did something while it should wait for the answer; else empty."""
    try:
        packet = connection.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
    except BlockingIOError:
        return ""
    except OSError:
        return "gone"
    return "out of turn" if packet else "gone"


class PreparedAnswer:
    """An encoded answer; a long body is in a sealed memfd. Whoever has it closes it."""

    def __init__(self, packet: bytes, fd: int = -1) -> None:
        self._packet, self._fd = packet, fd

    def send(self, connection: socket.socket) -> None:
        """Send it whole. Raises OSError."""
        if self._fd < 0:
            connection.send(self._packet, socket.MSG_DONTWAIT)
            return
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", self._fd))
        connection.sendmsg([self._packet], [rights], socket.MSG_DONTWAIT)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def prepare_answer(answer: hook.Answer) -> PreparedAnswer:
    """Encode an answer. Raises LocalProtocolError, or OSError where there is no descriptor for a long body."""
    encoded = hook.encode_answer(answer)
    return PreparedAnswer(encoded.packet, -1 if encoded.body is None else sealed_memfd("answer", encoded.body))


def receive_report(connection: socket.socket) -> hook.CommitReport:
    """Raises OSError or ProtocolError."""
    return hook.decode_report(connection.recv(hook.PACKET_MAX, socket.MSG_DONTWAIT))
