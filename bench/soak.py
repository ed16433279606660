#!/usr/bin/env python3
"""``make soak``: mail at full load while the daemon is reloaded, killed, stopped, stuck and upgraded, once per second.

Clients submit messages with known outcomes to the compiled hook and check what the stand-in for qmail-queue received:
an accepted message exactly once for each recipient, any other message not at all. Counted:

    lost        accepted, but missing for a recipient
    doubled     twice for a recipient, or queued and not accepted: the client sends it again
    refused     a clean message with a permanent status
    let in      a virus accepted for a protected recipient
    deferred    a temporary status: nothing is lost, but no disturbance may last longer than the hook's budget
    unchecked   accepted without a required check
    wrong       bytes or recipients that differ from those submitted

Exit status 0 only if all of these are zero. --only selects the disturbances; see --help.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from e2e.trouble import kill_everything  # noqa: E402  (tests/ is on the path only now)
from lab.clamd import EICAR, Clamd  # noqa: E402
from lab.process import exit_on_sigterm  # noqa: E402
from lab.standin import Queued, Standin  # noqa: E402
from lab.system import SMTP, System, installed_hook  # noqa: E402

import contentfilter  # noqa: E402
from contentfilter.wire import envelope  # noqa: E402

TEXT_FD = 6
FAULTS = ("lost", "doubled", "refused", "let in", "deferred", "unchecked", "wrong")
TEMPORARY = frozenset(range(51, 100)) - {82, 88, 91}
CONTROLS = {
    "options": "chksignature 1\nchkloadertype 1\n",
    "clamavclients": "@protected.example\nmarked@mixed.example virus=mark\n",
    "spamdclients": "",
}
SETTINGS = {
    "service": {"workers": 2, "stuck_after": 2.0, "drain": 5.0},
    "quarantine": {"quota": 0},
    "journal": {"enabled": True},
}


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of message: content, recipients, and whether it is delivered."""

    name: str
    weight: int
    body: bytes
    to: tuple[bytes, ...]
    delivered: bool  # otherwise it is rejected


LINES = b"".join(b"line %06d of a long and innocent text, nothing to see in it\n" % n for n in range(6000))
KINDS = (
    Kind("letter", 60, LINES[:2000], (b"user@protected.example",), delivered=True),
    Kind("long", 10, LINES, (b"user@protected.example",), delivered=True),
    Kind("unprotected", 10, LINES[:500], (b"none@mixed.example",), delivered=True),
    Kind("split", 10, EICAR + b"\n", (b"marked@mixed.example", b"none@mixed.example"), delivered=True),
    Kind("virus", 10, EICAR + b"\n", (b"user@protected.example",), delivered=False),
)


@dataclass(slots=True)
class Tally:
    """Results of all clients, protected by a lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: Kind, faults: Counter[str], seconds: float, note: str) -> None:
        with self.lock:
            self.counts.update(faults)
            self.counts["messages"] += 1
            self.kinds[kind.name] += 1
            self.seconds.append(seconds)
            if faults and len(self.notes) < 50:
                self.notes.append(f"{dict(faults)}: {kind.name}: {note}")


class Client:
    """A client that submits one message after the other, with a separate directory of its stand-in."""

    def __init__(self, system: System, number: int, tally: Tally, stop: threading.Event) -> None:
        self._program, self._number, self._tally, self._stop = str(system.program), number, tally, stop
        self._standin = Standin(system.queue_program, system.directory / "queued" / f"c{number}")
        self._environ = {"CONTENTFILTER_QUEUE_CONF": str(system.queue_conf()), **SMTP, **self._standin.environ()}
        self._chance = random.Random(number)
        self.problem: BaseException | None = None

    def run(self) -> None:
        serial = 0
        try:
            while not self._stop.is_set():
                serial += 1
                kind = self._chance.choices(KINDS, [k.weight for k in KINDS])[0]
                self._one(kind, b"%d-%d" % (self._number, serial))
        except BaseException as error:
            self.problem = error
            self._stop.set()

    def _one(self, kind: Kind, token: bytes) -> None:
        message = b"Subject: soak\nX-Soak: %s\n\n%s" % (token, kind.body)
        began = time.monotonic()
        status, text = self._hand_over(message, envelope.build(b"sender@example.net", kind.to))
        seconds = time.monotonic() - began
        queued = self._standin.queued()
        self._tally.add(kind, judge(kind, message, status, text, queued), seconds, f"status {status} {text[:200]!r}")
        for entry in queued:
            for ending in (".msg", ".env", ".info"):
                (self._standin.directory / f"{entry.pid}{ending}").unlink(missing_ok=True)

    def _hand_over(self, message: bytes, block: bytes) -> tuple[int, bytes]:
        """Submit as qmail-smtpd does. Returns the hook's exit status and the text for the client."""
        (m_out, m_in), (e_out, e_in), (t_out, t_in) = os.pipe(), os.pipe(), os.pipe()
        actions = [(os.POSIX_SPAWN_DUP2, fd, to) for fd, to in ((m_out, 0), (e_out, 1), (t_in, TEXT_FD))]
        pid = os.posix_spawn(self._program, [self._program], self._environ, file_actions=actions)
        for fd in (m_out, e_out, t_in):
            os.close(fd)
        for fd, data in ((m_in, message), (e_in, block)):
            with contextlib.suppress(BrokenPipeError), os.fdopen(fd, "wb", buffering=0) as pipe:
                view = memoryview(data)
                while view:
                    view = view[pipe.write(view) :]
        _, status = os.waitpid(pid, 0)
        with os.fdopen(t_out, "rb") as pipe:
            return os.waitstatus_to_exitcode(status), pipe.read()


def judge(kind: Kind, message: bytes, status: int, text: bytes, queued: list[Queued]) -> Counter[str]:
    """Compare the outcome of one message with the expected one; returns the faults."""
    faults: Counter[str] = Counter()
    got = Counter(recipient for entry in queued for recipient in entry.envelope.recipients)
    wanted = Counter(kind.to if kind.delivered and status == 0 else ())
    faults["lost"] = (wanted - got).total()
    faults["doubled"] = (got - wanted).total() if kind.delivered else 0
    faults["let in"] = got.total() if not kind.delivered else 0
    faults["deferred"] = int(status in TEMPORARY)
    faults["refused"] = int(kind.delivered and status != 0 and status not in TEMPORARY)
    faults["unchecked"] = sum(b"=unchecked" in entry.message.partition(b"\n\n")[0] for entry in queued)
    faults["wrong"] = sum(not entry.message.endswith(message) for entry in queued)
    if not kind.delivered and status == 0:
        faults["let in"] = max(1, faults["let in"])
    if not kind.delivered and status not in TEMPORARY and not text.startswith(b"D"):
        faults["wrong"] += 1
    return +faults


# Disturbances of the daemon


class Disturber:
    """The disturbances of a running system. Each returns when the daemon accepts mail again."""

    def __init__(self, system: System, versions: tuple[Path, Path]) -> None:
        self._system, self._versions = system, versions
        self._chance = random.Random(0)

    def actions(self) -> dict[str, Callable[[], object]]:
        return {
            "reload": self._system.daemon.reload,
            "worker killed": self._worker_killed,
            "worker stuck": self._worker_stuck,
            "supervisor killed": self._supervisor_killed,
            "all killed": self._all_killed,
            "stop and start": self._restart,
            "upgrade": self._upgrade,
        }

    def _worker(self) -> int:
        return self._chance.choice(self._system.daemon.workers() or [0])

    def _worker_killed(self) -> None:
        _signal(self._worker(), signal.SIGKILL)

    def _worker_stuck(self) -> None:
        _signal(self._worker(), signal.SIGSTOP)  # to the supervisor this looks like an endless loop: no heartbeat

    def _supervisor_killed(self) -> None:
        self._system.daemon.kill()
        self._system.daemon.wait_exit()  # its workers finish their messages
        self._system.daemon.start()

    def _all_killed(self) -> None:
        kill_everything(self._system.daemon)
        self._system.daemon.start()

    def _restart(self) -> None:
        self._system.daemon.stop()
        self._system.daemon.start()

    def _upgrade(self) -> None:
        """Stop, and start another version of the package."""
        self._system.daemon.stop()
        self._versions = self._versions[::-1]
        self._system.daemon.use(self._versions[0])
        self._system.daemon.start()


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        if pid:
            os.kill(pid, number)


def other_version(directory: Path) -> Path:
    """Make a copy of the package with a newer version number. Returns the directory for PYTHONPATH."""
    package = Path(contentfilter.__file__).parent
    copy = directory / "newer" / "contentfilter"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    version = copy / "__init__.py"
    version.write_text(version.read_text() + '\n__version__ += "+soak"\n')
    return copy.parent


# The whole run


@dataclass(frozen=True, slots=True)
class Outcome:
    seconds: float
    counts: dict[str, int]  # messages, and each of FAULTS
    kinds: dict[str, int]
    happened: dict[str, int]
    versions: list[str]
    rate: float
    p50: float
    p99: float
    longest: float  # seconds that a client waited
    memory: int  # MiB, resident, the largest process of the daemon at the end
    descriptors: int  # open descriptors of the largest worker at the end
    notes: list[str]

    @property
    def clean(self) -> bool:
        return not any(self.counts[name] for name in FAULTS)


def soak(
    directory: Path,
    *,
    seconds: float = 0.0,
    rounds: int = 0,
    every: float = 1.0,
    clients: int = 16,
    only: tuple[str, ...] = (),
    activated: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Run in ``directory``, whose path must be short, and which must be empty and accessible to daemons of other users.

    Lasts ``seconds``, or until each disturbance has happened ``rounds`` times.
    """
    tally, stop, happened = Tally(), threading.Event(), Counter[str]()
    with ExitStack() as stack, _low_descriptors_taken():
        clamd = stack.enter_context(Clamd(directory / "clamd"))
        system = System(
            directory / "system",
            controls=CONTROLS,
            settings=SETTINGS,
            clamd=clamd,
            activated=activated,
            program=installed_hook(),
        )
        stack.enter_context(system)
        disturber = Disturber(system, (Path(contentfilter.__file__).parents[1], other_version(directory)))
        actions = {name: do for name, do in disturber.actions().items() if not only or name in only}
        crowd = [Client(system, number, tally, stop) for number in range(clients)]
        threads = [threading.Thread(target=client.run) for client in crowd]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            reported = began
            for name in _names(list(actions), rounds):
                if (seconds and time.monotonic() > began + seconds) or stop.wait(every):
                    break
                actions[name]()
                happened[name] += 1
                if time.monotonic() > reported + 10:
                    reported = time.monotonic()
                    faults = {fault: tally.counts[fault] for fault in FAULTS if tally.counts[fault]}
                    progress(f"{reported - began:5.0f} s  {tally.counts['messages']} messages  {faults or 'no faults'}")
        finally:
            stop.wait(every)
            stop.set()
            for thread in threads:
                thread.join(120)
        lasted = time.monotonic() - began
        for client in crowd:
            if client.problem is not None:
                raise client.problem
        pids = [system.daemon.pid, *system.daemon.workers()]
        memory, descriptors = max(map(_resident, pids)), max(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
        versions = sorted({line["version"] for line in system.daemon.log("service.start")})
    ordered = sorted(tally.seconds) or [0.0]
    return Outcome(
        seconds=lasted,
        counts={name: tally.counts[name] for name in ("messages", *FAULTS)},
        kinds=dict(tally.kinds),
        happened=dict(happened),
        versions=versions,
        rate=tally.counts["messages"] / lasted,
        p50=ordered[len(ordered) // 2],
        p99=ordered[len(ordered) * 99 // 100],
        longest=ordered[-1],
        memory=memory // 1024,
        descriptors=descriptors,
        notes=tally.notes,
    )


def _names(names: list[str], rounds: int) -> Iterator[str]:
    """Each name once per round, in an order that differs between rounds. 0 rounds: endless."""
    chance = random.Random(1)
    for _ in range(rounds) if rounds else itertools.count():
        yield from chance.sample(names, len(names))


def _resident(pid: int) -> int:
    """Resident memory of a process in KiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    return 0


@contextlib.contextmanager
def _low_descriptors_taken() -> Iterator[None]:
    """Occupy the descriptors that the hook's are moved to, so that no pipe gets one of them."""
    null = os.open(os.devnull, os.O_RDONLY)
    held = []
    while not held or held[-1] < TEXT_FD + 1:
        held.append(fcntl.fcntl(null, fcntl.F_DUPFD_CLOEXEC, 3))
    try:
        yield
    finally:
        for fd in (null, *held):
            os.close(fd)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (600)")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="interval of the disturbances (1)")
    parser.add_argument("--clients", type=int, default=16, help="concurrent clients (16)")
    parser.add_argument("--only", action="append", default=[], metavar="DISTURBANCE", help="reload, worker killed, ...")
    parser.add_argument("--activated", action="store_true", help="use a socket of systemd, which outlives the daemon")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="cf-soak-", dir="/tmp"))
    directory.chmod(0o755)

    def show(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        outcome = soak(
            directory,
            seconds=options.seconds,
            every=options.every,
            clients=options.clients,
            only=tuple(options.only),
            activated=options.activated,
            progress=show,
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if options.json:
        print(json.dumps({name: getattr(outcome, name) for name in outcome.__slots__}))
    else:
        report(outcome)
    return 0 if outcome.clean else 1


def report(outcome: Outcome) -> None:
    print(f"{outcome.seconds:.0f} s, {outcome.counts['messages']} messages, {outcome.rate:.0f} per second")
    for title, counts in (("submitted", outcome.kinds), ("happened", outcome.happened)):
        print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    print(f"versions: {', '.join(outcome.versions)}")
    print(f"a client waited {outcome.p50:.3f} s (p50), {outcome.p99:.3f} s (p99), at most {outcome.longest:.3f} s")
    print(f"largest process at the end: {outcome.memory} MiB, {outcome.descriptors} descriptors")
    for name in FAULTS:
        print(f"{name:>10}  {outcome.counts[name]}")
    for note in outcome.notes:
        print(f"  {note}")


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
