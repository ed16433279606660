"""The probe: it answers who asks within their deadline, does not pester, and follows the settings."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from lab.peers import Peer, closes, in_turn, read_clamd, read_spamd, says, says_and_stays

from contentfilter.deadline import Deadline
from contentfilter.errors import Cause
from contentfilter.model import Scanner
from contentfilter.monitor import probe
from contentfilter.monitor.probe import Prober
from contentfilter.settings import ClamdSettings, Settings, SpamdSettings

pytestmark = pytest.mark.asyncio

VERSION = says(b"ClamAV 1.0.7/27000/Fri Nov 20 08:00:00 2026\n")
PONG = says(b"SPAMD/1.5 0 PONG\r\n")


def settings(*, clamd: tuple[str, ...] = (), spamd: tuple[str, ...] = ()) -> Settings:
    return Settings(clamd=ClamdSettings(backends=clamd), spamd=SpamdSettings(backends=spamd))


@asynccontextmanager
async def probing(given: Callable[[], Settings], *, rhythm: bool = False) -> AsyncIterator[Prober]:
    prober = Prober(given)
    task = asyncio.create_task(prober.run(rhythm=rhythm))
    try:
        yield prober
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.01)


async def test_both_scanners_are_asked_and_what_they_say_is_known(tmp_path: Path) -> None:
    with Peer(tmp_path, VERSION, read_clamd) as clamd, Peer(None, PONG, read_spamd) as spamd:
        given = settings(clamd=(clamd.backend,), spamd=(spamd.backend, "tcp:127.0.0.1:1"))
        async with probing(lambda: given) as prober:
            await prober.fresh(Deadline.after(10))
        assert spamd.seen == [b"PING SPAMC/1.5\r\n\r\n"]
    up = {(name, labels[0]): value for name, labels, value in prober.samples if name.endswith("_up")}
    assert up == {
        ("contentfilter_clamd_up", clamd.backend): True,
        ("contentfilter_spamd_up", spamd.backend): True,
        ("contentfilter_spamd_up", "tcp:127.0.0.1:1"): False,
    }
    assert ("contentfilter_clamd_database_version", (clamd.backend,), 27000) in prober.samples
    assert prober.results[Scanner.SPAMD, "tcp:127.0.0.1:1"].cause is Cause.DOWN


@pytest.mark.parametrize("talk", [closes(), says(b"SPAMD/1.5 75 EX_TEMPFAIL\r\n"), says(b"HTTP/1.0 200 OK\r\n")])
async def test_a_spamd_that_says_something_else_is_not_up(talk: Callable[..., None]) -> None:
    with Peer(None, talk, read_spamd) as spamd:
        given = settings(spamd=(spamd.backend,))
        async with probing(lambda: given) as prober:
            await prober.fresh(Deadline.after(10))
    assert prober.results[Scanner.SPAMD, spamd.backend].cause is not None


async def test_who_asks_waits_no_longer_than_the_deadline(tmp_path: Path) -> None:
    with Peer(tmp_path, says_and_stays(b""), read_clamd) as clamd:
        given = settings(clamd=(clamd.backend,))
        async with probing(lambda: given) as prober:
            began = time.monotonic()
            await prober.fresh(Deadline.after(0.2))
            assert time.monotonic() - began < 2
            assert prober.results == {}
            clamd.stop()


async def test_many_who_ask_are_one_probe_and_trouble_does_not_make_many(tmp_path: Path) -> None:
    with Peer(tmp_path, VERSION, read_clamd) as clamd:
        given = settings(clamd=(clamd.backend,))
        async with probing(lambda: given) as prober:
            await asyncio.gather(*(prober.fresh(Deadline.after(10)) for _ in range(20)))
            for _ in range(20):
                await prober.fresh(Deadline.after(10))
                prober.suspect(0.0)
            await asyncio.sleep(0)
            assert clamd.connections == 1


async def test_without_a_rhythm_nobody_is_asked_until_somebody_has_trouble(tmp_path: Path) -> None:
    with Peer(tmp_path, VERSION, read_clamd) as clamd:
        given = settings(clamd=(clamd.backend,))
        async with probing(lambda: given) as prober:
            prober.changed()
            await asyncio.sleep(0.05)
            assert clamd.connections == 0
            prober.suspect(0.0)
            await until(lambda: bool(prober.results))
    assert clamd.connections == 1


async def test_trouble_that_the_last_probe_came_after_is_no_news(tmp_path: Path) -> None:
    with Peer(tmp_path, VERSION, read_clamd) as clamd:
        given = settings(clamd=(clamd.backend,))
        async with probing(lambda: given) as prober:
            await prober.fresh(Deadline.after(10))
            prober.suspect(60.0)
            assert not prober._suspected
            prober.suspect(0.0)
            assert prober._suspected


async def test_with_a_rhythm_the_start_and_changed_settings_are_a_reason(tmp_path: Path) -> None:
    with Peer(tmp_path, VERSION, read_clamd) as one, Peer(tmp_path, VERSION, read_clamd) as two:
        given = settings(clamd=(one.backend,))
        async with probing(lambda: given, rhythm=True) as prober:
            await until(lambda: (Scanner.CLAMD, one.backend) in prober.results)
            given = settings(clamd=(two.backend,))
            prober.changed()
            await until(lambda: (Scanner.CLAMD, two.backend) in prober.results)
            assert (Scanner.CLAMD, one.backend) not in prober.results


async def test_one_that_does_not_answer_is_asked_again_until_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "AGAIN", 0.02)
    with Peer(tmp_path, in_turn(closes(), closes(), VERSION), read_clamd) as clamd:
        given = settings(clamd=(clamd.backend,))
        backend = Scanner.CLAMD, clamd.backend
        async with probing(lambda: given) as prober:
            await prober.fresh(Deadline.after(10))
            assert prober.results[backend].cause is not None
            await until(lambda: prober.results[backend].cause is None)
            assert clamd.connections == 3


async def test_failing_probes_in_a_row_have_one_beginning() -> None:
    given = settings(clamd=("unix:/nonexistent/clamd",))
    async with probing(lambda: given) as prober:
        await prober.fresh(Deadline.after(10))
        first = prober.results[Scanner.CLAMD, "unix:/nonexistent/clamd"]
        await prober._look()
        second = prober.results[Scanner.CLAMD, "unix:/nonexistent/clamd"]
    assert second.at > first.at
    assert second.since == first.since
