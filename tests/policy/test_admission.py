"""The line: who goes first, that nobody starves, that no source and no large message is in the way of the others."""

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


def claim(source: str = "a", rank: int = 1, volume: int = 0) -> Priority:
    return Priority(("user", source.encode()), rank, volume)


def small(rank: int) -> bool:
    return rank < 2


def waiting(line: AdmissionQueue[str], *claims: Priority) -> list[QueueEntry[str]]:
    tickets = [QueueEntry(each, f"{number}") for number, each in enumerate(claims)]
    for ticket in tickets:
        assert line.join(ticket) is None
    return tickets


def served(line: AdmissionQueue[str], count: int) -> list[QueueEntry[str]]:
    """The next ``count`` that get a place, each of which is given back at once."""
    order = []
    for _ in range(count):
        ticket = line.next()
        if ticket is None:
            break
        order.append(ticket)
        line.leave(ticket.claim)
    return order


# Claims


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
    assert (made.rank, made.volume) == (rank, size if size > LARGE else 0)


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
    line: AdmissionQueue[str] = AdmissionQueue(1)
    waiting(line, *[claim("flood")] * 1000)
    line.join(ticket := QueueEntry(claim("other"), "me"))
    assert ticket in served(line, 2)


def test_who_holds_places_for_long_waits_behind_who_holds_none() -> None:
    line: AdmissionQueue[str] = AdmissionQueue(8)
    for _ in range(8):
        assert line.take(claim("slow"))
    waiting(line, *[claim("slow")] * 5, claim("new"))
    line.leave(claim("slow"))
    first = line.next()
    assert first is not None
    assert first.claim.source == ("user", b"new")


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=60))
def test_sources_take_turns(sources: list[str]) -> None:
    """As long as all of them wait, none gets two more than another, but for the places that go by age."""
    line: AdmissionQueue[str] = AdmissionQueue(1)
    waiting(line, *(claim(source) for source in sources))
    left, got = Counter(sources), Counter[str]()
    for number, ticket in enumerate(served(line, len(sources)), 1):
        source = ticket.claim.source[1].decode()  # type: ignore[union-attr]
        left[source] -= 1
        got[source] += 1
        if all(left[each] for each in set(sources)):
            counts = [got[each] for each in set(sources)]
            assert max(counts) - min(counts) <= 1 + number / OLDEST_EVERY


def test_ranks_go_in_order_but_every_fourth_place_goes_by_age() -> None:
    line: AdmissionQueue[str] = AdmissionQueue(1)
    claims = [claim("z", 3, LARGE + 1), claim("y", 1), claim("x", 0), *(claim(f"u{n}", 0) for n in range(6))]
    waiting(line, *claims)
    assert [ticket.claim.rank for ticket in served(line, 9)] == [0, 0, 0, 3, 0, 0, 0, 1, 0]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, RANKS - 1)), max_size=12),
    st.tuples(st.sampled_from("abc"), st.integers(0, RANKS - 1)),
    st.integers(1, 4),
)
def test_nobody_starves(before: list[tuple[str, int]], mine: tuple[str, int], places: int) -> None:
    """However many better ones come: with n before me I am served within 4 (n + 1) places."""
    line: AdmissionQueue[str] = AdmissionQueue(places, volume=LARGE)
    waiting(line, *(claim(source, rank, 0 if small(rank) else LARGE + 1) for source, rank in before))
    me = QueueEntry(claim(mine[0], mine[1], 0 if small(mine[1]) else LARGE + 1), "me")
    line.join(me)
    for number in range(OLDEST_EVERY * (len(before) + 1)):
        line.join(QueueEntry(claim(f"fresh {number}", 0), "better"))
        line.join(QueueEntry(claim(f"fresh {number}", 0), "better"))
        if served(line, 1) == [me]:
            return
    pytest.fail(f"not served after {OLDEST_EVERY * (len(before) + 1)} places")


# Large ones


def test_a_large_one_that_does_not_fit_keeps_its_turn_and_lets_small_ones_pass() -> None:
    line: AdmissionQueue[str] = AdmissionQueue(10, volume=1_000_000)
    under_way = claim("a", 3, 600_000)
    assert line.take(under_way)
    big, middle, little = waiting(line, claim("b", 3, 900_000), claim("c", 3, 300_000), claim("d", 1))
    assert line.next() is little
    assert line.next() is None, "one that would fit must not overtake the one whose turn it is"
    line.leave(under_way)
    assert line.next() is big
    assert line.next() is None
    line.leave(big.claim)
    assert line.next() is middle


def test_even_our_own_large_one_does_not_pass_a_large_one_that_has_its_turn() -> None:
    line: AdmissionQueue[str] = AdmissionQueue(10, volume=1_000_000)
    under_way = claim("a", 3, 600_000)
    line.take(under_way)
    (big,) = waiting(line, claim("b", 3, 900_000))
    assert line.next() is None
    (ours,) = waiting(line, claim("c", 2, 300_000))
    assert line.next() is None
    line.leave(under_way)
    assert line.next() is big
    line.leave(big.claim)
    assert line.next() is ours


def test_one_that_is_larger_than_all_room_is_let_in_alone() -> None:
    line: AdmissionQueue[str] = AdmissionQueue(10, volume=10)
    assert line.take(claim("a", 3, 1 << 40))
    assert not line.take(claim("b", 3, 1_000_000))
    assert not line.full()


def test_a_stuck_one_that_goes_away_frees_the_way() -> None:
    line: AdmissionQueue[str] = AdmissionQueue(10, volume=1_000_000)
    assert line.take(claim("a", 3, 600_000))
    big, middle = waiting(line, claim("b", 3, 900_000), claim("c", 3, 300_000))
    assert line.next() is None
    line.quit(big)
    assert line.next() is middle


# Room


def test_the_greediest_source_loses_its_last_message_of_the_worst_rank() -> None:
    line: AdmissionQueue[str] = AdmissionQueue(1, room=4)
    line.take(claim("x"))
    tickets = waiting(line, claim("flood", 1), claim("flood", 3, LARGE + 1), claim("flood", 0), claim("other"))
    assert line.join(QueueEntry(claim("new"), "new")) is tickets[1]
    assert len(line) == 4


def test_a_flood_cannot_push_others_out() -> None:
    line: AdmissionQueue[str] = AdmissionQueue(1, room=4)
    line.take(claim("x"))
    others = waiting(line, claim("a"), claim("b"), claim("c"))
    for _ in range(20):
        line.join(QueueEntry(claim("flood"), "flood"))
    assert [ticket for ticket in served_all(line) if ticket in others] == others


def served_all(line: AdmissionQueue[str]) -> list[QueueEntry[str]]:
    line.leave(claim("x"))
    return served(line, 100)


def test_where_everybody_has_one_the_newcomer_goes_and_the_line_says_so_before() -> None:
    line: AdmissionQueue[str] = AdmissionQueue(1, room=2)
    assert not line.full()
    line.take(claim("x"))
    waiting(line, claim("a"), claim("b"))
    assert line.full()
    new = QueueEntry(claim("c"), "c")
    assert line.join(new) is new


def test_a_closed_line_gives_nobody_a_place() -> None:
    line: AdmissionQueue[str] = AdmissionQueue(1)
    line.closed = True
    assert not line.take(claim())
    (ticket,) = waiting(line, claim())
    assert line.next() is None
    line.closed = False
    assert line.next() is ticket


class Anything(RuleBasedStateMachine):
    """Whatever is done in whatever order, the books balance."""

    def __init__(self) -> None:
        super().__init__()
        self.line: AdmissionQueue[int] = AdmissionQueue(3, room=5, volume=2 * LARGE)
        self.held: list[Priority] = []
        self.waiting: list[QueueEntry[int]] = []

    @rule(source=st.sampled_from("abc"), rank=st.integers(0, RANKS - 1), extra=st.integers(1, LARGE))
    def come(self, source: str, rank: int, extra: int) -> None:
        made = claim(source, rank, 0 if small(rank) else LARGE + extra)
        if self.line.take(made):
            self.held.append(made)
            return
        ticket = QueueEntry(made, 0)
        self.waiting.append(ticket)
        if (leaving := self.line.join(ticket)) is not None:
            self.waiting.remove(leaving)
        self.hand_out()

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.held:
            self.line.leave(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))
            self.hand_out()

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        if self.waiting:
            self.line.quit(self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1))))
            self.hand_out()

    @rule(places=st.integers(1, 4), room=st.integers(0, 6))
    def resize(self, places: int, room: int) -> None:
        self.line.places, self.line.room = places, room
        self.hand_out()

    @rule()
    def shut(self) -> None:
        self.line.closed = not self.line.closed
        self.hand_out()

    def hand_out(self) -> None:
        while (ticket := self.line.next()) is not None:
            self.waiting.remove(ticket)
            self.held.append(ticket.claim)
            assert self.line.held <= self.line.places

    @invariant()
    def the_books_balance(self) -> None:
        line = self.line
        assert line.held == len(self.held)
        assert len(line) == len(self.waiting) == line.ahead(RANKS - 1)
        assert line._volume_held == sum(each.volume for each in self.held)
        assert line._held_by == Counter(each.source for each in self.held)
        assert line._waiting_by == Counter(each.claim.source for each in self.waiting)

    @invariant()
    def no_place_stays_empty_while_somebody_small_waits(self) -> None:
        if self.line.held < self.line.places and not self.line.closed:
            assert not any(small(each.claim.rank) for each in self.waiting)
            assert not self.waiting or self.line._volume_held, "a large one always fits alone"


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
