"""The running worker processes: commands to all of them, and waiting for what they report.

A worker that has just started gets the newest command of each kind with its first heartbeat; what it has already, it
ignores. So commands arrive in order and none is missing, and a heartbeat tells which ones a worker has taken.
"""

import asyncio
from collections.abc import Callable

from contentfilter.bus.messages import BackendNews, CacheUpdate, Configure, Heartbeat, Overrides, WorkerCommand
from contentfilter.bus.sockets import SupervisorBus
from contentfilter.deadline import Deadline
from contentfilter.supervisor.process import WorkerProcess


class Workers:
    """All worker processes by pid, those that are retiring included."""

    def __init__(self, bus: SupervisorBus) -> None:
        self._bus = bus
        self._processes: dict[int, WorkerProcess] = {}
        self._newest: dict[type, WorkerCommand] = {}
        self._changed = asyncio.Event()

    @property
    def processes(self) -> list[WorkerProcess]:
        return list(self._processes.values())

    def get(self, pid: int) -> WorkerProcess | None:
        return self._processes.get(pid)

    def add(self, process: WorkerProcess) -> None:
        self._processes[process.pid] = process

    def remove(self, process: WorkerProcess) -> None:
        del self._processes[process.pid]
        self._changed.set()

    def heard(self, process: WorkerProcess, beat: Heartbeat) -> bool:
        """Note a heartbeat. True for the first one."""
        first = not process.ready
        process.heartbeat(beat)
        if first:
            for command in self._newest.values():
                self._bus.command(command, (process.pid,))
        self._changed.set()
        return first

    def send(self, command: Configure | Overrides | BackendNews) -> None:
        """To all workers that run, and to those that start later."""
        self._newest[type(command)] = command
        self._bus.command(command, self._ready())

    def share(self, update: CacheUpdate) -> None:
        """To all workers that run."""
        self._bus.command(update, self._ready())

    def _ready(self) -> list[int]:
        return [process.pid for process in self.processes if process.ready]

    async def followed(self, taken: Callable[[Heartbeat], bool], deadline: Deadline) -> list[WorkerProcess]:
        """Wait until each worker's heartbeat shows that it has ``taken`` a command; returns those that are late."""
        await self.wait_until(lambda: not self._late(taken), deadline)
        return self._late(taken)

    def _late(self, taken: Callable[[Heartbeat], bool]) -> list[WorkerProcess]:
        return [p for p in self.processes if not p.retiring and (p.beat is None or not taken(p.beat))]

    async def wait_until(self, condition: Callable[[], bool], deadline: Deadline) -> bool:
        """Wait until ``condition`` holds, which is looked at whenever a worker changes. False at the deadline."""
        try:
            async with deadline.timeout():
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return condition()
        return True
