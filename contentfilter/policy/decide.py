"""Plan and outcomes become one Decision, with the rule that decided.

A permanent refusal of the whole message needs the refusal of every recipient. Where only some refuse,
``split`` keeps the message for those in quarantine and delivers it to the rest, and ``strictest``
refuses it for all. A message from qmail-send itself is never refused: it is dropped in place of that.
"""

import enum
from dataclasses import dataclass

from contentfilter.config.settings import Settings
from contentfilter.model import OriginKind, Scanner, ScanOutcome, ScanStatus
from contentfilter.policy.failure import on_fault
from contentfilter.policy.plan import ScanPlan, Treatment

_VIRUS_SCANNERS = (Scanner.SIGNATURES, Scanner.LOADERTYPES, Scanner.CLAMD)


class Fate(enum.Enum):
    """What becomes of the message for one recipient, weakest first."""

    DELIVER = "deliver"
    MARK = "mark"
    REMOVE = "remove"
    REJECT = "reject"
    DEFER = "defer"


_STRENGTH = {fate: strength for strength, fate in enumerate(Fate)}


class Action(enum.Enum):
    """What the hook is told."""

    QUEUE = "queue"
    REJECT = "reject"
    DEFER = "defer"
    DROP = "drop"


class Reason(enum.Enum):
    """Why a message is refused; s/qmail has a status for each."""

    NONE = "none"
    VIRUS = "virus"
    SPAM = "spam"
    BANNED = "banned"
    SIZE = "size"


@dataclass(frozen=True, slots=True)
class Finding:
    """What stands against the message for those who asked: the outcome, the fate, the rule."""

    fate: Fate
    reason: Reason
    rule: str
    outcome: ScanOutcome | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """Recipients (indices) that get the message in one form."""

    recipients: tuple[int, ...]
    virus: ScanStatus
    spam: ScanStatus
    marked: Finding | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done, and which rule said so."""

    action: Action
    reason: Reason
    rule: str
    finding: Finding | None = None
    deliveries: tuple[Delivery, ...] = ()
    quarantined: tuple[int, ...] = ()  # recipients for whom the message is kept in place of delivery


def status_of(outcomes: tuple[ScanOutcome, ...], scanners: tuple[Scanner, ...]) -> ScanStatus:
    """One word for several scanners: found beats unchecked beats clean beats skipped."""
    seen = {outcome.status for outcome in outcomes if outcome.scanner in scanners}
    for status in (ScanStatus.FOUND, ScanStatus.UNCHECKED, ScanStatus.CLEAN):
        if status in seen:
            return status
    return ScanStatus.SKIPPED


def decide(
    plan: ScanPlan, outcomes: tuple[ScanOutcome, ...], origin: OriginKind, recipients: int, settings: Settings
) -> Decision:
    """The decision for a message with ``recipients`` recipients."""
    if plan.limit:
        return Decision(Action.REJECT, Reason.SIZE, plan.limit)
    virus = _virus_finding(outcomes, origin, settings)
    spam = _spam_finding(outcomes, origin, settings)
    if recipients == 0:  # legal for qmail-queue; nobody to protect
        return Decision(Action.QUEUE, Reason.NONE, "no recipients", deliveries=(_delivery((), outcomes, None, None),))

    fates = [(treatment, members, _for(treatment, virus, spam)) for treatment, members in plan.groups]
    for _, _, finding in fates:
        if finding is not None and finding.fate is Fate.DEFER:
            return Decision(Action.DEFER, finding.reason, finding.rule, finding)

    refused = [(members, f) for _, members, f in fates if f is not None and f.fate is Fate.REJECT]
    removed = [(members, f) for _, members, f in fates if f is not None and f.fate is Fate.REMOVE]
    kept = [(t, members, f) for t, members, f in fates if f is None or f.fate in (Fate.DELIVER, Fate.MARK)]
    if refused and (settings.tables.recipients == "strictest" or not (kept or removed)):
        return _refusal(refused[0][1], origin, recipients)
    withheld = refused + removed
    first = withheld[0][1] if withheld else None
    quarantined = tuple(sorted(index for members, _ in withheld for index in members))
    if first is not None and not kept:
        return Decision(Action.DROP, first.reason, first.rule, first, quarantined=quarantined)
    deliveries = _merge([_delivery(members, outcomes, t, f) for t, members, f in kept])
    marked = next((d.marked for d in deliveries if d.marked is not None), None)
    leading = first or marked
    rule = leading.rule if leading else _plain_rule(plan, outcomes)
    return Decision(Action.QUEUE, leading.reason if leading else Reason.NONE, rule, leading, deliveries, quarantined)


def needed(
    scanner: Scanner, plan: ScanPlan, outcomes: tuple[ScanOutcome, ...], origin: OriginKind, settings: Settings
) -> bool:
    """Whether asking ``scanner`` can still change the decision, after ``outcomes`` so far."""
    if not plan.runs(scanner):
        return False
    virus = _virus_finding(outcomes, origin, settings)
    spam = _spam_finding(outcomes, origin, settings)
    fates = [(treatment, _for(treatment, virus, spam)) for treatment, _ in plan.groups]
    if any(f is not None and f.fate is Fate.DEFER for _, f in fates):
        return False
    if settings.tables.recipients == "strictest" and any(f is not None and f.fate is Fate.REJECT for _, f in fates):
        return False
    return any(
        (treatment.virus if scanner in _VIRUS_SCANNERS else treatment.spam)
        and (finding is None or finding.fate in (Fate.DELIVER, Fate.MARK))
        for treatment, finding in fates
    )


def _for(treatment: Treatment, virus: Finding | None, spam: Finding | None) -> Finding | None:
    """The strongest finding that concerns a recipient."""
    return _strongest(
        [f for f, wanted in ((virus, treatment.virus), (spam, treatment.spam)) if f is not None and wanted]
    )


def _strongest(findings: list[Finding]) -> Finding | None:
    """The one with the strongest fate; the earlier one where two are equal."""
    return max(findings, key=lambda finding: _STRENGTH[finding.fate], default=None)


def _virus_finding(outcomes: tuple[ScanOutcome, ...], origin: OriginKind, settings: Settings) -> Finding | None:
    findings = []
    for outcome in outcomes:
        if outcome.scanner not in _VIRUS_SCANNERS:
            continue
        if outcome.status is ScanStatus.FOUND:
            clamd = outcome.scanner is Scanner.CLAMD
            action = settings.clamd.action if clamd else settings.signatures.action
            reason = Reason.VIRUS if clamd else Reason.BANNED
            findings.append(Finding(Fate(action), reason, f"{outcome.scanner.value}: {outcome.name}", outcome))
        elif fault := _fault(outcome, origin, settings):
            findings.append(fault)
    return _strongest(findings)


def _spam_finding(outcomes: tuple[ScanOutcome, ...], origin: OriginKind, settings: Settings) -> Finding | None:
    for outcome in outcomes:
        if outcome.scanner is not Scanner.SPAMD:
            continue
        score = outcome.score if outcome.score is not None else 0.0
        limit = settings.spamd.reject_score
        if limit and score >= limit and outcome.status in (ScanStatus.FOUND, ScanStatus.CLEAN):
            return Finding(Fate.REJECT, Reason.SPAM, f"spamd: {score:g} >= reject_score={limit:g}", outcome)
        if outcome.status is ScanStatus.FOUND:
            rule = f"spamd: {score:g} / {outcome.threshold or 0.0:g}"
            return Finding(Fate(settings.spamd.action), Reason.SPAM, rule, outcome)
        return _fault(outcome, origin, settings)
    return None


def _fault(outcome: ScanOutcome, origin: OriginKind, settings: Settings) -> Finding | None:
    """A deferral where the failure table says so; a pass leaves only the word *unchecked* behind."""
    if outcome.status is not ScanStatus.UNCHECKED or outcome.cause is None:
        return None
    if on_fault(outcome.scanner, outcome.cause, origin, settings) == "pass":
        return None
    return Finding(Fate.DEFER, Reason.NONE, f"{outcome.scanner.value}: {outcome.cause.value}", outcome)


def _refusal(finding: Finding, origin: OriginKind, recipients: int) -> Decision:
    if origin is OriginKind.BOUNCE:  # qmail-send would offer it again for ever
        everybody = tuple(range(recipients))
        return Decision(Action.DROP, finding.reason, finding.rule + " (bounce)", finding, quarantined=everybody)
    return Decision(Action.REJECT, finding.reason, finding.rule, finding)


def _delivery(
    members: tuple[int, ...], outcomes: tuple[ScanOutcome, ...], treatment: Treatment | None, finding: Finding | None
) -> Delivery:
    """What this group may read in its headers: only of checks that it asked for."""
    skipped = ScanStatus.SKIPPED
    virus = status_of(outcomes, _VIRUS_SCANNERS) if treatment is not None and treatment.virus else skipped
    spam = status_of(outcomes, (Scanner.SPAMD,)) if treatment is not None and treatment.spam else skipped
    return Delivery(members, virus, spam, finding)


def _merge(deliveries: list[Delivery]) -> tuple[Delivery, ...]:
    """Recipients with equal outcomes travel together, in the order in which they came."""
    merged: dict[tuple[ScanStatus, ScanStatus, Finding | None], list[int]] = {}
    for d in deliveries:
        merged.setdefault((d.virus, d.spam, d.marked), []).extend(d.recipients)
    return tuple(Delivery(tuple(sorted(members)), *key) for key, members in merged.items())


def _plain_rule(plan: ScanPlan, outcomes: tuple[ScanOutcome, ...]) -> str:
    unchecked = [o.scanner.value for o in outcomes if o.status is ScanStatus.UNCHECKED]
    if unchecked:
        return "passed unchecked: " + ", ".join(unchecked)
    if plan.released:
        return f"released from quarantine ({plan.released})"
    if any(step.run for step in plan.steps):
        return "clean"
    return "nothing to check"
