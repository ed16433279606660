"""A listener in the test's event loop, around a handler that the test provides."""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from contentfilter.deadline import Deadline
from contentfilter.doors.admission import AcceptedMessage, IntakeLimits, PendingMessage
from contentfilter.doors.listener import Listener
from contentfilter.doors.listening_socket import open_socket
from contentfilter.doors.origin import resolve
from contentfilter.log import make_logger
from contentfilter.model import RECIPIENTS_MAX, Action, Envelope, OriginKind
from contentfilter.settings import OriginSettings
from contentfilter.verdict.disposition import AddHeader, Delivery, Disposition
from contentfilter.wire import hook
from contentfilter.wire.envelope import parse

Handle = Callable[[AcceptedMessage], Awaitable[hook.Answer]]
QUEUE = hook.Answer(Action.QUEUE, submissions=(hook.Submission(),))


class Bench:
    """The listener, its path, its log and its handler."""

    def __init__(self, listener: Listener, path: str, log: Path, handler: "Function") -> None:
        self.listener = listener
        self.handler = handler
        self.path = path
        self._log = log

    def log(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [line for line in lines if line["event"] == event]

    async def idle(self) -> None:
        assert await self.listener.drained(Deadline.after(10))


class Function:
    """A handler around a function that returns the answer which the hook shall get."""

    def __init__(self, handle: Handle, limit: int) -> None:
        self._handle, self._limit = handle, limit
        self.rejected: list[tuple[PendingMessage, Envelope, str, float]] = []

    def hold(self) -> AbstractContextManager[None]:
        return nullcontext()

    def recipient_limit(self, kind: OriginKind) -> int:
        return self._limit

    async def handle(self, accepted: AcceptedMessage) -> Disposition:
        answer = await self._handle(accepted)
        deliveries = tuple(
            Delivery(None if each.envelope is None else parse(each.envelope), (AddHeader(each.prepend),))
            for each in answer.submissions
        )
        return Disposition(answer.action, answer.reason, answer.text, deliveries)

    def rejected_busy(self, pending: PendingMessage, envelope: Envelope, why: str, text: str, seconds: float) -> None:
        self.rejected.append((pending, envelope, why, seconds))


@pytest.fixture
def listening(tmp_path: Path) -> Callable[..., Any]:
    """``async with listening(handle, budget=…) as bench``. No descriptor may leak."""

    @asynccontextmanager
    async def run(
        handle: Handle, *, budget: float = 30.0, max_in_flight: int = 64, limit: int = RECIPIENTS_MAX, **more: Any
    ) -> AsyncIterator[Bench]:
        await asyncio.to_thread(os.getpid)  # the executor's own descriptors, if any, come before the count
        before = set(os.listdir("/proc/self/fd"))
        path, log_path = str(tmp_path / "q"), tmp_path / "log"
        log_fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        rules, _ = resolve(OriginSettings(smtp_users=(str(os.getuid()),), bounce_users=()))
        handler = Function(handle, limit)
        limits = IntakeLimits(handler, rules, budget, max_in_flight, **more)
        own = open_socket(path, 0o600, 64)
        listener = Listener(
            socket.socket(fileno=os.dup(own.socket.fileno())), limits, make_logger("json", "debug", log_fd)
        )
        listener.start()
        try:
            yield Bench(listener, path, log_path, handler)
            await listener.drained(Deadline.after(10))
        finally:
            listener.stop()
            await listener.abort("test", Deadline.after(5))
            own.close()
            os.close(log_fd)
        async with asyncio.timeout(10):  # a call in a thread closes what it has opened when it ends
            while set(os.listdir("/proc/self/fd")) - before:
                await asyncio.sleep(0.01)

    return run
