"""Worker pool: keeps a worker running in each slot.

Dead workers are replaced immediately, those that die young with a growing delay, silent ones after a SIGKILL. On a
rolling restart a slot's new worker is ready before its old one is asked to end; one that cannot start is tried again.
The pool never gives up and never spins. It knows nothing of configuration or sockets: ``spawn`` starts a worker.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from contentfilter.bus.messages import Heartbeat
from contentfilter.deadline import Deadline
from contentfilter.log import Logger
from contentfilter.supervisor.process import SETTLED, WorkerProcess, restart_delay
from contentfilter.supervisor.workers import Workers

DEATHS = ("exit", "signal", "stuck", "start")  # exited, ended by a signal, killed by us; could not be started
START_ALLOWANCE = 60.0  # seconds that a worker may take to its first heartbeat, if stuck_after is shorter
KILL_WAIT = 5.0  # seconds for killed workers to be gone

Spawn = Callable[[int, Callable[[WorkerProcess], None]], WorkerProcess]
"""(slot, what to call at its end) -> the started process. May raise OSError."""


@dataclass(slots=True)
class Slot:
    """A place in the pool."""

    index: int
    current: WorkerProcess | None = None
    replace: bool = False  # current is to be replaced: successor takes over as soon as it is ready
    successor: WorkerProcess | None = None
    failures: int = 0  # deaths in a row soon after the start
    retry: asyncio.TimerHandle | None = None

    def cancel_retry(self) -> None:
        if self.retry is not None:
            self.retry.cancel()
            self.retry = None


class WorkerPool:
    """The slots, and the workers in them."""

    def __init__(self, spawn: Spawn, log: Logger, workers: Workers) -> None:
        self._spawn = spawn
        self._log = log
        self._workers = workers
        self._loop = asyncio.get_running_loop()
        self._slots: list[Slot] = []
        self._draining = False
        self._checked = time.monotonic()
        self.deaths = dict.fromkeys(DEATHS, 0)  # unexpected ends of workers, and failed starts

    @property
    def restarts(self) -> int:
        return sum(self.deaths.values())

    def full(self) -> bool:
        """True when every slot has a worker that accepts messages."""
        return all(slot.current is not None and slot.current.ready for slot in self._slots)

    def alive(self, stuck_after: float) -> bool:
        """True when at least one worker accepts messages and sent a heartbeat lately."""
        return any(p.ready and not p.retiring and p.silent() < stuck_after for p in self._workers.processes)

    def resize(self, count: int) -> None:
        """Start or retire workers until there are ``count`` slots."""
        while len(self._slots) < count:
            slot = Slot(len(self._slots))
            self._slots.append(slot)
            self._fill(slot)
        for slot in self._slots[count:]:
            slot.cancel_retry()
            for process in (slot.current, slot.successor):
                if process is not None:
                    process.retire()
        del self._slots[count:]

    def replace_all(self) -> None:
        """A new worker for every slot; the old one is retired when the new one is ready."""
        for slot in self._slots:
            if slot.current is not None and not slot.replace:
                slot.replace = True
                self._fill(slot)

    def unreplaced(self) -> list[int]:
        """The slots that still have the worker from before :meth:`replace_all`."""
        return [slot.index for slot in self._slots if slot.replace]

    def heard(self, beat: Heartbeat) -> None:
        """Note a heartbeat. One of a process that is not ours is ignored."""
        process = self._workers.get(beat.pid)
        if process is not None and self._workers.heard(process, beat):
            self._log.info("worker.ready", slot=process.slot, child=process.pid, seconds=round(process.age(), 3))
            slot = self._slot_of(process)
            if slot is not None and slot.successor is process:
                old = slot.current
                self._promote(slot)
                if old is not None:
                    old.retire()

    def check(self, stuck_after: float) -> None:
        """Kill workers that are silent for too long. Call about once per heartbeat."""
        now = time.monotonic()
        late, self._checked = now - self._checked, now
        for process in self._workers.processes:
            if late > stuck_after / 2:  # this process was stopped: their heartbeats may still be unread
                process.seen = now
                continue
            limit = stuck_after if process.ready else max(stuck_after, START_ALLOWANCE)
            if process.silent() > limit and not process.stuck:
                process.stuck = True
                self._log.error("worker.stuck", slot=process.slot, child=process.pid, silent=round(process.silent(), 1))
                process.kill()

    async def drain(self, deadline: Deadline) -> None:
        """Let all workers finish; those that are still there at the end are killed."""
        self._draining = True
        for slot in self._slots:
            slot.cancel_retry()
        for process in self._workers.processes:
            process.retire()
        await self._workers.wait_until(self._empty, deadline)
        self.kill()
        await self._workers.wait_until(self._empty, Deadline.after(KILL_WAIT))

    def kill(self) -> None:
        for process in self._workers.processes:
            process.kill()

    def _empty(self) -> bool:
        return not self._workers.processes

    def _slot_of(self, process: WorkerProcess) -> Slot | None:
        return next((s for s in self._slots if process in (s.current, s.successor)), None)

    def _promote(self, slot: Slot) -> None:
        slot.current, slot.successor, slot.replace = slot.successor, None, False

    def _fill(self, slot: Slot) -> None:
        """Start the worker that the slot lacks; later, if that fails."""
        slot.cancel_retry()
        process = self._started(slot)
        if process is None:
            self._fill_later(slot)
        elif slot.replace:
            slot.successor = process
        else:
            slot.current = process

    def _fill_later(self, slot: Slot) -> None:
        slot.cancel_retry()
        slot.retry = self._loop.call_later(restart_delay(slot.failures), self._fill, slot)
        slot.failures += 1

    def _started(self, slot: Slot) -> WorkerProcess | None:
        try:
            process = self._spawn(slot.index, self._ended)
        except OSError as error:
            self.deaths["start"] += 1
            self._log.error("worker.died", slot=slot.index, why=f"cannot start: {error.strerror}")
            return None
        self._workers.add(process)
        self._log.info("worker.start", slot=slot.index, child=process.pid)
        return process

    def _ended(self, process: WorkerProcess) -> None:
        self._workers.remove(process)
        if not process.expected:
            self.deaths["stuck" if process.stuck else "signal" if (process.status or 0) < 0 else "exit"] += 1
            self._log.error(
                "worker.died", slot=process.slot, child=process.pid, status=process.status, age=round(process.age(), 1)
            )
        slot = self._slot_of(process)
        if slot is not None and not self._draining:
            self._refill(slot, process)

    def _refill(self, slot: Slot, process: WorkerProcess) -> None:
        if slot.successor is process:  # the old one goes on meanwhile
            slot.successor = None
            self._fill_later(slot)
        elif slot.successor is not None:
            self._promote(slot)
        else:
            slot.current, slot.replace = None, False
            if process.ready and (process.stuck or process.age() > SETTLED or slot.failures == 0):
                slot.failures = 0 if process.age() > SETTLED else 1
                self._fill(slot)
            else:
                self._fill_later(slot)
