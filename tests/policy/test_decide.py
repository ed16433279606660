"""From outcomes to a decision: every fault defers or passes, never refuses (design 2, 6)."""

import itertools

import msgspec
import pytest

from contentfilter.errors import Cause
from contentfilter.model import SUBMISSIONS_MAX, Action, Check, OriginKind, Reason, Scanner, ScanOutcome, ScanStatus
from contentfilter.policy.decide import decide, open_checks
from contentfilter.policy.failure import failure_action
from contentfilter.policy.options import DEFAULTS, Options, read_options
from contentfilter.policy.plan import PlanStep, RecipientPolicy, ScanPlan
from contentfilter.settings import (
    ClamdSettings,
    FailureSettings,
    Settings,
    SignatureSettings,
    SpamdSettings,
    TableSettings,
)

BOTH = RecipientPolicy(True, True, "v", "s")
VIRUS = RecipientPolicy(True, False, "v", "")
SPAM = RecipientPolicy(False, True, "", "s")
NONE = RecipientPolicy(False, False, "", "")
STEPS = tuple(PlanStep(scanner, True, "asked") for scanner in Scanner)


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
    expected = failure_action(scanner, cause, origin, Settings())
    assert d.action is (Action.DEFER if expected == "defer" else Action.QUEUE)
    if origin is OriginKind.BOUNCE:
        assert d.action is Action.QUEUE
    if d.action is Action.QUEUE:
        assert "unchecked" in d.rule
        assert ScanStatus.UNCHECKED in (d.deliveries[0].virus, d.deliveries[0].spam)


@pytest.mark.parametrize("wish", ["defer", "pass"])
def test_failure_settings_are_obeyed(wish):
    failure = FailureSettings(clamd=wish, spamd=wish, signatures=wish, too_big=wish, limits=wish, poison=wish)
    for scanner, cause in itertools.product(Scanner, set(Cause) - {Cause.BYPASSED}):
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
    assert run([SPAM], [outcome], spamd=SpamdSettings(reject_score=15.0)).action is Action.REJECT
    assert run([SPAM], [outcome], spamd=SpamdSettings(reject_score=15.1)).action is Action.QUEUE


def test_split_keeps_for_the_refused_and_delivers_to_the_rest():
    d = run([VIRUS, NONE], [found(Scanner.CLAMD)])
    assert d.action is Action.QUEUE
    assert d.withheld == (0,)
    assert [delivery.recipients for delivery in d.deliveries] == [(1,)]
    assert d.rule == "clamd: Name"


def test_strictest_refuses_for_all():
    d = run([VIRUS, NONE], [found(Scanner.CLAMD)], tables=TableSettings(recipients="strictest"))
    assert (d.action, d.deliveries, d.withheld) == (Action.REJECT, (), ())


def test_remove_keeps_and_drops():
    d = run([VIRUS], [found(Scanner.CLAMD)], clamd=ClamdSettings(action="remove"))
    assert (d.action, d.withheld) == (Action.DROP, (0,))


def test_rejected_beside_removed_is_not_refused_as_a_whole():
    """Some of the recipients would get no message and no refusal otherwise."""
    outcomes = [found(Scanner.CLAMD), found(Scanner.SPAMD, score=9.0, threshold=5.0)]
    d = run([VIRUS, SPAM], outcomes, spamd=SpamdSettings(action="remove"))
    assert (d.action, d.withheld) == (Action.DROP, (0, 1))


def test_bounce_is_dropped_never_refused():
    d = run([VIRUS], [found(Scanner.CLAMD)], OriginKind.BOUNCE)
    assert (d.action, d.withheld) == (Action.DROP, (0,))


def test_bounce_is_not_refused_by_strictest_either():
    d = run([VIRUS, NONE], [found(Scanner.CLAMD)], OriginKind.BOUNCE, tables=TableSettings(recipients="strictest"))
    assert d.action in (Action.DROP, Action.QUEUE)
    assert d.withheld


def test_marking_a_signature_does_not_hide_a_virus():
    outcomes = [found(Scanner.SIGNATURES), found(Scanner.CLAMD)]
    d = run([VIRUS], outcomes, signatures=SignatureSettings(action="mark"))
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
    p = plan(*treatments)
    owners = open_checks(p, tuple(outcomes), OriginKind.STRANGER, Settings(**sections))
    return [scanner for scanner in Scanner if p.runs(scanner) and owners[scanner.check]]


def test_nobody_is_asked_after_a_refusal():
    assert asks([BOTH], [found(Scanner.SIGNATURES)]) == []


def test_spamd_is_still_asked_for_those_who_are_not_refused():
    assert asks([BOTH, SPAM], [found(Scanner.SIGNATURES)]) == [Scanner.SPAMD]
    assert asks([BOTH, SPAM], [found(Scanner.SIGNATURES)], tables=TableSettings(recipients="strictest")) == []


def test_nobody_is_asked_after_a_deferral():
    assert asks([BOTH, SPAM], [fault(Scanner.CLAMD)]) == []


def test_a_mark_does_not_end_the_search():
    assert Scanner.CLAMD in asks([BOTH], [found(Scanner.SIGNATURES)], signatures=SignatureSettings(action="mark"))


def test_who_is_not_wanted_is_not_asked():
    assert asks([SPAM], []) == [Scanner.SPAMD]
    assert asks([NONE], []) == []


# --- options of rows ---------------------------------------------------------------------------------------------


def wishing(clamav=b"", spamd=b""):
    return RecipientPolicy(True, True, "v", "s", read_options(clamav, spamd))


def of(decision, index=0):
    """What became of one recipient."""
    if index in decision.withheld:
        return "kept"
    for delivery in decision.deliveries:
        if index in delivery.recipients:
            return delivery.moved_to or (delivery.match.action.value if delivery.match else "delivered")
    return decision.action.value


VIRUS_FOUND = (found(Scanner.CLAMD),)


def spam(score, threshold=5.0):
    return (ScanOutcome(Scanner.SPAMD, ScanStatus.FOUND if score >= threshold else ScanStatus.CLEAN,
                        score=score, threshold=threshold),)  # fmt: skip


@pytest.mark.parametrize(
    ("clamav", "spamd", "outcomes", "fate"),
    [
        (b"", b"", VIRUS_FOUND, "reject"),
        (b"virus=mark", b"", VIRUS_FOUND, "mark"),
        (b"virus=remove", b"", VIRUS_FOUND, "kept"),
        (b"virus=move:jail@x", b"", VIRUS_FOUND, b"jail@x"),
        (b"virus=mark", b"", (found(Scanner.SIGNATURES),), "mark"),
        (b"", b"", spam(5.0), "mark"),
        (b"", b"spam=remove", spam(5.0), "kept"),
        (b"", b"spam=reject", spam(4.9), "delivered"),
        (b"", b"spam=move:jail@x", spam(5.0), b"jail@x"),
        (b"", b"score=4", spam(4.0), "mark"),
        (b"", b"score=4", spam(3.9), "delivered"),
        (b"", b"score=7 spam=reject", spam(6.9), "delivered"),
        (b"", b"score=7 spam=reject", spam(7.0), "reject"),
        (b"", b"reject_score=6", spam(5.9), "mark"),
        (b"", b"reject_score=6", spam(6.0), "reject"),
        (b"", b"reject_score=4", spam(4.0), "reject"),
        (b"", b"reject_score=0", spam(30.0), "mark"),
        (b"", b"", spam(30.0), "reject"),
        (b"virus=mark", b"spam=remove", VIRUS_FOUND + spam(9.0), "kept"),
        (b"virus=move:jail@x", b"spam=mark", VIRUS_FOUND + spam(9.0), b"jail@x"),
        (b"virus=move:jail@x", b"spam=reject", VIRUS_FOUND + spam(9.0), "reject"),
        (b"virus=remove", b"spam=reject", VIRUS_FOUND + spam(9.0), "kept"),
        (b"virus=mark", b"", (fault(Scanner.CLAMD),), "defer"),
        (b"", b"score=2", (fault(Scanner.SPAMD),), "delivered"),
    ],
)
def test_a_rows_actions_and_scores_come_before_the_configurations(clamav, spamd, outcomes, fate):
    decision = run([wishing(clamav, spamd)], outcomes, spamd=SpamdSettings(reject_score=25.0))
    assert of(decision) == fate


def test_the_words_of_a_delivery_follow_the_recipients_own_score():
    low, high = wishing(b"", b"score=4"), wishing(b"", b"score=10")
    forms = {d.recipients: d.spam for d in run([low, high, BOTH], spam(6.0)).deliveries}
    assert forms == {(0, 2): ScanStatus.FOUND, (1,): ScanStatus.CLEAN}


def test_recipients_with_different_scores_and_equal_results_travel_together():
    d = run([wishing(b"", b"score=4"), wishing(b"", b"score=5.5"), BOTH], spam(6.0))
    assert [delivery.recipients for delivery in d.deliveries] == [(0, 1, 2)]


def test_those_who_are_moved_to_one_place_travel_together_and_apart_from_the_rest():
    to = [wishing(b"virus=move:one@x"), wishing(b"virus=move:two@x"), wishing(b"virus=move:one@x"), SPAM]
    d = run(to, VIRUS_FOUND)
    assert {delivery.recipients: delivery.moved_to for delivery in d.deliveries} == {
        (0, 2): b"one@x",
        (1,): b"two@x",
        (3,): b"",
    }
    assert d.withheld == ()


def test_moved_is_not_refused_for_those_who_refuse_unless_strictest():
    to = [wishing(b"virus=move:one@x"), BOTH]
    d = run(to, VIRUS_FOUND)
    assert (d.action, d.withheld, of(d, 0)) == (Action.QUEUE, (1,), b"one@x")
    assert run(to, VIRUS_FOUND, tables=TableSettings(recipients="strictest")).action is Action.REJECT


def test_scanners_are_asked_on_while_a_rows_action_lets_the_message_through():
    hit = [found(Scanner.SIGNATURES)]
    assert asks([wishing(b"virus=mark")], hit)[2:] == [Scanner.CLAMD, Scanner.SPAMD]
    assert asks([wishing(b"virus=move:jail@x")], hit)[2:] == [Scanner.CLAMD, Scanner.SPAMD]
    assert asks([wishing(b"virus=remove")], hit) == []
    assert asks([wishing(b"virus=remove"), wishing(b"virus=mark")], hit)[2:] == [Scanner.CLAMD, Scanner.SPAMD]


def test_a_move_without_an_address_is_no_move():
    assert read_options(b"virus=move", b"spam=move:") == DEFAULTS
    assert read_options(b"virus=move:a@x", b"score=high") == Options(virus="move", virus_to=b"a@x")


# Preferences of their own


ANNA, BEN = (
    RecipientPolicy(True, True, "v", "s", owner=b"anna@x"),
    RecipientPolicy(True, True, "v", "s", owner=b"ben@x"),
)


def said(owner, score, threshold=5.0, headers=b""):
    status = ScanStatus.FOUND if score >= threshold else ScanStatus.CLEAN
    return ScanOutcome(Scanner.SPAMD, status, score=score, threshold=threshold, owner=owner, rewritten=headers)


def test_each_recipient_has_the_answer_by_its_own_preferences():
    answers = [said(b"anna@x", 3.0, 2.0), said(b"ben@x", -97.0, 2.0), said(b"", 3.0)]
    d = run([ANNA, BEN, SPAM], answers, spamd=SpamdSettings(action="remove"))
    assert (d.action, d.withheld, d.rule) == (Action.QUEUE, (0,), "spamd: 3 / 2")
    forms = {delivery.recipients: (delivery.virus, delivery.spam) for delivery in d.deliveries}
    assert forms == {(1, 2): (ScanStatus.SKIPPED, ScanStatus.CLEAN)}


def test_a_refusal_by_everybodys_preferences_is_a_refusal():
    answers = [said(b"anna@x", 3.0, 2.0), said(b"ben@x", 3.0, 1.0)]
    assert run([ANNA, BEN], answers, spamd=SpamdSettings(action="reject")).action is Action.REJECT


@pytest.mark.parametrize("wish", ["pass", "defer"])
def test_one_owners_fault_is_that_owners_by_the_failure_table(wish):
    away = ScanOutcome(Scanner.SPAMD, ScanStatus.UNCHECKED, cause=Cause.DOWN, owner=b"anna@x")
    d = run([ANNA, BEN], [away, said(b"ben@x", 1.0)], failure=FailureSettings(spamd=wish))
    if wish == "defer":
        assert (d.action, d.rule) == (Action.DEFER, "spamd: down")  # for all: the client offers the message as a whole
        return
    assert {delivery.recipients: delivery.spam for delivery in d.deliveries} == {
        (0,): ScanStatus.UNCHECKED,
        (1,): ScanStatus.CLEAN,
    }
    assert d.rule == "passed unchecked: spamd"


def test_a_fault_of_those_who_are_withheld_anyway_defers_nobody():
    strict = RecipientPolicy(True, True, "v", "s", Options(virus="remove"), b"anna@x")
    p = plan(strict, BEN)
    heard = (found(Scanner.CLAMD),)
    config = Settings(clamd=ClamdSettings(action="mark"))
    assert open_checks(p, heard, OriginKind.STRANGER, config)[Check.SPAM] == {b"ben@x"}
    both = Settings(clamd=ClamdSettings(action="remove"))
    assert open_checks(p, heard, OriginKind.STRANGER, both) == dict.fromkeys(Check, frozenset())


def test_different_headers_of_spamd_travel_apart_and_equal_ones_together():
    lines = b"X-Spam-Status: No, score=1 tests=IN_MY_WHITELIST\n\n"
    apart = run(
        [ANNA, BEN], [said(b"anna@x", 1.0, headers=lines), said(b"ben@x", 1.0, headers=b"X-Spam-Status: No\n\n")]
    )
    assert [(d.recipients, d.owner) for d in apart.deliveries] == [((0,), b"anna@x"), ((1,), b"ben@x")]
    together = run([ANNA, BEN], [said(b"anna@x", 1.0, headers=lines), said(b"ben@x", 1.0, headers=lines)])
    assert [d.recipients for d in together.deliveries] == [(0, 1)]
    bare = run([ANNA, BEN], [said(b"anna@x", 1.0), said(b"ben@x", 0.5, 2.0)])
    assert [d.recipients for d in bare.deliveries] == [(0, 1)]


# More forms of one message than the hook can take


def movers(count):
    return [RecipientPolicy(False, True, "", "s", Options(spam="move", spam_to=b"spam%d@x" % n)) for n in range(count)]


def test_moves_to_more_addresses_than_fit_are_kept_and_nobody_is_lost():
    d = run([NONE, *movers(200)], [said(b"", 9.0)])
    assert d.action is Action.QUEUE
    assert len(d.deliveries) == SUBMISSIONS_MAX
    assert d.deliveries[0].recipients == (0,)
    served = sorted(index for delivery in d.deliveries for index in delivery.recipients)
    assert sorted((*served, *d.withheld)) == list(range(201))
    assert d.withheld == tuple(range(SUBMISSIONS_MAX, 201))  # the last ones
    assert d.rule == f"spamd: 9 / 5, and more than {SUBMISSIONS_MAX} forms of one message"


def test_as_many_moves_as_fit_are_all_delivered():
    d = run([NONE, *movers(SUBMISSIONS_MAX - 1)], [said(b"", 9.0)])
    assert (len(d.deliveries), d.withheld, d.rule) == (SUBMISSIONS_MAX, (), "spamd: 9 / 5")


def test_the_most_owners_with_everything_that_tells_recipients_apart_still_fit():
    most = 30
    owners = [b"", *(b"o%d@x" % n for n in range(most))]
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"max_users": most + 1}, SpamdSettings)
    treatments = [
        RecipientPolicy(virus, spam, "v", "s", options, owner if spam else b"")
        for owner in owners
        for virus in (True, False)
        for spam in (True, False)
        for options in (Options(score=1.0), Options(score=100.0), Options(spam="move", spam_to=b"j@x", score=1.0))
    ]
    answers = [found(Scanner.CLAMD), *(said(owner, 9.0, headers=b"X-Spam-Of: %b\n\n" % owner) for owner in owners)]
    d = run(treatments, answers, clamd=ClamdSettings(action="mark"))
    assert len(d.deliveries) == SUBMISSIONS_MAX
    kept = set(d.withheld)
    assert all(treatments[index].options.spam == "move" for index in kept)
    assert len(kept) + sum(len(delivery.recipients) for delivery in d.deliveries) == len(treatments)


# A second engine of the spam check: nothing may depend on which scanner it is


def test_another_scanner_of_the_spam_check_is_treated_like_spamd(monkeypatch):
    monkeypatch.setattr(Scanner.LOADERTYPES, "check", Check.SPAM)
    score = ScanOutcome(Scanner.LOADERTYPES, ScanStatus.FOUND, score=9.0, threshold=5.0)
    d = run([SPAM, VIRUS], [score, clean(Scanner.CLAMD), clean(Scanner.SPAMD, score=1.0, threshold=5.0)])
    assert (d.rule, d.reason) == ("loadertypes: 9 / 5", Reason.SPAM)
    forms = {delivery.recipients: (delivery.virus, delivery.spam) for delivery in d.deliveries}
    assert forms == {(0,): (ScanStatus.SKIPPED, ScanStatus.FOUND), (1,): (ScanStatus.CLEAN, ScanStatus.SKIPPED)}
    assert run([SPAM], [score], spamd=SpamdSettings(reject_score=9.0)).rule == "loadertypes: 9 >= reject_score=9"
    assert asks([SPAM], []) == [Scanner.LOADERTYPES, Scanner.SPAMD]
    assert run([VIRUS], [fault(Scanner.LOADERTYPES)]).rule == "passed unchecked: loadertypes"  # concerns nobody here
    assert run([wishing(b"", b"score=10")], [score]).deliveries[0].spam is ScanStatus.CLEAN
