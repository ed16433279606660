"""Active health checks: sends PING where there is doubt about a backend, so that mail need not find out.

At most one PING at a time for each backend. A backend that leaves it unanswered gets no more mail while another one
will do, and later the requests that it holds are sent elsewhere.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable

from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError
from contentfilter.scanners.health import Backend, due
from contentfilter.scanners.limiter import ScannerLimiter

Ping = Callable[[Address, Deadline], Awaitable[object]]
"""Returns when the backend has answered. Raises BackendError."""


async def watch(limiter: ScannerLimiter, ping: Ping) -> None:
    """Until it is cancelled: check every backend of ``limiter``."""
    for backend in limiter.backends:
        backend.watched = True
    async with asyncio.TaskGroup() as group:
        for backend in limiter.backends:
            group.create_task(_watch(limiter, backend, ping))


async def _watch(limiter: ScannerLimiter, backend: Backend, ping: Ping) -> None:
    while True:
        await asyncio.sleep(limiter.patience.look)
        if due(backend, limiter.clock(), limiter.patience):
            await check(limiter, backend, ping)


async def check(limiter: ScannerLimiter, backend: Backend, ping: Ping) -> None:
    """One PING, and what follows from its answer or from none."""
    loop, began, patience = asyncio.get_running_loop(), limiter.clock(), limiter.patience
    alarms = (
        loop.call_later(patience.short, _set_aside, limiter, backend, began),
        loop.call_later(patience.move, limiter.move, backend, began),
    )
    try:
        await ping(backend.address, Deadline.after(patience.long))
    except BackendError as error:
        if backend.heard <= began:  # else mail was answered meanwhile
            limiter.failed(backend, error, began, math.inf)
            limiter.hand_out()  # whoever waits for it may have to hear that there is no backend
    else:
        backend.health = backend.health.answered_ping()
        limiter.heard(backend)
        limiter.hand_out()
    finally:
        for alarm in alarms:
            alarm.cancel()


def _set_aside(limiter: ScannerLimiter, backend: Backend, began: float) -> None:
    if backend.heard <= began and not backend.silent:
        backend.silent_since = began
        limiter.hand_out()
