"""Answers of scanners that are kept for a while: the pure part, with a clock that is handed in.

Bounded in number, bytes and time; the one that was used least recently goes first. What may be answered
from here is decided in recall.py.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass

from contentfilter.model import ScanOutcome, ScanStatus

WEIGHT = 1_000  # bytes of an answer, about
BYTES = 16 * 1024 * 1024  # of all answers together
REWRITTEN = 65_536  # bytes of SpamAssassin's headers; an answer with more is not kept
SURE = (ScanStatus.CLEAN, ScanStatus.FOUND)


@dataclass(frozen=True, slots=True)
class CacheKey:
    """To which question. ``size`` and ``digest`` are those of scanners/content.py."""

    kind: bytes  # scanner, its settings, and what else the answer depends on
    size: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """An answer, CLEAN or FOUND. Moments are seconds of the monotonic clock, which all processes of a machine share."""

    outcome: ScanOutcome
    client: bytes  # the digest of what the message says about who delivered it
    began: float  # when the question was put
    at: float  # when the answer came

    def weight(self) -> int:
        return WEIGHT + len(self.outcome.rewritten)


class Memory:
    """``keep``: seconds for which an answer counts; ``entries``: how many there may be."""

    def __init__(self, keep: float, entries: int) -> None:
        self._kept: OrderedDict[CacheKey, CacheEntry] = OrderedDict()
        self._sizes: Counter[tuple[bytes, int]] = Counter()
        self._weight = 0
        self.change(keep, entries)

    def change(self, keep: float, entries: int) -> None:
        self._keep, self._entries = keep, entries
        self._trim()

    def __len__(self) -> int:
        return len(self._kept)

    def may_know(self, kind: bytes, size: int) -> bool:
        """Whether a digest is worth its price."""
        return (kind, size) in self._sizes

    def put(self, key: CacheKey, kept: CacheEntry, now: float) -> None:
        """Keep an answer, in place of an older one. Nothing that is not an answer, and nothing old or too large."""
        if kept.outcome.status not in SURE or len(kept.outcome.rewritten) > REWRITTEN or not self._young(kept, now):
            return
        if key in self._kept:
            if self._kept[key].at > kept.at:
                return
            self.drop(key)
        for old in [key for key, other in self._kept.items() if not self._young(other, now)]:
            self.drop(old)
        self._kept[key] = kept
        self._sizes[key.kind, key.size] += 1
        self._weight += kept.weight()
        self._trim()

    def get(self, key: CacheKey, now: float) -> CacheEntry | None:
        kept = self._kept.get(key)
        if kept is None:
            return None
        if not self._young(kept, now):
            self.drop(key)
            return None
        self._kept.move_to_end(key)
        return kept

    def drop(self, key: CacheKey) -> None:
        """Forget an answer, if there is one."""
        kept = self._kept.pop(key, None)
        if kept is None:
            return
        self._weight -= kept.weight()
        where = key.kind, key.size
        self._sizes[where] -= 1
        if not self._sizes[where]:
            del self._sizes[where]

    def _young(self, kept: CacheEntry, now: float) -> bool:
        return 0 <= now - kept.at < self._keep

    def _trim(self) -> None:
        while self._kept and (len(self._kept) > self._entries or self._weight > BYTES):
            self.drop(next(iter(self._kept)))
