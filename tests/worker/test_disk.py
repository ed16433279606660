"""A hung disk stops what needs the disk, and nothing else: it has threads of its own, which nobody joins."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
from lab.offer import offer

from contentfilter.deadline import Deadline
from contentfilter.doors import hook_work
from contentfilter.doors.admission import AcceptedMessage, IntakeLimits
from contentfilter.doors.listener import Listener
from contentfilter.doors.listening_socket import open_socket
from contentfilter.doors.message import message_of
from contentfilter.doors.origin import ResolvedOrigin
from contentfilter.log import make_logger
from contentfilter.model import RECIPIENTS_MAX, Action, OriginKind
from contentfilter.scanners.content import THREAD_ABOVE, Content
from contentfilter.scanners.signatures.engine import Engine
from contentfilter.scanners.signatures.rules import default_signatures
from contentfilter.store import quarantine as store
from contentfilter.threads import DaemonExecutor
from contentfilter.verdict.disposition import Disposition
from contentfilter.wire import hook
from contentfilter.worker.crashes import CrashAttribution, CrashTable, WorkerSlot

THREADS = 4
DROP = hook.Answer(Action.DROP)


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """No fsync returns during the test; released once for each that has been called."""
    end, called = threading.Event(), threading.Semaphore(0)

    def fsync(fd: int) -> None:
        called.release()
        end.wait(60)

    monkeypatch.setattr(store.os, "fsync", fsync)
    yield called
    end.set()


class Dropping:
    def hold(self) -> AbstractContextManager[None]:
        return nullcontext()

    def recipient_limit(self, kind: OriginKind) -> int:
        return RECIPIENTS_MAX

    async def handle(self, accepted: AcceptedMessage) -> Disposition:
        return Disposition(Action.DROP)


@pytest.mark.asyncio
async def test_scans_hashes_plans_and_openings_go_on(hung: threading.Semaphore, tmp_path: Path) -> None:
    log = make_logger("json", "error")
    table = CrashTable(log)
    slot = WorkerSlot(os.dup(table.fd), table.enlist())
    attribution = CrashAttribution(slot, asyncio.get_running_loop())
    kept = store.Quarantine(tmp_path / "quarantine", disk=attribution.executor(DaemonExecutor("disk", THREADS)))

    async def keep(number: int) -> None:
        message = message_of(b"Subject: %d\n\nx\n" % number)
        with pytest.raises(TimeoutError):
            await kept.keep(f"{number:016}", message, {}, Deadline.after(1.0))
        message.close()

    default = os.cpu_count() or 1
    await asyncio.gather(*(keep(number) for number in range(default + 8)))  # more than the default executor has threads
    assert all(hung.acquire(timeout=10) for _ in range(THREADS)), "every thread of the disk hangs"

    large = message_of(b"Subject: x\n\n" + b"x" * (hook_work.INLINE + 1))
    assert large.size > THREAD_ABOVE
    own = open_socket(str(tmp_path / "q"), 0o600, 64)
    origin = ResolvedOrigin(frozenset(), frozenset(), ())
    listener = Listener(own.socket, IntakeLimits(Dropping(), origin, 30.0, 8), log)
    listener.start()
    async with asyncio.timeout(20):
        assert await asyncio.to_thread(Engine(default_signatures(), ()).scan, large.data) is None
        assert await Content(large).digest() is not None
        assert await asyncio.to_thread(offer, own.path, bytes(large.data)) == DROP
    await listener.drained(Deadline.after(10))
    listener.stop()
    large.close()
    own.close()
    table.close()


def test_a_call_that_waits_for_a_thread_can_be_cancelled_and_errors_come_back() -> None:
    executor, go = DaemonExecutor("disk", 1), threading.Event()
    hanging, waiting = executor.submit(go.wait, 20), executor.submit(time.time)
    assert waiting.cancel()
    after, failing = executor.submit(lambda: threading.current_thread().name), executor.submit(int, "x")
    go.set()
    assert hanging.result(10)
    assert after.result(10) == "disk"
    with pytest.raises(ValueError, match="invalid literal"):
        failing.result(10)


def test_no_more_threads_than_needed_are_started_and_none_above_the_limit() -> None:
    executor = DaemonExecutor("few", 3)

    def threads() -> int:
        return sum(thread.name == "few" for thread in threading.enumerate())

    for _ in range(5):
        executor.submit(time.time).result(10)
        deadline = time.monotonic() + 10
        while not executor._idle._value and time.monotonic() < deadline:
            time.sleep(0.001)
    assert threads() == 1
    go = threading.Event()
    calls = [executor.submit(go.wait, 20) for _ in range(9)]
    assert threads() == 3
    go.set()
    assert all(call.result(10) for call in calls)


def test_the_process_ends_although_a_thread_hangs() -> None:
    code = (
        "import time\n"
        "from contentfilter.threads import DaemonExecutor\n"
        "DaemonExecutor('disk', 2).submit(time.sleep, 600)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], timeout=60, check=True)
