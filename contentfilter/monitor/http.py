"""ASGI application for monitoring: GET and HEAD of a fixed set of pages.

Private pages answer only if the Host field is an address or a name of this server. The web site of an attacker can
make its own name resolve to our address (DNS rebinding), and its scripts could read them otherwise.
"""

import ipaddress
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

from contentfilter.deadline import Deadline
from contentfilter.log import Logger

ANSWER_WAIT = 20.0  # seconds for making and sending the answer

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9A-Za-z._-]+))(?::[0-9]{0,5})?")


@dataclass(frozen=True, slots=True)
class Response:
    """The answer of a page."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK
    header: Mapping[str, str] = field(default_factory=dict)  # further fields


Page = Callable[[str], Awaitable[Response]]
"""The value of the Accept header -> the answer."""

Send = Callable[[dict[str, Any]], Awaitable[None]]


class Application:
    """Serves ``pages`` (path -> page). A page that raises is answered with 500 and logged.

    ``private``: paths that answer only under an address, localhost or one of ``names``.
    """

    def __init__(
        self, pages: Mapping[str, Page], log: Logger, *, private: Collection[str] = (), names: Collection[str] = ()
    ) -> None:
        self._pages = pages
        self._private = frozenset(private)
        self._names = frozenset(name.lower() for name in names) | {"localhost"}
        self._log = log

    async def __call__(self, scope: Mapping[str, Any], receive: Callable[[], Awaitable[Any]], send: Send) -> None:
        """One request (ASGI 3, https://asgi.readthedocs.io). The connection is closed after the answer."""
        response = await self._answer(scope)
        header: dict[str, str] = {
            "date": formatdate(usegmt=True),
            "content-type": response.content_type,
            "content-length": str(len(response.body)),
            "cache-control": "no-store",
            "x-content-type-options": "nosniff",
            "connection": "close",
            **response.header,
        }
        fields = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in header.items()]
        await send({"type": "http.response.start", "status": response.status.value, "headers": fields})
        await send({"type": "http.response.body", "body": response.body})

    async def _answer(self, scope: Mapping[str, Any]) -> Response:
        path = scope["raw_path"].decode("latin-1")
        if not path.startswith("/") or scope["http_version"] not in ("1.0", "1.1"):
            return _plain(HTTPStatus.BAD_REQUEST)
        if scope["method"] not in ("GET", "HEAD"):
            return _plain(HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET, HEAD"})
        if path in self._private and not self._is_own_name(_values(scope, b"host")):
            return _plain(HTTPStatus.MISDIRECTED_REQUEST)
        page = self._pages.get(path)
        if page is None:
            return _plain(HTTPStatus.NOT_FOUND)
        try:
            async with Deadline.after(ANSWER_WAIT).timeout():
                return await page(b",".join(_values(scope, b"accept")).decode("latin-1"))
        except Exception:
            self._log.exception("http.error", path=path)
            return _plain(HTTPStatus.INTERNAL_SERVER_ERROR)

    def _is_own_name(self, hosts: list[bytes]) -> bool:
        found = _HOST.fullmatch(hosts[0].decode("latin-1")) if len(hosts) == 1 else None
        if found is None:
            return False
        try:
            ipaddress.ip_address(found[1] or found[2])
        except ValueError:
            return found[2] is not None and found[2].lower().removesuffix(".") in self._names
        return True


def _values(scope: Mapping[str, Any], name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def _plain(status: HTTPStatus, header: Mapping[str, str] | None = None) -> Response:
    return Response(f"{status.phrase}\n".encode(), status=status, header=header or {})
