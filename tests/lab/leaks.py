"""The proof that a piece of work leaves nothing behind."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator


def descriptors() -> list[str]:
    """What every open descriptor of this process points to, sockets and pipes by their number."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return sorted(entry for entry in found if "/proc/" not in entry)


@contextlib.asynccontextmanager
async def nothing_leaks() -> AsyncIterator[None]:
    """Fails when the block leaves a descriptor open or a task running."""
    before, tasks = descriptors(), asyncio.all_tasks() - {asyncio.current_task()}
    yield
    assert descriptors() == before, set(descriptors()) ^ set(before)
    assert asyncio.all_tasks() - {asyncio.current_task()} == tasks
