"""Accept loop of a worker, on the listening socket that all workers share.

The supervisor opened the SOCK_SEQPACKET socket under its lock (doors/listening_socket.py). A worker accepts while its
admission queue has room; further connections wait in the kernel's queue for the next free worker.
"""

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Any

from contentfilter.deadline import Deadline
from contentfilter.doors.admission import Callbacks, Counters, IntakeLimits, IntakeState
from contentfilter.doors.handover import HandOver
from contentfilter.doors.hook_socket import peer_credentials
from contentfilter.doors.queue import Connection
from contentfilter.log import Logger, RateLimiter

PER_WAKEUP = 4  # accepts in a row; the rest are for the other workers
NO_DESCRIPTORS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
PAUSE = 0.1  # seconds without accepting after descriptors ran out
SPARE = 512  # connections above those with a message: without a request yet, or waiting for a report


class Listener:
    """Accepts connections while there is room, and keeps each one until it is closed."""

    def __init__(
        self,
        listener: socket.socket,
        limits: IntakeLimits,
        log: Logger,
        emit: Callable[[str, dict[str, Any]], None] = lambda name, fields: None,
        receiver: socket.socket | None = None,
    ) -> None:
        """``receiver``: takes over connections of untrusted users; None: they are served here."""
        self._socket = listener
        self._log = log
        self._loop = asyncio.get_running_loop()
        callbacks = Callbacks(self._closed, self._resume_if_room, emit)
        self._state = IntakeState(self._loop, log, limits, callbacks)
        self._hand_over = None if receiver is None else HandOver(self._loop, receiver)
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

    def apply(self, limits: IntakeLimits) -> None:
        """New limits for new messages; those in progress end under the old ones."""
        self._state.apply(limits)
        self._resume()

    def set_exhausted(self, resource: str) -> None:
        """Messages wait while ``resource`` is below its watermark; empty: continue."""
        self._state.set_exhausted(resource)

    @property
    def exhausted(self) -> str:
        return self._state.exhausted

    @property
    def waiting(self) -> int:
        """Number of messages that wait for a slot."""
        return len(self._state.queue)

    def hold(self, held: bool) -> None:
        """While ``held``, accept nothing: hooks wait in the socket's queue. Open connections go on."""
        self._held = held
        if held:
            self._suspend()
        else:
            self._resume()

    def stop(self) -> None:
        """Stop accepting and close the listening socket. Open connections go on."""
        if self._accepting:
            self._accept()  # a connection may have woken this worker and, with EPOLLEXCLUSIVE, no other
        self._stopped = True
        self._suspend()
        if self._pause is not None:
            self._pause.cancel()
        self._socket.close()

    async def drained(self, deadline: Deadline) -> bool:
        """Wait until no connection is open; False if some still are at ``deadline``."""
        try:
            async with deadline.timeout():
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    async def abort(self, why: str, deadline: Deadline) -> None:
        """Close all connections; the hooks offer their messages again."""
        for connection in self.connections:
            connection.cancel(why)
        await self.drained(deadline)

    def _accept(self) -> None:
        """Accept one connection, even when full, and more while there is room.

        With EPOLLEXCLUSIVE the first one woke this worker and no other; left in the socket's queue it would wait for
        this worker although another may be idle. If there is no room for its message, the queue sheds one, and that
        hook's retry wakes another worker, because this one is not listening any longer.
        """
        for _ in range(PER_WAKEUP):
            if self._hand_over is not None and self._hand_over.full():
                self._suspend()
                self._pause = self._pause or self._loop.call_later(PAUSE, self._unpause)
                return
            try:
                accepted, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError as error:
                self._accept_failed(error)
                return
            self._state.counters.accepted += 1
            if self._hand_over is not None and not self._state.is_trusted(peer_credentials(accepted)[1]):
                self._hand_over.take(accepted)
                continue
            connection = Connection(self._state, accepted)
            self._open.add(connection)
            self._empty.clear()
            connection.start()
            if self._full():
                self._suspend()
                return

    def _full(self) -> bool:
        queue = self._state.queue
        return queue.full() or len(self._open) >= queue.slots + queue.max_waiting + SPARE

    def _accept_failed(self, error: OSError) -> None:
        """Pause: the socket stays readable, and the loop would spin."""
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
        self._resume_if_room()

    def _resume_if_room(self) -> None:
        if not self._accepting and not self._full():
            self._resume()
