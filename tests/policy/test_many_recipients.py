"""A message for 100,000 recipients does not keep the event loop from other mail."""

import asyncio
import time
from pathlib import Path
from typing import Any, cast

import pytest

from contentfilter.deadline import Deadline
from contentfilter.doors.message import message_of
from contentfilter.model import Action, Envelope, Origin, OriginKind, Scanner, ScanOutcome, ScanStatus
from contentfilter.pipeline import Handled, Pipeline, Scanners
from contentfilter.policy.admission import priority_of
from contentfilter.policy.decide import decide
from contentfilter.policy.plan import Row, Switches, make_plan, recipient_limit, unscanned_plan
from contentfilter.settings import ClamdSettings, ServiceSettings, Settings, SpamdSettings
from contentfilter.store.quarantine import Quarantine
from contentfilter.wire.envelope import parse

MANY = 100_000
LONGEST = 0.05  # seconds of CPU time on the event loop, for all stages together
RECIPIENTS = tuple(b"user%d@example.com" % number for number in range(MANY))
ORIGIN = Origin(OriginKind.STRANGER, 1)


class Asked:
    """A scanner that gives one answer."""

    def __init__(self, outcome: ScanOutcome) -> None:
        self.outcome = outcome
        self.database = ""

    def too_big(self, size: int) -> bool:
        return False

    async def scan(self, *_: Any, **__: Any) -> ScanOutcome:
        return self.outcome


def own_rows(recipient: bytes) -> tuple[Row, Row]:
    """The most expensive tables: a row and a group for each recipient, with options of its own."""
    options = b"" if len(recipient) % 2 else b"score=%d" % len(recipient)
    return Row(recipient, False), Row(recipient, False, options)


def pipeline(state: Path, spam: ScanOutcome, **sections: Any) -> Pipeline:
    clamd = Asked(ScanOutcome(Scanner.CLAMD, ScanStatus.CLEAN))
    scanners = Scanners(None, *(cast(Any, each) for each in (clamd, Asked(spam))))
    config = Settings(
        service=ServiceSettings(state=str(state)),
        **{"clamd": ClamdSettings(), "spamd": SpamdSettings(user="none")} | sections,
    )
    switches = Switches(chksignature=True, chkloadertype=True)
    return Pipeline(config, switches, own_rows, scanners, Quarantine.of(config))


def handled(by: Pipeline, recipients: tuple[bytes, ...] = RECIPIENTS) -> tuple[Handled, float]:
    """The result, and the CPU time that the thread of the event loop used for it."""

    async def handle() -> tuple[Handled, float]:
        message = message_of(b"Subject: x\n\nbody\n")
        started = time.thread_time()
        try:
            result = await by.handle("i", Envelope(b"s@x", recipients), message, ORIGIN, Deadline.after(60))
            return result, time.thread_time() - started
        finally:
            message.close()

    return asyncio.run(handle())


@pytest.mark.parametrize(
    ("score", "sections", "withheld"),
    [
        (1.0, {}, 0),
        (30.0, {"spamd": SpamdSettings(user="none", action="remove")}, MANY),
    ],
    ids=["delivered", "kept"],
)
def test_no_stage_of_a_large_message_runs_on_the_event_loop(
    tmp_path: Path, score: float, sections: dict[str, Any], withheld: int
) -> None:
    status = ScanStatus.FOUND if score > 5 else ScanStatus.CLEAN
    spam = ScanOutcome(Scanner.SPAMD, status, score=score, threshold=5.0)
    by = pipeline(tmp_path, spam, **sections)
    (disposition, record, _), used = handled(by)
    assert (record.recipient_count, record.quarantined) == (MANY, withheld)
    assert disposition.action is (Action.DROP if withheld else Action.QUEUE)
    assert used < LONGEST


def test_a_poison_message_for_many_does_not_run_on_the_event_loop_either(tmp_path: Path) -> None:
    by = pipeline(tmp_path, ScanOutcome(Scanner.SPAMD, ScanStatus.CLEAN))

    async def isolate() -> float:
        message = message_of(b"Subject: x\n\nbody\n")
        started = time.thread_time()
        isolated = await by.isolate("i", Envelope(b"s@x", RECIPIENTS), message, ORIGIN, 0, "f" * 32)
        used = time.thread_time() - started
        assert (isolated.handled.record.rule, Path(isolated.copy).name) == ("signatures: poison", "f" * 32 + ".eml")
        return used

    assert asyncio.run(isolate()) < LONGEST


@pytest.mark.parametrize(
    ("kind", "maxrecipients", "count", "action"),
    [
        (OriginKind.STRANGER, 0, MANY, None),
        (OriginKind.STRANGER, 0, MANY + 1, Action.REJECT),
        (OriginKind.STRANGER, 5, 6, Action.REJECT),
        (OriginKind.STRANGER, 2 * MANY, MANY + 1, Action.REJECT),
        (OriginKind.LOCAL, 5, 6, None),
        (OriginKind.LOCAL, 5, MANY + 1, Action.REJECT),
        (OriginKind.BOUNCE, 5, MANY, None),
        (OriginKind.BOUNCE, 5, MANY + 1, Action.DEFER),
    ],
)
@pytest.mark.parametrize("lookup", [None, lambda recipient: (None, None)], ids=["no tables", "tables"])
def test_too_many_recipients_are_rejected_and_a_bounce_never_is(
    kind: OriginKind, maxrecipients: int, count: int, action: Action | None, lookup: Any
) -> None:
    switches = Switches(maxrecipients=maxrecipients)
    block = b"Fs@x\0" + b"Ta@b\0" * count + b"\0"
    envelope = parse(block, recipient_limit(kind, switches))
    plans = [
        make_plan(envelope, 10, Origin(kind, 1), Settings(), switches, lookup),
        unscanned_plan(envelope, kind, switches, "it killed two workers"),
    ]
    for plan in plans:
        assert bool(plan.limit) is (action is not None)
        if action is not None:
            decision = decide(plan, (), kind, envelope.count, Settings())
            assert (decision.action, decision.rule) == (action, f"maxrecipients={recipient_limit(kind, switches)}")


def test_a_message_is_charged_for_its_recipients_but_ranked_by_its_size() -> None:
    few, many = (priority_of(ORIGIN, 1000, envelope) for envelope in (100, 20_000))
    assert (few.rank, few.bytes_charged) == (1, 0)
    assert many.rank == 1
    assert many.bytes_charged > 20_000 * 500
    assert priority_of(ORIGIN, 1000, 1 << 20).rank == 3
