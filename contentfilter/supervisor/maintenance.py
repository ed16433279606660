"""Chores: what must be done now and then, off the event loop, and may fail without harm.

A chore runs in a thread of its own, a daemon thread, so that one that hangs keeps neither the others' results
nor the process. Its result is logged as ``housekeeping.done``, its failure as ``housekeeping.failed``.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contentfilter.log import Logger
from contentfilter.settings import Settings
from contentfilter.store.quarantine import Quarantine
from contentfilter.supervisor.clock import FILE, clock_is_sane
from contentfilter.threads import in_thread

DELAY = 60.0  # seconds from the start to the first round
INTERVAL = 3600.0


@dataclass(frozen=True, slots=True)
class MaintenanceJob:
    """Something to do under the settings that hold then; returns what it did, for the log.

    The flag says whether anything may go because of its age: not while the clock is doubted.
    """

    name: str
    run: Callable[[Settings, bool], Mapping[str, Any]]  # in a thread: it may block and raise


async def run_maintenance(
    maintenance_jobs: Sequence[MaintenanceJob],
    settings: Callable[[], Settings],
    log: Logger,
    delay: float = DELAY,
    interval: float = INTERVAL,
) -> None:
    """All chores, one after the other, after ``delay`` and then every ``interval`` seconds. Does not return."""
    await asyncio.sleep(delay)
    while True:
        clock = Path(settings().service.state) / FILE
        aged = await in_thread(lambda clock=clock: clock_is_sane(clock, time.time()))  # type: ignore[misc]
        if not aged:
            log.warning("clock.jumped", path=str(clock))
        for chore in maintenance_jobs:
            await _do(chore, settings(), aged, log)
        await asyncio.sleep(interval)


async def _do(chore: MaintenanceJob, settings: Settings, aged: bool, log: Logger) -> None:
    began = time.monotonic()
    try:
        counts = await in_thread(lambda: chore.run(settings, aged))
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        log.error("housekeeping.failed", chore=chore.name, why=why)  # noqa: TRY400 - a full disk is no defect
    else:
        log.info("housekeeping.done", chore=chore.name, seconds=round(time.monotonic() - began, 3), **counts)


def maintenance_jobs() -> tuple[MaintenanceJob, ...]:
    """What the supervisor does now and then."""
    return (MaintenanceJob("quarantine", expire_quarantine),)


def expire_quarantine(settings: Settings, aged: bool) -> dict[str, int]:
    """Retention and quota of the quarantine. Raises OSError."""
    removed = Quarantine.of(settings).expire(aged=aged)
    return {"entries": len(removed.entries), "stray": removed.stray, "used": removed.used}
