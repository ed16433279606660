"""The seconds of a message: no scanner uses up what a later one needs, however slow it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contentfilter.model import Scanner
from contentfilter.policy.budget import REPLY_RESERVE, SIGNATURES, attempt_timeout, estimate, reserve, reserve_for_later
from contentfilter.policy.plan import PlanStep, ScanPlan
from contentfilter.settings import ClamdSettings, Settings, SpamdSettings

MARGIN = 1e-9
SECONDS = st.floats(0, 86_400)
WANTS = st.lists(st.floats(0, 1000), min_size=1, max_size=6)
TWO_CLAMDS = Settings(clamd=ClamdSettings(backends=("unix:/a", "unix:/b")), spamd=SpamdSettings(backends=("unix:/c",)))


def plan(*scanners):
    return ScanPlan((), tuple(PlanStep(scanner, scanner in scanners, "") for scanner in Scanner))


# One try


@given(st.integers(0, 10**12), st.floats(0.001, 1000), st.floats(0, 1000), st.floats(0.001, 1000))
def test_one_try_grows_with_the_size_from_the_base_up_to_the_most(size, base, rate, most):
    for kind in (ClamdSettings, SpamdSettings):
        section = kind(timeout_base=base, timeout_per_megabyte=rate, timeout=most)
        seconds = attempt_timeout(size, section)
        assert min(base, most) <= seconds <= most
        assert attempt_timeout(size + 1_000_000, section) == pytest.approx(min(seconds + rate, most))
        assert attempt_timeout(0, section) == min(base, most)


@pytest.mark.parametrize(("megabytes", "seconds"), [(0, 60), (2, 70), (11.9, 119.5), (12, 120), (500, 120)])
def test_the_defaults(megabytes, seconds):
    assert (
        attempt_timeout(int(megabytes * 1e6), ClamdSettings())
        == attempt_timeout(int(megabytes * 1e6), SpamdSettings())
        == seconds
    )


# Sharing


def all_slow(left, steps):
    """What each step has when every step before it uses all that it may; and what the end has."""
    shares = []
    for number, own in enumerate(steps):
        shares.append(left - reserve(left, own, steps[number + 1 :]))
        left -= shares[-1]
    return shares, left


@given(SECONDS, WANTS)
def test_however_slow_the_others_are_each_has_its_part_and_the_answer_too(left, steps):
    shares, rest = all_slow(left, steps)
    part = min(1.0, left / (sum(steps) + REPLY_RESERVE))
    for own, share in zip(steps, shares, strict=True):
        assert share >= own * part - MARGIN * max(1.0, own)
    assert rest >= REPLY_RESERVE * part - MARGIN
    assert sum(shares) + rest == pytest.approx(left)


@given(SECONDS, WANTS)
def test_nobody_keeps_back_more_than_there_is_or_than_the_others_want(left, steps):
    own, *later = steps
    assert 0 <= reserve(left, own, later) <= min(left, sum(later) + REPLY_RESERVE)


@given(SECONDS, SECONDS, WANTS)
def test_more_time_is_never_less_for_anybody(one, other, steps):
    less, more = sorted((one, other))
    own, *later = steps
    assert less - reserve(less, own, later) <= more - reserve(more, own, later) + MARGIN * more
    assert reserve(less, own, later) <= reserve(more, own, later) + MARGIN * more


@given(WANTS, st.floats(0, 1000))
def test_where_all_fits_only_the_wants_of_the_others_are_kept(steps, spare):
    own, *later = steps
    others = sum(later) + REPLY_RESERVE
    assert reserve(own + others + spare, own, later) == pytest.approx(others)


def test_no_time_left_is_no_time_kept():
    assert reserve(0.0, 60.0, [60.0]) == 0.0


# What the scanners want


def test_each_scanner_wants_a_try_for_each_backend_two_at_most():
    for number, tries in enumerate((0, 1, 2, 2)):
        backends = tuple(f"unix:/{n}" for n in range(number))
        settings = Settings(
            clamd=ClamdSettings(backends=backends), spamd=SpamdSettings(backends=backends, timeout_base=10.0)
        )
        assert estimate(Scanner.CLAMD, 2_000_000, settings) == tries * 70.0
        assert estimate(Scanner.SPAMD, 2_000_000, settings) == tries * 20.0
    assert estimate(Scanner.LOADERTYPES, 10**9, Settings()) == SIGNATURES


def test_only_scanners_that_come_later_and_are_in_the_plan_are_kept_for():
    everybody, size = plan(*Scanner), 2_000_000
    assert reserve_for_later(239.0, Scanner.LOADERTYPES, everybody, size, TWO_CLAMDS) == 215.0
    assert reserve_for_later(239.0, Scanner.CLAMD, everybody, size, TWO_CLAMDS) == 75.0
    assert reserve_for_later(239.0, Scanner.CLAMD, plan(Scanner.CLAMD), size, TWO_CLAMDS) == REPLY_RESERVE
    assert reserve_for_later(239.0, Scanner.SPAMD, everybody, size, TWO_CLAMDS) == REPLY_RESERVE


def test_the_example_of_the_documents():
    """docs/flow.md, "Time budget"."""
    everybody = plan(*Scanner)
    assert 239 - reserve_for_later(239.0, Scanner.CLAMD, everybody, 2_000_000, TWO_CLAMDS) == 164
    assert 99 - reserve_for_later(99.0, Scanner.SPAMD, everybody, 2_000_000, TWO_CLAMDS) == 94
    large = 20_000_000
    kept = reserve_for_later(239.0, Scanner.CLAMD, everybody, large, TWO_CLAMDS)
    assert (attempt_timeout(large, TWO_CLAMDS.clamd), round(kept), round(239 - kept)) == (120.0, 82, 157)
    finish = reserve_for_later(kept, Scanner.SPAMD, everybody, large, TWO_CLAMDS)
    assert (round(kept - finish), round(finish)) == (79, 3)
