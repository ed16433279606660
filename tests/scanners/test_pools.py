"""Several real clamds at once: one is killed, hangs, reloads or comes back, and mail does not notice."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from lab.clamd import EICAR, Clamd
from lab.process import ask

from contentfilter import settings
from contentfilter.deadline import Deadline
from contentfilter.errors import BackendError, Cause
from contentfilter.model import Message, ScanOutcome, ScanStatus
from contentfilter.monitor import probe
from contentfilter.monitor.probe import Prober
from contentfilter.scanners import health
from contentfilter.scanners.clamd import ClamdScanner

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("nothing_left")]

LETTER = b"From: a@example.org\r\nSubject: hello\r\n\r\nnothing in here\r\n"
PATIENCE = 0.4
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


def scanner(*backends: str, concurrency: int = 4, patience: float = PATIENCE, **changes: object) -> ClamdScanner:
    return ClamdScanner(
        settings.ClamdSettings(backends=backends, concurrency=concurrency, **changes),  # type: ignore[arg-type]
        patience=patience,
    )


@asynccontextmanager
async def watched(one: ClamdScanner, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ClamdScanner]:
    """With a prober and heartbeats as in the daemon, only faster."""
    for name, seconds in {"SILENT_AFTER": 0.1, "EVERY": 0.2, "AGAIN": 0.05, "QUIET": 0.1}.items():
        monkeypatch.setattr(probe, name, seconds)
    monkeypatch.setattr(health, "SILENT_AFTER", 0.1)
    backends = tuple(str(backend.address) for backend in one.limiter.backends)
    given = settings.Settings(
        clamd=settings.ClamdSettings(backends=backends), spamd=settings.SpamdSettings(backends=())
    )
    prober = Prober(lambda: given, lambda results: [one.learn(result) for result in results])
    tasks = asyncio.create_task(prober.run()), asyncio.create_task(beat(one, prober))
    try:
        yield one
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def beat(one: ClamdScanner, prober: Prober) -> None:
    while True:
        for each in one.limiter.describe():
            prober.heard(each)
        await asyncio.sleep(0.05)


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


async def test_a_silent_clamd_is_set_aside_and_its_questions_are_asked_elsewhere(
    three: list[Clamd], message, monkeypatch
) -> None:
    async with watched(scanner(*(each.backend for each in three)), monkeypatch) as one:
        letter = message(LETTER)
        three[0].signal(signal.SIGSTOP)
        outcomes = await scan_all(one, letter, 60)  # ends while it is stopped: what it held was moved
        assert {o.backend for o in outcomes} == {each.backend for each in three[1:]}
        assert states(one) == ["unresponsive", "closed", "closed"]
        assert one.limiter.describe()[0].cause == "timeout"
        assert (await scan_all(one, letter, 8))[0].status is ScanStatus.CLEAN
        three[0].signal(signal.SIGCONT)
        await until(lambda: states(one) == ["closed"] * 3)  # the probe that it held back says so
        back = await scan_all(one, letter, 12)
        assert three[0].backend in {o.backend for o in back}


async def test_a_lone_silent_clamd_is_waited_for_as_long_as_patience_lasts(
    three: list[Clamd], message, monkeypatch
) -> None:
    async with watched(scanner(three[0].backend, patience=WAIT), monkeypatch) as one:
        three[0].signal(signal.SIGSTOP)
        tasks = [asyncio.create_task(one.scan(message(LETTER), Deadline.after(WAIT))) for _ in range(4)]
        await until(lambda: states(one) == ["unresponsive"])
        late = asyncio.create_task(one.scan(message(LETTER), Deadline.after(WAIT)))
        three[0].signal(signal.SIGCONT)
        assert {o.status for o in await asyncio.gather(*tasks, late)} == {ScanStatus.CLEAN}


@pytest.mark.parametrize("over", ["backend", "tcp_backend"], ids=["unix", "tcp"])
async def test_a_hung_clamd_is_a_timeout_for_all_and_a_wait_for_the_first_only(
    three: list[Clamd], message, monkeypatch, over: str
) -> None:
    """Those that it holds, those that wait for a slot, and those that come later: one cause."""
    async with watched(scanner(getattr(three[0], over), concurrency=2), monkeypatch) as one:
        three[0].signal(signal.SIGSTOP)
        began, letter = time.monotonic(), message(LETTER)
        first = await asyncio.gather(
            *(one.scan(letter, Deadline.after(WAIT)) for _ in range(8)), return_exceptions=True
        )
        assert [getattr(error, "cause", None) for error in first] == [Cause.TIMEOUT] * 8
        assert time.monotonic() - began < WAIT / 2
        began = time.monotonic()
        for _ in range(100):
            with pytest.raises(BackendError, match="no sign of life") as caught:
                await one.scan(letter, Deadline.after(WAIT))
            assert caught.value.cause is Cause.TIMEOUT
        assert time.monotonic() - began < 1.0
        three[0].signal(signal.SIGCONT)
        await until(lambda: states(one) == ["closed"])
        assert (await one.scan(letter, Deadline.after(WAIT))).status is ScanStatus.CLEAN


def _write_signatures(path: Path) -> None:
    path.write_text("".join(f"Big.{n}:0:*:{n:048x}\n" for n in range(SIGNATURES)))


async def test_a_real_reload_without_concurrency_fails_no_mail(three: list[Clamd], message, monkeypatch) -> None:
    """RELOAD while mail comes. clamd takes connections meanwhile, but answers neither scans nor probes."""
    await asyncio.to_thread(_write_signatures, three[0].directory / "database" / "big.ndb")
    async with watched(scanner(*(each.backend for each in three[:2])), monkeypatch) as one:
        letter, outcomes, silent = message(LETTER), [], False
        assert await asyncio.to_thread(ask, three[0].socket, b"zRELOAD\0") == b"RELOADING\0"
        for _ in range(40):
            outcomes += await scan_all(one, letter, 8)
            silent = silent or "unresponsive" in states(one)
        await until(lambda: states(one) == ["closed", "closed"])
        assert {o.status for o in outcomes} == {ScanStatus.CLEAN}
        assert (await scan_all(one, letter, 8))[-1].status is ScanStatus.CLEAN
        assert "Big.0" not in {o.name for o in outcomes}


async def test_a_restarted_clamd_is_found_by_a_probe_and_no_mail_pays(three: list[Clamd], message, monkeypatch) -> None:
    """Every question of mail that is put while it is down or comes back is counted: none is put to it in vain."""
    async with watched(scanner(*(each.backend for each in three[:2])), monkeypatch) as one:
        letter = message(LETTER)
        await scan_all(one, letter, 8)
        three[0].kill()
        await until(lambda: states(one) == ["open", "closed"])  # no mail came: probes have found it
        in_vain = one.limiter.backends[0].turn
        for _ in range(10):
            await scan_all(one, letter, 8)
        assert one.limiter.backends[0].turn == in_vain  # never chosen
        three[0].start()
        await until(lambda: one.limiter.backends[0].proven)
        outcomes = await scan_all(one, letter, 8)
        assert three[0].backend in {o.backend for o in outcomes}
        assert states(one) == ["closed", "closed"]
