"""Diagnosis of a status for people: does mail flow, what has been wrong since when, and what to do about it.

Pure. The verdict is the first line that an administrator reads; each issue has a remedy and names its heading in
docs/runbook.md. Only what is wrong now is an issue: what is over is in the numbers of the last minutes.
"""

import time
from collections.abc import Iterator
from typing import Literal

import msgspec

from contentfilter.bus.messages import BackendStatus, Status, Window, WorkerStatus
from contentfilter.doors.canary import CLEAN
from contentfilter.errors import Cause
from contentfilter.model import OriginKind, Scanner
from contentfilter.store.overrides import ALLOW_FILE

SILENT = 10.0  # seconds without a heartbeat after which a worker is not counted as accepting mail
SLOW = 60.0  # seconds after which a message in flight is an issue
CROWDED = 0.25  # share of the socket's queue that is taken
RISING = 0.1  # share of deferred messages
OVER = 8.0  # seconds after the last deferral from which a later success shows that deferrals are over
UNREACHED = ("failed", "no-answer", "unknown")  # results of a canary sample that no worker of this daemon handled

WORDS = {
    Cause.DOWN.value: "has been down",
    Cause.TIMEOUT.value: "has not answered in time",
    Cause.BUSY.value: "has been busy",
    Cause.BAD_REPLY.value: "has given invalid answers",
    Cause.RELOADING.value: "has been reloading",
    Cause.MEMORY.value: "has been out of memory",
}

Effect = Literal["stops", "unchecked", ""]
"""The effect of an issue on mail: it waits or is deferred, it flows without a check, none."""


class Issue(msgspec.Struct, frozen=True):
    """Something that is wrong now."""

    what: str
    remedy: str
    runbook: str  # a heading
    effect: Effect = ""


class Oldest(msgspec.Struct, frozen=True):
    """The message that has been here longest."""

    incident: str
    stage: str
    seconds: float
    worker: int  # its slot


class Diagnosis(msgspec.Struct, frozen=True):
    verdict: str
    ok: bool  # nothing is wrong
    flowing: bool  # mail is accepted and delivered
    troubles: tuple[Issue, ...]  # the worst first
    oldest: Oldest | None


def diagnose(status: Status, now: float) -> Diagnosis:
    """``now``: seconds since 1970."""
    oldest = oldest_message(status.workers)
    found = (*_service(status, now), *_scanners(status, now), *_deferrals(status, now), *_slow(status, oldest))
    troubles = tuple(
        sorted(
            (*found, *_poison(status), *_refused(status), *_configuration(status)),
            key=lambda issue: _ORDER[issue.effect],
        )
    )
    stopped = next((issue.what for issue in troubles if issue.effect == "stops"), "")
    unchecked = [issue.what for issue in troubles if issue.effect == "unchecked"]
    if stopped:
        verdict = stopped
    elif unchecked:
        verdict = f"mail is flowing UNCHECKED: {'; '.join(unchecked)}"
    else:
        verdict = _idle_text(status)
    return Diagnosis(verdict, not troubles, not stopped, troubles, oldest)


_ORDER = {"stops": 0, "unchecked": 1, "": 2}


def oldest_message(workers: tuple[WorkerStatus, ...]) -> Oldest | None:
    ages = [
        Oldest(busy.incident, busy.stage, busy.seconds + worker.silent, worker.slot)
        for worker in workers
        for busy in worker.in_flight
    ]
    return max(ages, key=lambda oldest: oldest.seconds, default=None)


def able_workers(status: Status) -> int:
    """Number of slots with a worker that accepts mail."""
    return len({w.slot for w in status.workers if w.state == "ready" and w.silent < SILENT})


def _idle_text(status: Status) -> str:
    if status.window is None or status.window.messages:
        return "mail is flowing"
    if status.uptime < status.window.seconds:
        return f"ready; no mail since the start {length(status.uptime)} ago"
    return "no mail in the last 15 minutes"


def _service(status: Status, now: float) -> Iterator[Issue]:
    able = able_workers(status)
    if status.state == "draining":
        yield Issue(
            "THE DAEMON IS STOPPING: hooks keep their mail and wait for the next daemon",
            "systemctl start contentfilter",
            "The daemon is not ready",
            "stops",
        )
    elif status.drain is not None:
        by, until = status.drain.by, status.drain.until
        end = f"until {clock(until, now)}" if until else "until contentfilter resume"
        what = f"DRAINED by {by} since {clock(status.drain.since, now)}, {end}: hooks keep their mail and wait"
        yield Issue(
            what + (f" ({status.drain.reason})" if status.drain.reason else ""),
            "contentfilter resume",
            "Mail is drained",
            "stops",
        )
    elif not able:
        starting = status.state == "starting"
        yield Issue(
            "the daemon is starting: no worker accepts mail yet" if starting else "MAIL WAITS: no worker accepts mail",
            "journalctl -u contentfilter --since -5min",
            "The daemon is not ready",
            "stops",
        )
    elif able < status.wanted:
        yield Issue(
            f"{able} of {status.wanted} workers accept mail",
            "journalctl -u contentfilter | grep -e worker.died -e worker.stuck",
            "Workers die",
        )
    if status.socket_problem:
        yield Issue(
            f"MAIL DOES NOT REACH THE FILTER: {status.socket_problem}",
            status.socket_remedy,
            "The hook cannot reach the daemon",
            "stops",
        )
    for short in sorted({worker.short for worker in status.workers if worker.short}):
        yield Issue(
            f"MAIL WAITS: not enough {short}; mail is deferred if this lasts",
            "df" if short == "disk" else "free -m; ps aux --sort=-rss | head",
            "Too little memory or disk",
            "stops",
        )
    if status.tables is not None and not status.tables.loaded:
        yield Issue(
            f"MAIL IS DEFERRED: no recipient tables: {status.tables.trouble}",
            "contentfilter check",
            "The tables are old",
            "stops",
        )


def _scanners(status: Status, now: float) -> Iterator[Issue]:
    whole: set[str] = set()  # scanners that are bypassed for all mail: their backends do not matter
    for bypass in status.bypasses:
        name = bypass.scanner.value
        mail = f"mail of {', '.join(kind.value for kind in bypass.origins)} origin" if bypass.origins else "all mail"
        if not bypass.origins:
            whole.add(name)
        yield Issue(
            f"{name} is bypassed for {mail} until {clock(bypass.until, now)} by {bypass.by} ({bypass.reason})",
            f"contentfilter bypass end {name}",
            "A scanner is bypassed",
            "unchecked",
        )
    unreached = [sample for sample in status.canary if sample.sample == CLEAN and sample.result in UNREACHED]
    for sample in unreached:
        what = f"MAIL DOES NOT REACH THE FILTER: the canary's clean sample: {sample.text}"
        yield Issue(
            what, "contentfilter-queue --check; contentfilter canary", "The hook cannot reach the daemon", "stops"
        )
    for sample in () if unreached else status.canary:
        if sample.ok is False and sample.result != "bypassed":
            blind = sample.result == "passed"  # the scanner did not detect it
            expected = "delivered as expected" if sample.sample == CLEAN else "caught as expected"
            what = f"canary: the {sample.sample} sample was not {expected}: {sample.text}"
            yield Issue(what, "contentfilter canary", "The canary is red", "unchecked" if blind else "")
    for backend in status.backends:
        if backend.state == "failing" and backend.wanted:
            others = any(b.scanner == backend.scanner and b.state == "well" for b in status.backends)
            yield _failing(backend, now, idle=backend.scanner in whole, others=others)


def _failing(backend: BackendStatus, now: float, *, idle: bool, others: bool) -> Issue:
    actions = set(backend.meanwhile.values())
    effect: Effect = "" if idle or others else "stops" if "defer" in actions else "unchecked"
    down = f"{backend.scanner} {backend.backend} {WORDS.get(backend.cause, backend.cause)} since "
    down += f"{clock(backend.since, now)} ({', '.join(filter(None, (length(now - backend.since), backend.detail)))})"
    if idle:
        down += "; it is bypassed"
    elif others:
        down += "; another backend serves its mail"
    else:
        down += f": {consequence(backend.meanwhile)}"
    unit = "clamav-daemon" if backend.scanner == Scanner.CLAMD.value else "spamd"
    remedy = f"systemctl status {unit}"
    if effect == "stops":
        down = f"MAIL IS DEFERRED: {down}"
        remedy += (
            f"; to let mail pass unchecked meanwhile: contentfilter bypass {backend.scanner} --for 30m --reason ..."
        )
    away = backend.cause == Cause.DOWN.value
    return Issue(down, remedy, f"{backend.scanner} is down" if away else "clamd or spamd is slow", effect)


def consequence(meanwhile: dict[str, str]) -> str:
    """The failure table's action in words."""
    passing = [origin for origin, action in meanwhile.items() if action == "pass"]
    deferred = [origin for origin, action in meanwhile.items() if action != "pass"]
    if not deferred:
        return "mail that needs it passes unchecked"
    if not passing:
        return "mail that needs it is deferred"
    if passing == [OriginKind.BOUNCE.value]:
        return "mail that needs it is deferred (bounces pass unchecked)"
    return f"mail of {', '.join(deferred)} origin is deferred, mail of {', '.join(passing)} origin passes unchecked"


def _deferrals(status: Status, now: float) -> Iterator[Issue]:
    """Recent deferrals that no failing backend explains."""
    recent = status.recent
    if recent is None or _over(status, recent, now):
        return
    known = {backend.scanner for backend in status.backends}  # theirs are reported above, or over
    rest = {rule: count for rule, count in recent.deferred.items() if rule.partition(":")[0] not in known}
    count = sum(rest.values())
    if count and count > RISING * recent.messages:
        share = f"{count} of {recent.messages} messages in the last two minutes"
        what = f"MAIL IS DEFERRED: {share}, most by {next(iter(rest))}"
        yield Issue(what, "contentfilter why --decision defer --since 15m", "Deferrals rise", "stops")


def _over(status: Status, recent: Window, now: float) -> bool:
    """True if mail, or the canary's clean message, was accepted after the last deferral, which is not quite recent."""
    last = recent.ago.get("defer")
    if last is None or last < OVER:
        return False
    clean = (now - sample.at for sample in status.canary if sample.sample == CLEAN and sample.ok)
    return min((recent.ago.get("queue", last), *clean)) < last


def _slow(status: Status, oldest: Oldest | None) -> Iterator[Issue]:
    if oldest is not None and oldest.seconds > SLOW:
        time_in = f"for {length(oldest.seconds)} ({oldest.stage})"
        what = f"message {oldest.incident} has been in worker {oldest.worker} {time_in}"
        yield Issue(what, "see the scanners below", "clamd or spamd is slow")
    if (waiting := sum(worker.waiting for worker in status.workers)) > 0:
        what = f"{waiting} messages wait for a free slot; those that get none in time are deferred as busy"
        yield Issue(what, "contentfilter top", "Mail waits for a free place")
    if status.waiting and status.waiting_limit and status.waiting > CROWDED * status.waiting_limit:
        what = f"{status.waiting} hooks wait for a worker, of at most {status.waiting_limit}"
        yield Issue(what, "contentfilter top", "Mail waits for a free place")


def _poison(status: Status) -> Iterator[Issue]:
    if count := len(status.poison):
        what = (
            f"{count} messages are isolated, each after it killed two workers"
            if count > 1
            else "a message is isolated after it killed two workers"
        )
        yield Issue(
            what, "contentfilter tail, and the directory poison in the state directory", "A message kills workers"
        )


def _refused(status: Status) -> Iterator[Issue]:
    """Local users who offer more than one user may."""
    if status.refused:
        users = ", ".join(f"{user} ({count})" for user, count in status.refused.items())
        what = (
            f"connections of local users were refused within five minutes (too many, too slow, or no request): {users}"
        )
        yield Issue(what, "ps -fu USER, and end what floods the socket", "A local user floods the socket")


def _configuration(status: Status) -> Iterator[Issue]:
    for problem in status.problems[:3]:
        yield Issue(f"not in force: {problem}", "contentfilter check", "A new configuration is refused")
    if len(status.problems) > 3:
        more = f"not in force: {len(status.problems) - 3} more problems"
        yield Issue(more, "contentfilter check", "A new configuration is refused")
    if status.tables is not None and status.tables.loaded and status.tables.trouble:
        what = f"the recipient tables have not been current for {length(status.tables.age)}: {status.tables.trouble}"
        yield Issue(what, "contentfilter clients diff", "The tables are old")
    if ALLOW_FILE in status.orders_problem:
        remedy = "contentfilter allow add, for each signature that must pass"
        yield Issue(status.orders_problem, remedy, "A bad signature refuses honest mail")
    elif status.orders_problem:
        yield Issue(status.orders_problem, "contentfilter bypass list", "The disk is full")


def clock(at: float, now: float) -> str:
    """Local time, with its date unless that is today."""
    there, here = time.localtime(at), time.localtime(now)
    return time.strftime("%H:%M" if there[:3] == here[:3] else "%Y-%m-%d %H:%M", there)


def length(seconds: float) -> str:
    """A duration in one unit."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    if whole < 2 * 3600:
        return f"{whole // 60} min"
    return f"{whole // 3600} h" if whole < 2 * 86_400 else f"{whole // 86_400} days"
