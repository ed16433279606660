"""What a worker says about its load: counts for the heartbeat, and a log line when shedding begins and ends."""

from collections import Counter

from contentfilter.log import Logger

PREFIX = "shed "  # of the counts in a heartbeat
QUIET = 10.0  # seconds without anything left out after which shedding is over


class Load:
    """``shed`` is counted by whoever leaves something out, by the words of policy/shedding.py."""

    def __init__(self, log: Logger) -> None:
        self.shed: Counter[str] = Counter()
        self._log = log
        self._told: Counter[str] = Counter()  # counts when the present shedding began
        self._seen: Counter[str] = Counter()
        self._last: float | None = None  # when something was last left out; None: nothing is

    def look(self, now: float, busy: int) -> None:
        """Once in a while; ``now`` is monotonic, ``busy`` how many messages found no place in time so far."""
        self.shed["waiting"] = busy
        if self.shed != self._seen:
            if self._last is None:
                self._told = self._seen
                self._log.warning("load.shed", why=_words(self.shed - self._told))
            self._seen, self._last = self.shed.copy(), now
        elif self._last is not None and now - self._last >= QUIET:
            self._last = None
            self._log.warning("load.normal", why=_words(self._seen - self._told))

    def counters(self) -> dict[str, int]:
        """For the heartbeat, which has the messages without a place as ``busy`` already."""
        return {PREFIX + what: count for what, count in self.shed.items() if what != "waiting"}


def _words(counts: Counter[str]) -> str:
    return ", ".join(f"{what}: {count}" for what, count in sorted(counts.items()))
