"""One question to one daemon over a fresh stream socket, and every way in which it goes wrong.

:func:`converse` connects, writes, reads and closes, all before the deadline, and raises nothing but
:class:`BackendError`. Writing and reading go on together: a peer that answers early, or stops
taking what we send, cannot hold us. No task is started, and without TLS no byte of the message is copied.
"""

import asyncio
import errno
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, Cause, RemoteProtocolError
from contentfilter.model import ScanOutcome
from contentfilter.scanners.resolve import Resolver
from contentfilter.scanners.tls import Tls, TlsSocket, explain

T = TypeVar("T", covariant=True)
R = TypeVar("R")
Batch = tuple[bytes | memoryview, ...]  # buffers for one sendmsg

RECEIVE = 65_536  # bytes asked for at once
QUANTUM = 1_048_576  # bytes written before the event loop gets its turn
FIRST_PAUSE, LONGEST_PAUSE = 0.002, 0.1  # seconds between tries while a listen queue is full

# Errors that say "not now" and nothing about the peer's health; most of them are our own limits.
_BUSY = frozenset(
    {errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS, errno.EADDRNOTAVAIL}
)
_HANG_UP = (BrokenPipeError, ConnectionResetError)


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Seconds for each step of a conversation; the message's deadline ends it earlier."""

    connect: float
    answer: float


@dataclass(frozen=True, slots=True)
class StreamContext:
    """What conversations share: how names are found, and whom ``tls:`` backends must prove to be."""

    resolver: Resolver
    tls: Tls | None = None


class ClosedError(BackendError):
    """The peer took the connection and closed it without a byte: overload, a restart, a killed child."""


class UnreachableError(BackendError):
    """Not connected, or not with whom we want: nobody has seen the question."""


class Endpoint(Protocol):
    """A connected socket that does not block, plain or under TLS."""

    def fileno(self) -> int: ...

    def sendmsg(self, buffers: list[bytes | memoryview], /) -> int: ...

    def recv(self, size: int, /) -> bytes: ...

    def shutdown(self, how: int, /) -> None: ...

    def close(self) -> None: ...


class Reader(Protocol[T]):
    """A codec's side of the conversation (wire/clamd, wire/spamd)."""

    def feed(self, data: bytes) -> T | None: ...

    def end(self) -> T: ...


@dataclass(slots=True, eq=False)
class Late(Generic[R]):
    """A question that the daemon has as a whole, and whose asker did not wait. It needs nothing of the message."""

    address: Address
    sock: socket.socket
    reader: Reader[R]

    async def answer(self, deadline: Deadline) -> R:
        """What the daemon says at last; once. Raises BackendError."""
        try:
            async with deadline.timeout():
                return (await _exchange(self.sock, iter(()), self.reader, -1, False))[0]
        except (OSError, EOFError, RemoteProtocolError) as error:  # TimeoutError is an OSError
            cause = Cause.TIMEOUT if isinstance(error, TimeoutError) else Cause.DOWN
            raise BackendError(cause, str(self.address), str(error) or "no answer, however late") from error
        finally:
            self.close()

    def close(self) -> None:
        self.sock.close()


Left = Callable[[Late[R]], None]
"""Takes over a question, or closes it. Never waits."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A scan that goes on although nobody waits for it."""

    late: Late[Any]
    judge: Callable[[Any, Deadline], Awaitable[ScanOutcome]]

    async def finish(self, deadline: Deadline) -> ScanOutcome:
        """CLEAN or FOUND. Once. Raises BackendError."""
        return await self.judge(await self.late.answer(deadline), deadline)

    def close(self) -> None:
        self.late.close()


Leave = Callable[[Pending], None]
"""Takes over a scan, or closes it. Never waits."""


async def request(
    address: Address,
    batches: Iterator[Batch],
    reader: Reader[R],
    limits: StreamLimits,
    deadline: Deadline,
    *,
    descriptor: int = -1,
    half_close: bool = False,
    around: StreamContext | None = None,
    leave: Left[R] | None = None,
) -> tuple[R, bool]:
    """Ask one question: (answer, whether all of ``batches`` was taken before it came).

    ``descriptor`` travels with the first batch (Unix sockets only). ``half_close`` ends our
    direction after the last byte. ``leave`` gets a question that was put when the waiting ended (not with TLS).
    Raises BackendError only: UnreachableError where the question never left.
    """
    sock: Endpoint | None = None
    failure: type[BackendError] = UnreachableError
    try:
        sock = await _connect(address, limits, deadline, around or StreamContext(Resolver()))
        failure = BackendError
        async with deadline.within(limits.answer).timeout():
            return await _exchange(sock, batches, reader, descriptor, half_close, address, leave)
    except TimeoutError as error:
        step = "connect" if sock is None else "answer"
        raise failure(Cause.TIMEOUT, str(address), str(error) or f"no {step} in time") from None
    except RemoteProtocolError as error:
        raise BackendError(Cause.BAD_REPLY, str(address), str(error)) from error
    except EOFError:
        raise ClosedError(Cause.DOWN, str(address), "closed without an answer") from None
    except ssl.SSLError as error:
        # Who can forge a certificate could as well cut the line: it counts as down.
        name = around.tls.name if around and around.tls else ""
        raise failure(Cause.DOWN, str(address), explain(error, name or address.host)) from error
    except OSError as error:
        cause = Cause.BUSY if error.errno in _BUSY else Cause.DOWN
        step = "connect" if sock is None else "answer"
        raise failure(cause, str(address), f"{step}: {error.strerror or error}") from error
    except UnicodeError as error:
        raise failure(Cause.DOWN, str(address), "not a host name") from error
    finally:
        if sock is not None:
            sock.close()


async def _connect(address: Address, limits: StreamLimits, deadline: Deadline, around: StreamContext) -> Endpoint:
    if address.path:
        return await _connect_unix(address.path, deadline.within(limits.answer))
    end = deadline.within(limits.connect)
    try:
        async with end.timeout():
            found = await around.resolver.find(address.host, address.port)
    except TimeoutError:
        raise TimeoutError(f"no address for {address.host} in time") from None
    last = OSError(f"no address for {address.host}")
    for position, (family, where) in enumerate(found):
        share = end.left() / (len(found) - position)  # one that swallows packets must leave time for the others
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        endpoint: Endpoint = sock
        try:
            async with end.within(share).timeout():
                # Small last pieces must not wait for the peer's delayed acknowledgement.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await asyncio.get_running_loop().sock_connect(sock, where)
                if address.tls:
                    endpoint = await _under_tls(sock, address, around.tls)
        except OSError as error:  # a TimeoutError is one
            endpoint.close()
            last = error
        except BaseException:
            endpoint.close()
            raise
        else:
            return endpoint
    raise last


async def _under_tls(sock: socket.socket, address: Address, tls: Tls | None) -> TlsSocket:
    if tls is None:
        raise OSError(f"{address}: TLS is not set up for it")
    try:
        endpoint = TlsSocket(sock, tls, address.host)
    except ValueError as error:
        raise OSError(f"TLS: not a name for a certificate: {error}") from error
    try:
        while True:
            try:
                endpoint.shake_hands()
            except BlockingIOError:
                await _ready(endpoint, writing=endpoint.unsent)
            else:
                return endpoint
    except BaseException:
        endpoint.close()
        raise


async def _connect_unix(path: str, deadline: Deadline) -> socket.socket:
    """EAGAIN means that the listen queue is full: wait, do not call the peer down.

    asyncio's own sock_connect takes EAGAIN for "under way" and would return an unconnected socket.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    pause = FIRST_PAUSE
    try:
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:
                if deadline.expired():
                    raise
            else:
                return sock
            await asyncio.sleep(min(pause, deadline.left()))
            pause = min(2 * pause, LONGEST_PAUSE)
    except BaseException:
        sock.close()
        raise


async def _exchange(
    sock: Endpoint,
    batches: Iterator[Batch],
    reader: Reader[R],
    descriptor: int,
    half_close: bool,
    address: Address | None = None,
    leave: Left[R] | None = None,
) -> tuple[R, bool]:
    """Write and read until the reader has its event. EOFError: closed without a byte."""
    pending: list[bytes | memoryview] = []  # what is left of the batch being written
    writing, complete, heard = True, False, False
    try:
        while True:
            if writing:
                try:
                    if descriptor >= 0 and isinstance(sock, socket.socket):
                        pending.extend(next(batches))
                        _drop(pending, socket.send_fds(sock, pending, [descriptor]))
                        descriptor = -1
                    complete = _flush(sock, batches, pending)
                    writing = not complete
                    if complete and half_close:
                        sock.shutdown(socket.SHUT_WR)
                except _HANG_UP:
                    writing = False  # an answer may still be there to be read
                except OSError as error:
                    if error.errno != errno.ENOTCONN:  # shutdown on what the peer has reset
                        raise
            try:
                data = sock.recv(RECEIVE)
            except BlockingIOError:
                await _ready(sock, writing=writing or _unsent(sock))
                continue
            except ConnectionResetError:
                data = b""
            if not data:
                if not heard:
                    raise EOFError
                return reader.end(), complete and not _unsent(sock)
            heard = True
            event = reader.feed(data)
            if event is not None:
                return event, complete and not _unsent(sock)
            await asyncio.sleep(0)  # a peer that floods must not hold the loop
    except asyncio.CancelledError:
        if leave is not None and address is not None and complete and isinstance(sock, socket.socket):
            with suppress(OSError):  # out of descriptors: then not
                leave(Late(address, sock.dup(), reader))
        raise
    finally:
        pending.clear()  # an exception keeps this frame alive, and the views would keep the message mapped


def _unsent(sock: Endpoint) -> bool:
    """Does TLS hold back what we have given it?"""
    return isinstance(sock, TlsSocket) and sock.unsent


def _flush(sock: Endpoint, batches: Iterator[Batch], pending: list[bytes | memoryview]) -> bool:
    """Write what the socket takes now, at most a QUANTUM; True when everything is out."""
    left = QUANTUM
    while left > 0:
        if not pending:
            pending.extend(next(batches, ()))
            if not pending:
                return True
        try:
            sent = sock.sendmsg(pending)
        except BlockingIOError:
            return False
        _drop(pending, sent)
        left -= sent
    return False


def _drop(pending: list[bytes | memoryview], sent: int) -> None:
    """Take the first ``sent`` bytes out of ``pending``."""
    while pending and sent >= len(pending[0]):
        sent -= len(pending.pop(0))
    if sent:
        pending[0] = memoryview(pending[0])[sent:]


async def _ready(sock: Endpoint, *, writing: bool) -> None:
    """Wait until something can be read, or written where we have more to write."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    fd = sock.fileno()
    loop.add_reader(fd, wake)
    if writing:
        loop.add_writer(fd, wake)
    try:
        await ready
    finally:
        loop.remove_reader(fd)
        if writing:
            loop.remove_writer(fd)
