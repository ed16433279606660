"""A very small HTTP server for whoever watches the daemon: GET and HEAD, one answer per connection, nothing to write.

Everything is bounded: the head of a request, the time for it, the time for the answer, the number of
connections. A page may take its time without holding others; when there is no room, whoever has been
silent longest goes. Neither rubbish nor a slow reader reaches anything but its own connection.
What is private is answered only under an address or a name of our own.
RFC 9110 and 9112, no more of them than this needs; a library would bring routing, bodies and upgrades.
"""

import asyncio
import ipaddress
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus

from contentfilter.deadline import Deadline
from contentfilter.log import Logger

HEAD_MAX = 8192  # bytes
HEAD_WAIT = 5.0  # seconds for the head of the request
ANSWER_WAIT = 20.0  # seconds for making and sending the answer
MOST = 32  # connections at once
BACKLOG = 64

_REQUEST = re.compile(rb"([A-Z]{1,16}) (/[!-~]{0,1023}) HTTP/1\.[01]")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*")
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9A-Za-z._-]+))(?::[0-9]{0,5})?")


@dataclass(frozen=True, slots=True)
class Response:
    """What a page answers."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK
    header: Mapping[str, str] = field(default_factory=dict)  # further fields


Page = Callable[[str], Awaitable[Response]]
"""The value of the Accept header -> the answer."""


class Server:
    """Serves ``pages`` (path -> page). A page that raises is answered with 500 and logged.

    The paths in ``private`` answer only where the Host field is an address, localhost or one of ``names``. Somebody's
    web site can make its own name lead to our address (DNS rebinding), and would then be allowed to read them.
    """

    def __init__(
        self, pages: Mapping[str, Page], log: Logger, *, private: Collection[str] = (), names: Collection[str] = ()
    ) -> None:
        self._pages = pages
        self._private = frozenset(private)
        self._names = frozenset(name.lower() for name in names) | {"localhost"}
        self._log = log
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self._silent: dict[asyncio.StreamWriter, None] = {}  # those without a request so far, oldest first

    async def start(self, host: str, port: int) -> str:
        """Listen; returns where, as ``address:port``. Raises OSError."""
        self._server = await asyncio.start_server(self._accept, host, port, limit=HEAD_MAX, backlog=BACKLOG)
        name, bound = self._server.sockets[0].getsockname()[:2]
        return f"[{name}]:{bound}" if ":" in name else f"{name}:{bound}"

    async def close(self) -> None:
        """Stop listening and drop all connections."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._open.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= MOST:
            oldest = next(iter(self._silent), None)
            if oldest is None:
                writer.transport.abort()
                return
            self._open[oldest].cancel()
            self._close(oldest)
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._open[writer] = task
        self._silent[writer] = None
        task.add_done_callback(lambda _: self._close(writer))

    def _close(self, writer: asyncio.StreamWriter) -> None:
        self._open.pop(writer, None)
        self._silent.pop(writer, None)
        writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            try:
                async with Deadline.after(HEAD_WAIT).timeout():
                    head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.LimitOverrunError:
                head = b""
            self._silent.pop(writer, None)
            async with Deadline.after(ANSWER_WAIT).timeout():
                writer.write(await self.answer(head))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # it went away, or it is too slow

    async def answer(self, head: bytes) -> bytes:
        """All bytes of the answer to the request with this head."""
        request, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        line, fields = _REQUEST.fullmatch(request), [_FIELD.fullmatch(line) for line in lines]
        if line is None or None in fields:
            return _encode(_plain(HTTPStatus.BAD_REQUEST))
        method, target = line[1], line[2].partition(b"?")[0].decode("ascii")
        if method not in (b"GET", b"HEAD"):
            return _encode(_plain(HTTPStatus.METHOD_NOT_ALLOWED), "Allow: GET, HEAD\r\n")
        page = self._pages.get(target)
        accept = b",".join(_values(fields, b"accept"))
        if target in self._private and not self._ours(_values(fields, b"host")):
            return _encode(_plain(HTTPStatus.MISDIRECTED_REQUEST), with_body=method == b"GET")
        response = _plain(HTTPStatus.NOT_FOUND) if page is None else await self._made(page, target, accept)
        return _encode(response, with_body=method == b"GET")

    def _ours(self, hosts: list[bytes]) -> bool:
        found = _HOST.fullmatch(hosts[0].decode("latin-1")) if len(hosts) == 1 else None
        if found is None:
            return False
        try:
            ipaddress.ip_address(found[1] or found[2])
        except ValueError:
            return found[2] is not None and found[2].lower().removesuffix(".") in self._names
        return True

    async def _made(self, page: Page, target: str, accept: bytes) -> Response:
        try:
            return await page(accept.decode("latin-1"))
        except Exception:
            self._log.exception("http.error", path=target)
            return _plain(HTTPStatus.INTERNAL_SERVER_ERROR)


def _values(fields: list[re.Match[bytes] | None], name: bytes) -> list[bytes]:
    return [field[2] for field in fields if field is not None and field[1].lower() == name]


def _plain(status: HTTPStatus) -> Response:
    return Response(f"{status.phrase}\n".encode(), status=status)


def _encode(response: Response, more: str = "", *, with_body: bool = True) -> bytes:
    more += "".join(f"{name}: {value}\r\n" for name, value in response.header.items())
    head = (
        f"HTTP/1.1 {response.status.value} {response.status.phrase}\r\n"
        f"Date: {formatdate(usegmt=True)}\r\n"
        f"Content-Type: {response.content_type}\r\n"
        f"Content-Length: {len(response.body)}\r\n"
        f"Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n{more}\r\n"
    )
    return head.encode("latin-1") + (response.body if with_body else b"")
