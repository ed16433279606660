"""The plan that messages share where nobody is checked is the one that each of them would get."""

import asyncio
from typing import cast

import pytest

from contentfilter.model import Envelope, Message, Origin, OriginKind
from contentfilter.pipeline import Pipeline, Scanners
from contentfilter.policy.plan import Lookup, Row, ScanPlan, Switches, make_plan
from contentfilter.settings import Settings
from contentfilter.store.quarantine import Quarantine

ROWS: dict[bytes, tuple[Row | None, Row | None]] = {
    b"both@example.net": (Row(b"both@example.net", False), Row(b"both@example.net", False)),
    b"exempt@example.net": (Row(b"exempt@example.net", True), None),
}
NOBODY, BOTH, EXEMPT = (b"nobody@example.net",), (b"both@example.net",), (b"exempt@example.net",)
MAIL = (NOBODY, NOBODY, BOTH, EXEMPT, NOBODY, (*NOBODY, *BOTH), (), NOBODY)


def lookup(recipient: bytes) -> tuple[Row | None, Row | None]:
    return ROWS.get(recipient, (None, None))


def pipeline(switches: Switches, tables: Lookup | None = lookup) -> Pipeline:
    return Pipeline(Settings(), switches, tables, cast(Scanners, None), cast(Quarantine, None))


def planned(by: Pipeline, recipients: tuple[bytes, ...], kind: OriginKind, size: int = 100) -> ScanPlan:
    envelope, message = Envelope(b"s@example.org", recipients), Message(-1, size, b"")
    return asyncio.run(by._plan(envelope, message, Origin(kind, 7)))


@pytest.mark.parametrize(
    "switches",
    [
        Switches(chksignature=True),
        Switches(clamglobal=True, skipcachk=2),
        Switches(spamglobal=True, skipsachk=1, samsgsize=500),
        Switches(clamglobal=True, spamglobal=True, skipcachk=1, skipsachk=2),
        Switches(databytes=500, maxrecipients=1),
    ],
)
@pytest.mark.parametrize("tables", [lookup, None])
def test_a_plan_does_not_depend_on_the_messages_before_it(switches: Switches, tables: Lookup | None) -> None:
    by = pipeline(switches, tables)
    for kind in (*OriginKind, *OriginKind):
        for recipients in MAIL:
            for size in (100, 1000):
                envelope = Envelope(b"s@example.org", recipients)
                expected = make_plan(envelope, size, Origin(kind, 7), Settings(), switches, tables)
                assert planned(by, recipients, kind, size) == expected


def test_messages_that_nobody_wants_checked_share_one_plan() -> None:
    by = pipeline(Switches())
    assert planned(by, NOBODY, OriginKind.RELAY) is planned(by, (b"other@example.net",), OriginKind.RELAY)
