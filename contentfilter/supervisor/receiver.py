"""Runs the receiver process while untrusted users have mail to offer (contentfilter/receiver).

It is started with the first connection that a worker hands over, and again after its end. Its socket belongs to the
supervisor, so connections that were handed over meanwhile wait there. A receiver that dies costs its connections: their
hooks offer the messages again.
"""

import asyncio
import os
import pwd
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import msgspec

from contentfilter.log import Logger, RateLimiter
from contentfilter.settings import Settings
from contentfilter.supervisor.process import HelperProcess

PROGRAM = (sys.executable, "-P", "-m", "contentfilter.receiver")
RECENT = 300.0  # seconds for which refusals are shown
REPORTS_MAX = 512  # reports that are remembered
LOG_EVERY = 10.0  # seconds
_REFUSED = msgspec.json.Decoder(dict[int, int])


@dataclass(frozen=True, slots=True)
class Inherited:
    """Descriptors that children inherit, and the first words of a worker's command line."""

    worker: Sequence[str]
    listener: socket.socket
    lifeline: int  # at its end when the supervisor is gone


class ReceiverProcess:
    """:meth:`start` once; ``worker_end`` is for the workers to inherit."""

    def __init__(self, log: Logger, settings: Callable[[], Settings], inherited: Inherited) -> None:
        self._log = log
        self._settings = settings
        self._lifeline, self._queue = inherited.lifeline, inherited.listener.getsockname()
        self._loop = asyncio.get_running_loop()
        self.worker_end, self._end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._reports, self._report_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._process = HelperProcess(self._command, self._started, self._died)
        self._buffer = b""
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=REPORTS_MAX)  # time, uid, refused connections
        self._log_limit = RateLimiter(LOG_EVERY)
        self.refused_total = 0

    def start(self) -> None:
        self._process.start(self._end.fileno())
        self._loop.add_reader(self._reports, self._read_reports)

    def refused(self) -> dict[str, int]:
        """Connections that were refused lately for exceeding the limits, by user."""
        since = time.monotonic() - RECENT
        counts: Counter[int] = Counter()
        for at, uid, count in self._recent:
            if at >= since:
                counts[uid] += count
        return {_name(uid): count for uid, count in counts.most_common(10)}

    def close(self) -> None:
        """End it; the hooks offer their messages again."""
        self._process.stop()
        self._loop.remove_reader(self._reports)
        for each in (self.worker_end, self._end):
            each.close()
        os.close(self._reports)
        os.close(self._report_end)

    @contextmanager
    def _command(self) -> Iterator[tuple[Sequence[str], Sequence[int]]]:
        fds = {"handover": self._end.fileno(), "lifeline": self._lifeline, "report": self._report_end}
        options = [f"--{name}={fd}" for name, fd in fds.items()]
        yield (*PROGRAM, "--queue", self._queue, "--spool", self._settings().service.state, *options), (*fds.values(),)

    def _started(self, pid: int) -> None:
        self._log.info("receiver.start", child=pid)

    def _died(self, why: str) -> None:
        self._log.error("receiver.died", why=why)

    def _read_reports(self) -> None:
        with suppress(BlockingIOError):
            self._buffer += os.read(self._reports, 65_536)
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            with suppress(msgspec.DecodeError, msgspec.ValidationError):
                self._note(_REFUSED.decode(line))

    def _note(self, refused: dict[int, int]) -> None:
        for uid, count in refused.items():
            self._recent.append((time.monotonic(), uid, count))
            self.refused_total += count
        if (held := self._log_limit.allow()) is not None:
            self._log.warning("intake.refused", users=self.refused(), not_logged=held)


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name if uid >= 0 else "others"
    except KeyError:
        return f"uid {uid}"
