"""The one line per message: fixed fields, for the log, the event feed and, later, the journal.

Addresses stand here as printable ASCII; at most RECIPIENTS_SHOWN of them, with the true count beside.
"""

from typing import Any

import msgspec

from contentfilter.model import readable
from contentfilter.policy.decide import Action
from contentfilter.verdict.case import Case

RECIPIENTS_SHOWN = 20


class Scan(msgspec.Struct, frozen=True, omit_defaults=True):
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


class Record(msgspec.Struct, frozen=True):
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
    scans: tuple[Scan, ...]
    decision: str
    reason: str
    rule: str
    submissions: int
    quarantined: int
    attempt: int
    ms: float


def make_record(case: Case, attempt: int, seconds: float) -> Record:
    """The line for a decided message that took ``seconds`` from intake to decision."""
    decision, envelope = case.decision, case.envelope
    return Record(
        id=case.incident,
        origin=case.origin.kind.value,
        uid=case.origin.uid,
        remote=readable(case.origin.remote_ip[:64]),
        user=readable(case.origin.user[:256]),
        sender=readable(envelope.sender),
        recipients=tuple(readable(r) for r in envelope.recipients[:RECIPIENTS_SHOWN]),
        recipient_count=len(envelope.recipients),
        size=case.message.size,
        scans=tuple(
            Scan(
                o.scanner.value,
                o.status.value,
                round(o.seconds * 1000, 3),
                o.name,
                o.detail,
                o.cause.value if o.cause else "",
                o.backend,
                o.score,
                o.threshold,
            )
            for o in case.outcomes
        ),
        decision=decision.action.value,
        reason=decision.reason.value,
        rule=decision.rule,
        submissions=len(decision.deliveries) if decision.action is Action.QUEUE else 0,
        quarantined=len(decision.quarantined),
        attempt=attempt,
        ms=round(seconds * 1000, 3),
    )


def fields(record: Record) -> dict[str, Any]:
    """The record as plain values for a log line."""
    plain: dict[str, Any] = msgspec.to_builtins(record)
    return plain
