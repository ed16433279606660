"""The admission queue: order, no starvation, and that no source and no large message holds up the others."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from contentfilter.model import Origin, OriginKind
from contentfilter.policy.admission import (
    LARGE,
    OLDEST_EVERY,
    RANKS,
    AdmissionQueue,
    Priority,
    QueueEntry,
    priority_of,
    source_of,
)


def priority(source: str = "a", rank: int = 1, bytes_charged: int = 0) -> Priority:
    return Priority(("user", source.encode()), rank, bytes_charged)


def small(rank: int) -> bool:
    return rank < 2


def waiting(queue: AdmissionQueue[str], *priorities: Priority) -> list[QueueEntry[str]]:
    entries = [QueueEntry(each, f"{number}") for number, each in enumerate(priorities)]
    for entry in entries:
        assert queue.enqueue(entry) is None
    return entries


def served(queue: AdmissionQueue[str], count: int) -> list[QueueEntry[str]]:
    """The next ``count`` entries that get a slot, which is given back immediately."""
    order = []
    for _ in range(count):
        entry = queue.next_ready()
        if entry is None:
            break
        order.append(entry)
        queue.release(entry.priority)
    return order


# Priorities


@pytest.mark.parametrize(
    ("kind", "size", "rank"),
    [
        (OriginKind.BOUNCE, 1000, 0),
        (OriginKind.AUTHENTICATED, LARGE, 0),
        (OriginKind.RELAY, 0, 0),
        (OriginKind.STRANGER, LARGE, 1),
        (OriginKind.LOCAL, 10, 1),
        (OriginKind.AUTHENTICATED, LARGE + 1, 2),
        (OriginKind.STRANGER, LARGE + 1, 3),
    ],
)
def test_small_mail_goes_before_large_and_our_users_before_the_rest(kind: OriginKind, size: int, rank: int) -> None:
    made = priority_of(Origin(kind, 7), size)
    assert (made.rank, made.bytes_charged) == (rank, size if size > LARGE else 0)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (b"192.0.2.7", b"192.0.2.200", True),
        (b"192.0.2.7", b"192.0.3.7", False),
        (b"::ffff:192.0.2.7", b"::ffff:192.0.2.8", True),
        (b"2001:db8:1:2::1", b"2001:db8:1:2:ffff::9", True),
        (b"2001:db8:1:2::1", b"2001:db8:1:3::1", False),
        (b"fe80::1%eth0", b"fe80::2%eth0", True),
        (b"nonsense", b"other nonsense", False),
        (b":::::\xff", b":::::\xfe", False),
    ],
)
def test_a_network_is_one_source(one: bytes, other: bytes, same: bool) -> None:
    sources = [source_of(Origin(OriginKind.STRANGER, 7, remote_ip=ip)) for ip in (one, other)]
    assert (sources[0] == sources[1]) is same


def test_a_login_is_a_source_wherever_it_comes_from_and_a_local_user_is_his_uid() -> None:
    users = [Origin(OriginKind.AUTHENTICATED, 7, remote_ip=ip, user=b"joe") for ip in (b"192.0.2.1", b"198.51.100.1")]
    assert len({source_of(user) for user in users}) == 1
    assert source_of(Origin(OriginKind.LOCAL, 1001)) != source_of(Origin(OriginKind.LOCAL, 1002))


@given(st.binary(max_size=60))
def test_whatever_an_address_looks_like_it_makes_a_source(ip: bytes) -> None:
    assert source_of(Origin(OriginKind.STRANGER, 7, remote_ip=ip))[0] in ("net", "uid")


# Order


def test_a_flood_delays_another_source_by_one_message_not_by_all() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(1)
    waiting(queue, *[priority("flood")] * 1000)
    queue.enqueue(entry := QueueEntry(priority("other"), "me"))
    assert entry in served(queue, 2)


def test_a_source_that_holds_slots_waits_behind_one_that_holds_none() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(8)
    for _ in range(8):
        assert queue.try_acquire(priority("slow"))
    waiting(queue, *[priority("slow")] * 5, priority("new"))
    queue.release(priority("slow"))
    first = queue.next_ready()
    assert first is not None
    assert first.priority.source == ("user", b"new")


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=60))
def test_sources_take_turns(sources: list[str]) -> None:
    """While all of them wait, none gets two more than another, except for the slots that go by age."""
    queue: AdmissionQueue[str] = AdmissionQueue(1)
    waiting(queue, *(priority(source) for source in sources))
    left, got = Counter(sources), Counter[str]()
    for number, entry in enumerate(served(queue, len(sources)), 1):
        source = entry.priority.source[1].decode()  # type: ignore[union-attr]
        left[source] -= 1
        got[source] += 1
        if all(left[each] for each in set(sources)):
            counts = [got[each] for each in set(sources)]
            assert max(counts) - min(counts) <= 1 + number / OLDEST_EVERY


def test_ranks_go_in_order_but_every_fourth_slot_goes_by_age() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(1)
    priorities = [
        priority("z", 3, LARGE + 1),
        priority("y", 1),
        priority("x", 0),
        *(priority(f"u{n}", 0) for n in range(6)),
    ]
    waiting(queue, *priorities)
    assert [entry.priority.rank for entry in served(queue, 9)] == [0, 0, 0, 3, 0, 0, 0, 1, 0]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, RANKS - 1)), max_size=12),
    st.tuples(st.sampled_from("abc"), st.integers(0, RANKS - 1)),
    st.integers(1, 4),
)
def test_no_message_starves(before: list[tuple[str, int]], mine: tuple[str, int], slots: int) -> None:
    """However many better ones arrive: with n before it, a message is served within 4 (n + 1) slots."""
    queue: AdmissionQueue[str] = AdmissionQueue(slots, byte_limit=LARGE)
    waiting(queue, *(priority(source, rank, 0 if small(rank) else LARGE + 1) for source, rank in before))
    me = QueueEntry(priority(mine[0], mine[1], 0 if small(mine[1]) else LARGE + 1), "me")
    queue.enqueue(me)
    for number in range(OLDEST_EVERY * (len(before) + 1)):
        queue.enqueue(QueueEntry(priority(f"fresh {number}", 0), "better"))
        queue.enqueue(QueueEntry(priority(f"fresh {number}", 0), "better"))
        if served(queue, 1) == [me]:
            return
    pytest.fail(f"not served after {OLDEST_EVERY * (len(before) + 1)} slots")


# Large ones


def test_a_large_one_that_does_not_fit_keeps_its_turn_and_lets_small_ones_pass() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(10, byte_limit=1_000_000)
    under_way = priority("a", 3, 600_000)
    assert queue.try_acquire(under_way)
    big, middle, little = waiting(queue, priority("b", 3, 900_000), priority("c", 3, 300_000), priority("d", 1))
    assert queue.next_ready() is little
    assert queue.next_ready() is None, "one that would fit must not overtake the one whose turn it is"
    queue.release(under_way)
    assert queue.next_ready() is big
    assert queue.next_ready() is None
    queue.release(big.priority)
    assert queue.next_ready() is middle


def test_even_our_own_large_one_does_not_pass_a_large_one_that_has_its_turn() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(10, byte_limit=1_000_000)
    under_way = priority("a", 3, 600_000)
    queue.try_acquire(under_way)
    (big,) = waiting(queue, priority("b", 3, 900_000))
    assert queue.next_ready() is None
    (ours,) = waiting(queue, priority("c", 2, 300_000))
    assert queue.next_ready() is None
    queue.release(under_way)
    assert queue.next_ready() is big
    queue.release(big.priority)
    assert queue.next_ready() is ours


def test_one_that_is_larger_than_the_limit_is_admitted_alone() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(10, byte_limit=10)
    assert queue.try_acquire(priority("a", 3, 1 << 40))
    assert not queue.try_acquire(priority("b", 3, 1_000_000))
    assert not queue.full()


def test_a_stuck_one_that_goes_away_frees_the_way() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(10, byte_limit=1_000_000)
    assert queue.try_acquire(priority("a", 3, 600_000))
    big, middle = waiting(queue, priority("b", 3, 900_000), priority("c", 3, 300_000))
    assert queue.next_ready() is None
    queue.withdraw(big)
    assert queue.next_ready() is middle


# Room


def test_the_greediest_source_loses_its_last_message_of_the_worst_rank() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(1, max_waiting=4)
    queue.try_acquire(priority("x"))
    entries = waiting(
        queue, priority("flood", 1), priority("flood", 3, LARGE + 1), priority("flood", 0), priority("other")
    )
    assert queue.enqueue(QueueEntry(priority("new"), "new")) is entries[1]
    assert len(queue) == 4


def test_a_flood_cannot_push_others_out() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(1, max_waiting=4)
    queue.try_acquire(priority("x"))
    others = waiting(queue, priority("a"), priority("b"), priority("c"))
    for _ in range(20):
        queue.enqueue(QueueEntry(priority("flood"), "flood"))
    assert [entry for entry in served_all(queue) if entry in others] == others


def served_all(queue: AdmissionQueue[str]) -> list[QueueEntry[str]]:
    queue.release(priority("x"))
    return served(queue, 100)


def test_if_every_source_has_one_the_newcomer_is_shed_and_the_queue_reports_full_before() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(1, max_waiting=2)
    assert not queue.full()
    queue.try_acquire(priority("x"))
    waiting(queue, priority("a"), priority("b"))
    assert queue.full()
    new = QueueEntry(priority("c"), "c")
    assert queue.enqueue(new) is new


def test_a_suspended_queue_gives_no_slot() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(1)
    queue.suspended = True
    assert not queue.try_acquire(priority())
    (entry,) = waiting(queue, priority())
    assert queue.next_ready() is None
    queue.suspended = False
    assert queue.next_ready() is entry


class Anything(RuleBasedStateMachine):
    """Whatever is done in whatever order, the books balance."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: AdmissionQueue[int] = AdmissionQueue(3, max_waiting=5, byte_limit=2 * LARGE)
        self.held: list[Priority] = []
        self.waiting: list[QueueEntry[int]] = []

    @rule(source=st.sampled_from("abc"), rank=st.integers(0, RANKS - 1), extra=st.integers(1, LARGE))
    def come(self, source: str, rank: int, extra: int) -> None:
        made = priority(source, rank, 0 if small(rank) else LARGE + extra)
        if self.queue.try_acquire(made):
            self.held.append(made)
            return
        entry = QueueEntry(made, 0)
        self.waiting.append(entry)
        if (shed := self.queue.enqueue(entry)) is not None:
            self.waiting.remove(shed)
        self.fill_slots()

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.held:
            self.queue.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))
            self.fill_slots()

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        if self.waiting:
            self.queue.withdraw(self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1))))
            self.fill_slots()

    @rule(slots=st.integers(1, 4), max_waiting=st.integers(0, 6))
    def resize(self, slots: int, max_waiting: int) -> None:
        self.queue.slots, self.queue.max_waiting = slots, max_waiting
        self.fill_slots()

    @rule()
    def shut(self) -> None:
        self.queue.suspended = not self.queue.suspended
        self.fill_slots()

    def fill_slots(self) -> None:
        while (entry := self.queue.next_ready()) is not None:
            self.waiting.remove(entry)
            self.held.append(entry.priority)
            assert self.queue.in_use <= self.queue.slots

    @invariant()
    def the_books_balance(self) -> None:
        queue = self.queue
        assert queue.in_use == len(self.held)
        assert len(queue) == len(self.waiting) == queue.ahead(RANKS - 1)
        assert queue._bytes_in_use == sum(each.bytes_charged for each in self.held)
        assert queue._in_use_by == Counter(each.source for each in self.held)
        assert queue._waiting_by == Counter(each.priority.source for each in self.waiting)

    @invariant()
    def no_slot_stays_empty_while_a_small_message_waits(self) -> None:
        if self.queue.in_use < self.queue.slots and not self.queue.suspended:
            assert not any(small(each.priority.rank) for each in self.waiting)
            assert not self.waiting or self.queue._bytes_in_use, "a large one always fits alone"


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
