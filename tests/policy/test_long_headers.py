"""Hostile headers, delivered or rejected, do not hold the event loop: the watchdog of all tests would notice."""

import asyncio
from pathlib import Path

import pytest
from policy.test_many_recipients import pipeline

from contentfilter.deadline import Deadline
from contentfilter.doors.hook_work import answer_with
from contentfilter.doors.message import message_of
from contentfilter.model import Action, Envelope, Origin, OriginKind, Scanner, ScanOutcome, ScanStatus
from contentfilter.settings import SpamdSettings
from contentfilter.verdict.headers import HEADER_LIMIT

SHAPES = {
    "our fields": b"X-Spam-:\n",
    "hidden names": b"\0X\0-\0Virus-\0a: 1\n",
    "subjects": b"Subject: a\n",
    "encoded subjects": b"Subject: =?utf-8?b?eA==?=\n",
    "bare CR": b"\rX-Spam-a:\r",
    "long reply marks": b"Subject: [a] [b] [c] [d] [e] [f] [g]\n",
    "release marks": b"X-ContentFilter-Released: \n",
    "received": b"Received: a\n b\n",
}


@pytest.mark.parametrize("size", [47 << 10, 255 << 10, (1 << 20) - 100, 3 << 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_hostile_header_leaves_the_loop_free(tmp_path: Path, shape: str, size: int) -> None:
    unit = SHAPES[shape]
    data = b"Subject: x\n" + unit * (size // len(unit)) + b"\n\nbody\n"
    spam = ScanOutcome(Scanner.SPAMD, ScanStatus.FOUND, score=9.0, threshold=5.0)
    by = pipeline(tmp_path, spam, spamd=SpamdSettings(user="none", subject_tag="[SPAM]"))

    async def handle() -> Action:
        message = await asyncio.to_thread(message_of, data)
        envelope, origin = Envelope(b"s@x", (b"user1@example.com",)), Origin(OriginKind.STRANGER, 1)
        disposition, _, _ = await by.handle("i", envelope, message, origin, Deadline.after(60))
        (await answer_with(disposition, message, 100)).close()
        message.close()
        return disposition.action

    assert asyncio.run(handle()) is (Action.REJECT if size > HEADER_LIMIT else Action.QUEUE)
