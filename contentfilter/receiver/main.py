"""The receiver's main process: takes connections from the workers, and gives each a child of its own.

A worker must not touch what a user chose who is not trusted: receiving or closing a descriptor may block, a FUSE file
may never answer. So it hands the accepted connection over unread. The receiver forks a child for each, within limits
for each uid, and kills children that take too long. Connections beyond the limits go to a sink, a child that only
closes them, because even that may block. Single-threaded, without an event loop: fork(2) is safe here.

The last close() of such a connection may block, so it must never be ours. Whoever gives a connection away closes it
while the other side is known to hold it: workers announce that they have (doors/handover.py), and a child or the sink
keeps what it has until it is told that we have.
"""

import argparse
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from contentfilter.doors.handover import BATCH, GIVEN, KEY
from contentfilter.doors.hook_socket import peer_credentials
from contentfilter.errors import MessageError, ProtocolError
from contentfilter.hardening import give_up_privileges
from contentfilter.receiver.child import COPY_WAIT, REQUEST_WAIT, serve
from contentfilter.receiver.limits import ReceiverLimits, Usage

NICE = 5  # of the children: a flood must not take the processor from the mail of others
LIFETIME = 3700.0  # seconds after which a child is killed, whatever it waits for
COPY_LIMIT = REQUEST_WAIT + COPY_WAIT + 1.0  # seconds after which a child that has not made its copies is killed
END_WAIT = 2.0  # seconds that a child may need to end
SINK_WAIT = 2.0  # seconds that the sink may need for what it was given
READY_WAIT = 1.0  # seconds that a new child may need to close what is not its own
ORPHANED = 2.0  # seconds after which it is checked whether the worker that handed connections over is still there
REPORT_EVERY = 1.0  # seconds between two reports of refusals to the supervisor
TICK = 0.5
TAKE_AT_ONCE = 8  # packets of connections, before children are looked after
_SIZE = struct.Struct("=Q")
_MISUSE = 3  # exit status of a child that got something other than a request


@dataclass(slots=True)
class Child:
    """A process that serves one connection."""

    pid: int
    uid: int
    pipe: socket.socket  # it asks here for the bytes that it reserves
    began: float
    reserved: int = 0
    relaying: bool = False  # the copies are made, and what was passed is closed
    ended: float = 0.0  # when it closed its pipe; 0: it has not


@dataclass(slots=True)
class Batch:
    """Connections that a worker has given and not closed yet."""

    fds: list[int]
    pid: int
    began: float


class Sink:
    """Closes connections in a process of its own, which is replaced when a close() blocks."""

    def __init__(self) -> None:
        self._pid = 0
        self._socket: socket.socket | None = None
        self._since = 0.0  # since when it has not confirmed; 0: nothing is outstanding
        self._outstanding = 0
        self._waiting: list[list[int]] = []  # while no process can be started

    def take(self, fds: list[int]) -> None:
        """Have ``fds`` (at most BATCH) closed; our own close does not block, because the sink waits for it."""
        try:
            if self._socket is None:
                self._start()
        except OSError:
            self._waiting.append(fds)
            return None
        assert self._socket is not None  # noqa: S101 - just started
        try:
            socket.send_fds(self._socket, [b"."], fds)
        except OSError:  # it is full, so it hangs, or it is gone
            self.replace()
            return self.take(fds)
        for fd in fds:
            os.close(fd)
        if not self._outstanding:
            self._since = time.monotonic()
        self._outstanding += 1
        with suppress(OSError):  # full: it hangs, and will be replaced
            self._socket.send(b"c")
        return None

    def check(self) -> None:
        """Replace a sink that hangs. Call about once per TICK."""
        waiting, self._waiting = self._waiting, []
        for fds in waiting:
            self.take(fds)
        if self._socket is None:
            return
        with suppress(OSError):
            while self._socket.recv(1):
                self._outstanding -= 1
                self._since = time.monotonic() if self._outstanding else 0.0
        if self._outstanding and time.monotonic() - self._since > SINK_WAIT:
            self.replace()

    def replace(self) -> None:
        """Kill the sink: the kernel then closes what it holds, without waiting."""
        if self._pid:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        if self._socket is not None:
            self._socket.close()
        self._pid, self._socket, self._outstanding = 0, None, 0

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if not self._pid:
            close_all_but(theirs.fileno())
            with suppress(OSError):
                _sink(theirs)
            os._exit(0)
        theirs.close()
        ours.setblocking(False)
        self._socket = ours


def _sink(source: socket.socket) -> None:
    """In the sink: what comes in one packet is closed after the next packet, which says that the sender has."""
    held: list[int] = []
    while True:
        packet, fds, _, _ = socket.recv_fds(source, 1, BATCH)
        if not packet:
            return
        if packet == b".":
            held += fds
            continue
        while held:
            os.close(held.pop())
        source.send(b".")


def close_all_but(*kept: int) -> None:
    """In a child: close every inherited descriptor above 2 but these. None of them is the last reference."""
    start = 3
    for fd in (*sorted(kept), resource.getrlimit(resource.RLIMIT_NOFILE)[0]):
        os.closerange(start, fd)
        start = fd + 1


class Receiver:
    """The loop: connections in, children out."""

    def __init__(self, handover: socket.socket, lifeline: int, queue: str, spool: str, limits: ReceiverLimits) -> None:
        handover.setblocking(False)  # recv_fds and send_fds of Python 3.11 ignore their flags
        self._handover, self._lifeline = handover, lifeline
        self._queue, self._spool = queue, spool
        self._usage = Usage(limits)
        self._children: dict[int, Child] = {}
        self._given: dict[bytes, Batch] = {}
        self._sink = Sink()
        self._selector = selectors.DefaultSelector()
        self._selector.register(handover, selectors.EVENT_READ)
        self._selector.register(lifeline, selectors.EVENT_READ)

    def run(self, report: Callable[[dict[int, int]], None]) -> None:
        """Until the supervisor is gone. ``report`` gets refused connections by uid."""
        reported = time.monotonic()
        while True:
            for key, _ in self._selector.select(TICK):
                if key.fileobj is self._handover:
                    self._take_all()
                elif key.fileobj == self._lifeline:
                    self._end()
                    return
                elif isinstance(key.data, Child):
                    self._hear(key.data)
            self._reap()
            self._take_orphaned()
            self._sink.check()
            if time.monotonic() - reported >= REPORT_EVERY:
                reported = time.monotonic()
                if refused := self._usage.take_refused():
                    report(refused)

    def _take_all(self) -> None:
        """Packets from workers, a bounded number. Receiving them cannot block: workers accepted these sockets."""
        for _ in range(TAKE_AT_ONCE):
            try:
                packet, fds, _, _ = socket.recv_fds(self._handover, 1 + KEY.size, BATCH)
            except BlockingIOError:
                return
            key = packet[1:]
            if packet[:1] == GIVEN:
                self._given[key] = Batch(fds, KEY.unpack(key)[0], time.monotonic())
            elif (batch := self._given.pop(key, None)) is not None:
                self._take(batch.fds)

    def _take_orphaned(self) -> None:
        """Batches of workers that ended before they could say that they have closed them."""
        late = time.monotonic() - ORPHANED
        for key, batch in list(self._given.items()):
            if batch.began < late and not os.path.exists(f"/proc/{batch.pid}"):
                self._take(self._given.pop(key).fds)

    def _take(self, fds: list[int]) -> None:
        """Serve connections that no worker holds any longer."""
        refused = []
        for fd in fds:
            pid, uid = _peer(fd)
            if not self._usage.connect(uid, time.monotonic()):
                refused.append(fd)
            elif not self._fork(fd, uid, pid):
                self._usage.disconnect(uid, 0)
                self._usage.refuse(uid)
                refused.append(fd)
        if refused:
            self._sink.take(refused)

    def _fork(self, connection: int, uid: int, pid: int) -> bool:
        """False: there is no child, and ``connection`` is still ours."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            child = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            return False
        if not child:
            self._serve(connection, theirs, (uid, pid))
        theirs.close()
        ours.settimeout(READY_WAIT)
        try:
            if not ours.recv(1):
                raise TimeoutError  # it has ended already
        except OSError:
            os.kill(child, signal.SIGKILL)
            ours.close()
            return False
        os.close(connection)
        started = Child(child, uid, ours, time.monotonic())
        self._children[child] = started
        self._selector.register(ours, selectors.EVENT_READ, started)
        with suppress(OSError):
            ours.send(b"c")
        return True

    def _serve(self, connection: int, pipe: socket.socket, peer: tuple[int, int]) -> None:
        """In the child. Does not return."""

        def reserve(size: int) -> bool:
            pipe.send(_SIZE.pack(size))
            return pipe.recv(1) == b"y"

        def copied() -> None:
            pipe.send(b"c")

        try:
            close_all_but(connection, pipe.fileno())
            os.nice(NICE)
            pipe.send(b"r")
            pipe.recv(1)  # our parent has closed the connection
            taken = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=connection)
            serve(taken, peer, self._queue, self._spool, reserve, copied)
        except (MessageError, ProtocolError):
            os._exit(_MISUSE)
        except BaseException as error:  # the hook offers its message again
            print(f"receiver: uid {peer[0]}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)

    def _hear(self, child: Child) -> None:
        """A child asks for bytes, has made its copies, or ends."""
        try:
            packet = child.pipe.recv(_SIZE.size + 1)
        except OSError:
            packet = b""
        if packet == b"c":
            child.relaying = True
        elif len(packet) == _SIZE.size and not child.reserved:
            (size,) = _SIZE.unpack(packet)
            granted = self._usage.reserve(child.uid, size)
            child.reserved = size if granted else 0
            with suppress(OSError):
                child.pipe.send(b"y" if granted else b"n", socket.MSG_DONTWAIT)
        else:
            self._selector.unregister(child.pipe)
            child.ended = time.monotonic()

    def _reap(self) -> None:
        now = time.monotonic()
        for child in self._children.values():
            late = now - child.began > (LIFETIME if child.relaying else COPY_LIMIT)
            if late or (child.ended and now - child.ended > END_WAIT):
                os.kill(child.pid, signal.SIGKILL)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            ended = self._children.pop(pid, None)
            if ended is not None:
                with suppress(KeyError):
                    self._selector.unregister(ended.pipe)
                ended.pipe.close()
                self._usage.disconnect(ended.uid, ended.reserved)
                if os.waitstatus_to_exitcode(status) == _MISUSE or (os.WIFSIGNALED(status) and not ended.relaying):
                    self._usage.refuse(ended.uid)

    def _end(self) -> None:
        for child in self._children.values():
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
        self._sink.replace()


def _peer(connection: int) -> tuple[int, int]:
    """Pid and uid of the peer of a connection."""
    borrowed = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=connection)
    try:
        return peer_credentials(borrowed)
    finally:
        borrowed.detach()


def main(arguments: list[str] | None = None) -> None:
    """The whole life of the receiver process. ``arguments``: in place of the process's own."""
    parser = argparse.ArgumentParser(prog="contentfilter receiver", description="Started by contentfilter serve only.")
    for name in ("queue", "spool"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("handover", "lifeline", "report"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args(arguments)
    give_up_privileges()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError):  # the service's unit forbids it, and has set enough
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    handover = socket.socket(fileno=options.handover)

    def report(refused: dict[int, int]) -> None:
        with suppress(OSError):  # a full pipe: the supervisor learns of the next ones
            os.write(options.report, msgspec.json.encode(refused) + b"\n")

    receiver = Receiver(handover, options.lifeline, options.queue, options.spool, ReceiverLimits())
    receiver.run(report)
