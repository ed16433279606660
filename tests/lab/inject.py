"""The hook under inject.c: one system call of it fails, comes short, or is its last, and what became of its mail."""

import errno
import itertools
import os
import select
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab import hook as hook_lab
from lab.compiler import compiled
from lab.hook import FakeDaemon, HookProcess, HookResult, Offer, Reply
from lab.standin import Queued, Standin

from contentfilter.wire.hook import CommitReport

SOURCE = Path(__file__).with_name("inject.c")
ERRORS = {name: getattr(errno, name) for name in ("ENOSPC", "EMFILE", "ENOMEM", "EIO", "EINTR")}
MOVES = ("read", "write", "pread64", "sendfile", "splice")  # what can come short


def build(directory: Path) -> Path:
    """Compile inject.c into ``directory`` if it is missing there."""
    return compiled(directory, "inject", ["cc", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", SOURCE])


@dataclass(frozen=True, slots=True)
class Fault:
    """One injected fault. ``how``: a name of ERRORS, ``short`` or ``kill``."""

    number: int
    how: str
    who: str
    call: str = ""  # empty: there were fewer calls

    def __str__(self) -> str:
        return f"call {self.number} of the {self.who}, {self.call}: {self.how}"


@dataclass(frozen=True, slots=True)
class Outcome:
    fault: Fault
    result: HookResult
    queued: tuple[Queued, ...]
    leftovers: tuple[str, ...]
    offers: tuple[Offer, ...]
    reports: tuple[CommitReport, ...]

    @property
    def status(self) -> int:
        return self.result.status


class Bench:
    """One way a message may go, to be gone again and again. ``reply``: None where no daemon runs."""

    def __init__(
        self,
        directory: Path,
        programs: tuple[Path, Path, Path],  # injector, hook, stand-in
        reply: Reply | Callable[[Offer], Reply] | None,
        message: bytes,
        **settings: object,
    ) -> None:
        self.injector, self.hook, self.standin = programs
        self.directory, self.reply, self.message = directory, reply, message
        self.spool = directory / "spool"
        self.spool.mkdir(parents=True)
        self._numbers = itertools.count(1)
        values: dict[str, object] = {
            "socket": directory / "sock",
            "queue": self.standin,
            "budget": 1,
            "dialect": "notqmail",
            "spool": self.spool,
        }
        values |= settings
        self.conf = directory / "queue.conf"
        self.conf.write_text("".join(f"{name} {value}\n" for name, value in values.items()))

    def run(self, fault: Fault) -> Outcome:
        """Returns when all that was started has ended, orphans too."""
        if self.reply is None:
            return self._run(fault, None)
        with FakeDaemon(self.directory / "sock", self.reply) as daemon:
            return self._run(fault, daemon)

    def _run(self, fault: Fault, daemon: FakeDaemon | None) -> Outcome:
        number = next(self._numbers)
        log = self.directory / f"{number}.calls"
        standin = Standin(self.standin, self.directory / str(number))
        how = str(ERRORS.get(fault.how, fault.how))
        process = HookProcess(
            self.injector,
            self.message,
            b"Fsender@example.org\0Trecipient@example.com\0\0",
            {"CONTENTFILTER_QUEUE_CONF": str(self.conf), **standin.environ()},
            {6: "pipe"},
            self.directory,
            (str(fault.number), how, fault.who, str(log), str(self.hook)),
        )
        everybody = os.dup(process._readers[2])  # all have it as their stderr
        try:
            result = process.wait()
            poll = select.poll()
            poll.register(everybody, 0)  # the end of the last one is reported without asking
            assert poll.poll(hook_lab.FINAL * 1000), f"{fault}: something that the hook started is still there"
        finally:
            os.close(everybody)
        if daemon:
            daemon.settle()
        return Outcome(
            Fault(fault.number, fault.how, fault.who, " ".join(log.read_text().split())),
            result,
            tuple(standin.queued()),
            (*standin.leftovers(), *(path.name for path in self.spool.iterdir())),
            tuple(daemon.offers) if daemon else (),
            tuple(daemon.reports) if daemon else (),
        )

    def calls(self) -> list[str]:
        """The calls of an undisturbed run, in order."""
        return self.run(Fault(0, "0", "hook")).fault.call.split()
