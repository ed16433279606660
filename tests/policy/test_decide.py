"""From outcomes to a decision: every fault defers or passes, never refuses (design 2, 6)."""

import itertools

import pytest

from contentfilter.config.settings import Clamd, Failure, Settings, Signatures, Spamd, Tables
from contentfilter.errors import Cause
from contentfilter.model import OriginKind, Scanner, ScanOutcome, ScanStatus
from contentfilter.policy.decide import Action, Reason, decide, needed
from contentfilter.policy.failure import on_fault
from contentfilter.policy.plan import ScanPlan, Step, Treatment

BOTH = Treatment(True, True, "v", "s")
VIRUS = Treatment(True, False, "v", "")
SPAM = Treatment(False, True, "", "s")
NONE = Treatment(False, False, "", "")
STEPS = tuple(Step(scanner, True, "asked") for scanner in Scanner)


def plan(*treatments):
    return ScanPlan(tuple((t, (i,)) for i, t in enumerate(treatments)), STEPS)


def found(scanner, **more):
    return ScanOutcome(scanner, ScanStatus.FOUND, "Name", **more)


def clean(scanner, **more):
    return ScanOutcome(scanner, ScanStatus.CLEAN, **more)


def fault(scanner, cause=Cause.DOWN):
    return ScanOutcome(scanner, ScanStatus.UNCHECKED, cause=cause)


def run(treatments, outcomes, origin=OriginKind.STRANGER, **sections):
    return decide(plan(*treatments), tuple(outcomes), origin, len(treatments), Settings(**sections))


def test_clean_message_is_queued_for_all():
    d = run([BOTH], [clean(s) for s in Scanner])
    assert (d.action, d.rule) == (Action.QUEUE, "clean")
    assert (d.deliveries[0].virus, d.deliveries[0].spam) == (ScanStatus.CLEAN, ScanStatus.CLEAN)


def test_virus_refuses_by_default_with_its_rule():
    d = run([BOTH], [found(Scanner.CLAMD)])
    assert (d.action, d.reason, d.rule) == (Action.REJECT, Reason.VIRUS, "clamd: Name")


def test_signature_is_banned_content():
    assert run([BOTH], [found(Scanner.SIGNATURES)]).reason is Reason.BANNED


@pytest.mark.parametrize(
    ("scanner", "cause", "origin"),
    list(itertools.product(Scanner, Cause, OriginKind)),
    ids=lambda v: v.value,
)
def test_no_fault_ever_refuses_and_every_cell_is_what_the_table_says(scanner, cause, origin):
    d = run([BOTH], [fault(scanner, cause)], origin)
    expected = on_fault(scanner, cause, origin, Settings())
    assert d.action is (Action.DEFER if expected == "defer" else Action.QUEUE)
    if origin is OriginKind.BOUNCE:
        assert d.action is Action.QUEUE
    if d.action is Action.QUEUE:
        assert "unchecked" in d.rule
        assert ScanStatus.UNCHECKED in (d.deliveries[0].virus, d.deliveries[0].spam)


@pytest.mark.parametrize("wish", ["defer", "pass"])
def test_failure_settings_are_obeyed(wish):
    failure = Failure(clamd=wish, spamd=wish, signatures=wish, too_big=wish)
    for scanner, cause in itertools.product(Scanner, Cause):
        d = run([BOTH], [fault(scanner, cause)], failure=failure)
        assert (d.action is Action.DEFER) is (wish == "defer")


def test_a_fault_concerns_only_those_who_asked():
    assert run([SPAM], [fault(Scanner.CLAMD)]).action is Action.QUEUE
    assert run([SPAM, VIRUS], [fault(Scanner.CLAMD)]).action is Action.DEFER


def test_spam_is_marked_by_default_for_those_who_asked():
    d = run([BOTH, NONE, SPAM], [clean(Scanner.CLAMD), found(Scanner.SPAMD, score=9.0, threshold=5.0)])
    assert d.action is Action.QUEUE
    forms = {delivery.recipients: delivery.spam for delivery in d.deliveries}
    assert forms == {(0,): ScanStatus.FOUND, (2,): ScanStatus.FOUND, (1,): ScanStatus.SKIPPED}


def test_equal_outcomes_travel_together():
    d = run([SPAM, NONE, SPAM, NONE], [found(Scanner.SPAMD, score=9.0, threshold=5.0)])
    assert sorted(delivery.recipients for delivery in d.deliveries) == [(0, 2), (1, 3)]


def test_reject_score_refuses_whatever_the_action():
    outcome = found(Scanner.SPAMD, score=15.0, threshold=5.0)
    assert run([SPAM], [outcome], spamd=Spamd(reject_score=15.0)).action is Action.REJECT
    assert run([SPAM], [outcome], spamd=Spamd(reject_score=15.1)).action is Action.QUEUE


def test_split_keeps_for_the_refused_and_delivers_to_the_rest():
    d = run([VIRUS, NONE], [found(Scanner.CLAMD)])
    assert d.action is Action.QUEUE
    assert d.quarantined == (0,)
    assert [delivery.recipients for delivery in d.deliveries] == [(1,)]
    assert d.rule == "clamd: Name"


def test_strictest_refuses_for_all():
    d = run([VIRUS, NONE], [found(Scanner.CLAMD)], tables=Tables(recipients="strictest"))
    assert (d.action, d.deliveries, d.quarantined) == (Action.REJECT, (), ())


def test_remove_keeps_and_drops():
    d = run([VIRUS], [found(Scanner.CLAMD)], clamd=Clamd(action="remove"))
    assert (d.action, d.quarantined) == (Action.DROP, (0,))


def test_rejected_beside_removed_is_not_refused_as_a_whole():
    """Some of the recipients would get no message and no refusal otherwise."""
    outcomes = [found(Scanner.CLAMD), found(Scanner.SPAMD, score=9.0, threshold=5.0)]
    d = run([VIRUS, SPAM], outcomes, spamd=Spamd(action="remove"))
    assert (d.action, d.quarantined) == (Action.DROP, (0, 1))


def test_bounce_is_dropped_never_refused():
    d = run([VIRUS], [found(Scanner.CLAMD)], OriginKind.BOUNCE)
    assert (d.action, d.quarantined) == (Action.DROP, (0,))


def test_bounce_is_not_refused_by_strictest_either():
    d = run([VIRUS, NONE], [found(Scanner.CLAMD)], OriginKind.BOUNCE, tables=Tables(recipients="strictest"))
    assert d.action in (Action.DROP, Action.QUEUE)
    assert d.quarantined


def test_marking_a_signature_does_not_hide_a_virus():
    outcomes = [found(Scanner.SIGNATURES), found(Scanner.CLAMD)]
    d = run([VIRUS], outcomes, signatures=Signatures(action="mark"))
    assert (d.action, d.reason) == (Action.REJECT, Reason.VIRUS)


def test_limits_refuse():
    limited = ScanPlan(((BOTH, (0,)),), STEPS, limit="databytes=10")
    d = decide(limited, (), OriginKind.STRANGER, 1, Settings())
    assert (d.action, d.reason) == (Action.REJECT, Reason.SIZE)


def test_no_recipients_are_queued():
    d = decide(ScanPlan((), ()), (), OriginKind.STRANGER, 0, Settings())
    assert d.action is Action.QUEUE
    assert len(d.deliveries) == 1


# --- stop as soon as the decision is certain -------------------------------------------------------------------


def asks(treatments, outcomes, **sections):
    return [
        s for s in Scanner if needed(s, plan(*treatments), tuple(outcomes), OriginKind.STRANGER, Settings(**sections))
    ]


def test_nobody_is_asked_after_a_refusal():
    assert asks([BOTH], [found(Scanner.SIGNATURES)]) == []


def test_spamd_is_still_asked_for_those_who_are_not_refused():
    assert asks([BOTH, SPAM], [found(Scanner.SIGNATURES)]) == [Scanner.SPAMD]
    assert asks([BOTH, SPAM], [found(Scanner.SIGNATURES)], tables=Tables(recipients="strictest")) == []


def test_nobody_is_asked_after_a_deferral():
    assert asks([BOTH, SPAM], [fault(Scanner.CLAMD)]) == []


def test_a_mark_does_not_end_the_search():
    assert Scanner.CLAMD in asks([BOTH], [found(Scanner.SIGNATURES)], signatures=Signatures(action="mark"))


def test_who_is_not_wanted_is_not_asked():
    assert asks([SPAM], []) == [Scanner.SPAMD]
    assert asks([NONE], []) == []
