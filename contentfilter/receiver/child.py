"""One connection of a user who is not trusted, from its request to its end, in a process of its own.

The child receives the request with its descriptors, copies message and envelope into files that nobody else can
change, closes what it was given, and offers the copies to the workers as a hook would. It then passes answer and
commit report on. Each step may hang, because the peer chose the descriptors: a timer ends the process then, and the
kernel does not wait for a dying process's blocked close().
"""

import os
import resource
import select
import signal
import socket
import struct
import time
from collections.abc import Callable

import msgspec

from contentfilter.deadline import Deadline
from contentfilter.doors.message import Spool, open_pair
from contentfilter.doors.origin import PEER
from contentfilter.errors import ProtocolError, RemoteProtocolError
from contentfilter.wire import hook

REQUEST_WAIT = 5.0  # seconds from the connection to the whole request
COPY_WAIT = 10.0  # seconds for receiving, copying and closing what was passed
COPY_CPU = 10  # seconds of CPU for the whole child
COMMIT_WAIT = 60.0  # seconds that a hook may take for its report after its budget
ADDRESS_SPACE = 1024 * 1024 * 1024  # bytes
_ANCILLARY = socket.CMSG_SPACE(4 * 4)


def serve(
    connection: socket.socket,
    peer: tuple[int, int],
    queue: str,
    spool: str,
    reserve: Callable[[int], bool],
    copied: Callable[[], None],
) -> None:
    """Serve one connection. ``peer``: uid and pid; ``queue``: the workers' socket; ``spool``: where large copies go.

    ``reserve`` asks the parent whether so many bytes may be under way; ``copied`` tells it that nothing of what the
    peer passed is open any longer. Every error ends the connection, and the hook offers its message again.
    """
    signal.setitimer(signal.ITIMER_REAL, REQUEST_WAIT + COPY_WAIT)  # SIGALRM's default action ends the process
    resource.setrlimit(resource.RLIMIT_CPU, (COPY_CPU, COPY_CPU + 1))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    began = time.monotonic()
    request, fds = _receive(connection, Deadline.after(REQUEST_WAIT))
    if request is None:
        raise RemoteProtocolError("no request")  # the kernel closes what was passed
    if not reserve(request.message_size + request.envelope_size):
        return  # the kernel closes what was passed
    message, envelope = open_pair(fds, (request.message_size, request.envelope_size), trusted=False, spool=Spool(spool))
    copies = (message.fd, _sealed_copy(envelope))
    uid, pid = peer
    copied()
    spent = time.monotonic() - began
    end = Deadline.after(max(0.0, request.budget - spent))
    signal.setitimer(signal.ITIMER_REAL, min(end.left(), 3600.0) + COMMIT_WAIT)
    environ = {**request.environ, PEER: b"%d %d" % (uid, pid)}
    offered = msgspec.structs.replace(request, budget=end.left(), environ=environ, sent=time.monotonic())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as worker:
        worker.connect(queue)
        _send(worker, hook.encode_request(offered), copies)
        for fd in copies:
            os.close(fd)
        _relay(connection, worker)


def _receive(connection: socket.socket, deadline: Deadline) -> tuple[hook.Request | None, list[int]]:
    """The request and every descriptor that came with it. None: the peer sent something else, or nothing in time."""
    if not select.select([connection], [], [], deadline.left())[0]:
        return None, []
    packet, ancillary, flags, _ = connection.recvmsg(hook.REQUEST_MAX + 1, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    fds = [
        fd
        for level, kind, data in ancillary
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS
        for (fd,) in struct.iter_unpack("=i", data[: len(data) // 4 * 4])
    ]
    if not packet and not fds:
        raise SystemExit  # it has closed without a request
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        return None, fds
    try:
        return hook.decode_request(packet), fds
    except ProtocolError:
        return None, fds


def _sealed_copy(data: bytes) -> int:
    fd = os.memfd_create("envelope", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with memoryview(data) as view:
        at = 0
        while at < len(view):
            at += os.write(fd, view[at:])
    return fd


def _send(target: socket.socket, packet: bytes, fds: tuple[int, ...]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
    target.sendmsg([packet], rights)


def _relay(hook_side: socket.socket, worker: socket.socket) -> None:
    """Pass the answer on to the hook, and its report back, until either side closes."""
    while True:
        ready, _, _ = select.select([hook_side, worker], [], [])
        if worker in ready:
            packet, ancillary, _, _ = worker.recvmsg(hook.PACKET_MAX + 1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
            if not packet:
                return
            fds = tuple(fd for _, _, data in ancillary for (fd,) in struct.iter_unpack("=i", data))
            _send(hook_side, packet, fds)
        if hook_side in ready:
            report = hook_side.recv(hook.PACKET_MAX)
            if not report:
                return
            worker.send(report)
