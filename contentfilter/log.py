"""Log lines: events with fixed names and fields, one line each, JSON or logfmt.

A line is written with one call and is at most PIPE_BUF long, so the lines of several workers on one pipe
never mix; log_target.py decides where they go. docs/logs.md describes every event and field. Nothing here
is global: the code that starts a process makes its logger.
"""

import json
import logging
import sys
import time
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from contentfilter.log_target import Stream, Target

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    Logger = FilteringBoundLogger
else:
    Logger = Any

LINE_LIMIT = 4096  # PIPE_BUF: up to here a write to a pipe is atomic
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}

EventDict = MutableMapping[str, Any]

# Every event name that the daemon uses, with its meaning. A test compares this table with the source.
EVENTS: Mapping[str, str] = {
    "backend.down": "a clamd or spamd does not answer properly, as `contentfilter status` shows it",
    "backend.up": "it does again; `seconds` since the failure began",
    "backends.watch-failed": "a defect: the probes of clamd and spamd pause; only mail detects failing backends",
    "canary.done": "all samples had the correct result; logged when this changes",
    "canary.failed": "a sample did not have the correct result; logged when this changes, then every 10 minutes",
    "canary.off": "no samples are sent, and why",
    "canary.defect": "a defect in the canary; mail is not affected",
    "control.failed": "a defect: a request of the command line was not answered",
    "control.refused": "a user with read access only asked the daemon to change something",
    "events.ready": "the event feed is open to collectors with a known key, at this address",
    "events.failed": "the event feed cannot be offered, or its process ended, and why; mail is not affected; retried",
    "http.ready": "metrics and health are served at this address",
    "http.failed": "the address of [http] cannot be used; mail is not affected; it is retried",
    "http.error": "a defect: a page could not be produced; answered with 500",
    "intake.refused": "connections of untrusted local users were refused: too many, too slow, or no request",
    "receiver.start": "the process that receives mail of untrusted local users was started",
    "receiver.died": "that process ended; it is started again with the next such connection",
    "intake.accept-failed": "accept(2) failed, usually because no descriptors were left; accepting pauses",
    "intake.garbage": "a packet or descriptors that no hook sends; the connection was closed",
    "intake.bad-message": "a valid request with descriptors that cannot be used as a message; deferred",
    "intake.client-gone": "the hook closed its connection before the answer; processing was cancelled",
    "intake.answer-failed": "the answer could not be sent; the hook will offer the message again",
    "intake.internal-error": "a defect: an exception while a message was processed; the message was deferred",
    "intake.bad-envelope": "a request with a malformed envelope, which our hook never sends; deferred",
    "load.shed": "scanners or slots do not keep up: what is skipped or deferred, and how often so far",
    "load.normal": "nothing was shed for ten seconds; how often it had happened",
    "load.short": "memory or disk space is below the low watermark: mail waits, then it is deferred",
    "load.enough": "memory and disk space are sufficient again",
    "mail.done": "the record of one message, with fixed fields",
    "mail.step": "one step of the trace of a message, if `smtplog` enables it",
    "mail.report": "the hook's report on several submissions",
    "housekeeping.done": "a maintenance job has finished; the fields count what it removed",
    "housekeeping.failed": "a maintenance job failed; it is retried in the next round",
    "journal.failed": "the journal could not be written: it lacks some messages; mail is not affected",
    "journal.malformed": "events that the journal cannot store; dropped",
    "journal.set-aside": "the journal's file was damaged or of another version; it was renamed and a new one started",
    "monitor.failed": "a defect in the monitoring; mail is not affected",
    "origin.unknown-user": "a configured user name does not exist; it was skipped",
    "quarantine.no-secret": "released mail cannot be recognized: the secret in the state directory is unusable",
    "scan.late": "a scan has finished after its message was deferred; its result is cached for the retry",
    "service.start": "the supervisor has its sockets and starts workers",
    "service.ready": "every worker accepts messages",
    "service.problem": "one problem in the configuration, with file and line",
    "service.reload": "a new configuration generation was sent to the workers",
    "service.reload-failed": "an invalid configuration; the old one stays in force",
    "service.restart-needed": "a changed setting takes effect only after a restart of the daemon",
    "service.drain": "no new messages are accepted; those in flight are finished",
    "service.stop": "the supervisor exits",
    "bypass.begin": "an administrator bypassed a scanner: who, why, until when",
    "bypass.active": "the bypass is still active; repeated every few minutes",
    "bypass.end": "the scanner is used again; who or what ended the bypass",
    "clock.jumped": "the clock advanced by more than a day since the last check: for a day nothing is deleted by age",
    "drain.begin": "an administrator drained the daemon: who, why, until when",
    "drain.active": "the drain is still active; repeated every few minutes",
    "drain.end": "mail is accepted again; who or what ended the drain",
    "orders.not-saved": "overrides could not be saved: they are in force, but a restart will lose the change",
    "bus.malformed": "a frame on the bus that could not be decoded; dropped",
    "bus.mended": "sockets in the run directory had been removed, and were recreated",
    "bus.not-mended": "the sockets cannot be recreated: workers that start now find no supervisor",
    "tables.stale": "the recipient tables cannot be updated, and why; the last good ones stay in force",
    "tables.current": "the recipient tables match their source again",
    "poison.isolated": "a message that killed two workers was decided without being examined; a copy was kept",
    "poison.not-kept": "no copy of such a message could be kept",
    "worker.suspect": "a message that a worker was processing when it died",
    "worker.start": "a worker process was started",
    "worker.ready": "a worker accepts messages",
    "worker.died": "a worker ended unexpectedly",
    "worker.stuck": "a worker gave no heartbeat for too long and was killed",
    "worker.reload": "a worker runs a new configuration generation",
    "worker.reload-failed": "a worker could not build what the supervisor had checked; the old one stays in force",
    "worker.drain": "a worker stopped accepting and finishes its messages",
    "worker.orphaned": "the supervisor is gone; the worker drains and exits",
    "worker.stop": "a worker exits",
    "python.log": "a record of the standard library's logging, usually from a library",
}


class Writer:
    """Last step of structlog: writes the finished line at its level."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def msg(self, line: bytes, level: str) -> None:
        self._target.write(line, level)

    debug = info = warning = warn = error = critical = exception = log = msg


def make_logger(style: Literal["json", "logfmt"], level: str, target: Target | int = 2, **fields: Any) -> Logger:
    """A logger that writes to ``target`` (or a descriptor) with ``fields`` bound to every line."""
    structlog = _structlog()
    render = _json if style == "json" else _logfmt
    target = Stream(target) if isinstance(target, int) else target

    def finish(logger: Any, method: str, event: EventDict) -> tuple[tuple[bytes, str], dict[str, Any]]:
        """Render the line in one step, because this runs for every message. Time, level and event come first."""
        if "exc_info" in event:
            event = structlog.processors.format_exc_info(logger, method, event)
        if target.lost:
            event["lines_lost"] = target.lost
        now = datetime.now(UTC).isoformat(timespec="microseconds")[:-6] + "Z"
        line = bounded({"time": now, "level": method, "event": event.pop("event"), **event}, render)
        return (line, method), {}

    logger: Logger = structlog.wrap_logger(
        Writer(target),
        processors=[finish],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        cache_logger_on_first_use=True,
    )
    return logger.bind(**fields)


def _structlog() -> Any:
    """The library without rich, which its console renderer would load: 50 ms and 4 MiB in each process."""
    blocked = "rich" not in sys.modules
    if blocked:
        sys.modules["rich"] = None  # type: ignore[assignment]  # importing it raises ImportError, which is handled
    try:
        import structlog
    finally:
        if blocked:
            del sys.modules["rich"]
    return structlog


def bounded(event: EventDict, render: Any) -> bytes:
    """The line for ``event``; long values lose their middle until it fits."""
    line: bytes = render(event)
    while len(line) > LINE_LIMIT:
        longest = max(event, key=lambda key: len(str(event[key])))
        text = str(event[longest])
        if len(text) < 64:  # very many fields: give up on completeness, keep the frame
            event = {key: event[key] for key in ("time", "level", "event", "id") if key in event}
            event["cut"] = True
            return _json(event)[:LINE_LIMIT]
        keep = len(text) // 4
        event[longest] = f"{text[:keep]} … {text[-keep:]}"
        line = render(event)
    return line


def _json(event: EventDict) -> bytes:
    try:
        return msgspec.json.encode(event, enc_hook=str) + b"\n"
    except UnicodeEncodeError:  # a name from the file system that is not UTF-8
        return json.dumps(event, default=str).encode("ascii") + b"\n"


def _logfmt(event: EventDict) -> bytes:
    words = []
    for key, value in event.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        if not text or any(c in text for c in ' ="\\') or not text.isprintable():
            text = json.dumps(text, ensure_ascii=False)
        words.append(f"{key}={text}")
    return " ".join(words).encode("utf-8", "backslashreplace") + b"\n"


class Forward(logging.Handler):
    """Handler that passes log records of asyncio and other libraries on to our logger."""

    def __init__(self, log: Logger) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._log.log(
                record.levelno, "python.log", logger=record.name, text=record.getMessage(), exc_info=record.exc_info
            )
        except Exception:
            self.handleError(record)


def adopt_standard_logging(log: Logger) -> None:
    """Route the standard library's logging into ``log``. For a process's main function only."""
    logging.basicConfig(handlers=[Forward(log)], level=logging.WARNING, force=True)


class RateLimiter:
    """Lets one event through per ``interval`` seconds and counts the others."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._next = 0.0
        self._held = 0

    def allow(self) -> int | None:
        """Number of events suppressed since the last one; None: suppress this one, too."""
        now = time.monotonic()
        if now < self._next:
            self._held += 1
            return None
        self._next, held, self._held = now + self._interval, self._held, 0
        return held
