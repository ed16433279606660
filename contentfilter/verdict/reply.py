"""A Decision becomes the Answer that the hook understands: texts for SMTP, headers for each delivery.

Texts are printable ASCII of at most 250 bytes, carry the incident id and an enhanced status code
(RFC 3463), and never contain what a peer sent without passing :func:`~contentfilter.model.readable`.
"""

from collections.abc import Callable
from functools import cache, partial

from contentfilter.model import Action, OriginKind, Reason, Scanner, ScanStatus, Want, readable
from contentfilter.policy.decide import Decision, Delivery, spamd_said
from contentfilter.verdict import headers
from contentfilter.verdict.context import MessageContext
from contentfilter.wire import envelope as envelope_format
from contentfilter.wire import hook

TEXT_LIMIT = 250
_Correct = Callable[[frozenset[bytes], bytes], tuple[bytes, int]]  # see headers.correct


def text_for(decision: Decision, incident: str) -> str:
    """What the SMTP client reads after a refusal or deferral; empty when the message passes."""
    if decision.action in (Action.QUEUE, Action.DROP):
        return ""
    body, code = _wording(decision)
    tail = f" [{incident}] (#{code})"
    return readable(body.encode("utf-8", "replace"))[: TEXT_LIMIT - len(tail)] + tail


def _wording(decision: Decision) -> tuple[str, str]:
    outcome = decision.finding.outcome if decision.finding else None
    name = outcome.name if outcome else ""
    if decision.action is Action.DEFER:
        if outcome is None:
            return "temporary trouble in the content filter, please try again", "4.3.0"
        what = "virus check" if outcome.scanner is not Scanner.SPAMD else "spam check"
        state = outcome.cause.value if outcome.cause else "failed"
        return f"{what} not possible now ({state}), please try again", "4.3.0"
    if decision.reason is Reason.VIRUS:
        return f"message contains a virus: {name}", "5.7.1"
    if decision.reason is Reason.BANNED:
        return f"message carries a Windows program: {name}", "5.7.1"
    if decision.reason is Reason.SPAM:
        return f"message looks like spam ({decision.rule.removeprefix('spamd: ')})", "5.7.1"
    if decision.rule.startswith("maxrecipients"):
        return "too many recipients for one message", "5.5.3"
    return "message exceeds the size limit", "5.3.4"


def answer(case: MessageContext) -> hook.Answer:
    """The whole answer. One submission that carries all recipients goes with the envelope as received."""
    decision = case.decision
    if decision.action is not Action.QUEUE:
        text = text_for(decision, case.incident)
        return hook.Answer(decision.action, decision.reason, text)
    # a header may be long and the deliveries many, which hardly differ in it
    correct = cache(partial(headers.correct, case.message.data))
    submissions = tuple(_submission(case, delivery, correct) for delivery in decision.deliveries)
    return hook.Answer(Action.QUEUE, Reason.NONE, "", submissions)


def _submission(case: MessageContext, delivery: Delivery, correct: _Correct) -> hook.Submission:
    envelope, settings = case.envelope, case.settings
    everybody = len(delivery.recipients) == len(envelope.recipients) and not delivery.moved_to
    to = tuple(envelope.recipients[i] for i in delivery.recipients)
    block = (
        None if everybody else envelope_format.build(envelope.sender, (delivery.moved_to,) if delivery.moved_to else to)
    )
    lines = _lines(case, delivery, to)
    claimed: frozenset[bytes] = frozenset(
        family
        for family, ours in (
            (b"contentfilter", settings.headers.trace),
            (b"virus-", delivery.virus is not ScanStatus.SKIPPED),
            (b"spam-", delivery.spam is not ScanStatus.SKIPPED),
        )
        if ours and not case.plan.released  # the release's own line must reach the next hop as it is
    )
    is_spam = delivery.spam is ScanStatus.FOUND
    tag = settings.spamd.subject_tag.encode("utf-8") if is_spam else b""
    said = spamd_said(case.outcomes, delivery.owner)
    rewritten = said.rewritten if said and claimed else b""
    agreed = said is not None and said.status is delivery.spam  # else these recipients have a threshold of their own
    if rewritten and is_spam and agreed and case.plan.want is Want.PROCESS:
        header, skip = headers.correct(rewritten, claimed - {b"spam-"}, tag)
        return hook.Submission(b"".join((*lines, header, rewritten[skip:])), case.message.size, block)
    if rewritten and delivery.spam is not ScanStatus.SKIPPED:
        fields = headers.spam_lines(headers.header_block(rewritten))
        lines.append(fields if agreed else headers.overruled(fields, is_spam))
    header, skip = correct(claimed, tag)
    return hook.Submission(b"".join((*lines, header)), skip, block)


def _lines(case: MessageContext, delivery: Delivery, to: tuple[bytes, ...]) -> list[bytes]:
    lines: list[bytes] = []
    virus = [o for o in case.outcomes if o.scanner is not Scanner.SPAMD]
    if case.settings.headers.trace:
        words = f"virus={delivery.virus.value}; spam={delivery.spam.value}"
        lines.append(f"X-ContentFilter: {case.incident}; {words}\n".encode("ascii"))
    if case.settings.headers.scanned and delivery.virus in (ScanStatus.CLEAN, ScanStatus.FOUND):
        asked = ", ".join(o.scanner.value for o in virus if o.status in (ScanStatus.CLEAN, ScanStatus.FOUND))
        lines.append(f"X-Virus-Scanned: contentfilter ({asked})\n".encode("ascii"))
        found = next((o.name for o in virus if o.status is ScanStatus.FOUND), "")
        lines.append(f"X-Virus-Status: {f'Infected ({found})' if found else 'Clean'}\n".encode("ascii", "replace"))
    smtp = case.origin.kind in (OriginKind.STRANGER, OriginKind.RELAY, OriginKind.AUTHENTICATED)
    if case.switches.xoriginatingip and smtp and case.origin.remote_ip:
        lines.append(b"X-Originating-IP: [" + readable(case.origin.remote_ip[:64]).encode("ascii") + b"]\n")
    if delivery.moved_to or (case.switches.xenveloptoheader and len(to) == 1):
        lines += [b"X-Envelope-To: " + readable(address).encode("ascii") + b"\n" for address in to]
    return lines
