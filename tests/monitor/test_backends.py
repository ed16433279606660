"""How a backend stands: the newest word of workers and probes counts, and "since" does not begin anew."""

import time
from dataclasses import replace
from typing import Any

import pytest

from contentfilter.bus.messages import BackendStatus, WorkerStatus
from contentfilter.errors import Cause
from contentfilter.model import Scanner
from contentfilter.monitor.backends import STALE, backend_statuses
from contentfilter.monitor.probe import Probed
from contentfilter.scanners.health import BackendHealth
from contentfilter.settings import ClamdSettings, FailureSettings, Settings, SpamdSettings

CLAMD = "unix:/c"
SETTINGS = Settings(clamd=ClamdSettings(backends=(CLAMD,)), spamd=SpamdSettings(backends=()))
WELL = BackendHealth("clamd", CLAMD, "closed", 0, "", 0.0, 0.0, None, 0, 8, 0)


def sick(since: float, failed: float, cause: str = "down", **more: Any) -> BackendHealth:
    return replace(WELL, failures=2, cause=cause, since=since, failed=failed, **more)


def worker(slot: int, health: BackendHealth, silent: float = 0.0) -> WorkerStatus:
    return WorkerStatus(slot, slot, "ready", 1, 9.0, silent, 0.0, 0, (), {}, backends=(health,))


def status(*healths: BackendHealth, probed: Probed | None = None, settings: Settings = SETTINGS) -> BackendStatus:
    workers = [worker(slot, health) for slot, health in enumerate(healths)]
    (found,) = backend_statuses(workers, {(Scanner.CLAMD, CLAMD): probed} if probed else {}, settings)
    return found


def answered(ago: float) -> Probed:
    at = time.monotonic() - ago
    return Probed(at, answered=at)


def unanswered(ago: float, since: float) -> Probed:
    now = time.monotonic()
    return Probed(now - ago, Cause.DOWN, "refused", now - since)


def since(found: BackendStatus) -> float:
    """Seconds ago."""
    return round(time.time() - found.since)


def test_nobody_asked_is_unknown() -> None:
    assert status(WELL).state == status().state == "unknown"


def test_a_failure_of_one_worker_is_known_since_its_first() -> None:
    found = status(WELL, sick(30, 5))
    assert (found.state, found.cause, found.failures, since(found)) == ("failing", "down", 2, 30)


def test_the_age_of_the_heartbeat_counts() -> None:
    (found,) = backend_statuses([worker(0, sick(30, 5), silent=10)], {}, SETTINGS)
    assert since(found) == 40


@pytest.mark.parametrize("cause", ["down", "timeout", "bad-reply"])
def test_a_later_scan_of_any_worker_outweighs_a_failure(cause: str) -> None:
    assert status(replace(WELL, answered=2.0), sick(30, 5, cause)).state == "well"
    assert status(replace(WELL, answered=8.0), sick(30, 5, cause)).state == "failing"


def test_a_trouble_begins_after_the_last_sound_answer() -> None:
    assert since(status(replace(WELL, answered=12.0), sick(30, 5))) == 12
    assert since(status(sick(30, 5), probed=answered(12))) == 12
    assert since(status(sick(30, 5, "timeout"), probed=answered(12))) == 30  # that proves nothing about scans


def test_a_backend_that_some_worker_leaves_alone_is_sick_whatever_others_say() -> None:
    resting = replace(sick(30, 5), state="open")
    assert status(replace(WELL, answered=1.0), resting, probed=answered(1)).state == "failing"


def test_a_probe_proves_that_somebody_is_there_and_not_that_scans_work() -> None:
    assert status(sick(30, 5, "down"), probed=answered(1)).state == "well"
    assert status(sick(30, 5, "down"), probed=answered(6)).state == "failing"
    assert status(sick(30, 5, "timeout"), probed=answered(1)).state == "failing"
    assert status(sick(STALE + 30, STALE + 5, "timeout"), probed=answered(1)).state == "well"


def test_a_probe_without_an_answer_is_a_trouble_of_its_own_until_a_scan_succeeds() -> None:
    found = status(WELL, probed=unanswered(1, since=300))
    assert (found.state, found.detail, since(found)) == ("failing", "refused", 300)
    assert status(replace(WELL, answered=0.5), probed=unanswered(1, since=300)).state == "well"
    assert since(status(replace(WELL, answered=100.0), probed=unanswered(1, since=300))) == 100


def test_what_mail_gets_meanwhile_is_what_the_failure_table_says() -> None:
    found = status(sick(30, 5))
    assert found.meanwhile == {
        "stranger": "defer", "relay": "defer", "authenticated": "defer", "local": "defer", "bounce": "pass"
    }  # fmt: skip
    passing = Settings(clamd=SETTINGS.clamd, spamd=SETTINGS.spamd, failure=FailureSettings(clamd="pass"))
    assert set(status(sick(30, 5), settings=passing).meanwhile.values()) == {"pass"}


def test_numbers_are_summed_and_one_worker_that_wants_it_is_enough() -> None:
    busy = replace(WELL, outstanding=3, waiting=2, answered=1.0)
    found = status(busy, replace(busy, wanted=False))
    assert (found.outstanding, found.limit, found.waiting, found.wanted) == (6, 16, 4, True)
    assert not status(replace(WELL, wanted=False)).wanted


def test_a_backend_that_is_no_longer_configured_is_not_told() -> None:
    stranger = replace(WELL, backend="unix:/old")
    (found,) = backend_statuses([worker(0, stranger)], {}, SETTINGS)
    assert (found.backend, found.state) == (CLAMD, "unknown")
