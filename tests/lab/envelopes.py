"""Large envelopes, and the memory that a message with one of them takes from envelope to answer.

As a program: ``envelopes.py KIND MIB TABLES``; prints the bytes of the envelope, the peak of memory above what the
process had with the envelope in hand, the action and the number of recipients. TABLES: ``none``, or ``own`` for the
most expensive tables: each recipient has a row and options of its own, and the message is withheld from all of them.
"""

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

from contentfilter.deadline import Deadline
from contentfilter.doors.hook_work import answer_with, parse_envelope
from contentfilter.doors.message import message_of
from contentfilter.model import RECIPIENTS_MAX, Origin, OriginKind, Scanner, ScanOutcome, ScanStatus
from contentfilter.pipeline import Pipeline, Scanners
from contentfilter.policy.plan import Row, Switches, recipient_limit
from contentfilter.settings import ServiceSettings, Settings, SpamdSettings
from contentfilter.store.quarantine import Quarantine

LIMIT = 128 << 20


def envelope(kind: str, mib: int) -> bytes:
    """``empty``: recipients without an address; ``short``, ``long``: as many of these as may be, and fit."""
    size = min(mib << 20, LIMIT)
    if kind == "empty":
        return b"Fa@b.example\0" + b"T\0" * ((size - 14) // 2) + b"\0"
    address = b"T%06d@example.com\0" if kind == "short" else b"T" + b"x" * 980 + b"%06d@example.com\0"
    count = min((size - 14) // len(address % 0), RECIPIENTS_MAX)
    return b"Fa@b.example\0" + b"".join([address % number for number in range(count)]) + b"\0"


class Asked:
    database = ""

    def __init__(self, outcome: ScanOutcome) -> None:
        self._outcome = outcome

    def too_big(self, size: int) -> bool:
        return False

    async def scan(self, *_: Any, **__: Any) -> ScanOutcome:
        return self._outcome


def no_row(_: bytes) -> tuple[None, None]:
    return None, None


def own_rows(recipient: bytes) -> tuple[Row, Row]:
    return Row(recipient, False), Row(recipient, False, b"score=%d" % (hash(recipient) % 1000 + 1))


async def handle(block: bytes, tables: str, state: str) -> tuple[str, int]:
    spam = ScanOutcome(Scanner.SPAMD, ScanStatus.FOUND, score=2000.0, threshold=5.0)
    settings = Settings(service=ServiceSettings(state=state), spamd=SpamdSettings(user="none", action="remove"))
    scanners = Scanners(
        None, *(cast(Any, Asked(each)) for each in (ScanOutcome(Scanner.CLAMD, ScanStatus.CLEAN), spam))
    )
    lookup = no_row if tables == "none" else own_rows
    pipeline = Pipeline(settings, Switches(), lookup, scanners, Quarantine.of(settings))
    message = message_of(b"Subject: x\n\nbody\n")
    parsed = await parse_envelope(block, recipient_limit(OriginKind.LOCAL, Switches()))
    origin = Origin(OriginKind.LOCAL, 1)
    disposition, record, _ = await pipeline.handle("i", parsed, message, origin, Deadline.after(300))
    (await answer_with(disposition, message, len(block))).close()
    message.close()
    return record.decision, record.recipient_count


def memory(field: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    kind, mib, tables = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    block = envelope(kind, mib)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    before = memory("VmRSS")
    with tempfile.TemporaryDirectory() as state:
        action, count = asyncio.run(handle(block, tables, state))
    print(len(block), memory("VmHWM") - before, action, count)
