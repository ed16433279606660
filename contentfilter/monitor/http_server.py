"""HTTP server for monitoring: uvicorn's HTTP/1.1 protocol behind bounds of its own.

uvicorn has no time limit for a request's head, and h11's patterns take quadratic time for a long run of blanks. So the
head is collected here, bounded in size and time, and given to uvicorn in one piece; nothing after it is read. The
number of connections is bounded: a new one replaces the oldest that has not sent its request.
"""

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from contentfilter.monitor.http import ANSWER_WAIT, Application

HEAD_MAX = 8192  # bytes
BLANKS_MAX = 64  # blanks and tabs in a row
HEAD_WAIT = 5.0  # seconds for the head of the request
CLOSE_WAIT = 1.0  # seconds for answers under way when the server is closed
CONNECTIONS_MAX = 32
BACKLOG = 64


class BoundedProtocol(H11Protocol):
    """One request without a body, one answer."""

    def __init__(self, config: Config, state: ServerState, waiting: dict["BoundedProtocol", None]) -> None:
        """``waiting``: connections whose head is not complete, oldest first."""
        super().__init__(config, state, {})
        self._waiting = waiting
        self._head = bytearray()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS_MAX:
            oldest = next(iter(self._waiting), self)
            oldest.abort()
            if oldest is self:
                return
        self._waiting[self] = None
        self._timer = self.loop.call_later(HEAD_WAIT, self.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self not in self._waiting:
            return  # a body or a second request
        searched = max(0, len(self._head) - 3)
        self._head += data[: HEAD_MAX + 1 - len(self._head)]
        end = self._head.find(b"\r\n\r\n", searched)
        if end < 0 and len(self._head) <= HEAD_MAX:
            return
        self._forget()
        self._timer = self.loop.call_later(ANSWER_WAIT, self.abort)
        self.transport.pause_reading()
        head = bytes(self._head[: end + 4])
        if end < 0 or b" " * (BLANKS_MAX + 1) in head.replace(b"\t", b" "):
            self.send_400_response("Bad Request\n")
        else:
            super().data_received(head)

    def abort(self) -> None:
        """Drop the connection, whatever is still to be sent."""
        self._forget()
        self.connections.discard(self)
        self.transport.abort()

    def _forget(self) -> None:
        self._waiting.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()


class HttpServer:
    """Serves an application on one address."""

    def __init__(self, application: Application) -> None:
        self._config = Config(
            application,
            interface="asgi3",
            lifespan="off",
            ws="none",
            proxy_headers=False,
            access_log=False,
            log_config=None,
            log_level="critical",  # it would log a line for each malformed request
            h11_max_incomplete_event_size=HEAD_MAX,
        )
        self._state = ServerState()
        self._waiting: dict[BoundedProtocol, None] = {}
        self._server: asyncio.Server | None = None

    @property
    def open(self) -> int:
        """Connections."""
        return len(self._state.connections)

    def _protocol(self) -> BoundedProtocol:
        return BoundedProtocol(self._config, self._state, self._waiting)

    async def start(self, host: str, port: int) -> str:
        """Listen; returns where, as ``address:port``. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._protocol, host, port, backlog=BACKLOG)
        name, bound = self._server.sockets[0].getsockname()[:2]
        return f"[{name}]:{bound}" if ":" in name else f"{name}:{bound}"

    async def close(self) -> None:
        """Stop listening and close all connections, those with an answer under way after CLOSE_WAIT seconds at most."""
        if self._server is not None:
            self._server.close()
        connections: list[Any] = list(self._state.connections)
        for connection in connections:
            if not connection.transport.is_closing():
                connection.shutdown()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=CLOSE_WAIT)
        for task in self._state.tasks:
            task.cancel()
        for connection in connections:
            connection.abort()
