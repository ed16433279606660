"""Maintenance jobs: run periodically, off the event loop, and may fail without harm.

A job runs in a daemon thread of its own and with a time limit, so that one that hangs blocks neither the process nor
the other jobs. Its result is logged as ``housekeeping.done``, its failure as ``housekeeping.failed``.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from contentfilter.errors import ConfigError
from contentfilter.files import FileAccess
from contentfilter.log import Logger
from contentfilter.settings import Settings
from contentfilter.store.quarantine import Quarantine
from contentfilter.supervisor.clock import FILE, clock_is_sane

DELAY = 60.0  # seconds from the start to the first round
INTERVAL = 3600.0
JOB_TIMEOUT = 1800.0  # seconds; a job that takes longer goes on, and is not started again meanwhile


@dataclass(frozen=True, slots=True)
class MaintenanceJob:
    """A periodic job. ``run`` gets the settings in force and returns counts for the log.

    Its flag is False while the clock is doubted: then nothing may be deleted because of its age.
    """

    name: str
    run: Callable[[Settings, bool], Mapping[str, Any]]  # in a thread: it may block and raise


async def run_maintenance(
    jobs: Sequence[MaintenanceJob],
    settings: Callable[[], Settings],
    log: Logger,
    delay: float = DELAY,
    interval: float = INTERVAL,
) -> None:
    """Run all jobs, one after the other, after ``delay`` and then every ``interval`` seconds. Does not return."""
    files = FileAccess()
    access = {job.name: FileAccess() for job in jobs}
    await asyncio.sleep(delay)
    while True:
        aged = await _clock_is_sane(Path(settings().service.state) / FILE, files, log)
        for job in jobs:
            await _run(job, access[job.name], settings(), aged, log)
        await asyncio.sleep(interval)


async def _clock_is_sane(path: Path, files: FileAccess, log: Logger) -> bool:
    try:
        sane = await files.run(str(path), partial(clock_is_sane, path, time.time()))
    except ConfigError as error:  # then nothing may be deleted because of its age either
        log.error("housekeeping.failed", chore="clock", why=str(error))  # noqa: TRY400 - no defect
        return False
    if not sane:
        log.warning("clock.jumped", path=str(path))
    return sane


async def _run(job: MaintenanceJob, access: FileAccess, settings: Settings, aged: bool, log: Logger) -> None:
    began = time.monotonic()
    try:
        counts = await access.run(job.name, partial(job.run, settings, aged), JOB_TIMEOUT)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        log.error("housekeeping.failed", chore=job.name, why=why)  # noqa: TRY400 - a full disk is no defect
    else:
        log.info("housekeeping.done", chore=job.name, seconds=round(time.monotonic() - began, 3), **counts)


def maintenance_jobs() -> tuple[MaintenanceJob, ...]:
    """The supervisor's jobs, its own journal apart."""
    return (MaintenanceJob("quarantine", expire_quarantine),)


def expire_quarantine(settings: Settings, aged: bool) -> dict[str, int]:
    """Apply retention and quota to the quarantine. Raises OSError."""
    removed = Quarantine.of(settings).expire(aged=aged)
    return {"entries": len(removed.entries), "stray": removed.stray, "used": removed.used}
