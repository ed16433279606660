"""The pool: keeps as many workers running as there are slots, whatever becomes of them.

Dead workers are replaced at once, those that die young with a growing delay, silent ones after a
SIGKILL. On a rolling restart a slot's new worker is ready before its old one is asked to go. The pool never
gives up and never spins. It knows nothing of configuration or sockets: ``spawn`` starts a worker.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from contentfilter.bus.messages import Heartbeat
from contentfilter.deadline import Deadline
from contentfilter.log import Logger
from contentfilter.supervisor.process import Process

SETTLED = 10.0  # seconds after which a death no longer counts as trouble at the start
FIRST_DELAY, LONGEST_DELAY = 0.1, 30.0
DEATHS = ("exit", "signal", "stuck", "start")  # ended by itself, by a signal, killed by us; could not be started
START_ALLOWANCE = 60.0  # seconds that a worker may take to its first heartbeat, if stuck_after is shorter

Spawn = Callable[[int, Callable[[Process], None]], Process]
"""(slot, what to call at its end) -> the started process. May raise OSError."""


@dataclass(slots=True)
class Slot:
    """A place in the pool."""

    index: int
    current: Process | None = None
    successor: Process | None = None  # takes over as soon as it is ready
    failures: int = 0  # deaths in a row at the start
    again: asyncio.TimerHandle | None = None


class WorkerPool:
    """All worker processes, those that are on their way out included."""

    def __init__(self, spawn: Spawn, log: Logger, changed: Callable[[], None]) -> None:
        self._spawn = spawn
        self._log = log
        self._changed = changed  # called whenever a worker got ready or ended
        self._loop = asyncio.get_running_loop()
        self._slots: list[Slot] = []
        self._processes: dict[int, Process] = {}
        self._draining = False
        self._checked = time.monotonic()
        self._empty = asyncio.Event()
        self.deaths = dict.fromkeys(DEATHS, 0)  # workers that ended unasked, or could not be started

    @property
    def restarts(self) -> int:
        return sum(self.deaths.values())

    @property
    def processes(self) -> list[Process]:
        return list(self._processes.values())

    def full(self) -> bool:
        """True when every slot has a worker that accepts messages."""
        return all(slot.current is not None and slot.current.ready for slot in self._slots)

    def alive(self, stuck_after: float) -> bool:
        """True when at least one worker accepts messages and was heard of lately."""
        return any(p.ready and not p.retiring and p.silent() < stuck_after for p in self.processes)

    def resize(self, count: int) -> None:
        """Start or retire workers until there are ``count`` slots."""
        while len(self._slots) < count:
            slot = Slot(len(self._slots))
            self._slots.append(slot)
            self._start(slot)
        for slot in self._slots[count:]:
            if slot.again is not None:
                slot.again.cancel()
            for process in (slot.current, slot.successor):
                if process is not None:
                    process.retire()
        del self._slots[count:]

    def replace_all(self) -> None:
        """A new worker for every slot; the old one goes when the new one is ready."""
        for slot in self._slots:
            if slot.current is not None and slot.successor is None:
                slot.successor = self._started(slot)

    def heard(self, beat: Heartbeat) -> Process | None:
        """Note a heartbeat; returns whose it is, if one of ours."""
        process = self._processes.get(beat.pid)
        if process is None:
            return None
        first = not process.ready
        process.heartbeat(beat)
        if first:
            self._log.info("worker.ready", slot=process.slot, child=process.pid, seconds=round(process.age(), 3))
            slot = self._slot_of(process)
            if slot is not None and slot.successor is process:
                slot.successor, old, slot.current = None, slot.current, process
                if old is not None:
                    old.retire()
            self._changed()
        return process

    def check(self, stuck_after: float) -> None:
        """Kill who is silent for too long. Call about once per heartbeat."""
        now = time.monotonic()
        late, self._checked = now - self._checked, now
        for process in self.processes:
            if late > stuck_after / 2:  # it is us who slept: their heartbeats may still lie unread
                process.seen = now
                continue
            limit = stuck_after if process.ready else max(stuck_after, START_ALLOWANCE)
            if process.silent() > limit and not process.stuck:
                process.stuck = True
                self._log.error("worker.stuck", slot=process.slot, child=process.pid, silent=round(process.silent(), 1))
                process.kill()

    async def drain(self, deadline: Deadline) -> None:
        """Let all workers finish; those still there at the end are killed."""
        self._draining = True
        for slot in self._slots:
            if slot.again is not None:
                slot.again.cancel()
        for process in self.processes:
            process.retire()
        await self._gone(deadline)
        self.kill()
        await self._gone(Deadline.after(5.0))

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    async def _gone(self, deadline: Deadline) -> None:
        try:
            async with deadline.timeout():
                while self._processes:
                    self._empty.clear()
                    await self._empty.wait()
        except TimeoutError:
            pass

    def _slot_of(self, process: Process) -> Slot | None:
        return next((s for s in self._slots if process in (s.current, s.successor)), None)

    def _start(self, slot: Slot) -> None:
        slot.again = None
        slot.current = self._started(slot)
        if slot.current is None:
            self._later(slot)

    def _started(self, slot: Slot) -> Process | None:
        try:
            process = self._spawn(slot.index, self._ended)
        except OSError as error:
            self.deaths["start"] += 1
            self._log.error("worker.died", slot=slot.index, why=f"cannot start: {error.strerror}")
            return None
        self._processes[process.pid] = process
        self._log.info("worker.start", slot=slot.index, child=process.pid)
        return process

    def _later(self, slot: Slot) -> None:
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(slot.failures, 16))
        slot.failures += 1
        slot.again = self._loop.call_later(delay, self._start, slot)

    def _ended(self, process: Process) -> None:
        del self._processes[process.pid]
        if not self._processes:
            self._empty.set()
        if not process.expected:
            self.deaths["stuck" if process.stuck else "signal" if (process.status or 0) < 0 else "exit"] += 1
            self._log.error(
                "worker.died", slot=process.slot, child=process.pid, status=process.status, age=round(process.age(), 1)
            )
        slot = self._slot_of(process)
        if slot is not None and not self._draining:
            self._refill(slot, process)
        self._changed()

    def _refill(self, slot: Slot, process: Process) -> None:
        if slot.successor is process:  # the old one goes on
            slot.successor = None
        elif slot.successor is not None:
            slot.current, slot.successor = slot.successor, None
        elif process.ready and (process.stuck or process.age() > SETTLED or slot.failures == 0):
            slot.failures = 0 if process.age() > SETTLED else 1
            self._start(slot)
        else:
            slot.current = None
            self._later(slot)
