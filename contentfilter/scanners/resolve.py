"""Resolver cache: host names of backends to addresses, so that mail never waits twice for a name server.

One look-up at a time for each name. A result is kept. When it is stale, it is used while
a new look-up runs, and it stays in force if that fails: the scanners outlive a name server's outage.
"""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from contentfilter.threads import in_thread

Addresses = list[tuple[int, Any]]
"""(family, socket address) in the order in which they should be tried."""
Key = tuple[str, int]

FRESH = 30.0  # seconds for which a result is used without a new look-up
MOST = 8  # addresses of a name that are tried
AGAIN = 5.0  # seconds between two look-ups that fail, for a name that is known


async def look_up(host: str, port: int) -> Addresses:
    """getaddrinfo(3) in a thread of its own, which may hang. Raises OSError, or UnicodeError for no host name."""
    found = await in_thread(partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM))
    if not found:
        raise OSError(f"no address for {host}")
    return [(family, where) for family, _, _, _, where in found[:MOST]]


class Resolver:
    """Cache of one event loop."""

    def __init__(
        self,
        look_up: Callable[[str, int], Awaitable[Addresses]] = look_up,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look_up = look_up
        self._clock = clock
        self._known: dict[Key, Addresses] = {}
        self._stale_at: dict[Key, float] = {}
        self._pending: dict[Key, asyncio.Future[Addresses]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def find(self, host: str, port: int) -> Addresses:
        """Addresses, at least one. Raises OSError or UnicodeError; the caller limits the wait."""
        if numeric := _numeric(host, port):
            return numeric
        key = (host, port)
        known = self._known.get(key)
        if known is None or self._clock() >= self._stale_at[key]:
            pending = self._pending.get(key) or self._start(key)
            if known is None:
                return await asyncio.shield(pending)
        return known

    def _start(self, key: Key) -> asyncio.Future[Addresses]:
        loop = asyncio.get_running_loop()
        pending = self._pending[key] = loop.create_future()
        pending.add_done_callback(_retrieve)
        loop.call_soon(self._run, key)  # not from here: a look-up is not part of the message that needs it
        return pending

    def _run(self, key: Key) -> None:
        task = asyncio.get_running_loop().create_task(self._refresh(key))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _refresh(self, key: Key) -> None:
        """The waiters get the result or the error of one look-up."""
        pending = self._pending[key]
        try:
            found = self._known[key] = await self._look_up(*key)
        except (OSError, UnicodeError) as error:
            self._stale_at[key] = self._clock() + AGAIN
            pending.set_exception(error)
        else:
            self._stale_at[key] = self._clock() + FRESH
            pending.set_result(found)
        finally:
            del self._pending[key]


def _retrieve(pending: "asyncio.Future[Addresses]") -> None:
    """An error that no one waits for is not worth a warning."""
    if not pending.cancelled():
        pending.exception()


def _numeric(host: str, port: int) -> Addresses:
    """The address itself if ``host`` is one: it needs no look-up."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return [(family, (host, port))]
    return []
