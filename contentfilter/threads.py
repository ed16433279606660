"""Blocking work off the event loop, in threads that nobody joins."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

T = TypeVar("T")


async def in_thread(act: Callable[[], T]) -> T:
    """What ``act`` returns or raises, from a thread that nobody waits for at the end of the process."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(settled: Callable[[], None]) -> None:
        if not done.done():  # else cancelled: the service ends
            settled()

    def work() -> None:
        try:
            settled = partial(done.set_result, act())
        except Exception as error:
            settled = partial(done.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, settled)

    threading.Thread(target=work, name="housekeeping", daemon=True).start()
    return await done
