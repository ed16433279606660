"""One request to a scanner daemon over a fresh stream connection, and every way in which it fails.

:func:`request` connects, sends, reads and closes. It raises nothing but :class:`BackendError`, and it sets no limit
for the answer: the caller does, and learns from :class:`Progress` how far the attempt is. Sending and reading go on
together, so a peer that answers early, or stops reading, cannot block us.

asyncio's socket calls, not its streams. Its transports copy what the socket does not take, and drop an answer that is
there to be read when a write fails, which is how clamd refuses a message that is too large. Its TLS has no half close,
which spamd needs; a read after our close_notify fails there, and an answer that is decrypted already is lost.
"""

import asyncio
import errno
import socket
import ssl
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, Cause, RemoteProtocolError
from contentfilter.model import ScanOutcome
from contentfilter.scanners.resolve import Resolver
from contentfilter.scanners.tls import Tls, TlsConnection, explain

T = TypeVar("T", covariant=True)
R = TypeVar("R")
Batch = tuple[bytes | memoryview, ...]  # buffers for one sendmsg

RECEIVE = 65_536  # bytes read in one call
FIRST_PAUSE, LONGEST_PAUSE = 0.002, 0.1  # seconds between tries while a listen queue is full
KEEPALIVE = ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
"""A host that vanished is noticed after 50 seconds: a scan that nobody limits must not hold its slot."""

# Errors that say "not now" and nothing about the peer's health; most of them are our own limits.
_BUSY = frozenset(
    {errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS, errno.EADDRNOTAVAIL}
)
_HANG_UP = (BrokenPipeError, ConnectionResetError)


@dataclass(frozen=True, slots=True)
class StreamContext:
    """Shared by all requests to one scanner: its connect limit (seconds), name resolution, and TLS."""

    connect: float
    resolver: Resolver = field(default_factory=Resolver)
    tls: Tls | None = None


class ClosedError(BackendError):
    """The peer accepted the connection and closed it without a byte: overload, a restart, a killed child."""


class UnreachableError(BackendError):
    """Not connected, or not to the right peer: the request was never sent."""


class Owner(Protocol):
    """Owner of scans that go on when their caller has left."""

    def take_over(self, rest: Coroutine[Any, Any, ScanOutcome], progress: "Progress") -> asyncio.Task[ScanOutcome]:
        """Run the rest of an attempt in a task. Its caller is about to close the message."""
        ...


@dataclass(slots=True, eq=False)
class Progress:
    """State of one attempt, written by :func:`request`."""

    address: Address
    began: float = field(default_factory=time.monotonic)  # the first attempt of the scan, as monotonic time
    owner: Owner | None = None  # None: the attempt ends when it is cancelled
    awaited: str = "connect"
    cause: Cause = Cause.TIMEOUT  # of a time-out in this state
    connected: bool = False
    sent: bool = False  # the message is no longer needed
    rest: asyncio.Task[ScanOutcome] | None = None  # what the owner has taken over

    def timed_out(self) -> BackendError:
        """The error of an attempt that is given up now."""
        kind = BackendError if self.connected else UnreachableError
        return kind(self.cause, str(self.address), f"no {self.awaited} in time")


class Reader(Protocol[T]):
    """Decoder of the response (wire/clamd, wire/spamd)."""

    def feed(self, data: bytes) -> T | None: ...

    def end(self) -> T: ...


class Connection(Protocol):
    """A connected stream, plain or under TLS."""

    async def send(self, batch: Batch) -> None: ...

    async def receive(self) -> bytes:
        """Empty at the end of the stream."""
        ...

    async def end_sending(self) -> None: ...

    def abort(self) -> None:
        """Make :meth:`receive` return the end of the stream."""
        ...

    def close(self) -> None: ...


async def query(
    address: Address,
    command: bytes,
    reader: Reader[R],
    context: StreamContext,
    deadline: Deadline,
    progress: Progress | None = None,
    *,
    half_close: bool = False,
) -> R:
    """The answer to a short command that carries no message. Raises BackendError."""
    progress, batches = progress or Progress(address), iter([(command,)])
    try:
        async with deadline.timeout():
            answer, _ = await request(address, batches, reader, context, progress, half_close=half_close)
    except TimeoutError:
        raise progress.timed_out() from None
    return answer


Conclude = Callable[[R, bool], Coroutine[Any, Any, ScanOutcome]]
"""Makes the outcome of a response; the flag: the message was sent before it came. Raises BackendError."""


async def request(
    address: Address,
    batches: Iterator[Batch],
    reader: Reader[R],
    context: StreamContext,
    progress: Progress,
    *,
    descriptor: int = -1,
    half_close: bool = False,
    conclude: Conclude[R] | None = None,
) -> tuple[R, bool]:
    """One request and its response: (response, whether all of ``batches`` was sent before it came).

    ``descriptor`` travels with the first and only batch (Unix sockets only). ``half_close`` ends our direction after
    the last byte. Raises BackendError only: UnreachableError if the request was never sent. If it is cancelled while
    it waits for the answer, the owner takes it over, with ``conclude`` for the answer. Not over TLS.
    """
    connection: Connection | None = None
    try:
        if address.path:
            sock = await _connect_unix(address.path, progress)
            connection = PlainConnection(sock)
        else:
            connection = await _connect(address, context, progress)
        progress.connected, progress.awaited = True, "answer"
        if descriptor < 0:
            return await _exchange(connection, batches, reader, half_close, progress)
        socket.send_fds(sock, next(batches), [descriptor])
        progress.sent = True
        return await _receive(connection, reader), True
    except asyncio.CancelledError:
        if progress.owner and progress.sent and conclude and isinstance(connection, PlainConnection):
            progress.rest = progress.owner.take_over(_rest(connection, reader, progress, conclude), progress)
            progress.rest.add_done_callback(connection.ended)
            connection = None
        raise
    except (RemoteProtocolError, EOFError, OSError, UnicodeError) as error:  # TimeoutError is an OSError
        raise _fault(error, progress, context.tls) from error
    finally:
        if connection is not None:
            connection.close()


async def _rest(
    connection: "PlainConnection", reader: Reader[R], progress: Progress, conclude: Conclude[R]
) -> ScanOutcome:
    """The end of an attempt whose caller has left."""
    try:
        answer = await _receive(connection, reader)
    except (RemoteProtocolError, EOFError, OSError) as error:
        raise _fault(error, progress, None) from error
    return await conclude(answer, True)


def _fault(
    error: RemoteProtocolError | EOFError | OSError | UnicodeError, progress: Progress, tls: Tls | None
) -> BackendError:
    kind = BackendError if progress.connected else UnreachableError
    backend = str(progress.address)
    if isinstance(error, TimeoutError):
        return progress.timed_out()
    if isinstance(error, RemoteProtocolError):
        return BackendError(Cause.BAD_REPLY, backend, str(error))
    if isinstance(error, EOFError):
        return ClosedError(Cause.DOWN, backend, "closed without an answer")
    if isinstance(error, ssl.SSLError):
        # Anyone who can forge a certificate could as well cut the line: it counts as down.
        name = tls.name if tls else ""
        return kind(Cause.DOWN, backend, explain(error, name or progress.address.host))
    if isinstance(error, OSError):
        step = "answer" if progress.connected else "connect"
        cause = Cause.BUSY if error.errno in _BUSY else Cause.DOWN
        return kind(cause, backend, f"{step}: {error.strerror or error}")
    return UnreachableError(Cause.DOWN, backend, "not a host name")


# Connecting


async def _connect_unix(path: str, progress: Progress) -> socket.socket:
    """EAGAIN means that the listen queue is full: wait, do not report the peer as down.

    asyncio's own sock_connect takes EAGAIN for "in progress" and would return an unconnected socket.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    pause = FIRST_PAUSE
    try:
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:
                progress.awaited, progress.cause = "place in its listen queue", Cause.BUSY
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                progress.cause = Cause.TIMEOUT
                return sock
    except BaseException:
        sock.close()
        raise


async def _connect(address: Address, context: StreamContext, progress: Progress) -> Connection:
    """The first address of the host that accepts, within the connect limit. Raises OSError, UnicodeError."""
    end = Deadline.after(context.connect)
    progress.awaited = f"address for {address.host}"
    async with end.timeout():
        found = await context.resolver.find(address.host, address.port)
    progress.awaited = "connect"
    last = OSError(f"no address for {address.host}")
    for position, (family, where) in enumerate(found):
        share = end.left() / (len(found) - position)  # one that swallows packets must leave time for the others
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            async with end.within(share).timeout():
                # Small last pieces must not wait for the peer's delayed acknowledgement.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in KEEPALIVE:
                    sock.setsockopt(socket.IPPROTO_TCP, option, value)
                await asyncio.get_running_loop().sock_connect(sock, where)
                return await _under_tls(sock, address, context.tls) if address.tls else PlainConnection(sock)
        except OSError as error:  # a TimeoutError is one
            sock.close()
            last = error
        except BaseException:
            sock.close()
            raise
    raise last


async def _under_tls(sock: socket.socket, address: Address, tls: Tls | None) -> TlsConnection:
    if tls is None:
        raise OSError(f"{address}: TLS is not set up for it")
    try:
        connection = TlsConnection(sock, tls, address.host)
    except ValueError as error:
        raise OSError(f"TLS: not a name for a certificate: {error}") from error
    await connection.handshake()
    return connection


# Sending and receiving


async def _exchange(
    connection: Connection, batches: Iterator[Batch], reader: Reader[R], half_close: bool, progress: Progress
) -> tuple[R, bool]:
    """Send and read until the reader has its event. EOFError: closed without a byte."""
    sending = asyncio.create_task(_send(connection, batches, half_close, progress))
    try:
        return await _receive(connection, reader), progress.sent
    except EOFError:
        if sending.done() and (error := sending.exception()) is not None:
            raise error from None
        raise
    finally:
        if not sending.done():
            sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def _send(connection: Connection, batches: Iterator[Batch], half_close: bool, progress: Progress) -> None:
    try:
        for batch in batches:
            await connection.send(batch)
            del batch  # it has views of the message
            await asyncio.sleep(0)  # a peer that takes everything must not hold the loop
        if half_close:
            await connection.end_sending()
        progress.sent = True
    except _HANG_UP:
        pass  # an answer may still be there to be read
    except OSError:
        connection.abort()
        raise


async def _receive(connection: Connection, reader: Reader[R]) -> R:
    heard = False
    while True:
        try:
            data = await connection.receive()
        except ConnectionResetError:
            data = b""
        if not data:
            if not heard:
                raise EOFError
            return reader.end()
        heard = True
        event = reader.feed(data)
        if event is not None:
            return event
        await asyncio.sleep(0)  # a peer that floods must not hold the loop


class PlainConnection:
    """A TCP or Unix socket. No byte of the message is copied."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._fd = sock, sock.fileno()  # asyncio is much slower with a socket than with its number
        self._loop = asyncio.get_running_loop()

    async def send(self, batch: Batch) -> None:
        """Not by asyncio's sock_sendall: when that fails, a cycle of references keeps the message mapped."""
        pending = [memoryview(buffer) for buffer in batch]
        while pending:
            try:
                sent = self._sock.sendmsg(pending)
            except BlockingIOError:
                await self._writable()
                continue
            while pending and sent >= len(pending[0]):
                sent -= len(pending.pop(0))
            if sent:
                pending[0] = pending[0][sent:]

    async def _writable(self) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_writer(self._fd, _settle, ready)
        try:
            await ready
        finally:
            self._loop.remove_writer(self._fd)

    async def receive(self) -> bytes:
        """Not by asyncio's sock_recv: a cancellation at the wrong moment loses what it has read."""
        while True:
            ready: asyncio.Future[None] = self._loop.create_future()
            self._loop.add_reader(self._fd, _settle, ready)
            try:
                await ready
            finally:
                self._loop.remove_reader(self._fd)
            with suppress(BlockingIOError):
                return self._sock.recv(RECEIVE)

    async def end_sending(self) -> None:
        with suppress(OSError):  # the peer has reset the connection
            self._sock.shutdown(socket.SHUT_WR)

    def abort(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def ended(self, _: object) -> None:
        """Close it with the task that uses it."""
        self._sock.close()


def _settle(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)
