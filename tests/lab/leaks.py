"""The proof that a piece of work leaves nothing behind."""

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import AsyncIterator

SETTLE = 2.0  # seconds


def descriptors() -> list[str]:
    """Targets of all open descriptors of this process, sockets and pipes by their number."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return sorted(entry for entry in found if "/proc/" not in entry)


@contextlib.asynccontextmanager
async def nothing_leaks() -> AsyncIterator[None]:
    """Fails when the block leaves a descriptor open or a task running.

    What an earlier test left to the garbage collector is not this block's, and a thread that ends may take a moment.
    """
    gc.collect()
    before, tasks = set(descriptors()), asyncio.all_tasks() - {asyncio.current_task()}
    yield
    end = time.monotonic() + SETTLE
    while (left := set(descriptors()) - before) and time.monotonic() < end:
        gc.collect()
        await asyncio.sleep(0.01)
    assert left == set()
    assert asyncio.all_tasks() - {asyncio.current_task()} == tasks
