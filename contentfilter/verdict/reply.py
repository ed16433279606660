"""Makes the disposition of a decided message: the reply text for SMTP, and the header fields of each delivery.

Texts are printable ASCII of at most 250 bytes, carry the incident id and an enhanced status code
(RFC 3463), and never contain what a peer sent without passing :func:`~contentfilter.model.readable`.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import compress, product

from contentfilter.model import Action, Check, Envelope, OriginKind, Reason, ScanStatus, Want, readable
from contentfilter.policy.decide import Decision, DeliveryGroup, spam_outcomes
from contentfilter.verdict import headers
from contentfilter.verdict.context import MessageContext
from contentfilter.verdict.disposition import AddHeader, Delivery, Disposition, HeaderChange

TEXT_LIMIT = 250
_SCANNED = (ScanStatus.CLEAN, ScanStatus.FOUND)
_SMTP = (OriginKind.STRANGER, OriginKind.RELAY, OriginKind.AUTHENTICATED)
_Correct = Callable[[frozenset[bytes], bytes], tuple[bytes, tuple[HeaderChange, ...]]]  # see headers.correct


def text_for(decision: Decision, incident: str) -> str:
    """The reply to the SMTP client after a refusal or deferral; empty when the message passes."""
    if decision.action in (Action.QUEUE, Action.DROP):
        return ""
    body, code = _wording(decision)
    tail = f" [{incident}] (#{code})"
    return readable(body.encode("utf-8", "replace"))[: TEXT_LIMIT - len(tail)] + tail


def _wording(decision: Decision) -> tuple[str, str]:
    outcome = decision.match.outcome if decision.match else None
    name = outcome.name if outcome else ""
    if decision.action is Action.DEFER:
        if outcome is None:
            return "temporary trouble in the content filter, please try again", "4.3.0"
        state = outcome.cause.value if outcome.cause else "failed"
        return f"{outcome.scanner.check.value} check not possible now ({state}), please try again", "4.3.0"
    if decision.reason is Reason.VIRUS:
        return f"message contains a virus: {name}", "5.7.1"
    if decision.reason is Reason.BANNED:
        return f"message carries a Windows program: {name}", "5.7.1"
    if decision.reason is Reason.SPAM:
        return f"message looks like spam ({decision.rule.partition(': ')[2]})", "5.7.1"
    if decision.rule.startswith("maxrecipients"):
        return "too many recipients for one message", "5.5.3"
    if decision.rule.startswith("header"):
        return "message header exceeds the size limit", "5.3.4"
    return "message exceeds the size limit", "5.3.4"


def make_disposition(context: MessageContext) -> Disposition:
    """The disposition of a decided message."""
    decision, envelope = context.decision, context.envelope
    withheld = tuple([envelope.recipients[index] for index in decision.withheld])
    if decision.action is not Action.QUEUE:
        text = text_for(decision, context.incident)
        return Disposition(decision.action, decision.reason, text, withheld=withheld)
    # A hostile header may be long, and the deliveries, of which there may be many, hardly differ in its changes.
    correct = cache(partial(headers.correct, context.message.data))
    deliveries = tuple([_delivery(context, group, correct) for group in decision.deliveries])
    return Disposition(Action.QUEUE, deliveries=deliveries, withheld=withheld)


def _delivery(context: MessageContext, group: DeliveryGroup, correct: _Correct) -> Delivery:
    """One form of the message. The form that goes to all recipients keeps the envelope as received."""
    envelope, settings = context.envelope, context.settings
    recipients, edited = envelope.recipients, None
    if group.moved_to or len(group.recipients) != len(recipients):
        recipients = tuple([envelope.recipients[index] for index in group.recipients])
        edited = Envelope(envelope.sender, (group.moved_to,) if group.moved_to else recipients)
    added = _added(context, group, recipients)
    claimed = _claimed(group)
    is_spam = group.spam is ScanStatus.FOUND
    tag = settings.spamd.subject_tag.encode("utf-8") if is_spam else b""
    spam = next(iter(spam_outcomes(context.outcomes, group.owner)), None)
    rewritten = spam.rewritten if spam else b""
    agreed = spam is not None and spam.status is group.spam  # else these recipients have a threshold of their own
    content = None
    if rewritten and is_spam and agreed and context.plan.want is Want.PROCESS:
        content = rewritten
        missing, changes = headers.correct(rewritten, claimed - {b"spam-"}, tag)
    else:
        missing, changes = correct(claimed, tag)
        if rewritten and group.spam is not ScanStatus.SKIPPED:
            fields = headers.spam_fields(headers.header_block(rewritten))
            added += fields if agreed else headers.overruled(fields, is_spam)
    if missing:
        added.append(missing)
    return Delivery(edited, tuple(map(AddHeader, added)), changes, content)


_FAMILIES = {
    families: frozenset((b"contentfilter", *compress((b"virus-", b"spam-"), families)))
    for families in product((False, True), repeat=2)
}


def _claimed(group: DeliveryGroup) -> frozenset[bytes]:
    """The families of header fields that speak for us in this delivery.

    X-ContentFilter always does, even if no such field is added: a release token is one.
    """
    return _FAMILIES[group.virus is not ScanStatus.SKIPPED, group.spam is not ScanStatus.SKIPPED]


def _added(context: MessageContext, group: DeliveryGroup, recipients: tuple[bytes, ...]) -> list[bytes]:
    """Our own fields, each with its final LF."""
    fields: list[bytes] = []
    settings, origin = context.settings.headers, context.origin
    if settings.trace:
        words = f"virus={group.virus.value}; spam={group.spam.value}"
        fields.append(f"X-ContentFilter: {context.incident}; {words}\n".encode("ascii"))
    if settings.scanned and group.virus in _SCANNED:
        scans = [each for each in context.outcomes if each.scanner.check is Check.VIRUS]
        scanners = ", ".join([each.scanner.value for each in scans if each.status in _SCANNED])
        fields.append(f"X-Virus-Scanned: contentfilter ({scanners})\n".encode("ascii"))
        found = next((each.name for each in scans if each.status is ScanStatus.FOUND), "")
        fields.append(f"X-Virus-Status: {f'Infected ({found})' if found else 'Clean'}\n".encode("ascii", "replace"))
    if context.switches.xoriginatingip and origin.remote_ip and origin.kind in _SMTP:
        fields.append(b"X-Originating-IP: [" + readable(origin.remote_ip[:64]).encode("ascii") + b"]\n")
    if group.moved_to or (context.switches.xenveloptoheader and len(recipients) == 1):
        fields += [b"X-Envelope-To: " + readable(address).encode("ascii") + b"\n" for address in recipients]
    return fields
