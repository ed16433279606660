"""The line in front of a scanner: its order, its patience, and that no place is ever lost."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, Cause
from contentfilter.model import Scanner
from contentfilter.policy.admission import LARGE, Priority
from contentfilter.scanners.limiter import ScannerLimiter
from contentfilter.scanners.stream import Progress

pytestmark = pytest.mark.asyncio

SMALL = Priority(("user", b"a"), 1, 0)
BIG = Priority(("user", b"a"), 3, LARGE + 1)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """Turns with scans that last until they are told to end."""

    def __init__(self, places: int = 1, max_wait: float = 60.0, scanner: Scanner = Scanner.SPAMD) -> None:
        self.clock, self.shed = Clock(), Counter[str]()
        self.turns = ScannerLimiter(
            scanner, (Address(path="/a"),), places, max_wait=max_wait, shed=self.shed, clock=self.clock
        )
        self.running: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}

    def start(self, name: str, claim: Priority = SMALL, seconds: float = 600.0) -> "asyncio.Task[Any]":
        end = self._ends[name] = asyncio.Event()

        async def scan(address: Address, progress: Progress) -> Any:
            self.running.append(name)
            try:
                await end.wait()
            finally:
                self.running.remove(name)
            return name

        return asyncio.ensure_future(self.turns.run(claim, scan, 1e6, Deadline.after(seconds)))

    async def end(self, name: str, after: float = 0.0) -> None:
        self.clock.now += after
        self._ends[name].set()
        await self.settle()

    async def settle(self, done: Callable[[], bool] = lambda: False) -> None:
        for _ in range(20):
            if done():
                return
            await asyncio.sleep(0)


async def test_a_flood_in_front_of_a_scanner_delays_another_source_by_one() -> None:
    bench = Bench()
    flood = [bench.start(f"flood {n}") for n in range(20)]
    other = bench.start("other", Priority(("user", b"b"), 1, 0))
    await bench.settle()
    await bench.end("flood 0")
    await bench.end("flood 1")
    assert bench.running == ["other"]
    for task in (*flood, other):
        task.cancel()
    await asyncio.gather(*flood, other, return_exceptions=True)


async def test_no_more_than_the_places_run_and_all_get_their_turn() -> None:
    bench = Bench(places=3)
    tasks = [bench.start(str(n)) for n in range(10)]
    await bench.settle()
    for _ in range(10):
        assert len(bench.running) <= 3
        await bench.end(bench.running[0])
    assert sorted(await asyncio.gather(*tasks)) == sorted(map(str, range(10)))
    assert bench.shed == {}


async def test_who_would_wait_too_long_hears_it_at_once_large_ones_first() -> None:
    bench = Bench(max_wait=60.0)
    first = bench.start("first")
    await bench.settle()
    await bench.end("first", after=20.0)  # the mean is 20 seconds now
    assert await first == "first"
    tasks = [bench.start("under way")]
    await bench.settle()
    with pytest.raises(BackendError) as large:
        await bench.start("large", BIG)  # 20 s, and its patience is 15
    tasks += [bench.start("second"), bench.start("third"), bench.start("fourth")]
    await bench.settle()
    with pytest.raises(BackendError) as fifth:
        await bench.start("fifth")
    assert large.value.cause is fifth.value.cause is Cause.BUSY
    assert bench.shed == {"spamd-large": 1, "spamd": 1}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_share_of_the_deadline_bounds_the_wait_too() -> None:
    bench = Bench()
    first = bench.start("first")
    await bench.settle()
    await bench.end("first", after=20.0)
    await first
    under_way = bench.start("under way")
    await bench.settle()
    with pytest.raises(BackendError, match="20 s"):
        await bench.start("hasty", seconds=10.0)
    await bench.end("under way")
    assert await under_way == "under way"


async def test_a_wait_that_takes_longer_than_expected_ends_as_busy_and_keeps_no_place() -> None:
    bench = Bench(max_wait=0.05, scanner=Scanner.CLAMD)
    hanging = bench.start("hanging")
    with pytest.raises(BackendError) as late:
        await bench.start("late")
    assert (late.value.cause, late.value.backend) == (Cause.BUSY, "clamd")
    assert bench.shed == {"clamd": 1}
    await bench.end("hanging")
    assert await hanging == "hanging"
    again = bench.start("again")
    await bench.settle()
    assert bench.running == ["again"]
    await bench.end("again")
    assert await again == "again"


@pytest.mark.parametrize("moment", ["waiting", "given", "running"])
async def test_a_cancelled_question_gives_its_place_back(moment: str) -> None:
    bench = Bench()
    first, second = bench.start("first"), bench.start("second")
    await bench.settle()
    if moment == "running":
        first.cancel()
    elif moment == "waiting":
        second.cancel()
        await bench.settle()
        await bench.end("first")
    else:
        bench._ends["first"].set()
        await asyncio.sleep(0)
        second.cancel()  # it may have been given the place in this very step
    await bench.settle()
    third = bench.start("third")
    await bench.settle()
    if moment == "running":
        await bench.end("second")
    assert bench.running == ["third"]
    await bench.end("third")
    assert await third == "third"
    await asyncio.gather(first, second, return_exceptions=True)
