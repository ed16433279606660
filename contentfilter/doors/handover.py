"""Hands connections of untrusted users over to the receiver process, unread and unclosed.

Receiving from such a connection may block, and so may closing it: its queue can hold descriptors of the user's choice.
Both are left to the receiver (contentfilter/receiver); closing our descriptor is safe once the receiver's socket holds
another one.
"""

import asyncio
import socket
from collections import deque

RETRY = 0.02  # seconds until a full socket is tried again
MAX_PENDING = 256  # connections that wait for the receiver; beyond it the worker accepts none


class HandOver:
    """``target``: a socket to the receiver that all workers share."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: socket.socket) -> None:
        self._loop = loop
        target.setblocking(False)  # send_fds of Python 3.11 ignores its flags
        self._target = target
        self._pending: deque[socket.socket] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def full(self) -> bool:
        """True while too many connections wait for the receiver."""
        return len(self._pending) >= MAX_PENDING

    def take(self, connection: socket.socket) -> None:
        """Pass on a connection that was just accepted; in order, now or as soon as there is room."""
        self._pending.append(connection)
        if self._timer is None:
            self._flush()

    def _flush(self) -> None:
        self._timer = None
        while self._pending:
            try:
                socket.send_fds(self._target, [b"c"], [self._pending[0].fileno()])
            except OSError:  # full, or out of descriptors in flight: our copy must not be the last, so it is kept
                self._timer = self._loop.call_later(RETRY, self._flush)
                return
            self._pending.popleft().close()
