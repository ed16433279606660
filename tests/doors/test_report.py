"""The hook's door: whose clock a budget follows, and how long the report of a split message is awaited."""

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from lab.offer import ENVELOPE, MESSAGE, Offer, sealed

from contentfilter.doors import queue
from contentfilter.doors.admission import AcceptedMessage
from contentfilter.doors.queue import Stage
from contentfilter.model import Action
from contentfilter.wire import hook

pytestmark = pytest.mark.asyncio

QUEUE = hook.Answer(Action.QUEUE, submissions=(hook.Submission(),))
Listening = Callable[..., Any]


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (None, 130.0),  # an older hook: from accepting
        (80.0, 110.0),  # it waited 20 seconds in the socket's queue
        (101.0, 131.0),  # connected first, and sent later
        (102.5, 130.0),  # in the future
        (71.9, 130.0),  # older than the budget
    ],
)
async def test_the_hooks_budget_ends_where_the_hook_thinks(sent: float | None, expected: float) -> None:
    request = hook.Request(0, 30.0, 1, 1, {}, sent)
    assert queue.hook_end(request, 100.0, 102.0) == expected


@pytest.mark.parametrize("age", ["new", "old"])
async def test_time_in_the_sockets_queue_counts_once(age: str, listening: Listening) -> None:
    """The daemon answers before the hook gives up; the hook counts from the moment that it sends."""
    left: list[tuple[float, float]] = []

    async def look(accepted: AcceptedMessage) -> hook.Answer:
        left.append((end - time.monotonic(), accepted.deadline.left()))
        return QUEUE

    async with listening(look) as bench:
        bench.listener.hold(True)
        with Offer(bench.path) as once:
            fds = [sealed(MESSAGE), sealed(ENVELOPE)]
            sent = time.monotonic()
            end = sent + 5.0
            facts = hook.Request(0, 5.0, len(MESSAGE), len(ENVELOPE), {}, sent if age == "new" else None)
            once.send_raw(hook.encode_request(facts), fds)
            for fd in fds:
                os.close(fd)
            await asyncio.sleep(1.0)
            bench.listener.hold(False)
            assert await asyncio.to_thread(once.answer) == QUEUE
    ((hooks, ours),) = left
    assert (ours < hooks) is (age == "new")
    assert abs(hooks - ours) < 1.2


SPLIT = hook.Answer(Action.QUEUE, submissions=(hook.Submission(), hook.Submission(envelope=b"F\0Ta@b\0\0")))


async def split(accepted: AcceptedMessage) -> hook.Answer:
    return SPLIT


async def test_a_split_message_is_reported(listening: Listening) -> None:
    async with listening(split) as bench:
        with Offer(bench.path) as once:
            assert await asyncio.to_thread(once.send().answer) == SPLIT
            assert len(bench.listener.connections) == 1
            once.report(hook.Result(0, True), hook.Result(53, False))
            await bench.idle()
            assert await asyncio.to_thread(once.answer) is None  # closed by the daemon
        assert bench.log("mail.report")[0]["results"] == ["0+", "53"]


@pytest.mark.parametrize("last_words", [b"", b"CFR1 nonsense"])
async def test_a_split_message_whose_hook_dies_is_logged(last_words: bytes, listening: Listening) -> None:
    async with listening(split) as bench:
        with Offer(bench.path) as once:
            await asyncio.to_thread(once.send().answer)
            if last_words:
                once.socket.send(last_words)
        await bench.idle()
        assert bench.log("mail.report")[0]["results"] is None


async def test_a_report_may_come_after_the_budget(listening: Listening) -> None:
    """The hook commits for at least 30 seconds after the answer, and may need some more to give up."""
    async with listening(split, budget=0.2) as bench:
        with Offer(bench.path) as once:
            assert await asyncio.to_thread(once.send(budget=0.3).answer) == SPLIT
            await asyncio.sleep(0.5)
            once.report(hook.Result(0, True), hook.Result(0, True))
            await bench.idle()
        assert bench.log("mail.report")[0]["results"] == ["0+", "0+"]


async def test_the_wait_for_a_report_has_an_end(listening: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "HOOK_GRACE", 0.1)
    monkeypatch.setattr(queue, "HOOK_ABORT", 0.1)
    async with listening(split) as bench:
        with Offer(bench.path) as once:
            assert await asyncio.to_thread(once.send(budget=0.3).answer) == SPLIT
            await bench.idle()
        assert bench.log("mail.report")[0]["results"] is None


async def test_a_connection_that_waits_for_its_report_does_not_keep_others_out(listening: Listening) -> None:
    """Its slot is free. The accept loop was suspended when that slot was taken."""
    async with listening(split, max_in_flight=1, max_waiting=0) as bench:
        with Offer(bench.path) as first:
            assert await asyncio.to_thread(first.send().answer) == SPLIT
            with Offer(bench.path) as second:
                assert await asyncio.to_thread(second.send().answer) == SPLIT
                assert {c.stage for c in bench.listener.connections} == {Stage.REPORT}
