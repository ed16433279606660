"""Marks outlive the worker that made them, name what it worked on at that moment, and count each death once."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from contentfilter.log import make_logger
from contentfilter.worker import crashes as module
from contentfilter.worker.crashes import (
    DEATH_LIMIT,
    DEATHS,
    HALF,
    LANES,
    MARKS,
    CrashTable,
    SlotPlace,
    WorkerSlot,
    fingerprint,
)

KEY, OTHER = b"k" * 16, b"o" * 16


@pytest.fixture
def suspects() -> Iterator[CrashTable]:
    made = CrashTable(make_logger("json", "error"))
    yield made
    made.close()


@contextmanager
def worker(suspects: CrashTable, place: SlotPlace) -> Iterator[int]:
    """A process that has marked KEY and goes on; its pid. It is dead and reaped at the end."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        lane = WorkerSlot(suspects.fd, place)
        mark(lane)
        os.write(theirs, b"!")
        signal.pause()
        os._exit(lane.deaths(KEY))
    os.close(theirs)
    try:
        assert os.read(ours, 1) == b"!"
        yield pid
    finally:
        os.close(ours)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def mark(lane: WorkerSlot, key: bytes = KEY) -> None:
    """As in the middle of a step of the handling of a message."""
    lane._put(module.InProgressMark(key, "incident", lane._place.life, int(module.time.time())).packed())


def test_the_fingerprint_leaves_out_what_changes_between_tries() -> None:
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


def test_a_death_counts_before_it_is_buried_and_only_once_after(suspects: CrashTable) -> None:
    first, mine = suspects.enlist(), suspects.enlist()
    lane = WorkerSlot(suspects.fd, mine)
    with worker(suspects, first) as pid:
        assert lane.deaths(KEY) == 0, "it is alive"
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, but not reaped: as when the hook comes again at once
        assert lane.deaths(KEY) == 1
        suspects.record_death(first, expected=False, child=pid)
    assert (lane.deaths(KEY), lane.deaths(OTHER)) == (1, 0)
    assert suspects.isolated() == ()


def test_two_deaths_are_fatal_until_somebody_forgets_or_a_day_is_over(
    suspects: CrashTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(DEATH_LIMIT):
        place = suspects.enlist()
        mark(WorkerSlot(suspects.fd, place))
        suspects.record_death(place, expected=False, child=1)
    lane = WorkerSlot(suspects.fd, suspects.enlist())
    assert lane.deaths(KEY) == DEATH_LIMIT
    assert suspects.isolated() == (KEY.hex(),)
    now = module.time.time()
    with monkeypatch.context() as patch:
        patch.setattr(module.time, "time", lambda: now + module.MEMORY + 1)
        assert (lane.deaths(KEY), suspects.isolated()) == (0, ())
    suspects.forget()
    assert (lane.deaths(KEY), suspects.isolated()) == (0, ())


def test_a_worker_that_ends_as_asked_leaves_no_suspects(suspects: CrashTable) -> None:
    place = suspects.enlist()
    mark(WorkerSlot(suspects.fd, place))
    suspects.record_death(place, expected=True, child=1)
    assert suspects.enlist().lane == place.lane, "and its lane is free"
    assert WorkerSlot(suspects.fd, suspects.enlist()).deaths(KEY) == 0


def test_only_the_newest_deaths_are_remembered(suspects: CrashTable) -> None:
    for number in range(DEATHS + 1):
        place = suspects.enlist()
        mark(WorkerSlot(suspects.fd, place), b"%016d" % number)
        suspects.record_death(place, expected=False, child=1)
    lane = WorkerSlot(suspects.fd, suspects.enlist())
    assert [lane.deaths(b"%016d" % number) for number in (0, 1, DEATHS)] == [0, 1, 1]


def test_there_is_an_end_to_lanes_and_marks(suspects: CrashTable) -> None:
    places = [suspects.enlist() for _ in range(LANES)]
    with pytest.raises(OSError, match="workers"):
        suspects.enlist()
    lane = WorkerSlot(suspects.fd, places[-1])
    rows = [lane._put(b"\1" * module._MARK.size) for _ in range(MARKS + 1)]
    assert rows[-1] == -1
    for row in rows:
        lane._clear(row)
    assert lane._put(b"\1" * module._MARK.size) >= 0


def marked(suspects: CrashTable, place: SlotPlace) -> set[str]:
    return {each.incident for each in module._marks(suspects._table[place.start : place.start + module._LANE])}


def test_a_message_is_marked_while_it_is_worked_on_and_not_while_it_waits(suspects: CrashTable) -> None:
    place = suspects.enlist()
    seen: list[tuple[str, set[str]]] = []

    def look(where: str) -> None:
        seen.append((where, marked(suspects, place)))

    async def child(gate: asyncio.Event) -> None:
        look("child")
        await gate.wait()

    async def handle(gate: asyncio.Event) -> str:
        look("step")
        task = asyncio.create_task(child(gate))
        await asyncio.to_thread(look, "thread")
        await gate.wait()
        await task
        with suppress(TimeoutError):
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
        look("after a time-out")
        return "done"

    async def main() -> None:
        lane, gate = WorkerSlot(suspects.fd, place), asyncio.Event()
        lane.attend(asyncio.get_running_loop())
        running = asyncio.ensure_future(lane.handled(handle(gate), KEY, "a"))
        async with asyncio.timeout(20):
            while len(seen) < 3:
                await asyncio.sleep(0.001)  # what is waited for is in other tasks and threads
        await asyncio.to_thread(look, "another's thread")
        look("waiting")
        gate.set()
        assert await running == "done"
        cancelled = asyncio.ensure_future(lane.handled(asyncio.Event().wait(), KEY, "b"))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        look("end")

    asyncio.run(main())
    busy, idle = {"a"}, set[str]()
    assert dict(seen) == {
        "step": busy, "child": busy, "thread": busy, "waiting": idle, "another's thread": idle,
        "after a time-out": busy, "end": idle,
    }  # fmt: skip
