"""Several real clamds at once: one is killed, hangs, reloads or comes back, and mail does not notice."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from lab.clamd import EICAR, Clamd
from lab.process import ask

from contentfilter import settings
from contentfilter.deadline import Deadline
from contentfilter.errors import BackendError, Cause
from contentfilter.model import Message, ScanOutcome, ScanStatus
from contentfilter.scanners.clamd import ClamdScanner
from contentfilter.scanners.health import Patience

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("nothing_left")]

LETTER = b"From: a@example.org\r\nSubject: hello\r\n\r\nnothing in here\r\n"
HASTY = Patience(look=0.02, suspect=0.05, quiet=0.1, idle=0.2, short=0.1, move=0.4, long=30.0)
WAIT = 20.0
SIGNATURES = 150_000  # so many make clamd reload for some tenths of a second


@pytest.fixture
def three(lab_directory: Path) -> Iterator[list[Clamd]]:
    made = [Clamd(lab_directory / f"pool{number}", "ConcurrentDatabaseReload no") for number in range(3)]
    try:
        yield [each.start() for each in made]
    finally:
        for each in made:
            each.stop()


def scanner(*backends: str, concurrency: int = 4, patience: Patience = HASTY, **changes: object) -> ClamdScanner:
    return ClamdScanner(
        settings.ClamdSettings(backends=backends, concurrency=concurrency, **changes),  # type: ignore[arg-type]
        patience=patience,
    )


@asynccontextmanager
async def watched(one: ClamdScanner) -> AsyncIterator[ClamdScanner]:
    watching = asyncio.create_task(one.watch())
    try:
        yield one
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT):
        while not condition():
            await asyncio.sleep(0.01)


def states(one: ClamdScanner) -> list[str]:
    return [each.state for each in one.limiter.describe()]


async def scan_all(one: ClamdScanner, message: Message, count: int, seconds: float = WAIT) -> list[ScanOutcome]:
    return await asyncio.gather(*(one.scan(message, Deadline.after(seconds)) for _ in range(count)))


@pytest.mark.parametrize("over", ["backend", "tcp_backend"], ids=["unix", "tcp"])
@pytest.mark.parametrize("victims", [1, 2])
async def test_killed_under_load_no_verdict_is_lost_while_one_is_well(
    three: list[Clamd], message, over: str, victims: int
) -> None:
    one = scanner(*(getattr(each, over) for each in three))
    letter, virus = message(LETTER), message(LETTER + EICAR)
    done = 0

    async def scan(number: int) -> ScanOutcome:
        nonlocal done
        outcome = await one.scan(virus if number % 2 else letter, Deadline.after(WAIT))
        done += 1
        if done == 30:
            for each in three[:victims]:
                os.killpg(each.pid, signal.SIGKILL)
        return outcome

    outcomes = await asyncio.gather(*(scan(number) for number in range(300)))
    assert [o.status for o in outcomes] == [ScanStatus.CLEAN, ScanStatus.FOUND] * 150
    shares = Counter(o.backend for o in outcomes)
    assert set(shares) == {getattr(each, over) for each in three}  # all three had answered before
    assert all(shares[getattr(each, over)] < 50 for each in three[:victims])


async def test_a_hanging_backend_takes_its_own_share_and_no_more(three: list[Clamd], message) -> None:
    """Nobody watches here: the limit of questions alone keeps the rest going."""
    one, letter = scanner(*(each.backend for each in three)), message(LETTER)
    three[0].signal(signal.SIGSTOP)
    tasks = [asyncio.create_task(one.scan(letter, Deadline.after(WAIT))) for _ in range(120)]
    await until(lambda: sum(task.done() for task in tasks) == 116)  # all but concurrency, while it hangs
    assert {task.result().backend for task in tasks if task.done()} == {each.backend for each in three[1:]}
    assert [b.outstanding for b in one.limiter.backends] == [4, 0, 0]
    three[0].signal(signal.SIGCONT)
    outcomes = await asyncio.gather(*tasks)
    assert Counter(o.backend for o in outcomes)[three[0].backend] == 4


async def test_one_at_a_time_a_hanging_backend_is_met_once(three: list[Clamd], message) -> None:
    """Least outstanding: with a question stuck in it, it is nobody's first choice."""
    one, letter = scanner(*(each.backend for each in three)), message(LETTER)
    three[0].signal(signal.SIGSTOP)
    stuck = asyncio.create_task(one.scan(letter, Deadline.after(WAIT)))
    await until(lambda: one.limiter.backends[0].outstanding == 1)
    others = [await one.scan(letter, Deadline.after(WAIT)) for _ in range(30)]
    assert {o.backend for o in others} == {each.backend for each in three[1:]}
    assert not stuck.done()
    three[0].signal(signal.SIGCONT)
    assert (await stuck).backend == three[0].backend


async def test_a_silent_clamd_is_set_aside_and_its_questions_are_asked_elsewhere(three: list[Clamd], message) -> None:
    async with watched(scanner(*(each.backend for each in three))) as one:
        letter = message(LETTER)
        three[0].signal(signal.SIGSTOP)
        outcomes = await scan_all(one, letter, 60)  # ends while it is stopped: what it held was moved
        assert {o.backend for o in outcomes} == {each.backend for each in three[1:]}
        assert states(one) == ["silent", "well", "well"]
        assert one.limiter.describe()[0].cause == "reloading"
        assert (await scan_all(one, letter, 8))[0].status is ScanStatus.CLEAN
        three[0].signal(signal.SIGCONT)
        await until(lambda: states(one) == ["well"] * 3)  # the PING that it held back says so
        back = await scan_all(one, letter, 12)
        assert three[0].backend in {o.backend for o in back}


async def test_a_lone_silent_clamd_is_waited_for(three: list[Clamd], message) -> None:
    async with watched(scanner(three[0].backend)) as one:
        three[0].signal(signal.SIGSTOP)
        tasks = [asyncio.create_task(one.scan(message(LETTER), Deadline.after(WAIT))) for _ in range(4)]
        await until(lambda: states(one) == ["silent"])
        late = asyncio.create_task(one.scan(message(LETTER), Deadline.after(WAIT)))
        three[0].signal(signal.SIGCONT)
        assert {o.status for o in await asyncio.gather(*tasks, late)} == {ScanStatus.CLEAN}


async def test_a_lone_silent_clamd_that_lets_the_time_pass_is_called_reloading(three: list[Clamd], message) -> None:
    async with watched(scanner(three[0].backend)) as one:
        three[0].signal(signal.SIGSTOP)
        with pytest.raises(BackendError) as caught:
            await one.scan(message(LETTER), Deadline.after(1.0))
        assert caught.value.cause is Cause.RELOADING
        three[0].signal(signal.SIGCONT)


def _write_signatures(path: Path) -> None:
    path.write_text("".join(f"Big.{n}:0:*:{n:048x}\n" for n in range(SIGNATURES)))


async def test_a_real_reload_without_concurrency_fails_no_mail(three: list[Clamd], message) -> None:
    """RELOAD while mail comes. clamd takes connections meanwhile, but answers neither scan nor PING."""
    await asyncio.to_thread(_write_signatures, three[0].directory / "database" / "big.ndb")
    async with watched(scanner(*(each.backend for each in three[:2]))) as one:
        letter, outcomes, silent = message(LETTER), [], False
        assert await asyncio.to_thread(ask, three[0].socket, b"zRELOAD\0") == b"RELOADING\0"
        for _ in range(40):
            outcomes += await scan_all(one, letter, 8)
            silent = silent or "silent" in states(one)
        await until(lambda: states(one) == ["well", "well"])
        assert {o.status for o in outcomes} == {ScanStatus.CLEAN}
        assert (await scan_all(one, letter, 8))[-1].status is ScanStatus.CLEAN
        assert "Big.0" not in {o.name for o in outcomes}


async def test_a_restarted_clamd_is_found_by_ping_and_no_mail_pays(three: list[Clamd], message) -> None:
    """Every question of mail that is put while it is down or comes back is counted: none is put to it in vain."""
    async with watched(scanner(*(each.backend for each in three[:2]))) as one:
        letter = message(LETTER)
        await scan_all(one, letter, 8)
        three[0].kill()
        await until(lambda: states(one) == ["resting", "well"])  # no mail came: PINGs have found it
        in_vain = one.limiter.backends[0].turn
        for _ in range(10):
            await scan_all(one, letter, 8)
        assert one.limiter.backends[0].turn == in_vain  # never chosen
        three[0].start()
        await until(lambda: one.limiter.backends[0].health.proven)
        outcomes = await scan_all(one, letter, 8)
        assert three[0].backend in {o.backend for o in outcomes}
        assert states(one) == ["well", "well"]
