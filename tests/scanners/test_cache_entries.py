"""The pure part of the memory: it answers what it was told, for its time, and never grows beyond its bounds."""

from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from contentfilter.model import Scanner, ScanOutcome, ScanStatus
from contentfilter.scanners import cache_entries
from contentfilter.scanners.cache_entries import CacheEntry, CacheKey, Memory

KEEP, ENTRIES = 100.0, 4
KEYS = st.builds(CacheKey, st.sampled_from([b"clamd", b"spamd"]), st.integers(1, 3), st.sampled_from([b"x", b"y"]))


def kept(at: float, status: ScanStatus = ScanStatus.CLEAN, rewritten: bytes = b"", name: str = "") -> CacheEntry:
    return CacheEntry(ScanOutcome(Scanner.CLAMD, status, name, rewritten=rewritten), b"", at - 1, at)


class Machine(RuleBasedStateMachine):
    """Against a dictionary that never forgets: what is answered is the newest answer to exactly that key, and young."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.told = 1000.0, dict[CacheKey, CacheEntry]()
        self.memory = Memory(KEEP, ENTRIES, lambda: self.now)
        self.number = 0

    @rule(key=KEYS, age=st.floats(-5, 150), status=st.sampled_from(ScanStatus), size=st.sampled_from([0, 70_000]))
    def put(self, key: CacheKey, age: float, status: ScanStatus, size: int) -> None:
        self.number += 1
        answer = kept(self.now - age, status, b"x" * size, str(self.number))
        self.memory.put(key, answer)
        sure = status in (ScanStatus.CLEAN, ScanStatus.FOUND)
        newer = key not in self.told or self.told[key].at <= answer.at
        if sure and not size and 0 <= self.now - answer.at < KEEP and newer:
            self.told[key] = answer

    @rule(seconds=st.floats(0, 120))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(key=KEYS)
    def get(self, key: CacheKey) -> None:
        found = self.memory.get(key)
        assert found is None or (found == self.told[key] and self.now - found.at < KEEP)
        if found is not None:
            assert self.memory.may_know(key.kind, key.size)

    @invariant()
    def bounded(self) -> None:
        assert len(self.memory) <= ENTRIES
        assert len(self.memory._sizes) <= ENTRIES
        assert self.memory._known.currsize <= cache_entries.BYTES


Machine.TestCase.settings = settings(max_examples=60, deadline=None)
TestMemory = Machine.TestCase


def keys() -> Iterator[CacheKey]:
    return (CacheKey(b"clamd", number, b"x") for number in range(10_000))


class Clock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_the_one_that_was_used_least_recently_goes_first() -> None:
    clock = Clock()
    store, some = Memory(KEEP, 2, clock), keys()
    a, b, c = next(some), next(some), next(some)
    store.put(a, kept(0.0))
    store.put(b, kept(0.0))
    clock.now = 1.0
    assert store.get(a)
    store.put(c, kept(1.0))
    assert store.get(b) is None
    assert store.get(a)
    assert not store.may_know(b.kind, b.size), "an entry that is dropped costs no digest"


def test_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_entries, "BYTES", 100_000)
    store = Memory(KEEP, 10_000, Clock())
    for key, _ in zip(keys(), range(50), strict=False):
        store.put(key, kept(0.0, rewritten=b"x" * 60_000))
    assert len(store) == 1


def test_lower_limits_drop_entries_immediately() -> None:
    store = Memory(KEEP, 100, Clock())
    for key, _ in zip(keys(), range(50), strict=False):
        store.put(key, kept(0.0))
    store.change(KEEP, 3)
    assert len(store) == 3


def test_an_answer_from_another_workers_future_is_not_kept() -> None:
    clock = Clock(10.0)
    store, key = Memory(KEEP, 2, clock), next(keys())
    store.put(key, kept(50.0))
    clock.now = 60.0
    assert store.get(key) is None
