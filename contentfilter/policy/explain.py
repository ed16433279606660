"""Trace of a decision: its steps in order, in words that an administrator can act on.

The same trace serves ``explain`` (what would happen) and the journal (what happened).
"""

import msgspec

from contentfilter.errors import Cause
from contentfilter.model import Action, Check, Envelope, Origin, OriginKind, ScanOutcome, ScanStatus, readable
from contentfilter.policy.decide import Decision
from contentfilter.policy.plan import RecipientPolicy, ScanPlan

SHOWN = 20
"""Recipients named per line; the rest is counted."""
GROUPS_SHOWN = 50
"""Lines for recipients, and for deliveries; the rest is counted."""


class TraceLine(msgspec.Struct, frozen=True):
    """One step: its stage, and what happened."""

    stage: str
    text: str


_ORIGINS = {
    OriginKind.STRANGER: "a stranger over SMTP: no login, no relay right",
    OriginKind.RELAY: "an SMTP client that may relay (RELAYCLIENT is set)",
    OriginKind.AUTHENTICATED: "an authenticated SMTP client",
    OriginKind.LOCAL: "a local user: environment marks do not count",
    OriginKind.BOUNCE: "qmail-send itself: never refused",
}
_ACTIONS = {
    Action.QUEUE: "the message goes to the real qmail-queue",
    Action.REJECT: "the message is refused permanently",
    Action.DEFER: "the client is asked to try again later",
    Action.DROP: "the message is accepted and not delivered",
}


def trace(
    envelope: Envelope, origin: Origin, size: int, plan: ScanPlan, outcomes: tuple[ScanOutcome, ...], decision: Decision
) -> tuple[TraceLine, ...]:
    """All steps in the order in which they were taken."""
    lines = [
        TraceLine("message", f"{size} bytes from <{readable(envelope.sender)}>, {envelope.count} recipient(s)"),
        TraceLine("origin", f"{origin.kind.value}: {_ORIGINS[origin.kind]} (uid {origin.uid})"),
    ]
    for policy, members in plan.groups[:GROUPS_SHOWN]:
        lines.append(TraceLine("recipients", f"{_names(envelope, members)}: {_policy(policy)}"))
    if (more := len(plan.groups) - GROUPS_SHOWN) > 0:
        lines.append(TraceLine("recipients", f"{more} more groups of them"))
    if plan.limit:
        lines.append(TraceLine("limit", f"exceeds {plan.limit}"))
    if plan.hold:
        lines.append(TraceLine("tables", plan.hold))
    for step in plan.steps:
        results = [outcome for outcome in outcomes if outcome.scanner is step.scanner]
        lines += [TraceLine(step.scanner.value, f"{_outcome(o)} ({_asked(o)}: {step.reason})") for o in results]
        if results:
            continue
        if step.run:
            lines.append(TraceLine(step.scanner.value, "not asked: the decision was certain before"))
        else:
            lines.append(TraceLine(step.scanner.value, f"not asked: {step.reason}"))
    lines.append(TraceLine("decision", f"{decision.action.value}: {_ACTIONS[decision.action]}; rule: {decision.rule}"))
    for delivery in decision.deliveries[:GROUPS_SHOWN]:
        how = f"virus={delivery.virus.value}; spam={delivery.spam.value}"
        how += f", moved to {readable(delivery.moved_to)}" if delivery.moved_to else ""
        lines.append(TraceLine("deliver", f"to {_names(envelope, delivery.recipients)} with {how}"))
    if (more := len(decision.deliveries) - GROUPS_SHOWN) > 0:
        lines.append(TraceLine("deliver", f"in {more} more forms"))
    if decision.withheld:
        lines.append(TraceLine("quarantine", f"kept in place of delivery to {_names(envelope, decision.withheld)}"))
    return tuple(lines)


def _names(envelope: Envelope, members: tuple[int, ...]) -> str:
    named = ", ".join(readable(envelope.recipients[i]) for i in members[:SHOWN])
    more = len(members) - SHOWN
    return (named or "no recipients") + (f" and {more} more" if more > 0 else "")


def _policy(policy: RecipientPolicy) -> str:
    virus = f"virus check {'yes' if policy.virus else 'no'} ({policy.virus_rule})"
    own = f", by the preferences of {readable(policy.owner)}" if policy.owner else ""
    return f"{virus}, spam check {'yes' if policy.spam else 'no'} ({policy.spam_rule}{own})"


def _asked(outcome: ScanOutcome) -> str:
    return "not asked, though wanted" if outcome.cause is Cause.BYPASSED else "asked"


def _outcome(outcome: ScanOutcome) -> str:
    whose = f"by the preferences of {readable(outcome.owner)}: " if outcome.owner else ""
    return whose + _result(outcome)


def _result(outcome: ScanOutcome) -> str:
    took = f"{outcome.seconds * 1000:.1f} ms"
    if outcome.scanner.check is Check.SPAM and outcome.score is not None:
        took = f"{outcome.score:g} of {outcome.threshold or 0.0:g} points, {took}"
    if outcome.status is ScanStatus.FOUND:
        what = " ".join(part for part in (outcome.name, f"({outcome.detail})" if outcome.detail else "") if part)
        return f"found {what}, {took}".replace("found , ", "found, ")
    if outcome.status is ScanStatus.UNCHECKED:
        cause = outcome.cause.value if outcome.cause else "fault"
        return f"unchecked, {cause}: {outcome.detail}, {took}"
    return f"{outcome.status.value}{f' ({outcome.detail})' if outcome.detail else ''}, {took}"
