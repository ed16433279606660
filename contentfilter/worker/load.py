"""Load shedding report of a worker: counters for the heartbeat, and a log line when shedding begins and ends."""

from collections import Counter

from contentfilter.log import Logger

PREFIX = "shed "  # of the counts in a heartbeat
QUIET = 10.0  # seconds without a skipped scan after which shedding is over


class Load:
    """``shed`` counts what was skipped, by the words of policy/shedding.py; whatever skips a scan adds to it."""

    def __init__(self, log: Logger) -> None:
        self.shed: Counter[str] = Counter()
        self._log = log
        self._reported: Counter[str] = Counter()  # counts when the present shedding began
        self._seen: Counter[str] = Counter()
        self._last: float | None = None  # when something was last skipped; None: no shedding

    def look(self, now: float, busy: int) -> None:
        """Call regularly. ``now``: monotonic; ``busy``: number of messages so far that got no slot in time."""
        self.shed["waiting"] = busy
        if self.shed != self._seen:
            if self._last is None:
                self._reported = self._seen
                self._log.warning("load.shed", why=_words(self.shed - self._reported))
            self._seen, self._last = self.shed.copy(), now
        elif self._last is not None and now - self._last >= QUIET:
            self._last = None
            self._log.warning("load.normal", why=_words(self._seen - self._reported))

    def counters(self) -> dict[str, int]:
        """For the heartbeat, whose ``busy`` already counts the messages without a slot."""
        return {PREFIX + what: count for what, count in self.shed.items() if what != "waiting"}


def _words(counts: Counter[str]) -> str:
    return ", ".join(f"{what}: {count}" for what, count in sorted(counts.items()))
