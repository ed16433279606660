"""Memory of the scan cache: bounded in entries, bytes and age. What may be answered from it is decided in cache.py."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from cachetools import TLRUCache

from contentfilter.model import ScanOutcome, ScanStatus

WEIGHT = 1_000  # bytes of an entry, about
BYTES = 16 * 1024 * 1024  # of all entries together
REWRITTEN = 65_536  # bytes of SpamAssassin's headers; an answer with more is not kept
SURE = (ScanStatus.CLEAN, ScanStatus.FOUND)


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Identifies a scan request. ``size`` and ``digest`` are those of scanners/content.py."""

    kind: bytes  # scanner, its settings, and what else the answer depends on
    size: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """An answer, CLEAN or FOUND. Times are seconds of the monotonic clock, which all processes of a machine share."""

    outcome: ScanOutcome
    client: bytes  # the digest of what the message says about who delivered it
    began: float  # when the request was made
    at: float  # when the answer came

    def weight(self) -> int:
        return WEIGHT + len(self.outcome.rewritten)


class Memory:
    """Entries for ``keep`` seconds, at most ``entries`` of them; the least recently used one goes first."""

    def __init__(self, keep: float, entries: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known = _cache(keep, entries, clock)
        self._sizes: frozenset[tuple[bytes, int]] = frozenset()

    def change(self, keep: float, entries: int) -> None:
        """Apply other limits."""
        old, self._known = self._known, _cache(keep, entries, self._clock)
        self._known.update(old)
        self._count()

    def __len__(self) -> int:
        return len(self._known)

    def may_know(self, kind: bytes, size: int) -> bool:
        """Is it worth computing a digest?"""
        return (kind, size) in self._sizes

    def put(self, key: CacheKey, entry: CacheEntry) -> None:
        """Keep an answer. Not one that is unsure, too large, from the future, or older than the one that is known."""
        if entry.outcome.status not in SURE or len(entry.outcome.rewritten) > REWRITTEN or entry.at > self._clock():
            return
        known = self._known.get(key)
        if known is None or known.at <= entry.at:
            self._known[key] = entry
            self._count()

    def get(self, key: CacheKey) -> CacheEntry | None:
        return self._known.get(key)

    def _count(self) -> None:
        """Answers are kept rarely, and looked for with every message."""
        self._sizes = frozenset((key.kind, key.size) for key in self._known)


def _cache(keep: float, entries: int, clock: Callable[[], float]) -> TLRUCache[CacheKey, CacheEntry]:
    """An entry weighs at least its share of the bytes, so that one limit bounds both number and bytes."""
    least = max(1, BYTES // entries)
    limit = least * entries
    return TLRUCache(limit, lambda key, entry, now: entry.at + keep, clock, lambda entry: max(least, entry.weight()))
