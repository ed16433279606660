"""Signature scan of a message, where it holds up nobody: on the event loop for milliseconds, else in a thread."""

import asyncio
from contextlib import suppress

from contentfilter.deadline import Deadline
from contentfilter.model import Message
from contentfilter.scanners.signatures.engine import Detection, Engine
from contentfilter.scanners.signatures.work import OutOfWorkError


async def scan_programs(engine: Engine, message: Message, thread_above: int, deadline: Deadline) -> Detection | None:
    """Return the first detection, or None. Messages above ``thread_above`` bytes are scanned in a thread.

    Raises BackendError (LIMITS), or TimeoutError at the deadline; the thread then ends by its own limit of work.
    """
    if message.size <= thread_above:
        with suppress(OutOfWorkError):
            return engine.scan(message.data, inline=True)
    async with deadline.timeout():
        return await asyncio.to_thread(engine.scan, message.data)
