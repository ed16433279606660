"""The receiver's main process: takes connections from the workers, and gives each a child of its own.

A worker must not touch what a user chose who is not trusted: receiving or closing a descriptor may block, a FUSE file
may never answer. So it hands the accepted connection over unread. The receiver forks a child for each, within limits
for each uid, and kills children that take too long. Connections beyond the limits go to a sink, a child that only
closes them, because even that may block. Single-threaded, without an event loop: fork(2) is safe here.
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

from contentfilter.doors.hook_socket import peer_credentials
from contentfilter.hardening import give_up_privileges, give_way
from contentfilter.receiver.child import COPY_WAIT, REQUEST_WAIT, serve
from contentfilter.receiver.limits import ReceiverLimits, Usage

OOM_SCORE = 600  # before a worker
NICE = 5  # a flood must not take the processor from the mail of others
LIFETIME = 3700.0  # seconds after which a child is killed, whatever it waits for
COPY_LIMIT = REQUEST_WAIT + COPY_WAIT + 1.0  # seconds after which a child that has not made its copies is killed
END_WAIT = 2.0  # seconds that a child may need to end
SINK_WAIT = 2.0  # seconds that the sink may need for one connection
REPORT_EVERY = 1.0  # seconds between two reports of refusals to the supervisor
TICK = 0.5
TAKE_AT_ONCE = 64  # connections, before children are looked after
_SIZE = struct.Struct("=Q")


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


class Sink:
    """Closes connections in a process of its own, which is replaced when a close() blocks."""

    def __init__(self) -> None:
        self._pid = 0
        self._socket: socket.socket | None = None
        self._since = 0.0  # since when it has not confirmed; 0: nothing is outstanding
        self._outstanding = 0

    def take(self, connection: socket.socket) -> None:
        """Have ``connection`` closed; our own close does not block, because the sink holds it too."""
        if self._socket is None:
            self._start()
        assert self._socket is not None  # noqa: S101 - just started
        try:
            socket.send_fds(self._socket, [b"."], [connection.fileno()])
        except OSError:  # it is full, so it hangs, or it is gone
            self.replace()
            return self.take(connection)
        if not self._outstanding:
            self._since = time.monotonic()
        self._outstanding += 1
        connection.close()
        return None

    def check(self) -> None:
        """Replace a sink that hangs. Call about once per TICK."""
        if self._socket is None:
            return
        with suppress(BlockingIOError):
            done = len(self._socket.recv(4096, socket.MSG_DONTWAIT))
            self._outstanding -= done
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
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._pid = os.fork()
        if not self._pid:
            ours.close()
            with suppress(OSError):
                while True:
                    _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
                    if not fds:
                        break
                    for fd in fds:
                        os.close(fd)
                    theirs.send(b".")
            os._exit(0)
        theirs.close()
        ours.setblocking(False)
        self._socket = ours


class Receiver:
    """The loop: connections in, children out."""

    def __init__(self, handover: socket.socket, lifeline: int, queue: str, spool: str, limits: ReceiverLimits) -> None:
        handover.setblocking(False)  # recv_fds and send_fds of Python 3.11 ignore their flags
        self._handover, self._lifeline = handover, lifeline
        self._queue, self._spool = queue, spool
        self._usage = Usage(limits)
        self._children: dict[int, Child] = {}
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
            self._sink.check()
            if time.monotonic() - reported >= REPORT_EVERY:
                reported = time.monotonic()
                if refused := self._usage.take_refused():
                    report(refused)

    def _take_all(self) -> None:
        """Connections from workers, a bounded number. Receiving them cannot block: workers accepted these sockets."""
        for _ in range(TAKE_AT_ONCE):
            try:
                _, fds, _, _ = socket.recv_fds(self._handover, 1, 1)
            except BlockingIOError:
                return
            self._take(fds)

    def _take(self, fds: list[int]) -> None:
        for fd in fds:
            connection = socket.socket(fileno=fd)
            pid, uid = peer_credentials(connection)
            if self._usage.connect(uid, time.monotonic()):
                self._fork(connection, uid, pid)
            else:
                self._sink.take(connection)

    def _fork(self, connection: socket.socket, uid: int, pid: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            child = os.fork()
        except OSError:
            self._usage.disconnect(uid, 0)
            self._usage.refuse(uid)
            ours.close()
            theirs.close()
            self._sink.take(connection)
            return
        if not child:
            self._serve(connection, theirs, (uid, pid))
        theirs.close()
        connection.close()  # the child holds it, too: this cannot block
        started = Child(child, uid, ours, time.monotonic())
        self._children[child] = started
        self._selector.register(ours, selectors.EVENT_READ, started)

    def _serve(self, connection: socket.socket, pipe: socket.socket, peer: tuple[int, int]) -> None:
        """In the child. Does not return."""

        def reserve(size: int) -> bool:
            pipe.send(_SIZE.pack(size))
            return pipe.recv(1) == b"y"

        def copied() -> None:
            pipe.send(b"c")

        try:
            self._selector.close()
            self._handover.close()
            os.close(self._lifeline)
            serve(connection, peer, self._queue, self._spool, reserve, copied)
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
                pid, _ = os.waitpid(-1, os.WNOHANG)
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

    def _end(self) -> None:
        for child in self._children.values():
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
        self._sink.replace()


def main(arguments: list[str] | None = None) -> None:
    """The whole life of the receiver process. ``arguments``: in place of the process's own."""
    parser = argparse.ArgumentParser(prog="contentfilter receiver", description="Started by contentfilter serve only.")
    for name in ("queue", "spool"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("handover", "lifeline", "report"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args(arguments)
    give_way(OOM_SCORE, NICE)
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
