"""No program that a test, the demo or the benchmark started outlives it, however it ends."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys, time
from pathlib import Path
from lab import process
from lab.daemon import Daemon

class Sleeper(process.Daemon):
    def start(self):
        self.launch(["sh", "-c", "sleep 600 & wait"], lambda: True)
        return self

directory, exits = Path(sys.argv[1]), sys.argv[2] == "exits"
if exits:
    process.exit_on_sigterm()
try:
    sleeper = Sleeper(directory).start()
    served = Daemon(directory=directory, settings={"service": {"workers": 1}}).start()
    print(sleeper.pid, served.pid, *served.workers(), flush=True)
    time.sleep(600)
finally:
    (directory / "cleaned").touch()
"""


@pytest.mark.parametrize(
    ("number", "exits", "status"),
    [
        (signal.SIGINT, "", -signal.SIGINT),
        (signal.SIGTERM, "", -signal.SIGTERM),
        (signal.SIGTERM, "exits", 128 + signal.SIGTERM),
        (signal.SIGKILL, "", -signal.SIGKILL),
    ],
    ids=["SIGINT", "SIGTERM", "SIGTERM with cleaning up", "SIGKILL"],
)
def test_nothing_outlives_the_program_that_started_it(tmp_path: Path, number: int, exits: str, status: int) -> None:
    environ = {**os.environ, "PYTHONPATH": str(TESTS)}
    words = [sys.executable, "-c", PROGRAM, str(tmp_path), exits]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ) as program:
        assert program.stdout is not None
        started = [int(pid) for pid in program.stdout.readline().split()]
        assert len(started) == 3
        (child,) = Path(f"/proc/{started[0]}/task/{started[0]}/children").read_text().split()
        running = [os.pidfd_open(pid) for pid in (*started, int(child))]
        program.send_signal(number)
        assert program.wait(30) == status
    assert (tmp_path / "cleaned").exists() is (number == signal.SIGINT or bool(exits))
    end = time.monotonic() + 30
    for pidfd in running:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(max(0, end - time.monotonic()) * 1000), "a program is still running"
        os.close(pidfd)
