"""What PINGs change in a pool: by script, with a clock that stands still."""

import asyncio
from collections.abc import Callable

import pytest
from lab.pool import Pool

from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, Cause
from contentfilter.scanners.health import REST_AFTER, USUAL, Backend, Health, Patience, choose, due, usable
from contentfilter.scanners.stream import ClosedError, UnreachableError
from contentfilter.scanners.watch import check, watch

pytestmark = pytest.mark.asyncio

A, B, C = (Address(path=f"/{name}") for name in "abc")
HASTY = Patience(look=0.01, suspect=0.01, quiet=0.02, idle=0.02, short=0.02, move=0.06, long=5.0)


class Pings:
    """Answers PING by what stands in ``wrong`` for the address; a hung one waits for ``over``."""

    def __init__(self) -> None:
        self.asked: list[Address] = []
        self.wrong: dict[Address, BackendError] = {}
        self.hung: set[Address] = set()
        self.over = asyncio.Event()

    async def __call__(self, address: Address, deadline: Deadline) -> None:
        self.asked.append(address)
        if address in self.hung:
            await self.over.wait()
        if address in self.wrong:
            raise self.wrong[address]


def soon() -> Deadline:
    return Deadline.after(5)


def refused() -> UnreachableError:
    return UnreachableError(Cause.DOWN, "x", "by script")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("silence", "changes", "expected"),
    [
        (29.9, {}, False),
        (30.0, {}, True),
        (2.9, {"outstanding": 1}, False),
        (3.0, {"outstanding": 1}, True),
        (0.9, {"health": Health(1)}, False),
        (1.0, {"health": Health(1)}, True),
        (1.0, {"health": Health(1, proven=True)}, False),
        (1.0, {"silent_since": 1.0}, True),
        (100.0, {"health": Health(3, rest_until=1000.5)}, False),
        (1.0, {"health": Health(3, rest_until=1000.0)}, True),
    ],
)
async def test_a_ping_is_sent_after_a_silence_that_fits_the_doubt(silence: float, changes, expected: bool) -> None:
    assert due(Backend(A, 4, heard=1000.0 - silence, **changes), 1000.0, USUAL) is expected


async def test_nothing_is_known_at_first_so_everybody_is_asked() -> None:
    assert due(Backend(A, 4), 0.0, USUAL)


async def test_a_backend_that_answers_mail_gets_no_ping() -> None:
    pool, pings = Pool((A,), 4, patience=Patience(look=0.001, idle=5.0, quiet=5.0)), Pings()
    watching = asyncio.create_task(watch(pool, pings))
    await until(lambda: len(pings.asked) == 1)  # the first one

    async def answer(address: Address) -> None:
        await asyncio.sleep(0.001)

    for _ in range(100):
        await pool.ask(answer, soon())
    watching.cancel()
    assert len(pings.asked) == 1


async def test_who_is_silent_or_unproven_is_chosen_only_where_nobody_else_is() -> None:
    silent, unproven, well = Backend(A, 1, silent_since=1.0), Backend(B, 1, watched=True), Backend(C, 1)
    unproven.health = Health(REST_AFTER, rest_until=5.0)
    everyone = [silent, unproven, well]
    assert usable(everyone, 10.0) == [well]
    well.outstanding = 1
    assert choose(everyone, 10.0) is None  # better wait for the one that answers
    assert choose([silent, unproven], 10.0) is silent
    unproven.health = unproven.health.answered_ping()
    assert choose([silent, unproven], 10.0) is unproven
    assert unproven.free()
    unproven.outstanding = 1
    assert not unproven.free()  # half-open: a PING does not prove that it can scan


async def test_an_answer_to_ping_forgives_no_failed_scan() -> None:
    health = Health()
    for _ in range(REST_AFTER):
        health = health.failed(Cause.BAD_REPLY, 0.0, 0.0).answered_ping()
    assert (health.failures, health.resting(0.5)) == (REST_AFTER, True)
    assert not health.failed(Cause.BAD_REPLY, 2.0, 0.0).proven


async def test_one_that_answers_ping_but_no_scan_costs_one_question_for_each_rest() -> None:
    now = [1000.0]
    pool, pings = Pool((A, B), 4, clock=lambda: now[0]), Pings()
    asked: list[Address] = []

    async def scan(address: Address) -> Address:
        asked.append(address)
        if address == A:
            raise ClosedError(Cause.DOWN, "a", "by script")
        return address

    for backend in pool.backends:
        backend.watched = True
    for _ in range(20):
        assert await pool.ask(scan, soon()) == B
    assert asked.count(A) == REST_AFTER
    for rest in (1.0, 2.0, 4.0, 8.0, 10.0, 10.0):
        now[0] += rest
        asked.clear()
        await check(pool, pool.backends[0], pings)
        for _ in range(20):
            assert await pool.ask(scan, soon()) == B
        assert asked.count(A) == 1


async def test_while_its_ping_fails_no_mail_is_sent_there() -> None:
    now = [1000.0]
    pool, pings = Pool((A, B), 4, clock=lambda: now[0]), Pings()
    pings.wrong[A] = refused()
    for backend in pool.backends:
        backend.watched = True
    asked: list[Address] = []

    async def scan(address: Address) -> None:
        asked.append(address)

    for _ in range(40):
        if due(pool.backends[0], now[0], USUAL):
            await check(pool, pool.backends[0], pings)
        if pool.backends[0].health.failures >= REST_AFTER:
            await pool.ask(scan, soon())
        now[0] += 1.0
    assert set(asked) == {B}
    assert len(pings.asked) == 40  # it costs next to nothing to learn that nobody is there
    del pings.wrong[A]
    assert pool.backends[0].health.resting(now[0])
    await check(pool, pool.backends[0], pings)
    await pool.ask(scan, soon())
    assert asked[-1] == A, "one that is back rests no longer"


async def test_questions_of_a_silent_backend_move_once_and_only_to_one_that_answers() -> None:
    pool, pings = Pool((A, B), 8, silence=Cause.RELOADING, patience=HASTY), Pings()
    pings.hung = {A, B}
    watching = asyncio.create_task(watch(pool, pings))
    await until(lambda: all(backend.silent for backend in pool.backends))
    asked: list[Address] = []

    async def scan(address: Address) -> Address:
        asked.append(address)
        if address == A:
            await asyncio.Event().wait()
        return address

    task = asyncio.create_task(pool.ask(scan, soon()))
    await until(lambda: asked == [A])
    await asyncio.sleep(2 * HASTY.move)
    assert asked == [A]  # the other one is as silent: better to wait here
    watching.cancel()
    pool.backends[1].silent_since = None
    pool.move(pool.backends[0], pool.backends[0].heard)
    assert await task == B
    assert asked == [A, B]


async def test_a_question_that_has_moved_stays_where_it_is() -> None:
    pool = Pool((A, B, C), 8, patience=HASTY)
    asked: list[Address] = []

    async def scan(address: Address) -> Address:
        asked.append(address)
        await asyncio.Event().wait()
        return address

    task = asyncio.create_task(pool.ask(scan, soon()))
    await until(lambda: len(asked) == 1)
    for number, address in enumerate((A, B), 1):
        backend = next(b for b in pool.backends if b.address == address)
        backend.silent_since = 0.0
        pool.move(backend, backend.heard)
        await until(lambda expected=number: len(asked) >= min(expected + 1, 2))  # type: ignore[misc]
    await asyncio.sleep(0.02)
    assert asked == [A, B]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert [b.outstanding for b in pool.backends] == [0, 0, 0]


async def test_nobody_there_costs_no_try_but_two_that_took_the_question_are_enough() -> None:
    addresses = (A, B, C, Address(path="/d"))
    asked: list[Address] = []

    async def only_d(address: Address) -> Address:
        asked.append(address)
        if address != addresses[3]:
            raise refused()
        return address

    assert await Pool(addresses, 4).ask(only_d, soon()) == addresses[3]
    assert asked == list(addresses)
    asked.clear()

    async def poison(address: Address) -> None:
        asked.append(address)
        raise ClosedError(Cause.DOWN, str(address), "killed by it")

    with pytest.raises(BackendError):
        await Pool(addresses, 4).ask(poison, soon())
    assert len(asked) == 2


async def test_a_silent_one_is_described_with_its_cause() -> None:
    now = [100.0]
    pool = Pool((A,), 4, lambda: now[0], Cause.RELOADING)
    pool.backends[0].silent_since = 97.0
    found = pool.describe()[0]
    assert (found.state, found.cause, found.since, found.failures) == ("silent", "reloading", 3.0, 1)


async def test_a_slow_connection_counts_although_it_is_shorter_than_a_fair_try() -> None:
    """connect_timeout = 2: the backend's fault, as long as the message has time left."""
    pool = Pool((A,), 4)

    async def scan(address: Address) -> None:
        raise UnreachableError(Cause.TIMEOUT, "a", "no connect in time")

    with pytest.raises(BackendError):
        await pool.ask(scan, soon())
    assert pool.backends[0].health.failures == 1
    with pytest.raises(BackendError):
        await pool.ask(scan, Deadline.after(-1))
    assert pool.backends[0].health.failures == 1
