"""Host names of backends to addresses, without mail ever waiting twice for a name server.

A look-up runs in a thread of its own, one at a time for each name, that nobody joins: the C library may take as long
as it likes, and the threads that other work needs stay free. What was found is kept. When it is old, it is used
while a new look-up is under way, and it stays in force when that fails: a name server's bad hour is not the scanners'.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

Addresses = list[tuple[int, Any]]
"""(family, socket address) in the order in which they should be tried."""
LookUp = Callable[[str, int], Addresses]

FRESH = 30.0  # seconds for which an answer is used without a new look-up
AGAIN = 5.0  # seconds between two look-ups that fail, for a name that is known


def look_up(host: str, port: int) -> Addresses:
    """getaddrinfo(3), which blocks. Raises OSError, or UnicodeError for what is no host name."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(family, where) for family, _, _, _, where in found]


class Resolver:
    """For one event loop. ``look_up`` is called in a thread."""

    def __init__(self, look_up: LookUp = look_up, clock: Callable[[], float] = time.monotonic) -> None:
        self._look_up = look_up
        self._clock = clock
        self._known: dict[tuple[str, int], Addresses] = {}
        self._old_at: dict[tuple[str, int], float] = {}
        self._asking: dict[tuple[str, int], asyncio.Future[Addresses]] = {}

    async def find(self, host: str, port: int) -> Addresses:
        """Never empty. Raises OSError or UnicodeError; a wait ends only when it is cancelled."""
        numeric = _numeric(host, port)
        if numeric:
            return numeric
        key = (host, port)
        known = self._known.get(key)
        if known is None or self._clock() >= self._old_at[key]:
            asking = self._asking.get(key) or self._ask(key)
            if known is None:
                return await asyncio.shield(asking)
        return known

    def _ask(self, key: tuple[str, int]) -> asyncio.Future[Addresses]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Addresses] = loop.create_future()
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # told, even if nobody waits
        self._asking[key] = answer

        def settle(found: Addresses, error: Exception | None) -> None:
            del self._asking[key]
            self._old_at[key] = self._clock() + (FRESH if found else AGAIN)
            if found:
                self._known[key] = found
            if not answer.done():
                if error is None:
                    answer.set_result(found)
                else:
                    answer.set_exception(error)

        def work() -> None:
            found: Addresses = []
            error: Exception | None = None
            try:
                found = self._look_up(*key)
                if not found:
                    error = OSError(f"no address for {key[0]}")
            except (OSError, UnicodeError) as e:
                error = e.with_traceback(None)
            try:
                loop.call_soon_threadsafe(settle, found, error)
            except RuntimeError:
                pass  # the loop is closed: nobody asks any more

        threading.Thread(target=work, name=f"look up {key[0]}", daemon=True).start()
        return answer


def _numeric(host: str, port: int) -> Addresses:
    """The address itself where ``host`` is one: that costs no look-up."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return [(family, (host, port))]
    return []
