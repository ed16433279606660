"""Log record of a message: fixed fields for the log, the event feed and the journal; and its audit detail.

Addresses are printable ASCII; at most RECIPIENTS_SHOWN of them, with the true count beside.
The detail holds what is too long for a line: the trace of the decision, and what else a message can be found by.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from contentfilter.model import Action, ScanOutcome, ScanStatus, readable
from contentfilter.policy.explain import trace
from contentfilter.verdict.context import MessageContext
from contentfilter.verdict.headers import header_block, message_id

RECIPIENTS_SHOWN = 20
RECIPIENTS_FOUND = 1_000
"""Recipients of a message that can be searched for."""
ADDRESS_SHOWN = 300
"""Characters of an address in the detail."""
TRACE_MAX = 65_536
"""Characters of a trace in the detail."""


class ScanRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """Result of one scanner."""

    scanner: str
    status: str
    ms: float
    name: str = ""
    detail: str = ""
    cause: str = ""
    backend: str = ""
    score: float | None = None
    threshold: float | None = None
    reused: str = ""  # kept or shared: the result of an equal message
    owner: str = ""  # of the preferences that spamd used


class MailRecord(msgspec.Struct, frozen=True):
    """Result of one message."""

    id: str
    origin: str
    uid: int
    remote: str
    user: str
    sender: str
    recipients: tuple[str, ...]
    recipient_count: int
    size: int
    scans: tuple[ScanRecord, ...]
    decision: str
    reason: str
    rule: str
    submissions: int
    quarantined: int
    attempt: int
    ms: float


def make_record(context: MessageContext, attempt: int, seconds: float) -> MailRecord:
    """The record of a decided message that took ``seconds`` from intake to decision."""
    decision, envelope = context.decision, context.envelope
    return MailRecord(
        id=context.incident,
        origin=context.origin.kind.value,
        uid=context.origin.uid,
        remote=readable(context.origin.remote_ip[:64]),
        user=readable(context.origin.user[:256]),
        sender=readable(envelope.sender),
        recipients=tuple([readable(r) for r in envelope.recipients[:RECIPIENTS_SHOWN]]),
        recipient_count=envelope.count,
        size=context.message.size,
        scans=make_scans(context.outcomes),
        decision=decision.action.value,
        reason=decision.reason.value,
        rule=decision.rule,
        submissions=len(decision.deliveries) if decision.action is Action.QUEUE else 0,
        quarantined=len(decision.withheld),
        attempt=attempt,
        ms=round(seconds * 1000, 3),
    )


def make_scans(outcomes: tuple[ScanOutcome, ...]) -> tuple[ScanRecord, ...]:
    """The outcomes in the form of the record."""
    return tuple(
        ScanRecord(
            o.scanner.value,
            o.status.value,
            round(o.seconds * 1000, 3),
            o.name,
            o.detail,
            o.cause.value if o.cause else "",
            o.backend,
            o.score,
            o.threshold,
            o.reused,
            readable(o.owner[:ADDRESS_SHOWN]),
        )
        for o in outcomes
    )


def troubled(record: MailRecord) -> bool:
    """True for a message that needs attention: deferred, or passed without the result of a scanner."""
    return record.decision == Action.DEFER.value or any(s.status == ScanStatus.UNCHECKED.value for s in record.scans)


def ordinary(record: MailRecord) -> bool:
    """True for a message that was delivered to all, with nothing found and nothing unchecked."""
    unremarkable = (ScanStatus.CLEAN.value, ScanStatus.SKIPPED.value)
    delivered = record.decision == Action.QUEUE.value and not record.quarantined
    return delivered and all(scan.status in unremarkable for scan in record.scans)


class MailDetail(msgspec.Struct, frozen=True, omit_defaults=True):
    """Audit detail of a message: the facts that are too long for the record."""

    story: tuple[tuple[str, str], ...] = ()  # the trace: stage and text
    text: str = ""  # the reply to the client
    message_id: str = ""
    more_recipients: tuple[str, ...] = ()  # those behind the ones in the record


def make_detail(context: MessageContext, text: str) -> MailDetail:
    """The detail of a decided message; ``text`` is the reply to the client. Bounded, whatever the message is."""
    return MailDetail(
        _bounded(context_trace(context)),
        text,
        message_id(header_block(context.message.data)),
        tuple([readable(r[:ADDRESS_SHOWN]) for r in context.envelope.recipients[RECIPIENTS_SHOWN:RECIPIENTS_FOUND]]),
    )


def context_trace(context: MessageContext) -> tuple[tuple[str, str], ...]:
    """The trace as plain pairs of stage and text."""
    lines = trace(
        context.envelope, context.origin, context.message.size, context.plan, context.outcomes, context.decision
    )
    return tuple([(line.stage, line.text) for line in lines])


def quarantine_facts(context: MessageContext) -> dict[str, Any]:
    """The facts about a message that is kept in quarantine, for its sidecar."""
    envelope = context.envelope
    return fields(make_record(context, 0, 0.0)) | {
        # bytes as received: the printable fields may have lost some
        "envelope_hex": {"sender": envelope.sender.hex(), "recipients": [r.hex() for r in envelope.recipients]},
        "withheld_from": list(context.decision.withheld),
    }


def steps(detail: MailDetail) -> Iterator[tuple[str, str]]:
    """The trace and the other facts that the log lists step by step, as pairs of a stage and a text."""
    if detail.message_id:
        yield "message-id", detail.message_id
    yield from detail.story
    if detail.text:
        yield "answer", detail.text


def _bounded(lines: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    if sum([len(text) for _, text in lines]) <= TRACE_MAX:
        return lines
    share = TRACE_MAX // len(lines)  # many recipients with long addresses: every line keeps its beginning
    return tuple([(stage, text if len(text) <= share else text[:share] + " ...") for stage, text in lines])


def fields(record: MailRecord) -> dict[str, Any]:
    """The record as plain values for a log line."""
    plain: dict[str, Any] = msgspec.to_builtins(record)
    return plain
