"""History of the last three hours by minute, and the last decisions: for the status, without Prometheus.

Memory is bounded, and an event costs about five microseconds. All keys are from closed sets, except for the rules, of
which each minute keeps RULES_MAX and counts further ones as ``other``. Every ``now`` is time.monotonic(), which does
not jump; a jump would lose history, or put it in the wrong minute, and nothing else. A malformed event is skipped
(monitor.metrics counts it).
"""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import msgspec

from contentfilter.bus.messages import Window
from contentfilter.errors import Cause
from contentfilter.model import Action, Reason, Scanner, ScanStatus

MINUTES = 180
RULES_MAX = 20
"""Different rules that are kept apart in a minute, and in a window."""
RULE_SHOWN = 120
"""Characters of a rule."""
RECENT = 100
RECENT_BYTES = 65_536
"""Of one decision with its detail. A longer detail is omitted: the journal has it."""
BOUNDS = (
    0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0,
    1_000.0, 2_500.0, 5_000.0, 10_000.0, 30_000.0, 60_000.0, 120_000.0, 240_000.0,
)  # fmt: skip
"""Upper bounds of the buckets, in milliseconds; what is above the last counts as that."""
OTHER = "other"

_ACTIONS = tuple(action.value for action in Action)
_SCANNERS = tuple(scanner.value for scanner in Scanner)
_CAUSES = frozenset(cause.value for cause in Cause)
_Number = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class Minute(msgspec.Struct, frozen=True):
    """One minute. Quantiles as in :class:`Window`, for the whole message and by scanner."""

    start: float
    messages: int
    bytes: int
    decisions: dict[str, int]
    unchecked: int
    p50: float | None
    p95: float | None
    scanners: dict[str, tuple[float | None, float | None]]


class RecentDecision(msgspec.Struct, frozen=True):
    """One decision: the fields of its log line (verdict.record.MailRecord), and its detail (JSON, may be empty)."""

    at: float
    fields: dict[str, Any]
    account: bytes


class _Scan(msgspec.Struct):
    """The parts of verdict.record.ScanRecord that count here."""

    scanner: str
    status: str
    ms: _Number
    cause: str = ""


class _Mail(msgspec.Struct):
    """The parts of verdict.record.MailRecord that count here."""

    decision: str
    reason: str
    rule: str
    size: _Number
    ms: _Number
    scans: tuple[_Scan, ...]


class _Bucket:
    """Counts of one minute."""

    __slots__ = ("bytes", "decisions", "deferred", "minute", "rejected", "times", "unchecked")

    def __init__(self, minute: int) -> None:
        self.minute = minute
        self.bytes = 0
        self.decisions = dict.fromkeys(_ACTIONS, 0)
        self.deferred: dict[str, int] = {}
        self.rejected: dict[str, int] = {}
        self.unchecked: dict[str, int] = {}
        self.times = {name: [0] * len(BOUNDS) for name in ("", *_SCANNERS)}  # "": the whole message


class History:
    """Counts each event ``mail.done``. For one thread; what it returns is not shared."""

    def __init__(self) -> None:
        self._buckets: deque[_Bucket] = deque(maxlen=MINUTES)  # only minutes in which something happened
        self._recent: deque[tuple[float, bytes, bytes]] = deque(maxlen=RECENT)
        self._last: dict[str, float] = {}  # time of the last message of each decision

    def event(self, fields: Mapping[str, Any], account: bytes, now: float) -> None:
        """Count one decided message; a malformed one is skipped."""
        try:
            mail = msgspec.convert(fields, _Mail)
            line = msgspec.json.encode(fields)
        except (msgspec.ValidationError, TypeError, ValueError, OverflowError):
            return
        if mail.decision not in _ACTIONS:
            return
        bucket = self._bucket(now)
        bucket.bytes += int(mail.size)
        bucket.decisions[mail.decision] += 1
        self._last[mail.decision] = now
        _observe(bucket.times[""], mail.ms)
        if mail.decision == Action.DEFER.value:
            _count(bucket.deferred, _rule(mail))
        elif mail.decision == Action.REJECT.value:
            _count(bucket.rejected, _rule(mail))
        for scan in mail.scans:
            if scan.scanner not in _SCANNERS:
                continue
            if scan.ms:  # 0: the time belongs to another scan, or nothing was done
                _observe(bucket.times[scan.scanner], scan.ms)
            if scan.status == ScanStatus.UNCHECKED.value and mail.decision == Action.QUEUE.value:
                key = f"{scan.scanner} {scan.cause if scan.cause in _CAUSES else OTHER}"
                bucket.unchecked[key] = bucket.unchecked.get(key, 0) + 1
        if len(line) <= RECENT_BYTES:
            self._recent.append((now, line, account if len(line) + len(account) <= RECENT_BYTES else b""))

    def window(self, seconds: float, now: float) -> Window:
        """The last ``seconds``, in whole minutes, this one included; three hours at most."""
        minutes = min(max(1, round(seconds / 60)), MINUTES)
        newest = _minute(now)
        chosen = [bucket for bucket in self._buckets if newest - minutes < bucket.minute <= newest]
        decisions = _sum(bucket.decisions for bucket in chosen)
        times = _together(bucket.times[""] for bucket in chosen)
        return Window(
            (minutes - 1) * 60 + now % 60,
            sum(decisions.values()),
            sum(bucket.bytes for bucket in chosen),
            {action: decisions[action] for action in _ACTIONS},
            _most(_sum(bucket.deferred for bucket in chosen)),
            _most(_sum(bucket.rejected for bucket in chosen)),
            dict(_sum(bucket.unchecked for bucket in chosen).most_common()),
            _quantile(times, 0.5),
            _quantile(times, 0.95),
            {decision: now - at for decision, at in self._last.items() if 0 <= now - at < seconds},
        )

    def minutes(self, count: int, now: float) -> tuple[Minute, ...]:
        """The last ``count`` minutes, oldest first, without gaps; the last one is not over yet."""
        known = {bucket.minute: bucket for bucket in self._buckets}
        newest = _minute(now)
        wanted = range(newest - min(max(0, count), MINUTES) + 1, newest + 1)
        return tuple(_minute_of(known.get(minute) or _Bucket(minute)) for minute in wanted)

    def recent(self, count: int = RECENT) -> tuple[RecentDecision, ...]:
        """The last decisions, newest first."""
        chosen = list(self._recent)[::-1][: max(0, count)]
        return tuple(RecentDecision(at, msgspec.json.decode(line), account) for at, line, account in chosen)

    def _bucket(self, now: float) -> _Bucket:
        minute = _minute(now)
        last = self._buckets[-1].minute if self._buckets else None
        if last is not None and minute < last:  # a jump back: later minutes are not in the future
            self._buckets = deque((b for b in self._buckets if b.minute <= minute), maxlen=MINUTES)
            last = self._buckets[-1].minute if self._buckets else None
        if last is None or minute > last:
            self._buckets.append(_Bucket(minute))
        return self._buckets[-1]


def _minute(now: float) -> int:
    return int(now // 60)


def _minute_of(bucket: _Bucket) -> Minute:
    return Minute(
        bucket.minute * 60.0,
        sum(bucket.decisions.values()),
        bucket.bytes,
        dict(bucket.decisions),
        sum(bucket.unchecked.values()),
        _quantile(bucket.times[""], 0.5),
        _quantile(bucket.times[""], 0.95),
        {name: (_quantile(bucket.times[name], 0.5), _quantile(bucket.times[name], 0.95)) for name in _SCANNERS},
    )


def _rule(mail: _Mail) -> str:
    if mail.reason == Reason.SPAM.value:  # each score would be a rule of its own
        return "spamd: score"
    return mail.rule[:RULE_SHOWN]


def _count(counts: dict[str, int], key: str) -> None:
    if key not in counts and len(counts) >= RULES_MAX:
        key = OTHER
    counts[key] = counts.get(key, 0) + 1


def _sum(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return total


def _most(counts: Counter[str]) -> dict[str, int]:
    """The RULES_MAX most frequent ones; the rest as ``other``, which is last."""
    rest = counts.pop(OTHER, 0)
    ranked = counts.most_common()
    rest += sum(count for _, count in ranked[RULES_MAX:])
    return dict(ranked[:RULES_MAX]) | ({OTHER: rest} if rest else {})


def _observe(times: list[int], ms: float) -> None:
    times[min(bisect_left(BOUNDS, ms), len(BOUNDS) - 1)] += 1


def _together(times: Iterable[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*times, strict=True)] or [0] * len(BOUNDS)


def _quantile(times: Sequence[int], share: float) -> float | None:
    """The value below which this share lies, taken as evenly spread within its bucket."""
    rank = share * sum(times)
    below = 0
    for index, count in enumerate(times):
        if count and below + count >= rank:
            low = BOUNDS[index - 1] if index else 0
            return round(low + (BOUNDS[index] - low) * (rank - below) / count, 3)
        below += count
    return None
