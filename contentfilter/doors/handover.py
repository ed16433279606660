"""Hands connections of untrusted users over to the receiver process, unread.

Receiving from such a connection may block, and so may closing it: its queue can hold descriptors of the user's choice,
and the last close() of the connection closes those, too. So the last close must be the receiver's
(contentfilter/receiver), and a batch is handed over in two packets: GIVEN with the descriptors, which are then closed
here while the receiver's copies are open, and CLOSED. The receiver closes none of them before it has CLOSED.
"""

import asyncio
import os
import socket
import struct
from collections import deque

RETRY = 0.02  # seconds until a full socket is tried again
MAX_PENDING = 2048  # connections that wait for the receiver; beyond it the worker accepts none
BATCH = 64  # connections in a packet; the kernel takes 253
GIVEN, CLOSED = b"G", b"C"
KEY = struct.Struct("=IQ")  # names a batch: pid of the worker, and a number


class HandOver:
    """``target``: a socket to the receiver that all workers share."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: socket.socket) -> None:
        self._loop = loop
        target.setblocking(False)  # send_fds of Python 3.11 ignores its flags
        self._target = target
        self._pending: deque[int] = deque()  # descriptors: a socket object might close itself
        self._closed: deque[bytes] = deque()  # keys of batches that are to be announced as CLOSED
        self._number = 0
        self._timer: asyncio.Handle | None = None

    def full(self) -> bool:
        """True while too many connections wait for the receiver."""
        return len(self._pending) >= MAX_PENDING

    def take(self, connection: socket.socket) -> None:
        """Pass on a connection that was just accepted; in order, with those of the same moment, as soon as possible."""
        self._pending.append(connection.detach())
        if self._timer is None:
            self._timer = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._timer = None
        try:
            while self._pending or self._closed:
                if self._closed:
                    self._target.send(CLOSED + self._closed[0])
                    self._closed.popleft()
                else:
                    self._give()
        except OSError:  # full, or out of descriptors in flight
            self._timer = self._loop.call_later(RETRY, self._flush)

    def _give(self) -> None:
        batch = [self._pending[at] for at in range(min(BATCH, len(self._pending)))]
        key = KEY.pack(os.getpid(), self._number)
        socket.send_fds(self._target, [GIVEN + key], batch)
        self._number += 1
        for fd in batch:
            self._pending.popleft()
            os.close(fd)
        self._closed.append(key)
