"""The probe: it answers who asks within their deadline, does not pester, and follows the settings."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from lab.peers import Peer, closes, in_turn, read_clamd, read_spamd, says, says_and_stays

from contentfilter.deadline import Deadline
from contentfilter.errors import Cause
from contentfilter.model import Scanner
from contentfilter.monitor import probe
from contentfilter.monitor.probe import Prober
from contentfilter.scanners.health import BackendHealth, ProbeResult
from contentfilter.settings import ClamdSettings, Settings, SpamdSettings

pytestmark = pytest.mark.asyncio

VERSION = says(b"ClamAV 1.0.7/27000/Fri Nov 20 08:00:00 2026\n")
PONG = says(b"SPAMD/1.5 0 PONG\r\n")


def settings(*, clamd: tuple[str, ...] = (), spamd: tuple[str, ...] = ()) -> Settings:
    return Settings(clamd=ClamdSettings(backends=clamd), spamd=SpamdSettings(backends=spamd))


@asynccontextmanager
async def probing(given: Callable[[], Settings]) -> AsyncIterator[Prober]:
    prober = Prober(given)
    task = asyncio.create_task(prober.run())
    try:
        yield prober
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def doubt(backend: str, failed: float = 0.0) -> BackendHealth:
    """A worker's report of a failure, so many seconds ago."""
    return BackendHealth("clamd", backend, "closed", 1, "down", failed, failed, None, 0, 8, 0)


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
            assert prober.results == {}, "it is reported after SILENT_AFTER"
            clamd.stop()


async def test_many_who_ask_are_one_probe_and_doubts_do_not_make_many(tmp_path: Path) -> None:
    with Peer(tmp_path, VERSION, read_clamd) as clamd:
        given = settings(clamd=(clamd.backend,))
        async with probing(lambda: given) as prober:
            await asyncio.gather(*(prober.fresh(Deadline.after(10)) for _ in range(20)))
            for _ in range(20):
                await prober.fresh(Deadline.after(10))
                prober.heard(doubt(clamd.backend))
            await asyncio.sleep(0)
            assert clamd.connections == 1


@pytest.mark.parametrize("why", ["a failure", "requests without an answer"])
async def test_a_worker_that_doubts_a_backend_has_it_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(probe, "AGAIN", 0.02)
    with Peer(tmp_path, VERSION, read_clamd) as clamd:
        given = settings(clamd=(clamd.backend,))
        async with probing(lambda: given) as prober:
            await until(lambda: bool(prober.results))
            prober.heard(doubt(clamd.backend, failed=60.0))  # the probe came after it
            well = replace(doubt(clamd.backend), failures=0, outstanding=8, quiet=probe.QUIET)
            prober.heard(well)
            await asyncio.sleep(0.1)
            assert clamd.connections == 1
            prober.heard(doubt(clamd.backend) if why == "a failure" else replace(well, quiet=probe.QUIET + 0.1))
            await until(lambda: clamd.connections == 2)


async def test_the_start_the_rhythm_and_other_backends_are_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "EVERY", 0.05)
    with Peer(tmp_path, VERSION, read_clamd) as one, Peer(tmp_path, VERSION, read_clamd) as two:
        given = settings(clamd=(one.backend,))
        async with probing(lambda: given) as prober:
            await until(lambda: one.connections > 2)
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
            await until(lambda: backend in prober.results)
            assert prober.results[backend].cause is not None
            await until(lambda: prober.results[backend].cause is None)
            assert clamd.connections == 3


async def test_a_probe_without_an_answer_is_reported_while_it_waits_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clamd that hangs or reloads: one connection in its listen queue, and its answer counts when it comes."""
    monkeypatch.setattr(probe, "SILENT_AFTER", 0.02)
    monkeypatch.setattr(probe, "AGAIN", 0.02)
    answer = threading.Event()

    def late(peer: Peer, sock: socket.socket) -> None:
        peer.read(sock)
        answer.wait(20)
        sock.sendall(b"ClamAV 1.0.7/27000/Fri Nov 20 08:00:00 2026\n")

    published: list[tuple[ProbeResult, ...]] = []
    with Peer(tmp_path, late, read_clamd) as clamd:
        given = settings(clamd=(clamd.backend,))
        prober = Prober(lambda: given, published.append)
        task = asyncio.create_task(prober.run())
        await until(lambda: len(published) > 5)
        assert {(r.cause, r.asked) for (r,) in published} == {(Cause.TIMEOUT, published[0][0].asked)}
        assert clamd.connections == 1
        answer.set()
        await until(lambda: published[-1][0].cause is None)
        assert published[-1][0].database == "ClamAV 1.0.7/27000/2026-11-20 08:00:00+00:00"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_answer_to_mail_of_any_worker_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SILENT_AFTER", 0.02)
    monkeypatch.setattr(probe, "AGAIN", 0.02)
    published: list[tuple[ProbeResult, ...]] = []
    with Peer(tmp_path, says_and_stays(b""), read_clamd) as clamd:
        given = settings(clamd=(clamd.backend,))
        prober = Prober(lambda: given, published.append)
        task = asyncio.create_task(prober.run())
        await until(lambda: bool(published))
        before = time.monotonic()
        prober.heard(replace(doubt(clamd.backend), answered=0.0))
        await until(lambda: published[-1][0].answered >= before)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        clamd.stop()


async def test_failing_probes_in_a_row_have_one_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "AGAIN", 0.02)
    given, backend = settings(clamd=("unix:/nonexistent/clamd",)), (Scanner.CLAMD, "unix:/nonexistent/clamd")
    async with probing(lambda: given) as prober:
        await until(lambda: backend in prober.results)
        first = prober.results[backend]
        await until(lambda: prober.results[backend].at > first.at)
        second = prober.results[backend]
    assert second.at > first.at
    assert second.since == first.since
