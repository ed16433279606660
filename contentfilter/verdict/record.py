"""The one line per message: fixed fields, for the log, the event feed and the journal.

Addresses stand here as printable ASCII; at most RECIPIENTS_SHOWN of them, with the true count beside.
What is too long for a line is the account: the story as it was told, and what else a message is found by.
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
"""So many recipients of a message can be searched for."""
ADDRESS_SHOWN = 300
"""Characters of an address in the account."""
STORY_MAX = 65_536
"""Characters of a story in the account."""


class ScanRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one scanner said."""

    scanner: str
    status: str
    ms: float
    name: str = ""
    detail: str = ""
    cause: str = ""
    backend: str = ""
    score: float | None = None
    threshold: float | None = None
    reused: str = ""  # kept or shared: it was said about an equal message
    owner: str = ""  # of the preferences that spamd went by


class MailRecord(msgspec.Struct, frozen=True):
    """What happened to one message."""

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


def make_record(case: MessageContext, attempt: int, seconds: float) -> MailRecord:
    """The line for a decided message that took ``seconds`` from intake to decision."""
    decision, envelope = case.decision, case.envelope
    return MailRecord(
        id=case.incident,
        origin=case.origin.kind.value,
        uid=case.origin.uid,
        remote=readable(case.origin.remote_ip[:64]),
        user=readable(case.origin.user[:256]),
        sender=readable(envelope.sender),
        recipients=tuple(readable(r) for r in envelope.recipients[:RECIPIENTS_SHOWN]),
        recipient_count=len(envelope.recipients),
        size=case.message.size,
        scans=make_scans(case.outcomes),
        decision=decision.action.value,
        reason=decision.reason.value,
        rule=decision.rule,
        submissions=len(decision.deliveries) if decision.action is Action.QUEUE else 0,
        quarantined=len(decision.quarantined),
        attempt=attempt,
        ms=round(seconds * 1000, 3),
    )


def make_scans(outcomes: tuple[ScanOutcome, ...]) -> tuple[ScanRecord, ...]:
    """What the scanners said, in a line's words."""
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
    """Whether somebody should look: deferred, or let through without the answer of a scanner."""
    return record.decision == Action.DEFER.value or any(s.status == ScanStatus.UNCHECKED.value for s in record.scans)


def ordinary(record: MailRecord) -> bool:
    """Delivered to everybody, with nothing found and nothing left unchecked."""
    dull = (ScanStatus.CLEAN.value, ScanStatus.SKIPPED.value)
    delivered = record.decision == Action.QUEUE.value and not record.quarantined
    return delivered and all(scan.status in dull for scan in record.scans)


class MailDetail(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the log line has no room for."""

    story: tuple[tuple[str, str], ...] = ()  # stage, and what happened there
    text: str = ""  # what the client was told
    message_id: str = ""
    more_recipients: tuple[str, ...] = ()  # those behind the ones in the record


def make_detail(case: MessageContext, text: str) -> MailDetail:
    """The account of a decided message; ``text`` is what the client is told. Bounded, whatever the message is."""
    return MailDetail(
        _bounded(context_trace(case)),
        text,
        message_id(header_block(case.message.data)),
        tuple(readable(r[:ADDRESS_SHOWN]) for r in case.envelope.recipients[RECIPIENTS_SHOWN:RECIPIENTS_FOUND]),
    )


def context_trace(case: MessageContext) -> tuple[tuple[str, str], ...]:
    """The story as plain pairs."""
    lines = trace(case.envelope, case.origin, case.message.size, case.plan, case.outcomes, case.decision)
    return tuple((line.stage, line.text) for line in lines)


def steps(account: MailDetail) -> Iterator[tuple[str, str]]:
    """The story and what else the log tells step by step, as pairs of a stage and a text."""
    if account.message_id:
        yield "message-id", account.message_id
    yield from account.story
    if account.text:
        yield "answer", account.text


def _bounded(lines: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    if sum(len(text) for _, text in lines) <= STORY_MAX:
        return lines
    share = STORY_MAX // len(lines)  # many recipients with long addresses: every line keeps its beginning
    return tuple((stage, text if len(text) <= share else text[:share] + " ...") for stage, text in lines)


def fields(record: MailRecord) -> dict[str, Any]:
    """The record as plain values for a log line."""
    plain: dict[str, Any] = msgspec.to_builtins(record)
    return plain
