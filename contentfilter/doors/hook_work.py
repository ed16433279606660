"""Steps of the hook's door whose work grows with the message: opening, the envelope, the answer.

Each runs on the event loop where it is small, and in a thread where it is large.
"""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

from contentfilter.doors.hook_answer import bytes_rendered, render
from contentfilter.doors.hook_socket import PreparedAnswer, prepare_answer
from contentfilter.doors.message import open_pair
from contentfilter.model import Envelope, Message
from contentfilter.verdict.disposition import Disposition
from contentfilter.wire import envelope as envelope_format

T = TypeVar("T")
INLINE = 1024 * 1024  # bytes of a message or an envelope that are opened on the event loop
INLINE_BYTES = 65_536  # bytes of an envelope that is parsed, and of an answer that is rendered


async def open_offered(fds: list[int], sizes: tuple[int, int], threads: Executor) -> tuple[Message, bytes]:
    """See :func:`open_pair`. If the waiting is cancelled, everything is closed."""
    if max(sizes) <= INLINE:
        return open_pair(fds, sizes)
    opening = threads.submit(open_pair, fds, sizes)
    try:
        return await _owned(asyncio.wrap_future(opening), _close_message)
    except asyncio.CancelledError:
        if opening.cancel():  # no thread has begun
            close_all(fds)
        raise


async def parse_envelope(block: bytes, limit: int) -> Envelope:
    """Raises EnvelopeError."""
    if len(block) <= INLINE_BYTES:
        return envelope_format.parse(block, limit)
    return await asyncio.to_thread(envelope_format.parse, block, limit)


async def answer_with(disposition: Disposition, message: Message, envelope_size: int) -> PreparedAnswer:
    """Raises ProtocolError, or OSError where there is no descriptor for a long answer."""
    prepare = partial(_prepare, disposition, message)
    if bytes_rendered(disposition, message, envelope_size) <= INLINE_BYTES:
        return prepare()
    return await _owned(asyncio.get_running_loop().run_in_executor(None, prepare), PreparedAnswer.close)


def _prepare(disposition: Disposition, message: Message) -> PreparedAnswer:
    return prepare_answer(render(disposition, message))


async def _owned(future: "asyncio.Future[T]", discard: Callable[[T], None]) -> T:
    """The result of work in a thread. If the waiting is cancelled, ``discard`` gets it when the thread has finished."""
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        future.add_done_callback(partial(_discard, discard))
        raise


def _discard(discard: Callable[[T], None], done: "asyncio.Future[T]") -> None:
    if not done.cancelled() and done.exception() is None:
        discard(done.result())


def _close_message(opened: tuple[Message, bytes]) -> None:
    opened[0].close()


def close_all(fds: list[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)
