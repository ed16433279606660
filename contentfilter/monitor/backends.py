"""Backend states, aggregated from every worker and the last probe.

The newest report counts. A sound answer to any worker outweighs all failures before it. A probe's answer outweighs an
earlier "nothing listens"; it does not prove that scans work, so other failures count until one does or they are old.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

import msgspec

from contentfilter.bus.messages import BackendStatus, WorkerStatus
from contentfilter.errors import Cause
from contentfilter.model import OriginKind, Scanner
from contentfilter.monitor.probe import Probed
from contentfilter.policy.failure import failure_action
from contentfilter.scanners.health import BackendHealth, State
from contentfilter.settings import Settings

STALE = 900.0  # seconds after which a probe's answer outweighs any failure
NEVER = float("inf")

Probes = Mapping[tuple[Scanner, str], Probed]


def backend_statuses(workers: Iterable[WorkerStatus], probes: Probes, settings: Settings) -> tuple[BackendStatus, ...]:
    """One for each backend that is configured."""
    now = time.monotonic()
    known: dict[tuple[str, str], list[BackendHealth]] = {}
    for worker in workers:
        for health in worker.backends:
            known.setdefault((health.scanner, health.backend), []).append(_aged(health, worker.silent))
    configured = [(Scanner.CLAMD, name) for name in settings.clamd.backends]
    configured += [(Scanner.SPAMD, name) for name in settings.spamd.backends]
    return tuple(
        _status(scanner, name, known.get((scanner.value, name), []), probes.get((scanner, name)), settings, now)
        for scanner, name in configured
    )


def _aged(health: BackendHealth, silent: float) -> BackendHealth:
    """As of now, not of the heartbeat."""
    answered = None if health.answered is None else health.answered + silent
    return replace(health, since=health.since + silent, failed=health.failed + silent, answered=answered)


def _status(
    scanner: Scanner, backend: str, healths: list[BackendHealth], probed: Probed | None, settings: Settings, now: float
) -> BackendStatus:
    """Everything is compared by age: seconds that have passed."""
    scanned = min((h.answered for h in healths if h.answered is not None), default=NEVER)
    pinged = now - probed.answered if probed and probed.answered is not None else NEVER
    troubles = []  # age of the last failure, of the first one, cause, detail
    for health in healths:
        good = min(scanned, pinged) if health.cause == Cause.DOWN.value or health.failed > STALE else scanned
        if health.failures and (health.state == State.OPEN.value or health.failed < good):
            troubles.append((health.failed, max(health.failed, min(health.since, good)), health.cause, ""))
    if probed and probed.cause and now - probed.at < scanned:
        began = min(now - probed.since, scanned)
        troubles.append((now - probed.at, began, probed.cause.value, probed.detail))
    heard, clock = min(scanned, pinged), time.time()
    status = BackendStatus(
        scanner=scanner.value,
        backend=backend,
        state="unknown" if heard == NEVER else "well",
        heard=0.0 if heard == NEVER else clock - heard,
        outstanding=sum(h.outstanding for h in healths),
        limit=sum(h.limit for h in healths),
        waiting=sum(h.waiting for h in healths),
        wanted=any(h.wanted for h in healths) or not healths,
    )
    if not troubles:
        return status
    _, _, cause, detail = min(troubles)
    return msgspec.structs.replace(
        status,
        state="failing",
        cause=cause,
        detail=detail,
        since=clock - max(began for _, began, _, _ in troubles),
        failures=sum(h.failures for h in healths),
        meanwhile={origin.value: failure_action(scanner, Cause(cause), origin, settings) for origin in OriginKind},
    )
