"""Very many simultaneous hooks. Each message has a number, and outcomes are counted by number."""

import contextlib
import fcntl
import os
import re
import select
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lab.standin import Standin
from lab.system import SMTP, System

from contentfilter.wire import envelope

TEXT_FD = 6
PIPE_SIZE = 1 << 20
_TOKEN = re.compile(rb"^X-Number: (\d+)$", re.MULTILINE)

Environ = Callable[[int], Mapping[str, str]]
Body = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a whole crowd."""

    statuses: dict[int, int]  # number of the message -> exit status of its hook
    queued: Counter[int]  # number -> how often the stand-in got it
    texts: tuple[str, ...]  # what clients would have read
    seconds: float

    @property
    def accepted(self) -> set[int]:
        return {number for number, status in self.statuses.items() if status == 0}

    @property
    def lost(self) -> set[int]:
        return {number for number in self.accepted if not self.queued[number]}

    @property
    def doubled(self) -> set[int]:
        """Twice, or queued although the client was asked to retry."""
        return {n for n, count in self.queued.items() if count > 1 or self.statuses[n] != 0}


class Crowd:
    """``start`` as many hooks as fast as they can be started, then ``wait``."""

    def __init__(self, system: System, name: str, **conf: object) -> None:
        self._system = system
        self._standin = Standin(system.queue_program, system.directory / "queued" / name)
        self._environ = {"CONTENTFILTER_QUEUE_CONF": str(system.queue_conf(**conf)), **SMTP, **self._standin.environ()}
        self._text_out, self._text_in = os.pipe()
        fcntl.fcntl(self._text_in, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        self._running: dict[int, int] = {}  # pid -> number
        self._began = time.monotonic()

    def start(self, numbers: range, body: Body, environ: Environ, recipient: bytes) -> None:
        """A message has to fit into a pipe: below 1 MB."""
        block = envelope.build(b"sender@example.net", (recipient,))
        for number in numbers:
            message = b"Subject: one of many\nX-Number: %d\n\n%b" % (number, body(number))
            (m_out, m_in), (e_out, e_in) = os.pipe(), os.pipe()
            if len(message) > 65_536:
                fcntl.fcntl(m_in, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
            for fd, data in ((m_in, message), (e_in, block)):
                assert os.write(fd, data) == len(data)
                os.close(fd)
            actions = [(os.POSIX_SPAWN_DUP2, fd, to) for fd, to in ((m_out, 0), (e_out, 1), (self._text_in, TEXT_FD))]
            program = str(self._system.program)
            pid = os.posix_spawn(program, [program], {**self._environ, **environ(number)}, file_actions=actions)
            self._running[pid] = number
            os.close(m_out)
            os.close(e_out)

    def wait(self, seconds: float) -> Outcome:
        """Until all have ended. Raises TimeoutError; what still runs then is ended."""
        statuses: dict[int, int] = {}
        end = time.monotonic() + seconds
        texts = b""
        os.set_blocking(self._text_out, False)
        try:
            for pid, number in self._running.items():
                if not _ended(pid, end):
                    raise TimeoutError(f"{len(self._running) - len(statuses)} hooks still run")
                statuses[number] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(BlockingIOError):
                    texts += os.read(self._text_out, PIPE_SIZE)
        finally:
            for pid, number in self._running.items():
                if number not in statuses:
                    os.kill(pid, 9)
                    os.waitpid(pid, 0)
            os.close(self._text_in)
            os.close(self._text_out)
        spent = time.monotonic() - self._began
        return Outcome(
            statuses, self._queued(), tuple(filter(None, re.split(r"(?<=\))(?=[DZ])", texts.decode()))), spent
        )

    def _queued(self) -> Counter[int]:
        found: Counter[int] = Counter()
        for path in self._standin.directory.glob("*.msg"):
            token = _TOKEN.search(path.read_bytes()[:65_536])
            assert token is not None, path
            found[int(token[1])] += 1
        return found


def _ended(pid: int, end: float) -> bool:
    """Wait until the process has ended, but not beyond ``end``."""
    fd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(max(0.0, end - time.monotonic()) * 1000))
    finally:
        os.close(fd)


def most_memory(pid: int) -> int:
    """The largest resident set that a process ever had (proc(5), VmHWM), in bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
