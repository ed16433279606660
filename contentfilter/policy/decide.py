"""Plan and outcomes become one Decision, with the rule that decided.

A permanent refusal of the whole message needs the refusal of every recipient. Where only some refuse,
``split`` keeps the message for those in quarantine and delivers it to the rest, and ``strictest``
refuses it for all. A message from qmail-send itself is never refused: it is dropped in place of that.

Actions and scores are those of the recipient's rows, else the configuration's. For one recipient the outcomes
count in the order of the scanners, and the first that withholds the message is final: what comes after it need
not be asked, and could not change anything. Of spamd's answers each recipient has the one by its own preferences.
"""

import enum
from dataclasses import dataclass, replace

import msgspec

from contentfilter.model import Action, OriginKind, Reason, Scanner, ScanOutcome, ScanStatus
from contentfilter.policy.failure import failure_action
from contentfilter.policy.options import Options
from contentfilter.policy.overrides import class_action
from contentfilter.policy.plan import RecipientPolicy, ScanPlan
from contentfilter.settings import Settings
from contentfilter.wire.clamd import signature_class
from contentfilter.wire.hook import SUBMISSIONS_MAX

_VIRUS_SCANNERS = (Scanner.SIGNATURES, Scanner.LOADERTYPES, Scanner.CLAMD)


class RecipientAction(enum.Enum):
    """What becomes of the message for one recipient, weakest first."""

    DELIVER = "deliver"
    MARK = "mark"
    MOVE = "move"  # deliver it, but to another address
    REMOVE = "remove"
    REJECT = "reject"
    DEFER = "defer"


_STRENGTH = {fate: strength for strength, fate in enumerate(RecipientAction)}
_WITHHELD = (RecipientAction.REMOVE, RecipientAction.REJECT, RecipientAction.DEFER)


@dataclass(frozen=True, slots=True)
class Match:
    """What stands against the message for those who asked: the outcome, the fate, the rule."""

    fate: RecipientAction
    reason: Reason
    rule: str
    outcome: ScanOutcome | None = None
    to: bytes = b""  # where MOVE goes


class Delivery(msgspec.Struct, frozen=True):
    """Recipients (indices) that get the message in one form."""

    recipients: tuple[int, ...]
    virus: ScanStatus
    spam: ScanStatus
    marked: Match | None = None
    moved_to: bytes = b""  # it goes here, and not to the recipients; empty: to them
    owner: bytes = b""  # whose preferences spamd's headers in it go by


class Decision(msgspec.Struct, frozen=True):
    """What is to be done, and which rule said so."""

    action: Action
    reason: Reason
    rule: str
    finding: Match | None = None
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
    if plan.hold:
        return Decision(Action.DEFER, Reason.NONE, plan.hold)
    if recipients == 0:  # legal for qmail-queue; nobody to protect
        return Decision(Action.QUEUE, Reason.NONE, "no recipients", deliveries=(_delivery((), outcomes, None, None),))

    fates = _fates(plan, outcomes, origin, settings)
    refused = [(members, f) for _, members, f in fates if f is not None and f.fate is RecipientAction.REJECT]
    if refused and settings.tables.recipients == "strictest":
        return _refusal(refused[0][1], origin, recipients)
    for _, _, finding in fates:
        if finding is not None and finding.fate is RecipientAction.DEFER:
            return Decision(Action.DEFER, finding.reason, finding.rule, finding)
    removed = [(members, f) for _, members, f in fates if f is not None and f.fate is RecipientAction.REMOVE]
    kept = [(t, members, f) for t, members, f in fates if f is None or f.fate not in _WITHHELD]
    if refused and not (kept or removed):
        return _refusal(refused[0][1], origin, recipients)
    deliveries, surplus = _fit(_merge([_delivery(members, outcomes, t, f) for t, members, f in kept], outcomes))
    withheld = refused + removed + surplus
    first = withheld[0][1] if withheld else None
    quarantined = tuple(sorted(index for members, _ in withheld for index in members))
    if first is not None and not deliveries:
        return Decision(Action.DROP, first.reason, first.rule, first, quarantined=quarantined)
    marked = next((d.marked for d in deliveries if d.marked is not None), None)
    leading = first or marked
    rule = leading.rule if leading else _plain_rule(plan, outcomes)
    return Decision(Action.QUEUE, leading.reason if leading else Reason.NONE, rule, leading, deliveries, quarantined)


def needed(
    scanner: Scanner, plan: ScanPlan, outcomes: tuple[ScanOutcome, ...], origin: OriginKind, settings: Settings
) -> bool:
    """Whether asking ``scanner`` can still change the decision, after ``outcomes`` so far."""
    return bool(open_owners(scanner, plan, outcomes, origin, settings))


def open_owners(
    scanner: Scanner, plan: ScanPlan, outcomes: tuple[ScanOutcome, ...], origin: OriginKind, settings: Settings
) -> frozenset[bytes]:
    """Owners of preferences for whom asking ``scanner`` can still change the decision; the empty one for all others."""
    nobody = frozenset[bytes]()
    if not plan.runs(scanner):
        return nobody
    fates = _fates(plan, outcomes, origin, settings)
    if any(f is not None and f.fate is RecipientAction.DEFER for _, _, f in fates):
        return nobody
    if settings.tables.recipients == "strictest" and any(
        f is not None and f.fate is RecipientAction.REJECT for _, _, f in fates
    ):
        return nobody
    return frozenset(
        treatment.owner
        for treatment, _, finding in fates
        if _wants(treatment, scanner) and (finding is None or finding.fate not in _WITHHELD)
    )


def _wants(treatment: RecipientPolicy, scanner: Scanner) -> bool:
    return treatment.spam if scanner is Scanner.SPAMD else treatment.virus


def _concerns(outcome: ScanOutcome, treatment: RecipientPolicy) -> bool:
    if outcome.scanner is Scanner.SPAMD and outcome.owner != treatment.owner:
        return False
    return _wants(treatment, outcome.scanner)


def _fates(
    plan: ScanPlan, outcomes: tuple[ScanOutcome, ...], origin: OriginKind, settings: Settings
) -> list[tuple[RecipientPolicy, tuple[int, ...], Match | None]]:
    """Each group with what stands against the message for it. Most groups differ only in the row they come from."""
    known: dict[tuple[bool, bool, Options, bytes], Match | None] = {}
    fates = []
    for treatment, members in plan.groups:
        wish = (treatment.virus, treatment.spam, treatment.options, treatment.owner)
        if wish not in known:
            known[wish] = _judge(treatment, outcomes, origin, settings)
        fates.append((treatment, members, known[wish]))
    return fates


def _judge(
    treatment: RecipientPolicy, outcomes: tuple[ScanOutcome, ...], origin: OriginKind, settings: Settings
) -> Match | None:
    """The strongest finding for those who are treated so, up to the first that withholds the message."""
    worst: Match | None = None
    for outcome in outcomes:
        if not _concerns(outcome, treatment):
            continue
        finding = _fault(outcome, origin, settings) or _finding(outcome, treatment.options, settings)
        if finding is not None and (worst is None or _STRENGTH[finding.fate] > _STRENGTH[worst.fate]):
            worst = finding
        if worst is not None and worst.fate in _WITHHELD:
            break
    return worst


def _finding(outcome: ScanOutcome, options: Options, settings: Settings) -> Match | None:
    if outcome.scanner is Scanner.SPAMD:
        return _spam(outcome, options, settings)
    if outcome.status is not ScanStatus.FOUND:
        return None
    clamd = outcome.scanner is Scanner.CLAMD
    rule, reason = f"{outcome.scanner.value}: {outcome.name}", Reason.VIRUS if clamd else Reason.BANNED
    kind = signature_class(outcome.name) if clamd else None
    if kind is not None and (action := class_action(kind, settings)):  # the class knows better what it is than the row
        return Match(RecipientAction(action), reason, f"{rule} ({kind.value})", outcome)
    action = options.virus or (settings.clamd.action if clamd else settings.signatures.action)
    return Match(RecipientAction(action), reason, rule, outcome, options.virus_to)


def _spam(outcome: ScanOutcome, options: Options, settings: Settings) -> Match | None:
    score = outcome.score if outcome.score is not None else 0.0
    limit = settings.spamd.reject_score if options.reject_score is None else options.reject_score
    if limit and score >= limit and outcome.status in (ScanStatus.FOUND, ScanStatus.CLEAN):
        return Match(RecipientAction.REJECT, Reason.SPAM, f"spamd: {score:g} >= reject_score={limit:g}", outcome)
    if spam_status(outcome, options) is not ScanStatus.FOUND:
        return None
    threshold = outcome.threshold if options.score is None else options.score
    rule = f"spamd: {score:g} / {threshold or 0.0:g}"
    return Match(RecipientAction(options.spam or settings.spamd.action), Reason.SPAM, rule, outcome, options.spam_to)


def spam_status(outcome: ScanOutcome, options: Options) -> ScanStatus:
    """What spamd said, or what its score means to those who have a threshold of their own."""
    if options.score is None or outcome.score is None or outcome.status not in (ScanStatus.FOUND, ScanStatus.CLEAN):
        return outcome.status
    return ScanStatus.FOUND if outcome.score >= options.score else ScanStatus.CLEAN


def _fault(outcome: ScanOutcome, origin: OriginKind, settings: Settings) -> Match | None:
    """A deferral where the failure table says so; a pass leaves only the word *unchecked* behind."""
    if outcome.status is not ScanStatus.UNCHECKED or outcome.cause is None:
        return None
    if failure_action(outcome.scanner, outcome.cause, origin, settings) == "pass":
        return None
    return Match(RecipientAction.DEFER, Reason.NONE, f"{outcome.scanner.value}: {outcome.cause.value}", outcome)


def _refusal(finding: Match, origin: OriginKind, recipients: int) -> Decision:
    if origin is OriginKind.BOUNCE:  # qmail-send would offer it again for ever
        everybody = tuple(range(recipients))
        return Decision(Action.DROP, finding.reason, finding.rule + " (bounce)", finding, quarantined=everybody)
    return Decision(Action.REJECT, finding.reason, finding.rule, finding)


def _delivery(
    members: tuple[int, ...],
    outcomes: tuple[ScanOutcome, ...],
    treatment: RecipientPolicy | None,
    finding: Match | None,
) -> Delivery:
    """What this group may read in its headers: only of checks that it asked for."""
    virus = spam = ScanStatus.SKIPPED
    if treatment is not None and treatment.virus:
        virus = status_of(outcomes, _VIRUS_SCANNERS)
    owner = b""
    if treatment is not None and treatment.spam:
        owner = treatment.owner
        said = spamd_said(outcomes, owner)
        spam = spam_status(said, treatment.options) if said else ScanStatus.SKIPPED
    to = finding.to if finding and finding.fate is RecipientAction.MOVE else b""
    return Delivery(members, virus, spam, finding, to, owner)


def spamd_said(outcomes: tuple[ScanOutcome, ...], owner: bytes) -> ScanOutcome | None:
    """spamd's answer by the preferences of ``owner``."""
    return next((o for o in outcomes if o.scanner is Scanner.SPAMD and o.owner == owner), None)


def _merge(deliveries: list[Delivery], outcomes: tuple[ScanOutcome, ...]) -> tuple[Delivery, ...]:
    """Recipients with equal outcomes travel together, in the order in which they came, whatever their thresholds.

    Not where spamd's headers tell them apart: nobody reads what somebody else's preferences did.
    """
    headers = {o.owner: (o.status, o.rewritten) for o in outcomes if o.scanner is Scanner.SPAMD and o.rewritten}
    merged: dict[object, list[Delivery]] = {}
    for d in deliveries:
        lines = headers.get(d.owner) if d.spam is not ScanStatus.SKIPPED else None
        merged.setdefault((d.virus, d.spam, d.marked.fate if d.marked else None, d.moved_to, lines), []).append(d)
    return tuple(
        msgspec.structs.replace(
            first, recipients=tuple(sorted(index for d in (first, *others) for index in d.recipients))
        )
        for first, *others in merged.values()
    )


def _fit(deliveries: tuple[Delivery, ...]) -> tuple[tuple[Delivery, ...], list[tuple[tuple[int, ...], Match]]]:
    """No more forms of the message than the hook takes. What should move to still more addresses is kept instead.

    Without those that move there are never too many: [spamd] max_users sees to that.
    """
    too_many = len(deliveries) - SUBMISSIONS_MAX
    fitting: list[Delivery] = []
    surplus: list[tuple[tuple[int, ...], Match]] = []
    for d in reversed(deliveries):
        if len(surplus) < too_many and d.moved_to and d.marked is not None:
            rule = f"{d.marked.rule}, and more than {SUBMISSIONS_MAX} forms of one message"
            surplus.append((d.recipients, replace(d.marked, fate=RecipientAction.REMOVE, rule=rule, to=b"")))
        else:
            fitting.append(d)
    return tuple(reversed(fitting)), surplus


def _plain_rule(plan: ScanPlan, outcomes: tuple[ScanOutcome, ...]) -> str:
    unchecked = dict.fromkeys(o.scanner.value for o in outcomes if o.status is ScanStatus.UNCHECKED)
    if unchecked:
        return "passed unchecked: " + ", ".join(unchecked)
    if plan.released:
        return f"released from quarantine ({plan.released})"
    if any(step.run for step in plan.steps):
        return "clean"
    return "nothing to check"
