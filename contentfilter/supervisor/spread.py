"""A frame on its way to every worker: sent, and sent again until each one's heartbeat says that it has it.

Commands are lossy, and a worker may not be listening yet; so what counts is only what the workers themselves report.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import zmq

from contentfilter.bus import messages
from contentfilter.deadline import Deadline
from contentfilter.supervisor.process import Process

REPEAT = 2.0  # seconds before a frame is sent again to a worker that lacks it


class Spread:
    """The newest frame of one kind. It may be another one at any time; it is asked for when it is sent."""

    def __init__(
        self,
        send: Callable[[], Awaitable[None]],
        has: Callable[[messages.Heartbeat], bool],
        processes: Callable[[], Sequence[Process]],
        moved: asyncio.Event,
    ) -> None:
        """``send``: sends the newest to all workers, or raises zmq.Again. ``has``: whether a worker has that one.

        ``moved``: set when a worker has changed.
        """
        self._send = send
        self._has = has
        self._processes = processes
        self._moved = moved
        self._last_sent = 0.0

    async def send(self) -> None:
        self._last_sent = time.monotonic()
        try:
            await self._send()
        except zmq.Again:
            pass  # their heartbeats will ask for it again

    async def heard(self, process: Process) -> None:
        """A worker gave a sign of life; if it lacks the newest it gets that again."""
        if self._lacks(process) and time.monotonic() > self._last_sent + REPEAT:
            await self.send()

    async def followed(self, deadline: Deadline) -> list[Process]:
        """Wait until all workers have the newest; returns those that are late."""
        while lacking := [process for process in self._processes() if self._lacks(process)]:
            self._moved.clear()
            try:
                async with deadline.timeout():
                    await self._moved.wait()
            except TimeoutError:
                return lacking
        return []

    def _lacks(self, process: Process) -> bool:
        return not process.retiring and (process.beat is None or not self._has(process.beat))
