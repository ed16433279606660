"""The pool: whom it asks, how many at once, whom it leaves alone, and when it asks again."""

import asyncio
import gc
import weakref

import pytest
from lab.pool import Pool

from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, Cause
from contentfilter.scanners.health import FAIR_TRY, LONGEST_REST, OPEN_AFTER, Backend, State, choose
from contentfilter.scanners.stream import ClosedError

pytestmark = pytest.mark.asyncio

A, B = Address(path="/a"), Address(path="/b")


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Script:
    """Answers each question by the next entry of its list; an empty list means success."""

    def __init__(self, *answers: Exception | None) -> None:
        self.answers = list(answers)
        self.asked: list[Address] = []

    async def __call__(self, address: Address) -> Address:
        self.asked.append(address)
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer
        return address


def soon() -> Deadline:
    return Deadline.after(5)


def down(cause: Cause = Cause.DOWN) -> BackendError:
    return BackendError(cause, "x", "by script")


def closed() -> BackendError:
    return ClosedError(Cause.DOWN, "x", "by script")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/clamav/clamd.ctl", Address(path="/run/clamav/clamd.ctl")),
        ("unix:/with:colon", Address(path="/with:colon")),
        ("tcp:127.0.0.1:783", Address(host="127.0.0.1", port=783)),
        ("tcp:scan.example.org:1", Address(host="scan.example.org", port=1)),
        ("tcp:[::1]:65535", Address(host="::1", port=65535)),
    ],
)
async def test_an_address_reads_and_prints_the_same(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "/run/x", "unix:", "unix:relative", "unix:/" + "x" * 107, "unix:/a\0b", "udp:h:1"),
        *("tcp:host", "tcp:host:", "tcp::1", "tcp:[]:1", "tcp:a b:1", "tcp:::1:783"),
        *("tcp:h:0", "tcp:h:65536", "tcp:h:999999", "tcp:h:-1", "tcp:h:\u0663", "tcp:h: 1"),
    ],
)
async def test_an_address_that_is_none_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        Address.parse(text)
    assert repr(text) in str(caught.value)


async def test_failures_in_a_row_bring_a_rest_that_grows_to_a_limit() -> None:
    backend, now, rests = Backend(A, 1), 100.0, []
    for _ in range(OPEN_AFTER + 6):
        backend.fail(Cause.DOWN, now, 0.0)
        rests.append(max(0.0, backend.rest_until - now))
        now = max(now, backend.rest_until)
    assert rests == [0.0, 0.0, 1.0, 2.0, 4.0, 8.0, LONGEST_REST, LONGEST_REST, LONGEST_REST]


async def test_one_crash_that_cuts_many_questions_counts_once() -> None:
    backend = Backend(A, 1)
    for _ in range(50):
        backend.fail(Cause.DOWN, 0.0, 0.0)
    assert (backend.failures, backend.rest_until, backend.state) == (OPEN_AFTER, 1.0, State.OPEN)


@pytest.mark.parametrize(
    ("cause", "seconds", "counts"),
    [
        (Cause.DOWN, 0.0, True),
        (Cause.BAD_REPLY, 0.0, True),
        (Cause.MEMORY, 0.0, True),
        (Cause.TIMEOUT, FAIR_TRY, True),
        (Cause.TIMEOUT, FAIR_TRY - 1, False),  # the message had no time left: not the backend's fault
        (Cause.TOO_BIG, 9.0, False),
        (Cause.LIMITS, 9.0, False),
        (Cause.BUSY, 9.0, False),
    ],
)
async def test_only_a_backends_own_faults_count(cause: Cause, seconds: float, counts: bool) -> None:
    backend = Backend(A, 1)
    backend.fail(cause, 0.0, seconds)
    assert backend.failures == int(counts)


async def test_the_choice_is_healthy_then_least_loaded_then_longest_unused() -> None:
    doubtful, busy, used, fresh = (
        Backend(A, 9, failures=OPEN_AFTER, state=State.OPEN, rest_until=5.0),
        Backend(A, 9, outstanding=2),
        Backend(A, 9, 1, turn=7),
        Backend(A, 9, 1, turn=3),
    )
    everyone = [doubtful, busy, used, fresh]
    assert choose(everyone, now=10.0) is fresh
    assert choose(everyone, now=10.0, avoid={fresh}) is used
    assert choose([doubtful], now=10.0) is doubtful
    doubtful.state = State.OPEN
    assert choose([doubtful], now=4.9) is None
    assert choose([doubtful], now=10.0) is doubtful
    doubtful.outstanding = 1
    assert choose([doubtful], now=10.0) is None  # half-open: one question at a time
    assert choose([Backend(A, 2, outstanding=2)], now=0.0) is None


async def test_equal_backends_share_the_load() -> None:
    pool, script = Pool((A, B), 4), Script()
    for _ in range(6):
        await pool.ask(script, soon())
    assert script.asked == [A, B, A, B, A, B]


async def test_a_failure_is_tried_once_more_on_another_backend() -> None:
    for cause in (Cause.DOWN, Cause.TIMEOUT, Cause.BAD_REPLY, Cause.MEMORY, Cause.BUSY):
        pool, script = Pool((A, B), 4), Script(down(cause))
        assert await pool.ask(script, soon()) == B
        assert script.asked == [A, B]


async def test_two_failures_are_enough() -> None:
    pool, script = Pool((A, B, Address(path="/c")), 4), Script(closed(), down(Cause.MEMORY))
    with pytest.raises(BackendError) as caught:
        await pool.ask(script, soon())
    assert (caught.value.cause, len(script.asked)) == (Cause.MEMORY, 2)


async def test_a_lone_backend_is_asked_again_only_when_it_closed_without_a_byte() -> None:
    script = Script(closed())
    assert await Pool((A,), 1).ask(script, soon()) == A
    assert script.asked == [A, A]
    script = Script(down())
    with pytest.raises(BackendError):
        await Pool((A,), 1).ask(script, soon())
    assert script.asked == [A]


async def test_too_big_is_not_asked_elsewhere() -> None:
    pool, script = Pool((A, B), 1), Script(down(Cause.TOO_BIG))
    with pytest.raises(BackendError):
        await pool.ask(script, soon())
    assert script.asked == [A]


async def test_no_retry_when_the_deadline_is_over() -> None:
    pool, script = Pool((A, B), 1), Script(down())
    with pytest.raises(BackendError):
        await pool.ask(script, Deadline.after(-1))
    assert script.asked == [A]


async def test_a_resting_backend_fails_at_once_with_its_cause_and_is_tried_after_its_rest() -> None:
    clock = Clock()
    pool, script = Pool((A,), 4, clock), Script(*[down(Cause.MEMORY)] * OPEN_AFTER)
    for _ in range(OPEN_AFTER):
        with pytest.raises(BackendError):
            await pool.ask(script, soon())
    with pytest.raises(BackendError, match="left alone") as caught:
        await pool.ask(script, soon())
    assert (caught.value.cause, len(script.asked)) == (Cause.MEMORY, OPEN_AFTER)
    clock.now += 1.0
    assert await pool.ask(script, soon()) == A
    assert (pool.backends[0].state, pool.backends[0].failures) == (State.CLOSED, 0)


async def test_a_resting_backend_is_left_out_while_another_is_well() -> None:
    pool, script = Pool((A, B), 4, Clock()), Script()
    pool.backends[0].state, pool.backends[0].rest_until = State.OPEN, 2000.0
    for _ in range(4):
        assert await pool.ask(script, soon()) == B


async def test_no_backend_at_all_is_down() -> None:
    with pytest.raises(BackendError, match="no backend configured"):
        await Pool((), 4).ask(Script(), soon())


class Gate:
    """Questions stay until the gate opens; counts how many are inside."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.inside: list[Address] = []
        self.most = 0

    async def __call__(self, address: Address) -> Address:
        self.inside.append(address)
        self.most = max(self.most, len(self.inside))
        try:
            await self.open.wait()
        finally:
            self.inside.remove(address)
        return address


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_no_more_at_once_than_the_limit_of_each_backend() -> None:
    gate, pool = Gate(), Pool((A, B), 2)
    tasks = [asyncio.create_task(pool.ask(gate, soon())) for _ in range(20)]
    await settle()
    assert sorted(map(str, gate.inside)) == ["unix:/a", "unix:/a", "unix:/b", "unix:/b"]
    gate.open.set()
    await asyncio.gather(*tasks)
    assert gate.most == 4
    assert [b.outstanding for b in pool.backends] == [0, 0]


async def test_who_waits_is_served_in_order() -> None:
    pool, served = Pool((A,), 1), []

    async def one(number: int) -> None:
        async def ask(address: Address) -> None:
            served.append(number)
            await asyncio.sleep(0)

        await pool.ask(ask, soon())

    await asyncio.gather(*(one(number) for number in range(10)))
    assert served == list(range(10))


async def test_who_waits_too_long_hears_busy_and_leaves_the_queue() -> None:
    gate, pool = Gate(), Pool((A,), 1)
    first = asyncio.create_task(pool.ask(gate, soon()))
    await settle()
    with pytest.raises(BackendError) as caught:
        await pool.ask(gate, Deadline.after(0.02))
    assert caught.value.cause is Cause.BUSY
    gate.open.set()
    await first
    assert await pool.ask(gate, soon()) == A
    assert pool.backends[0].outstanding == 0


async def test_a_client_that_goes_away_gives_its_place_back() -> None:
    gate, pool = Gate(), Pool((A,), 1)
    first, second, third = (asyncio.create_task(pool.ask(gate, soon())) for _ in range(3))
    await settle()
    second.cancel()  # waiting
    first.cancel()  # inside; its place goes to the third
    await settle()
    assert len(gate.inside) == 1
    gate.open.set()
    assert await third == A
    assert pool.backends[0].outstanding == 0


async def test_a_place_given_to_a_client_that_goes_away_at_that_moment_is_not_lost() -> None:
    gate, pool = Gate(), Pool((A,), 1)
    first, second = (asyncio.create_task(pool.ask(gate, soon())) for _ in range(2))
    await settle()
    gate.open.set()
    while not first.done():
        await asyncio.sleep(0)  # the place is handed over now; second has not run yet
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert pool.backends[0].outstanding == 0
    assert await pool.ask(gate, soon()) == A


async def test_those_who_wait_for_a_backend_that_dies_hear_it_at_once() -> None:
    pool, release = Pool((A,), 1, Clock()), asyncio.Event()
    pool.backends[0].failures = OPEN_AFTER - 1

    async def dies(address: Address) -> None:
        await release.wait()
        raise down()

    tasks = [asyncio.create_task(pool.ask(dies, soon())) for _ in range(4)]
    await settle()
    release.set()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [getattr(error, "cause", None) for error in errors] == [Cause.DOWN] * 4
    assert pool.backends[0].failures == OPEN_AFTER


async def test_one_that_waits_for_another_backend_does_not_hold_up_the_rest() -> None:
    gate, pool = Gate(), Pool((A, B), 1)
    slow = asyncio.create_task(pool.ask(gate, soon()))  # takes A and stays
    await settle()

    async def fails_on_b(address: Address) -> Address:
        if address == B:
            raise down()
        return await gate(address)

    retry = asyncio.create_task(pool.ask(fails_on_b, soon()))  # fails on B, now waits for A
    await settle()
    assert await asyncio.gather(*(pool.ask(Script(), soon()) for _ in range(3))) == [B, B, B]
    gate.open.set()
    assert await asyncio.gather(slow, retry) == [A, A]


async def test_a_failed_question_keeps_nothing_alive() -> None:
    class Payload:
        pass

    pool, payload = Pool((A,), 1), Payload()
    gone = weakref.ref(payload)

    async def ask(address: Address, held: Payload = payload) -> None:
        raise down()

    with pytest.raises(BackendError):
        await pool.ask(ask, soon())
    del ask, payload
    await asyncio.sleep(0)  # the attempt's task has ended; the event loop forgets it in its next turn
    gc.collect()
    assert gone() is None


async def test_what_is_told_of_a_backend_is_how_it_stands_now() -> None:
    clock = Clock()
    pool = Pool((A,), 2, clock)
    (told,) = pool.describe()
    assert (told.scanner, told.backend, told.state, told.answered, told.limit) == (
        "clamd",
        "unix:/a",
        "closed",
        None,
        2,
    )
    for _ in range(2):
        with pytest.raises(BackendError):
            await pool.ask(Script(down(Cause.BAD_REPLY)), soon())
        clock.now += 10
    (told,) = pool.describe()
    assert (told.state, told.failures, told.cause) == ("closed", 2, "bad-reply")
    assert (told.since, told.failed) == (20, 10)  # the first and the last of them
    with pytest.raises(BackendError):
        await pool.ask(Script(down()), soon())
    (told,) = pool.describe()
    assert (told.state, told.failures, told.cause, told.since) == ("open", 3, "down", 20)
    clock.now += LONGEST_REST
    await pool.ask(Script(), soon())
    clock.now += 4
    (told,) = pool.describe()
    assert (told.state, told.failures, told.cause, told.since, told.answered) == ("closed", 0, "", 0, 4)


async def test_what_is_told_counts_who_is_asked_and_who_waits() -> None:
    pool = Pool((A,), 1)
    gate = asyncio.Event()

    async def ask(address: Address) -> None:
        await gate.wait()

    tasks = [asyncio.create_task(pool.ask(ask, soon())) for _ in range(3)]
    while pool.describe()[0].waiting < 2:
        await asyncio.sleep(0)
    assert (pool.describe()[0].outstanding, pool.describe()[0].limit) == (1, 1)
    gate.set()
    await asyncio.gather(*tasks)
    assert (pool.describe()[0].outstanding, pool.describe()[0].waiting) == (0, 0)
