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

from contentfilter.bus.messages import Heartbeat, WorkerStatus

FIRST_DELAY, LONGEST_DELAY = 0.1, 30.0  # seconds before a process that keeps dying is started again


def restart_delay(failures: int) -> float:
    """Seconds, after so many ``failures`` in a row."""
    return min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(failures, 16))


class Process:
    """A running child. ``ended`` is called once, from the event loop, after it was reaped. Raises OSError."""

    def __init__(self, argv: Sequence[str], fds: Sequence[int], ended: Callable[[], None]) -> None:
        self.started = time.monotonic()
        self.retiring = False
        self._ended = ended
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

    def __init__(
        self, slot: int, argv: Sequence[str], fds: Sequence[int], ended: Callable[["WorkerProcess"], None]
    ) -> None:
        super().__init__(argv, fds, lambda: ended(self))
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
