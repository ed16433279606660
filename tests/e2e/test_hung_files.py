"""Files that do not answer: a hung control directory, table or state disk; hang.c replaces calls of the C library."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from lab.clamd import EICAR, Clamd
from lab.compiler import compiled
from lab.system import System

from contentfilter.bus import messages, sockets

VIRUS = b"From: a@example.net\nSubject: look\n\n" + EICAR + b"\n"
SOURCE = Path(__file__).parents[1] / "lab" / "hang.c"
ANSWER = 60.0  # seconds for a reload that meets a hung file: its own limit and some for a busy machine

Start = Callable[..., System]


class Hung:
    """A system in which files below ``below`` hang while :meth:`hang` is in force."""

    def __init__(self, directory: Path, clamd: Clamd, below: str, refresh: float, only: str) -> None:
        directory.mkdir()
        self._switch = directory / "hang"
        library = compiled(directory, "hang.so", ["cc", "-shared", "-fPIC", "-O1", "-Wall", SOURCE, "-ldl"])
        below = str(directory / below)
        environ = {"LD_PRELOAD": str(library), "HANG_BELOW": below, "HANG_WHILE": str(self._switch), "HANG_ONLY": only}
        settings = {"tables": {"refresh": refresh}, "service": {"workers": 2, "stuck_after": 3.0, "drain": 5.0}}
        controls = {"clamavclients": "@protected.example\n"}
        self.system = System(
            directory, settings=settings, controls=controls, clamd=clamd, environ=environ, tracebacks_allowed=False
        )

    def hang(self) -> None:
        self._switch.touch()

    def answer(self) -> None:
        self._switch.unlink(missing_ok=True)

    def reload(self) -> messages.Done:
        reply = sockets.ask(str(self.system.directory), messages.AskReload(), ANSWER)
        assert isinstance(reply, messages.Done)
        return reply

    def status(self) -> messages.Status:
        reply = sockets.ask(str(self.system.directory), messages.AskStatus(), 5.0)
        assert isinstance(reply, messages.Status)
        return reply

    def refuses_the_virus(self) -> None:
        began = time.monotonic()
        assert self.system.deliver(VIRUS, budget=30).text.startswith("D")
        assert time.monotonic() - began < 15

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.system.daemon.pid}/task"))


@pytest.fixture
def start(lab_directory: Path, clamd: Clamd, request: pytest.FixtureRequest) -> Iterator[Callable[..., Hung]]:
    with ExitStack() as stack:

        def make(below: str, refresh: float = 3600.0, *, only: str = "", run: bool = True) -> Hung:
            made = Hung(lab_directory / f"hung{abs(hash(request.node.name)) % 100_000}", clamd, below, refresh, only)
            stack.callback(made.answer)
            if run:
                stack.enter_context(made.system)
                stack.callback(made.answer)
            return made

        yield make


@pytest.mark.parametrize(
    "below", ["control", "control/databytes", "control/clamavclients", "control/badsignatures", "contentfilter.toml"]
)
def test_a_reload_that_meets_a_hung_file_names_it_and_changes_nothing(start: Callable[..., Hung], below: str) -> None:
    hung = start(below)
    hung.refuses_the_virus()
    hung.hang()
    for _ in range(2):  # the second time immediately: the first one's thread still hangs
        done = hung.reload()
        assert not done.ok
        assert any(below in problem and "did not answer within" in problem for problem in done.problems), done
    hung.refuses_the_virus()
    assert hung.status().generation == 1
    hung.answer()
    hung.system.control("spamdclients", "*\n")
    time.sleep(0.3)  # the thread that hung has ended
    assert hung.reload().ok


def test_timers_and_the_end_do_not_wait_for_a_hung_control_directory(start: Callable[..., Hung]) -> None:
    hung = start("control", refresh=0.2)
    before = hung.threads()
    hung.hang()
    hung.system.daemon.wait_for("tables.stale", 1)
    time.sleep(3)  # many refreshes
    assert hung.threads() <= before + 3, "no refresh adds a thread"
    hung.refuses_the_virus()
    tables = hung.status().tables
    assert tables is not None
    assert "control" in tables.trouble
    hung.system.daemon.signal(signal.SIGHUP)
    began = time.monotonic()
    hung.system.daemon.signal(signal.SIGTERM)
    assert hung.system.daemon.wait_exit(30) == 0
    assert time.monotonic() - began < 10


def test_a_hung_state_disk_kills_no_worker_and_stops_no_mail(start: Callable[..., Hung]) -> None:
    hung = start("state/tables.snapshot", refresh=3600.0)
    workers = hung.system.daemon.workers()
    done = hung.reload()
    assert done.ok
    hung.system.control("spamdclients", "*\n")
    hung.hang()
    done = hung.reload()
    assert not done.ok
    assert any("state/tables.snapshot" in problem for problem in done.problems)
    hung.refuses_the_virus()
    assert hung.system.daemon.workers() == workers
    assert not hung.system.daemon.log("worker.stuck")


@pytest.mark.parametrize("below", ["state/tables.snapshot", "state/release.key"])
def test_workers_serve_with_what_they_have_until_their_disk_answers(start: Callable[..., Hung], below: str) -> None:
    hung = start(below, only="worker")
    system = hung.system
    workers = system.daemon.workers()
    hung.hang()
    for number in range(3):  # a configuration that comes meanwhile takes the place of one that waits
        system.control("spamdclients", f"u{number}@x.example\n")
        done = hung.reload()
        assert done.ok
        assert any("has not taken" in problem for problem in done.problems)
        hung.refuses_the_virus()
    assert system.daemon.workers() == workers
    assert not system.daemon.log("worker.stuck")
    hung.answer()
    lines = system.daemon.wait_for("worker.reload", 2, where=lambda line: line["generation"] == 4)
    assert {line["pid"] for line in lines} == set(workers)
    assert not system.daemon.log("worker.reload-failed")


def test_a_worker_that_starts_on_a_hung_disk_ends_when_it_is_asked_to(start: Callable[..., Hung]) -> None:
    hung = start("state/tables.snapshot", only="worker")
    hung.hang()
    victim = hung.system.daemon.workers()[0]
    os.kill(victim, signal.SIGKILL)
    hung.system.daemon.wait_for("worker.died", 1)
    hung.refuses_the_virus()
    began = time.monotonic()
    hung.system.daemon.signal(signal.SIGTERM)
    assert hung.system.daemon.wait_exit(30) == 0
    assert time.monotonic() - began < 4, "less than [service] drain"


@pytest.mark.parametrize("below", ["control", "state/tables.snapshot"])
def test_a_start_ends_in_time_where_a_file_hangs(start: Callable[..., Hung], below: str) -> None:
    hung = start(below, run=False)
    hung.hang()
    daemon = hung.system.daemon
    try:
        daemon.start(wait=False)
        assert daemon.wait_exit(60) == 78
        assert any(below in line["text"] and "did not answer" in line["text"] for line in daemon.log("text"))
    finally:
        hung.answer()
        daemon.clean()


@pytest.mark.parametrize("kind", ["fifo", "device"])
@pytest.mark.parametrize("name", ["control/clamavclients", "control/databytes", "contentfilter.toml", "state/clock"])
def test_a_pipe_or_device_in_place_of_a_file_makes_nobody_wait(
    start: Callable[..., Hung], name: str, kind: str
) -> None:
    hung = start("nothing")
    path = hung.system.directory / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    began = time.monotonic()
    done = hung.reload()
    assert time.monotonic() - began < 9, "nothing had to time out"
    assert done.ok == name.startswith("state")
    if not done.ok:
        assert any(name in problem and "not a regular file" in problem for problem in done.problems)
    hung.refuses_the_virus()
