"""What one user may have under way in the receiver."""

from dataclasses import replace

from contentfilter.receiver.limits import ReceiverLimits, Usage

LIMITS = ReceiverLimits(connections=3, all_connections=5, bytes=100, all_bytes=150, rate=10.0, burst=4)


def test_one_user_has_a_number_of_connections_and_others_have_theirs() -> None:
    usage = Usage(LIMITS)
    assert [usage.connect(1, 0.0) for _ in range(4)] == [True, True, True, False]
    assert [usage.connect(2, 0.0) for _ in range(3)] == [True, True, False], "all together have five"
    usage.disconnect(1, 0)
    assert usage.connect(3, 0.0)
    assert usage.take_refused() == {1: 1, 2: 1}
    assert usage.take_refused() == {}


def test_the_bytes_of_one_user_and_of_all_are_bounded() -> None:
    usage = Usage(LIMITS)
    assert usage.reserve(1, 100)
    assert not usage.reserve(1, 1)
    assert not usage.reserve(2, 51)
    assert usage.reserve(2, 50)
    usage.connect(1, 0.0)
    usage.disconnect(1, 100)
    assert usage.reserve(1, 100)


def test_new_connections_come_at_a_rate_after_a_burst() -> None:
    usage = Usage(LIMITS)

    def offer(uid: int, now: float) -> bool:
        granted = usage.connect(uid, now)
        if granted:
            usage.disconnect(uid, 0)
        return granted

    assert [offer(1, 0.0) for _ in range(6)] == [True] * 4 + [False] * 2
    assert offer(2, 0.0), "another user has a rate of its own"
    assert [offer(1, 0.2) for _ in range(3)] == [True, True, False]
    assert sum(offer(1, 10.0) for _ in range(10)) == 4


def test_who_brings_no_request_is_given_fewer_connections_for_a_while() -> None:
    usage = Usage(replace(LIMITS, misuse=4.0))
    assert usage.connect(1, 0.0)
    usage.disconnect(1, 0)
    for _ in range(3):
        usage.misused(1, 0.0)
    assert usage.take_refused() == {1: 3}
    assert not usage.connect(1, 0.4), "four below zero at most, and ten come in a second"
    assert usage.connect(2, 0.4), "another user pays nothing for it"
    assert usage.connect(1, 0.6)


def test_refusals_of_many_users_take_bounded_memory() -> None:
    usage = Usage(LIMITS)
    for uid in range(1, 1000):
        usage.refuse(uid)
    refused = usage.take_refused()
    assert len(refused) <= 101
    assert sum(refused.values()) == 999
