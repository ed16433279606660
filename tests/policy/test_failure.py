"""The failure table: every cell is what is written here, the most specific rule wins, and bad rules are told."""

import itertools
import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contentfilter import settings as config
from contentfilter.errors import Cause
from contentfilter.model import Action, OriginKind, Scanner, ScanOutcome, ScanStatus
from contentfilter.policy.decide import decide
from contentfilter.policy.failure import MEANINGS, complaints, failure_action, failure_table, named
from contentfilter.policy.plan import PlanStep, RecipientPolicy, ScanPlan
from contentfilter.settings import FailureSettings, FaultRule, Settings

ROOT = Path(__file__).parents[2]
KEYS = list(itertools.product(Scanner, Cause, OriginKind))
BOTH = ScanPlan(
    ((RecipientPolicy(True, True, "v", "s"), (0,)),), tuple(PlanStep(scanner, True, "") for scanner in Scanner)
)

# What the built-in settings do, for every origin but bounces: d defers, p passes.
DEFAULTS = {
    #                              signatures, loadertypes, clamd, spamd
    Cause.DOWN: "d d d p",
    Cause.TIMEOUT: "d d d p",
    Cause.BUSY: "d d d p",
    Cause.TOO_BIG: "p p p p",
    Cause.LIMITS: "p p p p",
    Cause.BAD_REPLY: "d d d p",
    Cause.RELOADING: "d d d p",
    Cause.MEMORY: "d d d p",
    Cause.POISON: "d d d d",
    Cause.BYPASSED: "p p p p",
}
WORDS = {"d": "defer", "p": "pass"}


def names(key):
    return "-".join(part.value for part in key)


def by_default(scanner, cause, origin):
    return "pass" if origin is OriginKind.BOUNCE else WORDS[DEFAULTS[cause].split()[list(Scanner).index(scanner)]]


def decided(key, failure):
    scanner, cause, origin = key
    outcome = ScanOutcome(scanner, ScanStatus.UNCHECKED, cause=cause)
    return decide(BOTH, (outcome,), origin, 1, Settings(failure=failure))


@pytest.mark.parametrize("key", KEYS, ids=names)
def test_each_cell_has_its_default_and_can_be_set_alone(key):
    """Through the decision: a deferral, or a delivery that says unchecked; and no other cell is touched."""
    scanner, cause, origin = key
    expected = by_default(*key)
    assert decided(key, FailureSettings()).action is {"defer": Action.DEFER, "pass": Action.QUEUE}[expected]
    if cause is Cause.BYPASSED:
        return  # no setting reaches it: the word is not one that a rule may say
    other = "pass" if expected == "defer" else "defer"
    rule = FaultRule(action=other, scanner=scanner.value, cause=cause.value, origin=origin.value)
    changed = decided(key, FailureSettings(rule=(rule,)))
    if origin is OriginKind.BOUNCE:
        assert changed.action is Action.QUEUE, "bounces always pass"
        return
    assert changed.action is {"defer": Action.DEFER, "pass": Action.QUEUE}[other]
    if other == "pass":
        assert changed.rule == f"passed unchecked: {scanner.value}"
    before, after = failure_table(FailureSettings()), failure_table(FailureSettings(rule=(rule,)))
    assert [k for k in KEYS if before[k].action != after[k].action] == [key]


@pytest.mark.parametrize("key", KEYS, ids=names)
def test_each_cell_obeys_the_simple_key_that_is_named_as_its_source(key):
    cell = failure_table(FailureSettings())[key]
    every = {"clamd", "spamd", "signatures", "too_big", "limits", "poison"}
    for name in every:
        for action in ("defer", "pass"):
            said = failure_table(FailureSettings(**{name: action}))[key]
            if cell.source == f"[failure] {name}":
                assert said.action == action
            else:
                assert said == cell
    assert cell.fixed is (key[2] is OriginKind.BOUNCE or key[1] is Cause.BYPASSED)
    assert cell.fixed or cell.source.removeprefix("[failure] ") in every


def test_a_bounce_passes_whatever_is_set():
    everything = (FaultRule(action="defer", origin=("bounce", "local")), FaultRule(action="defer", scanner="clamd"))
    keys = dict.fromkeys(("clamd", "spamd", "signatures", "too_big", "limits", "poison"), "defer")
    failure = FailureSettings(**keys, rule=everything)
    assert {failure_table(failure)[k].action for k in KEYS if k[2] is OriginKind.BOUNCE} == {"pass"}


# Which rule wins

ACTIONS = st.sampled_from(["defer", "pass"])


def column(kind):
    words = st.sampled_from(get_args(kind))
    return st.one_of(st.just(()), words, st.lists(words, min_size=1, max_size=3, unique=True).map(tuple))


RULES = st.builds(
    FaultRule,
    action=ACTIONS,
    scanner=column(config.FaultScanner),
    cause=column(config.FaultCause),
    origin=column(config.FaultOrigin),
)
FAILURES = st.builds(
    FailureSettings,
    **dict.fromkeys(("clamd", "spamd", "signatures", "too_big", "limits"), ACTIONS),
    rule=st.lists(RULES, max_size=6).map(tuple),
)


def covers(rule, key):
    return all(
        said in ((), part.value) or (isinstance(said, tuple) and part.value in said)
        for said, part in zip((rule.scanner, rule.cause, rule.origin), key, strict=True)
    )


def weight(rule):
    return sum(said != () for said in (rule.scanner, rule.cause, rule.origin))


@given(FAILURES)
def test_the_rule_that_names_most_wins_unless_the_rules_are_refused(failure):
    """A second reading of the same sentence, cell by cell."""
    if any(not complaint.warning for complaint in complaints(failure)):
        return
    table, plain = failure_table(failure), failure_table(msgspec.structs.replace(failure, rule=()))
    for key in KEYS:
        rules = [rule for rule in failure.rule if covers(rule, key)]
        top = [rule.action for rule in rules if weight(rule) == max(map(weight, rules))]
        if plain[key].fixed or not rules:
            assert table[key] == plain[key]
        else:
            assert {table[key].action} == set(top)


@given(FAILURES, st.sampled_from(KEYS))
def test_the_source_named_is_what_decides(failure, key):
    """Whoever turns it round changes the cell."""
    cell = failure_table(failure)[key]
    if cell.fixed:
        return
    other = "pass" if cell.action == "defer" else "defer"
    if place := re.fullmatch(r"\[\[failure\.rule\]\] (\d+)", cell.source):
        rules = list(failure.rule)
        rules[int(place[1]) - 1] = msgspec.structs.replace(rules[int(place[1]) - 1], action=other)
        turned = msgspec.structs.replace(failure, rule=tuple(rules))
    else:
        turned = msgspec.structs.replace(failure, **{cell.source.removeprefix("[failure] "): other})
    now = failure_table(turned)[key]
    assert now.action == other or now.source != cell.source  # another rule with equal right may take its place


# What is told about rules


def told(*rules, **keys):
    return [(c.number, c.warning, c.text) for c in complaints(FailureSettings(rule=rules, **keys))]


PASS_DOWN = FaultRule(action="pass", scanner="clamd", cause=("down", "timeout"))


@pytest.mark.parametrize(
    ("rules", "number", "warning", "says"),
    [
        ([FaultRule(action="pass")], 1, False, "names no scanner, no cause and no origin"),
        ([FaultRule(action="defer", origin="bounce")], 1, False, "bounces always pass"),
        ([FaultRule(action="defer", scanner="clamd", origin=("local", "bounce"))], 1, False, "bounces always pass"),
        ([PASS_DOWN, FaultRule(action="defer", cause="down", origin="local")], 2, False, "for clamd, down, local?"),
        ([PASS_DOWN, FaultRule(action="defer", scanner="clamd", cause="timeout")], 2, False, "[[failure.rule]] 1"),
        ([PASS_DOWN, PASS_DOWN], 1, True, "decided by [[failure.rule]] 2"),
        ([FaultRule(action="pass", origin="bounce")], 1, True, "decided by bounces always pass"),
        ([FaultRule(action="pass", scanner="signatures", cause="down")], 1, True, "none of these scanners ever"),
    ],
)
def test_a_rule_that_contradicts_or_does_nothing_is_told(rules, number, warning, says):
    ((place, mild, text),) = told(*rules)
    assert (place, mild) == (number, warning)
    assert says in text


@pytest.mark.parametrize(
    "rules",
    [
        [PASS_DOWN],
        [PASS_DOWN, FaultRule(action="defer", scanner="clamd", cause="down", origin="stranger")],
        [FaultRule(action="defer", scanner="clamd"), FaultRule(action="pass", scanner="spamd")],
        [PASS_DOWN, FaultRule(action="pass", scanner="clamd", cause=("down", "busy"))],
        [FaultRule(action="defer", cause="down", scanner="clamd")],  # as the key says: nothing new, but no fault
    ],
)
def test_rules_that_make_sense_are_not_complained_about(rules):
    assert told(*rules) == []


@given(FAILURES)
def test_no_two_rules_that_are_accepted_disagree_with_equal_right(failure):
    """So the order of the rules in the file never matters."""
    if any(not complaint.warning for complaint in complaints(failure)):
        return
    turned = msgspec.structs.replace(failure, rule=tuple(reversed(failure.rule)))
    actions = {key: cell.action for key, cell in failure_table(failure).items()}
    assert {key: cell.action for key, cell in failure_table(turned).items()} == actions


# Words and documents


def test_the_words_of_the_file_are_those_of_the_program():
    assert get_args(config.FaultScanner) == tuple(scanner.value for scanner in Scanner)
    assert get_args(config.FaultCause) == tuple(c.value for c in Cause if c is not Cause.BYPASSED)
    assert get_args(config.FaultOrigin) == tuple(origin.value for origin in OriginKind)


def test_every_cause_is_explained_and_every_scanner_can_run_out_of_time():
    assert list(MEANINGS) == list(Cause)
    assert all(meaning.text and meaning.scanners for meaning in MEANINGS.values())
    assert MEANINGS[Cause.TIMEOUT].scanners == tuple(Scanner)


def test_the_table_is_made_once_for_a_configuration_and_cannot_be_changed():
    assert failure_table(FailureSettings(rule=(PASS_DOWN,))) is failure_table(FailureSettings(rule=(PASS_DOWN,)))
    with pytest.raises(TypeError):
        failure_table(FailureSettings())[KEYS[0]] = None
    assert failure_action(*KEYS[0], Settings(failure=FailureSettings(rule=(PASS_DOWN,)))) == "defer"
    assert named(1) == "[[failure.rule]] 1"


def table_in_words():
    """The table of docs/flow.md: what may happen, by default."""
    table = failure_table(FailureSettings())
    yield "| cause | when | signatures | clamd | spamd |"
    yield "|---|---|---|---|---|"
    for cause, meaning in MEANINGS.items():
        cells = (
            table[scanner, cause, OriginKind.STRANGER].action if scanner in meaning.scanners else "-"
            for scanner in (Scanner.SIGNATURES, Scanner.CLAMD, Scanner.SPAMD)
        )
        yield f"| `{cause.value}` | {meaning.text} | {' | '.join(cells)} |"


def test_the_documents_show_the_table_as_it_is():
    assert "\n".join(("", *table_in_words(), "")) in (ROOT / "docs" / "flow.md").read_text()
