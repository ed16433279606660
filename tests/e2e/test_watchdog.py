"""The watchdog of the event loop notices a callback that holds it, here and in the daemons' processes."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

from lab import watchdog
from lab.daemon import Daemon
from lab.hook import until
from lab.offer import offer


def burn(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_callback_that_burns_is_named_and_one_that_sleeps_is_not() -> None:
    async def run() -> None:
        asyncio.get_running_loop().call_soon(burn, 2 * watchdog.LIMIT)
        await asyncio.sleep(0.01)
        time.sleep(2 * watchdog.LIMIT)  # no CPU time
        burn(watchdog.LIMIT / 4)
        await asyncio.sleep(0)

    asyncio.run(run())
    (found,) = watchdog.held
    assert "ms of CPU time in burn" in found
    watchdog.held.clear()


def test_a_worker_of_a_daemon_is_watched(daemon: Callable[..., Daemon]) -> None:
    report = Path(os.environ[watchdog.REPORT])
    with daemon() as running:
        assert offer(running.socket, b"BURN\n") is not None
        until(lambda: "Connection._serve" in report.read_text(), "no report")  # it comes after the answer
        held = report.read_text().splitlines()
    (line,) = [each for each in held if "Trivial.handle" in each or "Connection._serve" in each]
    assert "worker" in line
    os.truncate(report, 0)
