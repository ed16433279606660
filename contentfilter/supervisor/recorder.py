"""Journal writer: takes events from the event loop, which never waits for it.

One thread owns the file. Events queue up to WAITING_MAX bytes; those that do not fit, and those that a full or broken
disk does not take, are dropped and counted, with a rate-limited warning. Mail is not affected. A file that cannot be
used is set aside and a new one is started. It is a daemon thread, so that a disk that hangs does not keep the process.
"""

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from contentfilter.bus.messages import Event
from contentfilter.errors import JournalError
from contentfilter.log import Logger, RateLimiter
from contentfilter.settings import Settings
from contentfilter.store.journal import Journal, journal_path, set_aside

GATHER = 0.2  # seconds for which events are collected; a crash loses no more than these
BATCH = 500  # events in one transaction
WAITING_MAX = 32 << 20  # bytes, about
EVENT_BYTES = 2_000  # size of an event without its account, about
PAUSE = 10.0  # seconds without an attempt after the disk refused
WARN_EVERY = 60.0
DAY = 86_400.0
KEPT = frozenset(("mail.done", "mail.report"))


@dataclass(frozen=True, slots=True)
class _Limits:
    """The settings that matter here."""

    path: Path
    retention: float  # seconds
    max_size: int

    @classmethod
    def of(cls, settings: Settings) -> "_Limits":
        return cls(journal_path(settings), settings.journal.retention * DAY, settings.journal.max_size)


class Recorder:
    """Only :meth:`expire` may wait; call it from a thread."""

    def __init__(self, log: Logger, settings: Settings) -> None:
        self._log = log
        self._changed = threading.Condition()
        self._events: deque[tuple[float, Event]] = deque()
        self._weight = 0
        self._wanted: Future[int] | None = None  # an expiry that a caller waits for
        self._aged = True
        self._closing = False
        self._thread: threading.Thread | None = None
        self._journal: Journal | None = None
        self._not_before = 0.0
        self._warned = RateLimiter(WARN_EVERY)
        self.dropped = 0
        self.change(settings)

    def change(self, settings: Settings) -> None:
        """Use other settings from the next batch on."""
        self._enabled = settings.journal.enabled
        self._limits = _Limits.of(settings)
        if self._enabled and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
            self._thread.start()

    def put(self, event: Event) -> None:
        """Keep an event for the journal, or drop it; never waits for the disk."""
        if not self._enabled or event.name not in KEPT:
            return
        weight = EVENT_BYTES + len(event.account)
        with self._changed:
            if self._weight + weight > WAITING_MAX:
                self.dropped += 1
                return  # the writer reports it when it recovers
            first = not self._events
            self._events.append((time.time(), event))
            self._weight += weight
            if first:
                self._changed.notify()

    def expire(self, aged: bool = True) -> int:
        """Apply the limits of age (``aged``) and size; returns the number of messages deleted.

        Raises JournalError. Waits for the writer.
        """
        if not self._enabled:
            return 0
        wanted: Future[int] = Future()
        with self._changed:
            self._wanted, self._aged = wanted, aged
            self._changed.notify()
        return wanted.result()

    def close(self, seconds: float) -> None:
        """Write what is queued, for at most ``seconds``."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(seconds)

    # In the thread

    def _run(self) -> None:
        while True:
            batch, wanted = self._take()
            if batch:
                self._store(batch)
            if wanted is not None:
                self._expire(wanted)
            if not batch and self._closing:
                break
        if self._journal is not None:
            self._journal.close()

    def _take(self) -> tuple[list[tuple[float, Event]], "Future[int] | None"]:
        """The next batch, and the expiry that is wanted, once there is either."""
        with self._changed:
            while not (self._events or self._wanted or self._closing):
                self._changed.wait()
            if self._events and not (self._wanted or self._closing):
                self._changed.wait(GATHER)
            batch = [self._events.popleft() for _ in range(min(BATCH, len(self._events)))]
            self._weight -= sum(EVENT_BYTES + len(event.account) for _, event in batch)
            wanted, self._wanted = self._wanted, None
        return batch, wanted

    def _store(self, batch: list[tuple[float, Event]]) -> None:
        """Write a batch, or count it as lost."""
        if time.monotonic() < self._not_before:
            self.dropped += len(batch)
            return
        try:
            try:
                self._write(batch)
            except JournalError as error:
                if not error.unusable:
                    raise
                self._close_journal()
                aside = set_aside(self._limits.path)
                self._log.warning("journal.set-aside", why=str(error), path=str(aside))
                self._write(batch)
        except Exception as error:  # mail goes on, and so does this thread
            self._close_journal()
            self._not_before = time.monotonic() + PAUSE
            self.dropped += len(batch)
            if (held := self._warned.allow()) is not None:
                self._log.warning("journal.failed", why=str(error), dropped=self.dropped, not_logged=held)

    def _write(self, batch: list[tuple[float, Event]]) -> None:
        journal = self._opened()
        bad = journal.append((at, event.name, event.fields, event.account) for at, event in batch)
        self.dropped += bad
        if bad:
            self._log.warning("journal.malformed", events=bad)
        if journal.size() > self._limits.max_size:
            journal.expire(0.0, self._limits.max_size)

    def _expire(self, wanted: "Future[int]") -> None:
        limits = time.time() - self._limits.retention if self._aged else 0.0, self._limits.max_size
        try:
            wanted.set_result(self._opened().expire(*limits))
        except Exception as error:
            self._close_journal()
            wanted.set_exception(error)

    def _opened(self) -> Journal:
        if self._journal is not None and self._journal.path != self._limits.path:
            self._close_journal()
        if self._journal is None:
            self._journal = Journal.open(self._limits.path)
        return self._journal

    def _close_journal(self) -> None:
        journal, self._journal = self._journal, None
        if journal is not None:
            journal.close()
