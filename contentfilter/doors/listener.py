"""The listening socket, and the accept loop that a worker runs on it.

All workers accept on one SOCK_SEQPACKET socket that the supervisor opened under its lock: a second
daemon is refused, a dead one's path is taken over, and a live socket is never stolen. A worker
accepts while it has room for messages to wait in (room.py); the rest wait in the kernel's queue for the next
free worker.
"""

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Any

from contentfilter.deadline import Deadline
from contentfilter.doors.admission import Counters, IntakeLimits, IntakeState
from contentfilter.doors.queue import Connection
from contentfilter.log import Logger, RateLimiter

PER_WAKEUP = 4  # accepts in a row; the other workers shall get their share
NO_DESCRIPTORS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
PAUSE = 0.1  # seconds without accepting when descriptors ran out
SPARE = 512  # connections above those with a message: without a request yet, or waiting for a report


class Listener:
    """Accepts hooks while it may, and knows every connection until it is closed."""

    def __init__(
        self,
        listener: socket.socket,
        terms: IntakeLimits,
        log: Logger,
        emit: Callable[[str, dict[str, Any]], None] = lambda name, fields: None,
    ) -> None:
        self._socket = listener
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._state = IntakeState(self._loop, log, terms, self._closed, emit)
        self._open: set[Connection] = set()
        self._accepting = False
        self._stopped = False
        self._held = False
        self._empty = asyncio.Event()
        self._empty.set()
        self._failure_log = RateLimiter(10.0)
        self._pause: asyncio.TimerHandle | None = None

    @property
    def counters(self) -> Counters:
        return self._state.counters

    @property
    def connections(self) -> frozenset[Connection]:
        """A snapshot of those that are open."""
        return frozenset(self._open)

    def start(self) -> None:
        self._resume()

    def change(self, terms: IntakeLimits) -> None:
        """New terms for messages from now on; those under way end under the old ones."""
        self._state.change(terms)
        self._resume()

    def shut(self, short: str) -> None:
        """There is too little of something, named for people: messages wait; empty: they go on."""
        self._state.shut(short)

    @property
    def short(self) -> str:
        return self._state.short

    @property
    def waiting(self) -> int:
        """How many messages wait for a place."""
        return len(self._state.line)

    def hold(self, held: bool) -> None:
        """Accept nothing while this is so: hooks wait in the socket's queue. Connections go on."""
        self._held = held
        if held:
            self._suspend()
        else:
            self._resume()

    def stop(self) -> None:
        """Accept no more and let go of the listening socket. Connections go on."""
        if self._accepting:
            self._accept()  # one may have woken us and, with EPOLLEXCLUSIVE, nobody else
        self._stopped = True
        self._suspend()
        if self._pause is not None:
            self._pause.cancel()
        self._socket.close()

    async def drained(self, deadline: Deadline) -> bool:
        """Wait until no connection is open; False when some still are at the end."""
        try:
            async with deadline.timeout():
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    async def abort(self, why: str, deadline: Deadline) -> None:
        """Drop all connections; the hooks offer their messages again."""
        for connection in self.connections:
            connection.cancel(why)
        await self.drained(deadline)

    def _accept(self) -> None:
        for _ in range(PER_WAKEUP):
            if self._full():
                self._suspend()
                return
            try:
                accepted, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError as error:
                self._accept_failed(error)
                return
            self._state.counters.accepted += 1
            connection = Connection(self._state, accepted)
            self._open.add(connection)
            self._empty.clear()
            connection.start()

    def _full(self) -> bool:
        line = self._state.line
        return line.full() or len(self._open) >= line.places + line.room + SPARE

    def _accept_failed(self, error: OSError) -> None:
        """The queue stays readable, so only a pause keeps us from spinning."""
        if (held := self._failure_log.allow()) is not None:
            self._log.error("intake.accept-failed", why=error.strerror, open=len(self._open), not_logged=held)
        self._suspend()
        self._pause = self._loop.call_later(PAUSE if error.errno in NO_DESCRIPTORS else 10 * PAUSE, self._unpause)

    def _unpause(self) -> None:
        self._pause = None
        self._resume()

    def _suspend(self) -> None:
        if self._accepting:
            self._loop.remove_reader(self._socket.fileno())
            self._accepting = False

    def _resume(self) -> None:
        if not (self._accepting or self._stopped or self._held or self._pause):
            self._loop.add_reader(self._socket.fileno(), self._accept)
            self._accepting = True

    def _closed(self, connection: Connection) -> None:
        self._open.discard(connection)
        if not self._open:
            self._empty.set()
        if not self._accepting and not self._full():
            self._resume()
