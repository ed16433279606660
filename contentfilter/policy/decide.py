"""Turns the plan and the outcomes of the scanners into one decision, with the rule that decided.

A permanent refusal of the whole message needs the refusal of every recipient. Where only some refuse,
``split`` keeps the message for those in quarantine and delivers it to the rest, and ``strictest``
refuses it for all. A message from qmail-send itself is never refused: it is dropped instead.

Actions and scores are those of the recipient's rows, else the configuration's. For one recipient the outcomes
count in the order of the scanners, and the first that withholds the message is final: later scanners need
not be asked, and could not change anything. Of the spam check each recipient has the result by its own preferences.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

import msgspec

from contentfilter.model import Action, Check, OriginKind, Reason, Scanner, ScanOutcome, ScanStatus
from contentfilter.policy.failure import failure_action
from contentfilter.policy.options import Options
from contentfilter.policy.overrides import class_action
from contentfilter.policy.plan import RecipientPolicy, ScanPlan
from contentfilter.settings import Settings
from contentfilter.wire.clamd import signature_class
from contentfilter.wire.hook import SUBMISSIONS_MAX


class RecipientAction(enum.Enum):
    """Action for one recipient, the weakest first."""

    DELIVER = "deliver"
    MARK = "mark"
    MOVE = "move"  # deliver, but to another address
    REMOVE = "remove"
    REJECT = "reject"
    DEFER = "defer"


_STRENGTH = {action: strength for strength, action in enumerate(RecipientAction)}
_WITHHELD = (RecipientAction.REMOVE, RecipientAction.REJECT, RecipientAction.DEFER)


@dataclass(frozen=True, slots=True)
class Match:
    """A matched rule: the outcome that it applies to, and the action for the recipients whose check it was."""

    action: RecipientAction
    reason: Reason
    rule: str
    outcome: ScanOutcome | None = None
    to: bytes = b""  # the address that MOVE delivers to


class DeliveryGroup(msgspec.Struct, frozen=True):
    """Recipients (indices) that get the message in one form."""

    recipients: tuple[int, ...]
    virus: ScanStatus
    spam: ScanStatus
    match: Match | None = None
    moved_to: bytes = b""  # delivered to this address instead of the recipients; empty: to them
    owner: bytes = b""  # of the preferences that the spam check's headers in it come from


class Decision(msgspec.Struct, frozen=True):
    """The action for the whole message, the deliveries, and the rule that decided."""

    action: Action
    reason: Reason
    rule: str
    match: Match | None = None
    deliveries: tuple[DeliveryGroup, ...] = ()
    withheld: tuple[int, ...] = ()  # recipients for whom the message is kept in quarantine


_Matches = list[tuple[RecipientPolicy, tuple[int, ...], Match | None]]


def decide(
    plan: ScanPlan, outcomes: tuple[ScanOutcome, ...], origin: OriginKind, recipients: int, settings: Settings
) -> Decision:
    """The decision for a message with ``recipients`` recipients."""
    if plan.limit:  # bounces have one recipient; a user of qmail-send that sends more is asked to stop, not refused
        action = Action.DEFER if origin is OriginKind.BOUNCE else Action.REJECT
        return Decision(action, Reason.SIZE, plan.limit)
    if plan.hold:
        return Decision(Action.DEFER, Reason.NONE, plan.hold)
    if recipients == 0:  # legal for qmail-queue
        return Decision(Action.QUEUE, Reason.NONE, "no recipients", deliveries=(_delivery((), outcomes, None, None),))

    matches = _matches(plan, outcomes, origin, settings)
    refused = [(members, m) for _, members, m in matches if m is not None and m.action is RecipientAction.REJECT]
    if refused and settings.tables.recipients == "strictest":
        return _refusal(refused[0][1], origin, recipients)
    for _, _, match in matches:
        if match is not None and match.action is RecipientAction.DEFER:
            return Decision(Action.DEFER, match.reason, match.rule, match)
    removed = [(members, m) for _, members, m in matches if m is not None and m.action is RecipientAction.REMOVE]
    passed = [each for each in matches if each[2] is None or each[2].action not in _WITHHELD]
    if refused and not (passed or removed):
        return _refusal(refused[0][1], origin, recipients)
    groups = [_delivery(members, outcomes, policy, match) for policy, members, match in passed]
    deliveries, surplus = _limit_forms(_merge(groups, outcomes))
    withheld = refused + removed + surplus
    first = withheld[0][1] if withheld else None
    indices = tuple(sorted([index for members, _ in withheld for index in members]))
    if first is not None and not deliveries:
        return Decision(Action.DROP, first.reason, first.rule, first, withheld=indices)
    leading = first or next((d.match for d in deliveries if d.match is not None), None)
    rule = leading.rule if leading else _plain_rule(plan, outcomes)
    return Decision(Action.QUEUE, leading.reason if leading else Reason.NONE, rule, leading, deliveries, indices)


def open_checks(
    plan: ScanPlan, outcomes: tuple[ScanOutcome, ...], origin: OriginKind, settings: Settings
) -> dict[Check, frozenset[bytes]]:
    """For each check, the owners of preferences for whom a scanner of it can still change the decision.

    The empty owner is there for all recipients without preferences of their own.
    """
    owners: dict[Check, set[bytes]] = {check: set() for check in Check}
    strictest = settings.tables.recipients == "strictest"
    for policy, _, match in _matches(plan, outcomes, origin, settings):
        if match is not None and match.action in _WITHHELD:
            if match.action is RecipientAction.DEFER or (strictest and match.action is RecipientAction.REJECT):
                return dict.fromkeys(Check, frozenset())
            continue
        if policy.virus:
            owners[Check.VIRUS].add(policy.owner)
        if policy.spam:
            owners[Check.SPAM].add(policy.owner)
    return {check: frozenset(found) for check, found in owners.items()}


def _has_check(policy: RecipientPolicy, check: Check) -> bool:
    return policy.spam if check is Check.SPAM else policy.virus


def _concerns(outcome: ScanOutcome, policy: RecipientPolicy) -> bool:
    check = outcome.scanner.check
    return _has_check(policy, check) and (check is not Check.SPAM or outcome.owner == policy.owner)


def _matches(plan: ScanPlan, outcomes: tuple[ScanOutcome, ...], origin: OriginKind, settings: Settings) -> _Matches:
    """The rule that matched for each kind of recipients; groups that differ only in the row they come from are one."""
    kinds: dict[tuple[bool, bool, Options, bytes], tuple[RecipientPolicy, list[tuple[int, ...]]]] = {}
    for policy, members in plan.groups:
        key = (policy.virus, policy.spam, policy.options, policy.owner)
        if (known := kinds.get(key)) is None:
            kinds[key] = policy, [members]
        else:
            known[1].append(members)
    return [
        (policy, parts[0] if len(parts) == 1 else tuple(chain(*parts)), _strongest(policy, outcomes, origin, settings))
        for policy, parts in kinds.values()
    ]


def _strongest(
    policy: RecipientPolicy, outcomes: tuple[ScanOutcome, ...], origin: OriginKind, settings: Settings
) -> Match | None:
    """The strongest match under this policy, up to the first that withholds the message."""
    strongest: Match | None = None
    for outcome in outcomes:
        if not _concerns(outcome, policy):
            continue
        match = _fault(outcome, origin, settings) or _found(outcome, policy.options, settings)
        if match is not None and (strongest is None or _STRENGTH[match.action] > _STRENGTH[strongest.action]):
            strongest = match
        if strongest is not None and strongest.action in _WITHHELD:
            break
    return strongest


def _found(outcome: ScanOutcome, options: Options, settings: Settings) -> Match | None:
    if outcome.scanner.check is Check.SPAM:
        return _spam(outcome, options, settings)
    if outcome.status is not ScanStatus.FOUND:
        return None
    clamd = outcome.scanner is Scanner.CLAMD
    rule, reason = f"{outcome.scanner.value}: {outcome.name}", Reason.VIRUS if clamd else Reason.BANNED
    kind = signature_class(outcome.name) if clamd else None
    if kind is not None and (action := class_action(kind, settings)):  # the class is more precise than the row
        return Match(RecipientAction(action), reason, f"{rule} ({kind.value})", outcome)
    action = options.virus or (settings.clamd.action if clamd else settings.signatures.action)
    return Match(RecipientAction(action), reason, rule, outcome, options.virus_to)


def _spam(outcome: ScanOutcome, options: Options, settings: Settings) -> Match | None:
    name = outcome.scanner.value
    score = outcome.score if outcome.score is not None else 0.0
    limit = settings.spamd.reject_score if options.reject_score is None else options.reject_score
    if limit and score >= limit and outcome.status in (ScanStatus.FOUND, ScanStatus.CLEAN):
        return Match(RecipientAction.REJECT, Reason.SPAM, f"{name}: {score:g} >= reject_score={limit:g}", outcome)
    if spam_status(outcome, options) is not ScanStatus.FOUND:
        return None
    threshold = outcome.threshold if options.score is None else options.score
    rule = f"{name}: {score:g} / {threshold or 0.0:g}"
    return Match(RecipientAction(options.spam or settings.spamd.action), Reason.SPAM, rule, outcome, options.spam_to)


def spam_status(outcome: ScanOutcome, options: Options) -> ScanStatus:
    """The status of a spam check for a recipient, whose own threshold comes before the scanner's."""
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


def _refusal(match: Match, origin: OriginKind, recipients: int) -> Decision:
    if origin is OriginKind.BOUNCE:  # qmail-send would retry it for ever
        everybody = tuple(range(recipients))
        return Decision(Action.DROP, match.reason, match.rule + " (bounce)", match, withheld=everybody)
    return Decision(Action.REJECT, match.reason, match.rule, match)


def _delivery(
    members: tuple[int, ...],
    outcomes: tuple[ScanOutcome, ...],
    policy: RecipientPolicy | None,
    match: Match | None,
) -> DeliveryGroup:
    """The delivery to one group, which shows only the results of its own checks."""
    virus = spam = ScanStatus.SKIPPED
    owner = b""
    if policy is not None and policy.virus:
        virus = strongest_status(o.status for o in outcomes if o.scanner.check is Check.VIRUS)
    if policy is not None and policy.spam:
        owner = policy.owner
        spam = strongest_status(spam_status(o, policy.options) for o in spam_outcomes(outcomes, owner))
    to = match.to if match and match.action is RecipientAction.MOVE else b""
    return DeliveryGroup(members, virus, spam, match, to, owner)


def strongest_status(statuses: Iterable[ScanStatus]) -> ScanStatus:
    """One status for several scanners: found beats unchecked beats clean beats skipped."""
    seen = set(statuses)
    for status in (ScanStatus.FOUND, ScanStatus.UNCHECKED, ScanStatus.CLEAN):
        if status in seen:
            return status
    return ScanStatus.SKIPPED


def spam_outcomes(outcomes: tuple[ScanOutcome, ...], owner: bytes) -> tuple[ScanOutcome, ...]:
    """The outcomes of the spam check by the preferences of ``owner``."""
    return tuple([o for o in outcomes if o.scanner.check is Check.SPAM and o.owner == owner])


def _merge(groups: list[DeliveryGroup], outcomes: tuple[ScanOutcome, ...]) -> tuple[DeliveryGroup, ...]:
    """One delivery for all recipients with equal results, in the order in which they came, whatever their thresholds.

    Except where the spam check's headers differ: no recipient reads the effect of another one's preferences.
    """
    headers: dict[bytes, tuple[object, ...]] = {}
    for o in outcomes:
        if o.rewritten:
            headers[o.owner] = (*headers.get(o.owner, ()), o.status, o.rewritten)
    merged: dict[object, list[DeliveryGroup]] = {}
    for group in groups:
        lines = headers.get(group.owner) if group.spam is not ScanStatus.SKIPPED else None
        action = group.match.action if group.match else None
        merged.setdefault((group.virus, group.spam, action, group.moved_to, lines), []).append(group)
    return tuple([_joined(alike) for alike in merged.values()])


def _joined(groups: list[DeliveryGroup]) -> DeliveryGroup:
    recipients = tuple(sorted([index for group in groups for index in group.recipients]))
    return msgspec.structs.replace(groups[0], recipients=recipients)


def _limit_forms(
    groups: tuple[DeliveryGroup, ...],
) -> tuple[tuple[DeliveryGroup, ...], list[tuple[tuple[int, ...], Match]]]:
    """No more forms of the message than the hook accepts. Moves to further addresses are kept in quarantine instead.

    Without moves there are never too many: [spamd] max_users limits them.
    """
    too_many = len(groups) - SUBMISSIONS_MAX
    fitting: list[DeliveryGroup] = []
    surplus: list[tuple[tuple[int, ...], Match]] = []
    for group in reversed(groups):
        if len(surplus) < too_many and group.moved_to and group.match is not None:
            rule = f"{group.match.rule}, and more than {SUBMISSIONS_MAX} forms of one message"
            removed = replace(group.match, action=RecipientAction.REMOVE, rule=rule, to=b"")
            surplus.append((group.recipients, removed))
        else:
            fitting.append(group)
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
