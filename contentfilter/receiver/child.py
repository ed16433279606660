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
from contentfilter.doors.hook_socket import receive_request
from contentfilter.doors.origin import PEER
from contentfilter.errors import MessageError
from contentfilter.model import Action
from contentfilter.receiver.copies import check_sizes, copy_pair
from contentfilter.wire import hook
from contentfilter.wire.envelope import memory_cost

REQUEST_WAIT = 5.0  # seconds from the connection to the whole request
COPY_WAIT = 10.0  # seconds for receiving, copying and closing what was passed
COPY_CPU = 10  # seconds of CPU for the whole child
COMMIT_WAIT = 60.0  # seconds that a hook may take for its report after its budget
ADDRESS_SPACE = 1024 * 1024 * 1024  # bytes


def serve(
    connection: socket.socket,
    peer: tuple[int, int],
    queue: str,
    spool: str,
    reserve: Callable[[int], bool],
    copied: Callable[[], None],
) -> None:
    """Serve one connection. ``peer``: uid and pid; ``queue``: the workers' socket; ``spool``: where large copies go.

    ``reserve`` asks the parent for a number of bytes; ``copied`` reports to it that nothing of what the peer passed is
    open any longer. Every error ends the connection, and the hook offers its message again; but what can never be
    copied is deferred with the reason.
    """
    signal.setitimer(signal.ITIMER_REAL, REQUEST_WAIT + COPY_WAIT)  # SIGALRM's default action ends the process
    resource.setrlimit(resource.RLIMIT_CPU, (COPY_CPU, COPY_CPU + 1))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    began = time.monotonic()
    if not select.select([connection], [], [], REQUEST_WAIT)[0] or (received := receive_request(connection)) is None:
        return
    request, fds = received
    sizes = (request.message_size, request.envelope_size)
    try:
        check_sizes(sizes)
        if not reserve(sizes[0] + memory_cost(sizes[1])):
            return  # the kernel closes what was passed
        copies = copy_pair(fds, sizes, spool)
    except MessageError as error:
        text = f"message could not be taken over ({error}), please try again (#4.3.0)"
        connection.send(hook.encode_answer(hook.Answer(Action.DEFER, text=text)).packet)
        raise
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
