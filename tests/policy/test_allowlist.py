"""Signature classes with actions of their own, and signatures that are allowed for a while."""

import pytest

from contentfilter.model import Action, OriginKind, Scanner, ScanOutcome, ScanStatus
from contentfilter.policy.decide import RecipientAction, decide
from contentfilter.policy.options import Options
from contentfilter.policy.overrides import AllowEntry, apply_allowlist
from contentfilter.policy.plan import PlanStep, RecipientPolicy, ScanPlan
from contentfilter.settings import ClamdSettings, ClassSettings, Settings

NAMES = {
    "pua": "PUA.Win.Packer.Upx-1",
    "phishing": "Heuristics.Phishing.Email.SpoofedDomain",
    "macro": "Heuristics.OLE2.ContainsMacros.VBA",
    "encrypted": "Heuristics.Encrypted.Zip",
    "broken": "Heuristics.Broken.Executable",
    "structured": "Heuristics.Structured.CreditCardNumber",
    "unofficial": "Sanesecurity.Junk.1.UNOFFICIAL",
}
MALWARE = "Win.Test.EICAR_HDB-1"


def found(name, scanner=Scanner.CLAMD):
    return ScanOutcome(scanner, ScanStatus.FOUND, name)


def decision(name, options=None, **sections):
    plan = ScanPlan(
        ((RecipientPolicy(True, False, "v", "", options or Options()), (0,)),),
        tuple(PlanStep(s, run=True, reason="") for s in Scanner),
    )
    settings = Settings(**sections)
    return decide(plan, (apply_allowlist(found(name), settings, (), 0.0),), OriginKind.STRANGER, 1, settings)


@pytest.mark.parametrize("kind", NAMES)
def test_a_class_without_action_is_treated_as_malware(kind):
    assert decision(NAMES[kind]).action is Action.REJECT
    assert decision(NAMES[kind], clamd=ClamdSettings(action="remove")).action is Action.DROP


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("action", ["reject", "remove", "mark", "pass"])
def test_each_class_has_its_own_action(kind, action):
    d = decision(NAMES[kind], clamd=ClamdSettings(action="reject"), classes=ClassSettings(**{kind: action}))
    expected = {"reject": Action.REJECT, "remove": Action.DROP, "mark": Action.QUEUE, "pass": Action.QUEUE}
    assert d.action is expected[action]
    if action == "pass":
        assert d.deliveries[0].virus is ScanStatus.CLEAN
    else:
        assert f"({kind})" in d.rule


@pytest.mark.parametrize("kind", NAMES)
def test_no_class_softens_malware(kind):
    assert decision(MALWARE, classes=ClassSettings(**{kind: "pass"})).action is Action.REJECT


def test_a_class_counts_before_the_row():
    d = decision(NAMES["pua"], Options(virus="reject"), classes=ClassSettings(pua="mark"))
    assert d.match is not None
    assert d.match.action is RecipientAction.MARK


ALLOWED = (AllowEntry(signature="Win.Bad-1.UNOFFICIAL", by="anna", reason="false alarm", since=0.0, until=100.0),)


@pytest.mark.parametrize("name", ["Win.Bad-1", "Win.Bad-1.UNOFFICIAL"])
@pytest.mark.parametrize("scanner", [Scanner.CLAMD, Scanner.SIGNATURES, Scanner.LOADERTYPES])
def test_an_allowed_signature_is_clean_until_its_end_and_says_why(name, scanner):
    outcome = apply_allowlist(found(name, scanner), Settings(), ALLOWED, 99.9)
    assert (outcome.status, outcome.name) == (ScanStatus.CLEAN, "")
    assert outcome.detail == f"{name} passed, allowed by anna: false alarm"
    assert apply_allowlist(found(name, scanner), Settings(), ALLOWED, 100.0).status is ScanStatus.FOUND


def test_only_that_signature_is_allowed():
    for name in ("Win.Bad-11", "win.bad-1", "Win.Bad", MALWARE):
        assert apply_allowlist(found(name), Settings(), ALLOWED, 1.0).status is ScanStatus.FOUND
    spam = found("Win.Bad-1", Scanner.SPAMD)
    assert apply_allowlist(spam, Settings(), ALLOWED, 1.0) is spam
