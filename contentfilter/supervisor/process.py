"""Child processes of the supervisor: started by exec, watched by a pidfd.

A fresh interpreter instead of a fork, so no threads, sockets or ZeroMQ contexts are inherited; only
the descriptors named here get through. The process group is its own: Ctrl-C in a terminal reaches the
supervisor alone, which then drains the workers in order.
"""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Self

from contentfilter.bus.messages import Heartbeat, WorkerStatus

FIRST_DELAY, LONGEST_DELAY = 0.1, 30.0  # seconds before a process that keeps dying is started again
SETTLED = 10.0  # seconds after which a death no longer counts as a failed start


def restart_delay(failures: int) -> float:
    """Seconds, by the number of ``failures`` in a row."""
    return min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(failures, 16))


class Process:
    """A running child. ``ended`` is called once, from the event loop, after it was reaped. Raises OSError."""

    def __init__(self, argv: Sequence[str], fds: Sequence[int], ended: Callable[[Self], None]) -> None:
        self.started = time.monotonic()
        self.retiring = False
        self._ended = partial(ended, self)
        self._popen = subprocess.Popen(argv, stdin=subprocess.DEVNULL, pass_fds=tuple(fds), process_group=0)
        self.pid = self._popen.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._reap)

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._popen.wait()
        self._ended()

    @property
    def status(self) -> int | None:
        """Exit status after its end; negative: the signal that ended it."""
        return self._popen.returncode

    @property
    def expected(self) -> bool:
        """It ended on request, or by the signal of the request before it was up."""
        return self.retiring and self.status in (0, -signal.SIGTERM)

    def age(self) -> float:
        return time.monotonic() - self.started

    def retire(self) -> None:
        """Ask it to finish its work and end."""
        self.retiring = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._pidfd >= 0:
            signal.pidfd_send_signal(self._pidfd, number)


class WorkerProcess(Process):
    """A worker as the supervisor sees it."""

    def __init__(self, slot: int, argv: Sequence[str], fds: Sequence[int], ended: Callable[[Self], None]) -> None:
        super().__init__(argv, fds, ended)
        self.slot = slot
        self.seen = self.started  # of the last heartbeat
        self.ready = False
        self.stuck = False
        self.beat: Heartbeat | None = None

    def heartbeat(self, beat: Heartbeat) -> None:
        self.seen = time.monotonic()
        self.beat = beat
        self.ready = True

    def silent(self) -> float:
        """Seconds since its last heartbeat."""
        return time.monotonic() - self.seen

    def describe(self) -> WorkerStatus:
        beat = self.beat
        return WorkerStatus(
            slot=self.slot,
            pid=self.pid,
            state="retiring" if self.retiring else "ready" if self.ready else "starting",
            generation=beat.generation if beat else 0,
            age=round(self.age(), 3),
            silent=round(self.silent(), 3),
            lag=round(beat.lag, 6) if beat else 0.0,
            open=beat.open if beat else 0,
            in_flight=beat.in_flight if beat else (),
            counters=beat.counters if beat else {},
            bytes=beat.bytes if beat else 0,
            backends=beat.backends if beat else (),
            waiting=beat.waiting if beat else 0,
            short=beat.short if beat else "",
        )


Command = Callable[[], AbstractContextManager[tuple[Sequence[str], Sequence[int]]]]
"""Opens what one start needs: the command line, and the descriptors to inherit."""


class HelperProcess:
    """A process beside the workers, started immediately or on demand, and again after its end with a growing delay."""

    def __init__(self, command: Command, started: Callable[[int], None], died: Callable[[str], None]) -> None:
        """``started``: called with the pid. ``died``: called with the reason of an end or of a failed start."""
        self._command = command
        self._started = started
        self._died = died
        self._loop = asyncio.get_running_loop()
        self._demand: int | None = None
        self._waiting: asyncio.TimerHandle | None = None
        self._process: Process | None = None
        self._failures = 0

    @property
    def pid(self) -> int | None:
        """None while it does not run."""
        return None if self._process is None else self._process.pid

    def start(self, demand: int | None = None) -> None:
        """Start it: now, or when the descriptor ``demand`` is readable. Once, or again after :meth:`stop`."""
        self._demand = demand
        self._failures = 0
        self._await_demand()

    def stop(self) -> None:
        """End it, or the wait for its start."""
        if self._demand is not None:
            self._loop.remove_reader(self._demand)
        if self._waiting is not None:
            self._waiting.cancel()
        process, self._process = self._process, None
        if process is not None:
            process.kill()  # it has nothing to finish
        self._demand = self._waiting = None

    def _await_demand(self) -> None:
        self._waiting = None
        if self._demand is None:
            self._spawn()
        else:
            self._loop.add_reader(self._demand, self._spawn)

    def _spawn(self) -> None:
        if self._demand is not None:
            self._loop.remove_reader(self._demand)
        try:
            with self._command() as (argv, fds):
                self._process = Process(argv, fds, self._ended)
        except OSError as error:
            self._failed(f"cannot start: {error.strerror}", settled=False)
        else:
            self._started(self._process.pid)

    def _ended(self, process: Process) -> None:
        if process is self._process:  # otherwise it was stopped
            self._process = None
            self._failed(f"status {process.status}", settled=process.age() > SETTLED)

    def _failed(self, why: str, *, settled: bool) -> None:
        self._failures = 1 if settled else self._failures + 1
        self._died(why)
        self._waiting = self._loop.call_later(restart_delay(self._failures), self._await_demand)
