"""What a worker says about its load: counts for the heartbeat, and a log line when shedding begins and ends."""

from collections import Counter

from contentfilter.ops.log import Logger

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
                self._log.warning("load.shed", **_fields(self.shed - self._told))
            self._seen, self._last = self.shed.copy(), now
        elif self._last is not None and now - self._last >= QUIET:
            self._last = None
            self._log.warning("load.normal", **_fields(self._seen - self._told))

    def counters(self) -> dict[str, int]:
        """For the heartbeat."""
        return _fields(self.shed)


def _fields(counts: Counter[str]) -> dict[str, int]:
    return {"shed_" + what.replace("-", "_"): count for what, count in counts.items()}
