"""Chores: done now and then in a thread, told in the log, and never fatal."""

import asyncio
import json
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from contentfilter.deadline import Deadline
from contentfilter.log import make_logger
from contentfilter.model import Message
from contentfilter.settings import QuarantineSettings as QuarantineSettings
from contentfilter.settings import ServiceSettings, Settings
from contentfilter.store.quarantine import Quarantine
from contentfilter.supervisor import maintenance
from contentfilter.supervisor.clock import DAY, clock_is_sane
from contentfilter.supervisor.maintenance import MaintenanceJob, maintenance_jobs, run_maintenance

pytestmark = pytest.mark.asyncio

WAIT = 30.0
House = Callable[..., Awaitable[list[dict[str, Any]]]]


@pytest.fixture
def house(tmp_path: Path) -> House:
    """Runs chores until ``enough`` is set; the log lines."""

    async def run(
        *given: MaintenanceJob, enough: asyncio.Event, settings: Callable[[], Settings] | None = None
    ) -> list[Any]:
        state = ServiceSettings(state=str(tmp_path))
        settings = settings or (lambda: Settings(service=state))
        fd = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        task = asyncio.create_task(run_maintenance(given, settings, make_logger("json", "info", fd), 0.0, 0.0))
        async with asyncio.timeout(WAIT):
            await enough.wait()
        task.cancel()
        os.close(fd)
        return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]

    return run


async def test_every_round_does_all_chores_with_the_settings_of_then(house: House) -> None:
    loop, enough = asyncio.get_running_loop(), asyncio.Event()
    seen: list[tuple[str, int]] = []
    workers = iter(range(1, 100))

    def chore(name: str) -> MaintenanceJob:
        def run(settings: Settings, aged: bool) -> dict[str, int]:
            seen.append((name, settings.service.workers))
            if len(seen) == 6:
                loop.call_soon_threadsafe(enough.set)
            return {"things": 3}

        return MaintenanceJob(name, run)

    lines = await house(
        chore("one"),
        chore("two"),
        enough=enough,
        settings=lambda: Settings(service=ServiceSettings(workers=next(workers), state="/nonexistent")),
    )
    assert seen[:6] == [("one", 2), ("two", 3), ("one", 5), ("two", 6), ("one", 8), ("two", 9)]  # each round asks, too
    assert [(line["event"], line["chore"], line["things"]) for line in lines[:2]] == [
        ("housekeeping.done", "one", 3),
        ("housekeeping.done", "two", 3),
    ]


async def test_a_chore_that_hangs_is_told_hinders_no_other_and_is_not_begun_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "JOB_TIMEOUT", 0.1)
    loop, enough, end = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    begun: list[str] = []

    def hangs(settings: Settings, aged: bool) -> dict[str, int]:
        begun.append("hangs")
        end.wait(WAIT)
        return {}

    def works(settings: Settings, aged: bool) -> dict[str, int]:
        begun.append("works")
        if begun.count("works") == 3:
            loop.call_soon_threadsafe(enough.set)
        return {}

    lines = await house(MaintenanceJob("bad", hangs), MaintenanceJob("good", works), enough=enough)
    end.set()
    assert begun.count("hangs") == 1
    failed = [line for line in lines if line["event"] == "housekeeping.failed"]
    assert len(failed) >= 3
    assert all("bad: it did not answer within 0.1 s" in line["why"] for line in failed)


async def test_a_chore_that_fails_is_told_and_hinders_no_other(house: House) -> None:
    loop, enough = asyncio.get_running_loop(), asyncio.Event()
    rounds = 0

    def fails(settings: Settings, aged: bool) -> dict[str, int]:
        raise OSError(28, "No space left on device")

    def works(settings: Settings, aged: bool) -> dict[str, int]:
        nonlocal rounds
        rounds += 1
        if rounds == 2:
            loop.call_soon_threadsafe(enough.set)
        return {}

    lines = await house(MaintenanceJob("bad", fails), MaintenanceJob("good", works), enough=enough)
    assert [(line["event"], line["level"], line["chore"]) for line in lines[:3]] == [
        ("housekeeping.failed", "error", "bad"),
        ("housekeeping.done", "info", "good"),
        ("housekeeping.failed", "error", "bad"),
    ]
    assert "No space left" in lines[0]["why"]


async def test_a_chore_that_hangs_blocks_neither_the_loop_nor_the_end(house: House) -> None:
    loop, began, release = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def hangs(settings: Settings, aged: bool) -> dict[str, int]:
        threads.append(threading.current_thread())
        loop.call_soon_threadsafe(began.set)
        release.wait(WAIT)
        return {}

    assert await house(MaintenanceJob("slow", hangs), enough=began) == []
    assert threads[0].is_alive()
    assert threads[0].daemon  # the process may end
    release.set()
    threads[0].join(WAIT)


async def test_the_quarantine_is_one_of_them(tmp_path: Path) -> None:
    settings = Settings(service=ServiceSettings(state=str(tmp_path)), quarantine=QuarantineSettings(retention=1.0))
    old = Quarantine(tmp_path / "quarantine", clock=lambda: 1_000_000.0)
    await old.keep("old", Message(-1, 4, b"mail"), {}, Deadline.after(WAIT))
    await Quarantine.of(settings).keep("young", Message(-1, 4, b"mail"), {}, Deadline.after(WAIT))
    (chore,) = (chore for chore in maintenance_jobs() if chore.name == "quarantine")
    assert chore.run(settings, True)["entries"] == 1
    assert [entry.incident for entry in Quarantine.of(settings).entries()] == ["young"]


async def test_while_the_clock_is_doubted_age_alone_removes_nothing(house: House, tmp_path: Path) -> None:
    """The whole way: housekeeping, quarantine, journal; and what was asked for by hand is done."""
    settings = Settings(service=ServiceSettings(state=str(tmp_path)), quarantine=QuarantineSettings(retention=1.0))
    old = Quarantine(tmp_path / "quarantine", clock=lambda: 1_000_000.0)
    await old.keep("old", Message(-1, 4, b"mail"), {}, Deadline.after(WAIT))
    assert clock_is_sane(tmp_path / "clock", 1_000_000.0)  # the last round was then, so today is a jump
    loop, enough = asyncio.get_running_loop(), asyncio.Event()
    asked: list[bool] = []

    def last(settings: Settings, aged: bool) -> dict[str, int]:
        asked.append(aged)
        loop.call_soon_threadsafe(enough.set)
        return {}

    lines = await house(*maintenance_jobs(), MaintenanceJob("last", last), enough=enough, settings=lambda: settings)
    assert [line["event"] for line in lines[:2]] == ["clock.jumped", "housekeeping.done"]
    assert not asked[0]
    assert [entry.incident for entry in Quarantine.of(settings).entries()] == ["old"]
    assert Quarantine.of(settings).expire().entries == ("old",)


async def test_a_full_quota_on_a_wrong_clock_takes_the_oldest_and_no_more(tmp_path: Path) -> None:
    clock = [1_000_000.0]
    quarantine = Quarantine(tmp_path / "quarantine", quota=30_000, retention=1.0, clock=lambda: clock[0])
    for number in range(3):
        clock[0] += 1
        await quarantine.keep(f"old{number}", Message(-1, 8000, b"%d" % number * 8000), {}, Deadline.after(WAIT))
    clock[0] += 365 * DAY
    await quarantine.keep("new", Message(-1, 8000, b"n" * 8000), {}, Deadline.after(WAIT))
    assert {entry.incident for entry in quarantine.entries()} == {"old1", "old2", "new"}
