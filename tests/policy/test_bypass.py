"""A bypass holds for what it names, ends to the second, and always lets mail pass marked unchecked."""

import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from contentfilter.errors import Cause
from contentfilter.model import Action, Envelope, Origin, OriginKind, Scanner, ScanStatus
from contentfilter.policy.decide import decide
from contentfilter.policy.explain import trace
from contentfilter.policy.overrides import (
    SCANNERS,
    SLACK,
    Bypass,
    bypassed_outcomes,
    find_bypass,
)
from contentfilter.policy.plan import ScanPlan, Switches, make_plan
from contentfilter.settings import FailureSettings, Settings

NOW = 1_800_000_000.0
CLAMD = Bypass(scanner=Scanner.CLAMD, since=NOW, until=NOW + 600, reason="ticket 1", by="root")
SIGNATURES = replace(CLAMD, scanner=Scanner.SIGNATURES)
SPAMD = replace(CLAMD, scanner=Scanner.SPAMD)
ORIGIN = Origin(OriginKind.STRANGER, 100)
SWITCHES = Switches(clamglobal=True, spamglobal=True, chksignature=True, chkloadertype=True)
ENVELOPE = Envelope(b"s@example.net", (b"r@example.org",))


def plan(switches: Switches = SWITCHES, settings: Settings | None = None) -> ScanPlan:
    return make_plan(ENVELOPE, 100, ORIGIN, settings or Settings(), switches, lambda recipient: (None, None))


def test_a_bypass_ends_to_the_second() -> None:
    assert CLAMD.covers(Scanner.CLAMD, OriginKind.STRANGER, NOW + 599.999)
    assert not CLAMD.covers(Scanner.CLAMD, OriginKind.STRANGER, NOW + 600)


def test_a_clock_set_back_makes_no_bypass_last() -> None:
    longest = replace(CLAMD, until=NOW + Bypass.LONGEST)
    assert longest.active(NOW - SLACK), "a small correction ends nothing"
    assert not longest.active(NOW - SLACK - 1)
    assert not longest.active(0.0)


@given(st.sampled_from(Scanner), st.sampled_from(OriginKind), st.sets(st.sampled_from(OriginKind)))
def test_it_holds_for_what_it_names_and_nothing_else(
    scanner: Scanner, origin: OriginKind, origins: set[OriginKind]
) -> None:
    orders = (replace(CLAMD, origins=tuple(origins)), SIGNATURES)
    found = find_bypass(orders, scanner, origin, NOW)
    if scanner is Scanner.CLAMD:
        assert (found is orders[0]) == (not origins or origin in origins)
    else:
        assert (found is SIGNATURES) == (scanner in (Scanner.SIGNATURES, Scanner.LOADERTYPES))


@pytest.mark.parametrize("origin", OriginKind)
@pytest.mark.parametrize("scanner", Scanner)
def test_what_is_bypassed_passes_whatever_the_failure_table_says(scanner: Scanner, origin: OriginKind) -> None:
    settings = Settings(failure=FailureSettings("defer", "defer", "defer", "defer", "defer"))
    outcomes = bypassed_outcomes(CLAMD, scanner, plan())
    decision = decide(plan(), outcomes, origin, 1, settings)
    assert (decision.action, decision.rule) == (Action.QUEUE, f"passed unchecked: {scanner.value}")
    assert ScanStatus.UNCHECKED in (decision.deliveries[0].virus, decision.deliveries[0].spam)


def test_the_outcome_says_who_until_when_and_why_in_printable_ascii() -> None:
    (outcome,) = bypassed_outcomes(replace(CLAMD, reason="café\n"), Scanner.CLAMD, plan())
    assert (outcome.status, outcome.cause) == (ScanStatus.UNCHECKED, Cause.BYPASSED)
    assert outcome.detail == "by root until 2027-01-15T08:10:00Z: caf???"


def test_a_scanner_that_nobody_wants_is_not_bypassed_but_skipped() -> None:
    unwanted = plan(dataclasses.replace(SWITCHES, chkloadertype=False))
    assert bypassed_outcomes(SIGNATURES, Scanner.LOADERTYPES, unwanted) == ()
    assert len(bypassed_outcomes(SIGNATURES, Scanner.SIGNATURES, unwanted)) == 1


def test_every_owner_of_preferences_is_told_that_spamd_was_left_out() -> None:
    several = msgspec.structs.replace(plan(), users=((b"", b""), (b"a", b"a@example.org"), (b"b", b"b@example.org")))
    assert [outcome.owner for outcome in bypassed_outcomes(SPAMD, Scanner.SPAMD, several)] == [b"", b"a", b"b"]


def test_the_story_tells_that_nobody_was_asked() -> None:
    outcomes = bypassed_outcomes(CLAMD, Scanner.CLAMD, plan())
    decision = decide(plan(), outcomes, ORIGIN.kind, 1, Settings())
    (line,) = (line for line in trace(ENVELOPE, ORIGIN, 100, plan(), outcomes, decision) if line.stage == "clamd")
    assert "unchecked, bypassed: by root until" in line.text
    assert "(not asked, though wanted: clamglobal)" in line.text


@pytest.mark.parametrize(
    ("seconds", "reason", "refused"),
    [
        (Bypass.SHORTEST, "r", False),
        (Bypass.LONGEST, "r" * 200, False),
        (None, "", False),
        (Bypass.SHORTEST - 1, "r", True),
        (Bypass.LONGEST + 1, "r", True),
        (float("nan"), "r", True),
        (-1.0, "r", True),
        (600.0, "r" * 201, True),
        (600.0, "two\nlines", True),
        (600.0, "\x1b[31m", True),
        (600.0, "\udce4", True),
    ],
)
def test_bounds_of_an_order(seconds: float | None, reason: str, refused: bool) -> None:
    assert bool(Bypass.objection(seconds, reason)) is refused


def test_loader_types_go_with_the_signatures() -> None:
    assert set(SCANNERS) == set(Scanner) - {Scanner.LOADERTYPES}
