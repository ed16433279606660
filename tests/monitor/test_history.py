"""The history of the last hours: exact counts, honest estimates, and never more memory than it may have."""

import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contentfilter.monitor import history
from contentfilter.monitor.history import History

NOON = 43_200.0
MAIL: dict[str, Any] = {
    "id": "a" * 16, "origin": "stranger", "sender": "s@x.example", "size": 100, "scans": (), "decision": "queue",
    "reason": "none", "rule": "clean", "ms": 2.0,
}  # fmt: skip


def scan(scanner: str, status: str = "clean", ms: float = 3.0, **more: Any) -> dict[str, Any]:
    return {"scanner": scanner, "status": status, "ms": ms, **more}


def weight(thing: Any) -> int:
    """Bytes of an object with all that it holds."""
    if isinstance(thing, dict):
        return sys.getsizeof(thing) + sum(weight(key) + weight(value) for key, value in thing.items())
    if isinstance(thing, (list, tuple)) or type(thing).__name__ == "deque":
        return sys.getsizeof(thing) + sum(map(weight, thing))
    slots = getattr(type(thing), "__slots__", ()) or getattr(thing, "__dict__", ())
    return sys.getsizeof(thing) + sum(weight(getattr(thing, name)) for name in slots)


def test_a_window_adds_up_its_minutes_and_no_others() -> None:
    kept = History()
    kept.event(MAIL, b"", NOON - 900)
    kept.event(MAIL | {"decision": "reject", "reason": "virus", "rule": "clamd: Eicar"}, b"", NOON - 840)
    kept.event(MAIL | {"decision": "defer", "rule": "clamd: down", "size": 50}, b"", NOON)
    kept.event(MAIL | {"decision": "drop"}, b"", NOON + 1)
    told = kept.window(900, NOON + 30)
    assert (told.messages, told.bytes, told.seconds) == (3, 250, 870)
    assert told.decisions == {"queue": 0, "reject": 1, "defer": 1, "drop": 1}
    assert (told.rejected, told.deferred) == ({"clamd: Eicar": 1}, {"clamd: down": 1})
    assert kept.window(86_400, NOON).messages == 4
    assert kept.window(0, NOON).messages == 2


def test_what_is_unchecked_is_told_by_scanner_and_cause_and_only_when_it_was_delivered() -> None:
    kept = History()
    scans = (scan("spamd", "unchecked", cause="timeout"), scan("clamd", "unchecked", cause="\x1b[2J"), scan("evil"))
    kept.event(MAIL | {"scans": scans}, b"", NOON)
    kept.event(MAIL | {"scans": scans, "decision": "defer"}, b"", NOON)
    assert kept.window(60, NOON).unchecked == {"spamd timeout": 1, "clamd other": 1}
    assert kept.minutes(1, NOON)[0].unchecked == 2


def test_minutes_come_without_gaps_and_the_last_one_is_now() -> None:
    kept = History()
    kept.event(MAIL, b"", NOON)
    kept.event(MAIL, b"", NOON + 121)
    minutes = kept.minutes(4, NOON + 121)
    assert [(minute.start - NOON, minute.messages) for minute in minutes] == [(-60, 0), (0, 1), (60, 0), (120, 1)]
    assert minutes[0].p50 is None
    assert minutes[0].decisions == {"queue": 0, "reject": 0, "defer": 0, "drop": 0}
    assert len(kept.minutes(10_000, NOON)) == history.MINUTES
    assert kept.minutes(-1, NOON) == ()


@given(st.lists(st.floats(0.01, 200_000), min_size=1, max_size=50))
@settings(deadline=None)
def test_quantiles_are_in_the_bucket_where_the_true_ones_are(times: list[float]) -> None:
    kept = History()
    for ms in times:
        kept.event(MAIL | {"ms": ms, "scans": (scan("clamd", ms=ms),)}, b"", NOON)
    told = kept.window(60, NOON)
    for estimate, share in ((told.p50, 0.5), (told.p95, 0.95)):
        true = sorted(times)[max(0, -(-len(times) * round(share * 100) // 100) - 1)]
        high = next(bound for bound in history.BOUNDS if true <= bound)
        low = max((bound for bound in history.BOUNDS if bound < true), default=0)
        assert estimate is not None
        assert low - 0.001 <= estimate <= high
    assert kept.minutes(1, NOON)[0].scanners["clamd"] == (told.p50, told.p95)
    assert kept.minutes(1, NOON)[0].scanners["spamd"] == (None, None)


def test_time_that_is_another_scans_is_not_counted_again() -> None:
    kept = History()
    kept.event(MAIL | {"scans": (scan("spamd", ms=0.0),)}, b"", NOON)
    assert kept.minutes(1, NOON)[0].scanners["spamd"] == (None, None)


def test_scores_are_one_rule() -> None:
    kept = History()
    for score in range(100):
        refused = {"decision": "reject", "reason": "spam", "rule": f"spamd: {score} >= reject_score=1"}
        kept.event(MAIL | refused, b"", NOON)
    assert kept.window(60, NOON).rejected == {"spamd: score": 100}


def test_the_last_decisions_newest_first_with_their_account() -> None:
    kept = History()
    for number in range(history.RECENT + 5):
        kept.event(MAIL | {"id": f"{number:016x}"}, b'{"text":"x"}', NOON + number)
    recent = kept.recent()
    assert len(recent) == history.RECENT
    assert (recent[0].at, recent[0].account) == (NOON + history.RECENT + 4, b'{"text":"x"}')
    assert recent[0].fields["id"] == f"{history.RECENT + 4:016x}"
    assert len(kept.recent(3)) == 3
    assert kept.recent(-3) == ()


def test_memory_is_bounded_whatever_comes_in() -> None:
    kept = History()
    for minute in range(history.MINUTES + 20):
        for number in range(history.RULES_MAX + 30):
            mail = {"decision": ("reject", "defer")[number % 2], "rule": f"{minute} {number} " + "x" * 100_000}
            kept.event(MAIL | mail, b"y" * 10_000_000, NOON + 60 * minute)
    told = kept.window(86_400, NOON + 60 * minute)
    assert len(told.rejected) == len(told.deferred) == history.RULES_MAX + 1
    assert sum(told.rejected.values()) == sum(told.deferred.values()) == history.MINUTES * (history.RULES_MAX + 30) / 2
    assert kept.recent() == ()  # such a line is no line
    for _ in range(1_000):
        kept.event(MAIL | {"sender": "s" * 30_000}, b"y" * 60_000, NOON + 60 * minute)
    assert [entry.account for entry in kept.recent(2)] == [b"", b""]
    assert weight(kept) < 12_000_000


def test_a_minute_knows_so_many_rules_and_no_more() -> None:
    kept = History()
    for number in range(5_000):
        kept.event(MAIL | {"decision": "reject", "rule": f"clamd: {number}"}, b"", NOON)
    before = weight(kept)
    for number in range(5_000, 20_000):
        kept.event(MAIL | {"decision": "reject", "rule": f"clamd: {number}"}, b"", NOON)
    assert weight(kept) - before < 2_000
    assert kept.window(60, NOON).rejected["other"] == 20_000 - history.RULES_MAX


@pytest.mark.parametrize(
    "wrong",
    [{"ms": "soon"}, {"ms": float("nan")}, {"ms": -1}, {"size": 1e300}, {"scans": 7}, {"decision": "???"}, {"rule": 5}],
)
def test_a_strange_event_is_left_out(wrong: dict[str, Any]) -> None:
    kept = History()
    kept.event(MAIL | wrong, b"", NOON)
    kept.event({}, b"", NOON)
    assert kept.window(60, NOON).messages == 0
    assert kept.recent() == ()


@given(st.lists(st.floats(-1e9, 1e10), min_size=1, max_size=40))
@settings(deadline=None)
def test_a_clock_that_jumps_breaks_nothing(clock: list[float]) -> None:
    kept = History()
    for now in clock:
        kept.event(MAIL, b"", now)
        kept.event(MAIL, b"", now)
        assert 2 <= kept.window(120, now).messages <= 2 * len(clock)
        starts = [minute.start for minute in kept.minutes(5, now)]
        assert starts == sorted(set(starts))
        assert len(starts) == 5


def test_a_window_tells_when_each_decision_was_last_made() -> None:
    kept = History()
    kept.event(MAIL, b"", NOON - 200)
    kept.event(MAIL, b"", NOON - 20)
    kept.event(MAIL | {"decision": "defer", "rule": "clamd: down"}, b"", NOON - 5)
    assert kept.window(120, NOON).ago == {"queue": 20.0, "defer": 5.0}
    assert kept.window(120, NOON + 110).ago == {"defer": 115.0}
