"""Executor of daemon threads: calls fail fast while all threads hang, and run again once one returns."""

import threading
import time

import pytest

from contentfilter.threads import DaemonExecutor


def test_calls_fail_fast_while_all_threads_hang() -> None:
    executor, end = DaemonExecutor("disk", 2, 0.3), threading.Event()
    hung = [executor.submit(end.wait, 30) for _ in range(2)]
    waiting = executor.submit(str, 1)
    time.sleep(0.6)
    before = time.monotonic()
    with pytest.raises(OSError, match="disk: no call has completed for a while"):
        executor.submit(str, 2).result(10)
    assert time.monotonic() - before < 0.2
    end.set()
    assert all(future.result(10) for future in hung)
    assert waiting.result(10) == "1"
    assert executor.submit(str, 3).result(10) == "3"


def test_a_slow_disk_is_no_hung_one() -> None:
    executor = DaemonExecutor("disk", 1, 0.5)
    slow = [executor.submit(time.sleep, 0.2) for _ in range(6)]
    time.sleep(0.8)
    assert executor.submit(str, 1).result(10) == "1"
    assert all(future.done() for future in slow)


def test_idle_threads_hang_nobody() -> None:
    executor = DaemonExecutor("disk", 1, 0.1)
    assert executor.submit(str, 1).result(10) == "1"
    time.sleep(0.3)
    assert executor.submit(str, 2).result(10) == "2"
