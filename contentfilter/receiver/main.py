"""The receiver's main process: takes connections from the workers, and gives each a child of its own.

A worker must not touch what a user chose who is not trusted: receiving or closing a descriptor may block, a FUSE file
may never answer. So it hands the accepted connection over unread. Each gets a child, within limits for each uid;
children that take too long are killed. Connections beyond the limits go to a sink, a process that only closes them,
because even that may block. Single-threaded, without an event loop.

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
from dataclasses import dataclass, field
from functools import partial

import msgspec

from contentfilter.doors.handover import BATCH, GIVEN, KEY
from contentfilter.doors.hook_socket import peer_credentials
from contentfilter.errors import MessageError, ProtocolError
from contentfilter.hardening import give_up_privileges, give_way
from contentfilter.receiver import sink
from contentfilter.receiver.child import COPY_WAIT, REQUEST_WAIT, serve
from contentfilter.receiver.limits import ReceiverLimits, Usage
from contentfilter.receiver.sink import Sink
from contentfilter.receiver.starter import Starter, Work

OOM_SCORE = 600  # before a worker
NICE = 5  # a flood must not take the processor from the mail of others
LIFETIME = 3700.0  # seconds after which a child is killed, whatever it waits for
COPY_LIMIT = REQUEST_WAIT + COPY_WAIT + 1.0  # seconds after which a child that has not made its copies is killed
ORPHANED = 2.0  # seconds after which it is checked whether the worker that handed connections over is still there
REPORT_EVERY = 1.0  # seconds between two reports of refusals to the supervisor
TICK = 0.5
TAKE_AT_ONCE = 8  # packets of connections, before children are looked after
_SIZE = struct.Struct("=Q")
_PEER = struct.Struct("=Ii")  # uid and pid
LETTER = b"c"
COPIED, DONE, MISUSE = b"c", b"e", b"m"  # from a child: copies are made; it ends; it ends, and got no sound request


@dataclass(slots=True, eq=False)
class Child:
    """A process that serves one connection. Its other end of ``pipe`` is the last thing that it closes."""

    uid: int
    peer: int  # pid
    connection: int  # -1: passed on
    pid: int = 0  # 0: it is being started
    began: float = 0.0
    pipe: socket.socket = field(init=False)  # it asks here for the bytes that it reserves
    reserved: int = 0
    relaying: bool = False  # the copies are made, and what was passed is closed
    ended: bool = False  # it has said so


@dataclass(slots=True)
class Batch:
    """Connections that a worker has given and not closed yet."""

    fds: list[int]
    pid: int
    began: float


class Receiver:
    """The loop: connections in, children out."""

    def __init__(self, handover: socket.socket, lifeline: int, starter: Starter, limits: ReceiverLimits) -> None:
        handover.setblocking(False)  # recv_fds and send_fds of Python 3.11 ignore their flags
        self._handover, self._lifeline, self._starter = handover, lifeline, starter
        self._usage = Usage(limits)
        self._children: set[Child] = set()
        self._given: dict[bytes, Batch] = {}
        self._sink = Sink(starter)
        self._selector = selectors.DefaultSelector()
        for source in (handover, lifeline, starter.socket):
            self._selector.register(source, selectors.EVENT_READ)

    def run(self, report: Callable[[dict[int, int]], None]) -> None:
        """Until the supervisor is gone. ``report`` gets refused connections by uid."""
        reported = time.monotonic()
        while True:
            for key, _ in self._selector.select(TICK):
                if key.fileobj is self._handover:
                    self._take_all()
                elif key.fileobj == self._lifeline or (
                    key.fileobj is self._starter.socket and not self._starter.hear()
                ):
                    self._starter.end()
                    return
                elif isinstance(key.data, Child):
                    self._hear(key.data)
            self._end_late()
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
                continue
            child = Child(uid, pid, fd)
            try:
                child.pipe = self._starter.start(LETTER, partial(self._started, child))
            except OSError:
                self._usage.disconnect(uid, 0)
                self._usage.refuse(uid)
                refused.append(fd)
                continue
            self._children.add(child)
            self._selector.register(child.pipe, selectors.EVENT_READ, child)
        if refused:
            self._sink.take(refused)

    def _started(self, child: Child, pid: int) -> None:
        connection, child.connection = child.connection, -1
        try:
            if not pid:
                raise ChildProcessError
            socket.send_fds(child.pipe, [_PEER.pack(child.uid, child.peer)], [connection])
        except OSError:
            self._gone(child)
            self._sink.take([connection])
            return
        os.close(connection)
        child.pid, child.began = pid, time.monotonic()
        with suppress(OSError):  # it has died already
            child.pipe.send(b"c")

    def _hear(self, child: Child) -> None:
        """A child asks for bytes, has made its copies, or ends."""
        try:
            packet = child.pipe.recv(_SIZE.size + 1)
        except OSError:
            packet = b""
        if packet == COPIED:
            child.relaying = True
        elif packet in (DONE, MISUSE):
            child.ended = True
            if packet == MISUSE:
                self._usage.misused(child.uid, time.monotonic())
        elif len(packet) == _SIZE.size and not child.reserved:
            (size,) = _SIZE.unpack(packet)
            granted = self._usage.reserve(child.uid, size)
            child.reserved = size if granted else 0
            with suppress(OSError):
                child.pipe.send(b"y" if granted else b"n", socket.MSG_DONTWAIT)
        elif child.connection < 0:  # otherwise it is not started yet, or could not be, which _started() will be told
            self._gone(child)

    def _gone(self, child: Child) -> None:
        self._selector.unregister(child.pipe)
        child.pipe.close()
        self._children.discard(child)
        self._usage.disconnect(child.uid, child.reserved)
        if not (child.ended or child.relaying):  # killed
            self._usage.misused(child.uid, time.monotonic())

    def _end_late(self) -> None:
        now = time.monotonic()
        for child in self._children:
            if child.pid and now - child.began > (LIFETIME if child.relaying else COPY_LIMIT):
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)


def serve_connection(queue: str, spool: str, pipe: socket.socket) -> None:
    """In a child, from the connection to its end."""
    packet, fds, _, _ = socket.recv_fds(pipe, _PEER.size, 1)
    if not pipe.recv(1):  # our parent has closed the connection
        return

    def reserve(size: int) -> bool:
        pipe.send(_SIZE.pack(size))
        return pipe.recv(1) == b"y"

    def copied() -> None:
        pipe.send(COPIED)

    peer = _PEER.unpack(packet)
    outcome = DONE
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=fds[0])
        serve(connection, peer, queue, spool, reserve, copied)
    except (MessageError, ProtocolError):
        outcome = MISUSE
    except SystemExit:
        pass
    except BaseException as error:  # the hook offers its message again
        print(f"receiver: uid {peer[0]}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    pipe.send(outcome)


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
    give_way(OOM_SCORE, NICE)
    give_up_privileges()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError):  # the service's unit forbids it, and has set enough
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    works: dict[bytes, Work] = {
        LETTER: partial(serve_connection, options.queue, options.spool),
        sink.LETTER: sink.swallow,
    }
    starter = Starter(works)
    handover = socket.socket(fileno=options.handover)

    def report(refused: dict[int, int]) -> None:
        with suppress(OSError):  # a full pipe: the supervisor learns of the next ones
            os.write(options.report, msgspec.json.encode(refused) + b"\n")

    Receiver(handover, options.lifeline, starter, ReceiverLimits()).run(report)
