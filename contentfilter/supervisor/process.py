"""One worker process as the supervisor sees it: started by exec, watched by a pidfd.

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

from contentfilter.bus.messages import Heartbeat, InFlight, WorkerStatus


class Process:
    """A running worker. ``ended`` is called once, from the event loop, after it was reaped."""

    def __init__(self, slot: int, words: Sequence[str], fds: Sequence[int], ended: Callable[["Process"], None]) -> None:
        self.slot = slot
        self.started = time.monotonic()
        self.seen = self.started  # of the last heartbeat
        self.ready = False
        self.retiring = False
        self.stuck = False
        self.beat: Heartbeat | None = None
        self._ended = ended
        self._popen = subprocess.Popen(words, stdin=subprocess.DEVNULL, pass_fds=tuple(fds), process_group=0)
        self.pid = self._popen.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._reap)

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._popen.wait()
        self._ended(self)

    @property
    def status(self) -> int | None:
        """Exit status once it ended; negative: the signal that ended it."""
        return self._popen.returncode

    @property
    def expected(self) -> bool:
        """It ended as it was asked to, or by the signal that asked it before it was up."""
        return self.retiring and self.status in (0, -signal.SIGTERM)

    def heartbeat(self, beat: Heartbeat) -> None:
        self.seen = time.monotonic()
        self.beat = beat
        self.ready = True

    def silent(self) -> float:
        """Seconds since it was last heard of."""
        return time.monotonic() - self.seen

    def age(self) -> float:
        return time.monotonic() - self.started

    def retire(self) -> None:
        """Ask it to finish its messages and end."""
        self.retiring = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._pidfd >= 0:
            signal.pidfd_send_signal(self._pidfd, number)

    def describe(self) -> WorkerStatus:
        beat = self.beat
        in_flight: tuple[InFlight, ...] = beat.in_flight if beat else ()
        return WorkerStatus(
            slot=self.slot,
            pid=self.pid,
            state="retiring" if self.retiring else "ready" if self.ready else "starting",
            generation=beat.generation if beat else 0,
            age=round(self.age(), 3),
            silent=round(self.silent(), 3),
            lag=round(beat.lag, 6) if beat else 0.0,
            open=beat.open if beat else 0,
            in_flight=in_flight,
            counters=beat.counters if beat else {},
            bytes=beat.bytes if beat else 0,
            backends=beat.backends if beat else (),
            waiting=beat.waiting if beat else 0,
            short=beat.short if beat else "",
        )
