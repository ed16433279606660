"""Marks outlive the worker that made them, name what it worked on at that moment, and count each death once."""

import asyncio
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress

import pytest

from contentfilter.log import make_logger
from contentfilter.threads import DaemonExecutor
from contentfilter.worker import crashes as module
from contentfilter.worker.crashes import (
    DEATH_LIMIT,
    DEATHS,
    HALF,
    MARKS,
    SLOTS,
    CrashAttribution,
    CrashTable,
    SlotPlace,
    WorkerSlot,
    fingerprint,
)

KEY, OTHER = b"k" * 16, b"o" * 16


@pytest.fixture
def table() -> Iterator[CrashTable]:
    made = CrashTable(make_logger("json", "error"))
    yield made
    made.close()


@contextmanager
def worker(table: CrashTable, place: SlotPlace) -> Iterator[int]:
    """A process that has marked KEY and goes on; its pid. It is dead and reaped at the end."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        slot = WorkerSlot(table.fd, place)
        mark(slot)
        os.write(theirs, b"!")
        signal.pause()
        os._exit(slot.deaths(KEY))
    os.close(theirs)
    try:
        assert os.read(ours, 1) == b"!"
        yield pid
    finally:
        os.close(ours)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def mark(slot: WorkerSlot, key: bytes = KEY) -> None:
    """As in the middle of a step of the handling of a message."""
    slot.put(module.InProgressMark(key, "incident", slot.place.life, int(module.time.time())).packed())


def test_the_fingerprint_omits_what_changes_between_tries() -> None:
    message = b"Subject: a\n\nbody\n"
    again = b"Received: from a\n\tby b; now\nreceived: (qmail 1)\n" + message
    assert fingerprint(message) == fingerprint(again)
    assert fingerprint(message) != fingerprint(message + b".")
    assert fingerprint(b"Subject: a\nReceived: x\n\n") != fingerprint(b"Subject: a\nReceived: y\n\n")
    assert len({fingerprint(data) for data in (b"", b"Received", b"Received: a", b"\n")}) == 4


def test_the_fingerprint_of_a_long_message_covers_both_ends_and_the_length() -> None:
    middle = b"m" * HALF
    base = fingerprint(b"a" * HALF + middle + b"z" * HALF)
    assert base != fingerprint(b"A" + b"a" * (HALF - 1) + middle + b"z" * HALF)
    assert base != fingerprint(b"a" * HALF + middle + b"z" * (HALF - 1) + b"Z")
    assert base != fingerprint(b"a" * HALF + middle + b"m" + b"z" * HALF)


def test_a_death_counts_before_it_is_recorded_and_only_once_after(table: CrashTable) -> None:
    first, mine = table.enlist(), table.enlist()
    slot = WorkerSlot(table.fd, mine)
    with worker(table, first) as pid:
        assert slot.deaths(KEY) == 0, "it is alive"
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, but not reaped: as when the hook retries immediately
        assert slot.deaths(KEY) == 1
        table.record_death(first, expected=False, child=pid)
    assert (slot.deaths(KEY), slot.deaths(OTHER)) == (1, 0)
    assert table.isolated() == ()


def test_two_deaths_isolate_until_they_are_cleared_or_a_day_is_over(
    table: CrashTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(DEATH_LIMIT):
        place = table.enlist()
        mark(WorkerSlot(table.fd, place))
        table.record_death(place, expected=False, child=1)
    slot = WorkerSlot(table.fd, table.enlist())
    assert slot.deaths(KEY) == DEATH_LIMIT
    assert table.isolated() == (KEY.hex(),)
    now = module.time.time()
    with monkeypatch.context() as patch:
        patch.setattr(module.time, "time", lambda: now + module.MEMORY + 1)
        assert (slot.deaths(KEY), table.isolated()) == (0, ())
    table.forget()
    assert (slot.deaths(KEY), table.isolated()) == (0, ())


def test_a_worker_that_ends_as_requested_leaves_no_suspects(table: CrashTable) -> None:
    place = table.enlist()
    mark(WorkerSlot(table.fd, place))
    table.record_death(place, expected=True, child=1)
    assert table.enlist().index == place.index, "and its slot is free"
    assert WorkerSlot(table.fd, table.enlist()).deaths(KEY) == 0


def test_only_the_newest_deaths_are_kept(table: CrashTable) -> None:
    for number in range(DEATHS + 1):
        place = table.enlist()
        mark(WorkerSlot(table.fd, place), b"%016d" % number)
        table.record_death(place, expected=False, child=1)
    slot = WorkerSlot(table.fd, table.enlist())
    assert [slot.deaths(b"%016d" % number) for number in (0, 1, DEATHS)] == [0, 1, 1]


def test_there_is_an_end_to_slots_and_marks(table: CrashTable) -> None:
    places = [table.enlist() for _ in range(SLOTS)]
    with pytest.raises(OSError, match="workers"):
        table.enlist()
    slot = WorkerSlot(table.fd, places[-1])
    rows = [slot.put(b"\1" * module._MARK.size) for _ in range(MARKS + 1)]
    assert rows[-1] == -1
    for row in rows:
        slot.clear(row)
    assert slot.put(b"\1" * module._MARK.size) >= 0


def marked(table: CrashTable, place: SlotPlace) -> set[str]:
    return {each.incident for each in module._marks(table._table[place.start : place.start + module._SLOT])}


def test_a_message_is_marked_while_it_is_worked_on_and_not_while_it_waits(table: CrashTable) -> None:
    place = table.enlist()
    seen: list[tuple[str, set[str]]] = []

    def look(where: str) -> None:
        seen.append((where, marked(table, place)))

    async def child(gate: asyncio.Event) -> None:
        look("child")
        await gate.wait()

    async def handle(gate: asyncio.Event, disk: Executor) -> str:
        look("step")
        task = asyncio.create_task(child(gate))
        await asyncio.to_thread(look, "thread")
        await asyncio.get_running_loop().run_in_executor(disk, look, "disk thread")
        await gate.wait()
        await task
        with suppress(TimeoutError):
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
        look("after a time-out")
        return "done"

    async def main() -> None:
        loop, gate = asyncio.get_running_loop(), asyncio.Event()
        attribution = CrashAttribution(WorkerSlot(table.fd, place), loop)
        disk = attribution.executor(DaemonExecutor("disk", 1))
        running = asyncio.ensure_future(attribution.attribute(handle(gate, disk), KEY, "a"))
        async with asyncio.timeout(20):
            while len(seen) < 4:
                await asyncio.sleep(0.001)  # what is waited for is in other tasks and threads
        await asyncio.to_thread(look, "another's thread")
        await loop.run_in_executor(disk, look, "another's disk thread")
        look("waiting")
        gate.set()
        assert await running == "done"
        cancelled = asyncio.ensure_future(attribution.attribute(asyncio.Event().wait(), KEY, "b"))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        look("end")

    asyncio.run(main())
    busy, idle = {"a"}, set[str]()
    assert dict(seen) == {
        "step": busy, "child": busy, "thread": busy, "disk thread": busy, "waiting": idle, "another's thread": idle,
        "another's disk thread": idle, "after a time-out": busy, "end": idle,
    }  # fmt: skip
