"""The breaker of a backend: its table of transitions, and what the prober's results change. With a clock by hand."""

import asyncio
from collections.abc import Callable

import pytest
from lab.pool import Pool

from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, Cause
from contentfilter.model import Scanner
from contentfilter.scanners.health import (
    EXPIRES,
    OPEN_AFTER,
    SILENT_AFTER,
    TRANSITIONS,
    Backend,
    Event,
    ProbeResult,
    State,
    choose,
    usable,
)
from contentfilter.scanners.stream import ClosedError, UnreachableError

pytestmark = pytest.mark.asyncio

A, B, C = (Address(path=f"/{name}") for name in "abc")
START = 1000.0
PATIENCE = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


def result(
    address: Address, asked: float, cause: Cause | None = None, answered: float = 0.0, *, absent: bool = False
) -> ProbeResult:
    return ProbeResult(Scanner.CLAMD, str(address), asked, answered, cause, absent)


def soon() -> Deadline:
    return Deadline.after(5)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_every_state_can_be_entered_and_left_and_a_valid_answer_always_closes() -> None:
    assert {state for state, _ in TRANSITIONS} == set(State) == set(TRANSITIONS.values())
    assert all(TRANSITIONS.get((state, Event.ANSWERED), state) is State.CLOSED for state in State)


async def test_an_unanswered_probe_makes_a_backend_unresponsive_after_a_silence() -> None:
    backend = Backend(A, 4)
    backend.learn(result(A, START, Cause.TIMEOUT), START + SILENT_AFTER - 0.1)
    assert backend.state is State.CLOSED
    backend.learn(result(A, START, Cause.TIMEOUT), START + SILENT_AFTER)
    assert (backend.state, backend.silent_since, backend.cause) == (State.UNRESPONSIVE, START, Cause.TIMEOUT)
    assert backend.usable(START + PATIENCE - 0.1, PATIENCE)
    assert not backend.usable(START + PATIENCE, PATIENCE)


@pytest.mark.parametrize("by", ["this worker", "another worker"])
async def test_a_spamd_without_a_free_child_for_the_probe_is_not_silent_while_mail_is_answered(by: str) -> None:
    backend, now = Backend(A, 4, outstanding=4, busy_since=START), START
    for _ in range(100):
        now += 1.0
        if by == "this worker":
            backend.answer(now - 1.5)
        backend.learn(result(A, START, Cause.TIMEOUT, 0.0 if by == "this worker" else now - 1.5), now)
        assert backend.state is State.CLOSED
    backend.learn(result(A, START, Cause.TIMEOUT, now - 1.5), now + SILENT_AFTER)
    assert (backend.state, backend.silent_since) == (State.UNRESPONSIVE, now - 1.5)
    backend.learn(result(A, START, Cause.TIMEOUT, now + SILENT_AFTER), now + SILENT_AFTER + 1)
    assert backend.state is State.CLOSED, "mail of another worker was answered meanwhile"


async def test_the_silence_of_a_backend_with_requests_begins_with_them() -> None:
    backend = Backend(A, 4, outstanding=1, busy_since=START)
    backend.learn(result(A, START + 3, Cause.TIMEOUT), START + 5)
    assert backend.silent_since == START


async def test_without_news_from_the_prober_an_unresponsive_backend_is_tried_by_one_request_at_a_time() -> None:
    backend = Backend(A, 4)
    backend.learn(result(A, START, Cause.TIMEOUT), START + SILENT_AFTER)
    now = START + SILENT_AFTER + EXPIRES
    assert backend.usable(now, PATIENCE)
    assert backend.state is State.HALF_OPEN
    assert backend.free()
    backend.outstanding = 1
    assert not backend.free()


async def test_unresponsive_or_unproven_backends_are_chosen_only_where_there_is_no_other() -> None:
    silent, well = Backend(A, 1), Backend(C, 1)
    unproven = Backend(B, 1, failures=OPEN_AFTER, state=State.OPEN, rest_until=START, since=START)
    now = START + SILENT_AFTER
    silent.learn(result(A, START, Cause.TIMEOUT), now)
    unproven.expires = now + 1
    everyone = [silent, unproven, well]
    assert usable(everyone, now) == [well]
    well.outstanding = 1
    assert choose(everyone, now) is None  # better wait for the one that answers
    assert choose([silent, unproven], now) is silent
    unproven.learn(result(B, now), now)
    assert choose([silent, unproven], now) is unproven
    assert unproven.free()
    unproven.outstanding = 1
    assert not unproven.free()  # half-open: a probe does not prove that it can scan


async def test_an_answer_to_a_probe_forgives_no_failed_scan() -> None:
    backend = Backend(A, 4)
    for number in range(OPEN_AFTER):
        backend.fail(Cause.BAD_REPLY, START, 0.0)
        backend.learn(result(A, START + number, answered=START + number), START)
    assert (backend.failures, backend.state) == (OPEN_AFTER, State.OPEN)
    backend.fail(Cause.BAD_REPLY, START + 2, 0.0)
    assert (backend.failures, backend.state, backend.proven) == (OPEN_AFTER + 1, State.OPEN, False)


async def test_one_that_answers_probes_but_no_scan_costs_one_request_for_each_rest() -> None:
    clock = Clock()
    pool = Pool((A, B), 4, clock)
    asked: list[Address] = []

    async def scan(address: Address) -> Address:
        asked.append(address)
        if address == A:
            raise ClosedError(Cause.DOWN, "a", "by script")
        return address

    for _ in range(20):
        assert await pool.ask(scan, soon()) == B
    assert asked.count(A) == OPEN_AFTER
    for rest in (1.0, 2.0, 4.0, 8.0, 10.0, 10.0):
        clock.now += rest
        asked.clear()
        pool.learn(result(A, clock.now, answered=clock.now))
        for _ in range(20):
            assert await pool.ask(scan, soon()) == B
        assert asked.count(A) == 1


async def test_while_its_probes_fail_no_mail_is_sent_there() -> None:
    clock = Clock()
    pool = Pool((A, B), 4, clock)
    asked: list[Address] = []

    async def scan(address: Address) -> None:
        asked.append(address)

    for _ in range(40):
        pool.learn(result(A, clock.now, Cause.DOWN, absent=True))
        if pool.backends[0].failures >= OPEN_AFTER:
            await pool.ask(scan, soon())
        clock.now += 1.0
    assert set(asked) == {B}
    assert pool.backends[0].state is State.OPEN
    pool.learn(result(A, clock.now, answered=clock.now))
    await pool.ask(scan, soon())
    assert asked[-1] == A, "one that is back rests no longer"


async def test_a_result_that_is_repeated_counts_as_one_failure() -> None:
    pool = Pool((A,), 4, Clock())
    for _ in range(10):
        pool.learn(result(A, START, Cause.DOWN, absent=True))
    assert pool.backends[0].failures == 1


async def test_requests_of_an_unresponsive_backend_are_asked_elsewhere_once() -> None:
    """Two backends at most take a request, whatever happens to them."""
    clock = Clock()
    pool = Pool((A, B, C), 8, clock)
    asked: list[Address] = []

    async def scan(address: Address) -> Address:
        asked.append(address)
        await asyncio.Event().wait()
        return address

    task = asyncio.create_task(pool.ask(scan, soon()))
    await until(lambda: asked == [A])
    clock.now += PATIENCE
    pool.learn(result(A, START, Cause.TIMEOUT))
    await until(lambda: asked == [A, B])
    clock.now += PATIENCE
    pool.learn(result(B, START + PATIENCE, Cause.TIMEOUT))
    with pytest.raises(BackendError, match="no sign of life") as caught:
        await task
    assert (caught.value.cause, asked) == (Cause.TIMEOUT, [A, B])
    assert [b.outstanding for b in pool.backends] == [0, 0, 0]


@pytest.mark.parametrize("cause", [Cause.TIMEOUT, Cause.BUSY])
async def test_all_unresponsive_for_longer_than_patience_is_an_answer_without_a_wait(cause: Cause) -> None:
    """Whether a request is held, waits for a slot, or comes later. The prober finds out when they are back."""
    clock = Clock()
    pool = Pool((A, B), 1, clock)
    asked: list[Address] = []

    async def scan(address: Address) -> Address:
        asked.append(address)
        await asyncio.Event().wait()
        return address

    tasks = [asyncio.create_task(pool.ask(scan, soon())) for _ in range(4)]
    await until(lambda: len(asked) == 2)
    clock.now += PATIENCE - 1
    for address in (A, B):
        pool.learn(result(address, START, cause))
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in tasks)
    clock.now += 1
    for address in (A, B):
        pool.learn(result(address, START, cause))
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [getattr(error, "cause", None) for error in errors] == [cause] * 4
    for _ in range(10):
        with pytest.raises(BackendError) as caught:
            await pool.ask(scan, soon())
        assert caught.value.cause is cause
    assert len(asked) == 2

    async def answer(address: Address) -> Address:
        return address

    pool.learn(result(B, clock.now, answered=clock.now))
    assert await pool.ask(answer, soon()) == B


async def test_a_backend_that_is_slow_by_habit_gets_more_patience() -> None:
    """A spamd whose scans take 20 seconds has not hung when it says nothing for 20 seconds."""
    clock = Clock()
    pool, seen = Pool((A,), 4, clock), asyncio.Event()

    async def slow(address: Address) -> Address:
        clock.now += 20.0
        return address

    async def waits(address: Address) -> Address:
        await seen.wait()
        return address

    await pool.ask(slow, soon())
    began = clock.now
    task = asyncio.create_task(pool.ask(waits, soon()))
    await until(lambda: pool.backends[0].outstanding == 1)
    clock.now += 30.0
    pool.learn(result(A, began, Cause.TIMEOUT))
    seen.set()
    assert await task == A


async def test_while_one_request_tests_a_backend_that_failed_for_long_the_others_do_not_wait() -> None:
    """A name that leads to a black hole: each trial takes the whole connect limit."""
    clock = Clock()
    pool, over = Pool((A,), 4, clock), asyncio.Event()

    async def fails(address: Address) -> None:
        raise UnreachableError(Cause.TIMEOUT, "a", "no connect in time")

    async def tries(address: Address) -> None:
        await over.wait()
        await fails(address)

    for _ in range(OPEN_AFTER):
        with pytest.raises(BackendError):
            await pool.ask(fails, soon())
    clock.now += PATIENCE
    trial = asyncio.create_task(pool.ask(tries, soon()))
    await until(lambda: pool.backends[0].outstanding == 1)
    with pytest.raises(BackendError, match="one request tests it") as caught:
        await pool.ask(tries, soon())
    assert caught.value.cause is Cause.TIMEOUT
    over.set()
    with pytest.raises(BackendError):
        await trial


async def test_nobody_there_costs_no_try_but_two_that_took_the_request_are_enough() -> None:
    addresses = (A, B, C, Address(path="/d"))
    asked: list[Address] = []

    async def only_d(address: Address) -> Address:
        asked.append(address)
        if address != addresses[3]:
            raise UnreachableError(Cause.DOWN, "x", "by script")
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


async def test_an_unresponsive_one_is_described_with_its_cause() -> None:
    clock = Clock()
    pool = Pool((A,), 4, clock)
    clock.now += 3.0
    pool.learn(result(A, START, Cause.TIMEOUT))
    found = pool.describe()[0]
    assert (found.state, found.cause, found.since, found.failures) == ("unresponsive", "timeout", 3.0, 1)


async def test_a_slow_connection_counts_although_it_is_shorter_than_a_fair_try() -> None:
    """connect_timeout = 2: the backend's fault, as long as the message has time left."""
    pool = Pool((A,), 4)

    async def scan(address: Address) -> None:
        raise UnreachableError(Cause.TIMEOUT, "a", "no connect in time")

    with pytest.raises(BackendError):
        await pool.ask(scan, soon())
    assert pool.backends[0].failures == 1
    with pytest.raises(BackendError):
        await pool.ask(scan, Deadline.after(-1))
    assert pool.backends[0].failures == 1
