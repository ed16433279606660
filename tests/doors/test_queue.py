"""The hook's door: every request that may come, and its answer."""

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab.offer import ENVELOPE, MESSAGE, Offer, offer, sealed, unnamed

from contentfilter.doors import hook_work, queue
from contentfilter.doors.admission import AcceptedMessage, new_incident
from contentfilter.doors.queue import TRANSITIONS, Connection, Stage
from contentfilter.errors import LocalProtocolError
from contentfilter.log import RateLimiter
from contentfilter.model import Action, OriginKind
from contentfilter.wire import hook
from contentfilter.wire.envelope import parse

pytestmark = pytest.mark.asyncio

QUEUE = hook.Answer(Action.QUEUE, submissions=(hook.Submission(),))
Listening = Callable[..., Any]


async def accept(accepted: AcceptedMessage) -> hook.Answer:
    return QUEUE


def request(message: int = len(MESSAGE), envelope: int = len(ENVELOPE), budget: float = 60.0) -> bytes:
    return hook.encode_request(hook.Request(0, budget, message, envelope, {}))


def send_raw(path: str, packet: bytes, fds: list[int]) -> hook.Answer | None:
    """Offer as no hook does; the descriptors are closed here."""
    try:
        with Offer(path) as once:
            return once.send_raw(packet, fds).answer()
    finally:
        for fd in fds:
            os.close(fd)


async def test_the_handler_gets_what_the_hook_sent(listening: Listening) -> None:
    seen: list[tuple[AcceptedMessage, bytes]] = []

    async def look(accepted: AcceptedMessage) -> hook.Answer:
        seen.append((accepted, bytes(accepted.message.data)))
        return QUEUE

    async with listening(look) as bench:
        environ = {b"TCPREMOTEIP": b"192.0.2.7", b"RELAYCLIENT": b""}
        answer = await asyncio.to_thread(offer, bench.path, MESSAGE, ENVELOPE, environ=environ, attempt=3)
    assert answer == QUEUE
    accepted, content = seen[0]
    assert (content, accepted.envelope) == (MESSAGE, parse(ENVELOPE))
    assert (accepted.origin.kind, accepted.origin.remote_ip) == (OriginKind.RELAY, b"192.0.2.7")
    assert (accepted.origin.uid, accepted.origin.pid) == (os.getuid(), os.getpid())
    assert accepted.attempt == 3
    assert accepted.message.fd == -1, "the message is closed when the answer is out"


@pytest.mark.parametrize(("ours", "theirs", "expected"), [(30.0, 60.0, 29.0), (30.0, 5.0, 4.5), (2.0, 60.0, 1.8)])
async def test_the_deadline_is_the_smaller_budget_less_a_margin(
    ours: float, theirs: float, expected: float, listening: Listening
) -> None:
    left: list[float] = []

    async def look(accepted: AcceptedMessage) -> hook.Answer:
        left.append(accepted.deadline.left())
        return QUEUE

    async with listening(look, budget=ours) as bench:
        assert await asyncio.to_thread(offer, bench.path, budget=theirs)
    assert expected - 0.3 < left[0] <= expected


GARBAGE = {
    "noise": os.urandom(500),
    "one byte": b"C",
    "another version": request().replace(b"CFQ1\x01", b"CFQ1\x02"),
    "an answer": hook.encode_answer(QUEUE).packet,
    "a cut request": request()[:-1],
    "more than a request": request() + b"x",
    "too large": b"CFQ1" + b"\0" * 60000,
}


@pytest.mark.parametrize("packet", GARBAGE.values(), ids=GARBAGE.keys())
async def test_garbage_closes_the_connection_and_every_descriptor(packet: bytes, listening: Listening) -> None:
    async with listening(accept) as bench:
        fds = [sealed(b"a"), sealed(b"b")]
        assert await asyncio.to_thread(send_raw, bench.path, packet, fds) is None
        assert bench.listener.counters.garbage == 1
        assert bench.log("intake.garbage")[0]["uid"] == os.getuid()
        assert await asyncio.to_thread(offer, bench.path) == QUEUE


async def test_more_descriptors_than_two_are_refused(listening: Listening) -> None:
    async with listening(accept) as bench:
        fds = [sealed(MESSAGE), sealed(ENVELOPE), *(sealed(b"x") for _ in range(50))]
        assert await asyncio.to_thread(send_raw, bench.path, request(), fds) is None
        assert bench.listener.counters.garbage == 1


@pytest.mark.parametrize("count", [0, 1])
async def test_missing_descriptors_defer_immediately(count: int, listening: Listening) -> None:
    async with listening(accept) as bench:
        answer = await asyncio.to_thread(send_raw, bench.path, request(), [sealed(MESSAGE) for _ in range(count)])
        assert answer.action is Action.DEFER
        assert "descriptor" in bench.log("intake.bad-message")[0]["why"]


def directory(path: Path) -> int:
    return os.open(path, os.O_RDONLY)


def socket_end(_: Path) -> int:
    one, other = socket.socketpair()
    other.close()
    return one.detach()


def pipe_end(_: Path) -> int:
    ours, other = os.pipe()
    os.close(other)
    return ours


def opened(flags: int) -> Callable[[Path], int]:
    def make(directory: Path) -> int:
        (directory / "m").write_bytes(MESSAGE)
        return os.open(directory / "m", flags)

    return make


WRONG = {
    "directory": directory,
    "socket": socket_end,
    "pipe": pipe_end,
    "write-only": opened(os.O_WRONLY),
    "append-only": opened(os.O_WRONLY | os.O_APPEND),
    "grown": lambda _: unnamed(MESSAGE + b"more"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("place", [0, 1])
async def test_a_wrong_descriptor_defers_with_the_incident(
    kind: str, place: int, listening: Listening, tmp_path: Path
) -> None:
    async with listening(accept) as bench:
        fds = [sealed(MESSAGE), sealed(ENVELOPE)]
        os.close(fds[place])
        fds[place] = WRONG[kind](tmp_path)
        answer = await asyncio.to_thread(send_raw, bench.path, request(), fds)
        line = bench.log("intake.bad-message")[0]
    assert answer is not None
    assert answer.action is Action.DEFER
    assert line["id"] in answer.text
    assert "#4.3.0" in answer.text
    assert bench.listener.counters.bad_messages == 1


async def test_a_defect_in_the_handler_defers_and_leaves_a_traceback(listening: Listening) -> None:
    async def fail(accepted: AcceptedMessage) -> hook.Answer:
        raise ZeroDivisionError("a defect")

    async with listening(fail) as bench:
        answer = await asyncio.to_thread(offer, bench.path)
        line = bench.log("intake.internal-error")[0]
    assert answer.action is Action.DEFER
    assert line["id"] in answer.text
    assert "ZeroDivisionError: a defect" in line["exception"]


async def test_an_answer_that_cannot_be_encoded_defers(listening: Listening) -> None:
    async def nonsense(accepted: AcceptedMessage) -> hook.Answer:
        return hook.Answer(Action.REJECT, text="two\nlines")

    async with listening(nonsense) as bench:
        assert (await asyncio.to_thread(offer, bench.path)).action is Action.DEFER


async def test_a_handler_that_overruns_its_deadline_is_cut_off_with_a_deferral(listening: Listening) -> None:
    async def dream(accepted: AcceptedMessage) -> hook.Answer:
        await asyncio.Event().wait()
        return QUEUE

    async with listening(dream, budget=0.3) as bench:
        answer = await asyncio.to_thread(offer, bench.path)
    assert answer.action is Action.DEFER
    assert "out of time" in answer.text


async def test_a_long_answer_travels_in_a_sealed_descriptor(listening: Listening) -> None:
    long = hook.Answer(Action.QUEUE, submissions=(hook.Submission(prepend=b"X: y\n" * 40_000),))

    async def answer_long(accepted: AcceptedMessage) -> hook.Answer:
        return long

    async with listening(answer_long) as bench:
        assert await asyncio.to_thread(offer, bench.path) == long


async def test_a_large_message_is_taken_over_off_the_loop(listening: Listening) -> None:
    large = b"x" * (hook_work.INLINE + 1)
    sizes = []

    async def look(accepted: AcceptedMessage) -> hook.Answer:
        sizes.append((accepted.message.size, accepted.message.data[-1:]))
        return QUEUE

    async with listening(look) as bench:
        assert await asyncio.to_thread(offer, bench.path, large) == QUEUE
    assert sizes == [(len(large), b"x")]


async def test_a_hook_that_goes_away_cancels_the_handling(listening: Listening) -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def wait(accepted: AcceptedMessage) -> hook.Answer:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return QUEUE

    async with listening(wait) as bench:
        once = Offer(bench.path)
        once.send()
        async with asyncio.timeout(10):
            await began.wait()
            once.close()
            await cancelled.wait()
        await bench.idle()
        assert bench.listener.counters.gone == 1
        assert bench.log("intake.client-gone")[0]["stage"] == "handling"


async def test_a_hook_that_speaks_out_of_turn_is_cut_off(listening: Listening) -> None:
    began = asyncio.Event()

    async def wait(accepted: AcceptedMessage) -> hook.Answer:
        began.set()
        await asyncio.Event().wait()
        return QUEUE

    async with listening(wait) as bench:
        with Offer(bench.path) as once:
            once.send()
            async with asyncio.timeout(10):
                await began.wait()
                once.socket.send(b"hurry")
                assert await asyncio.to_thread(once.answer) is None
        assert bench.log("intake.client-gone")[0]["why"] == "out of turn"


async def test_a_request_in_its_own_time_is_served(listening: Listening) -> None:
    async with listening(accept) as bench:
        with Offer(bench.path) as once:
            while not bench.listener.connections:
                await asyncio.sleep(0)
            once.send()
            assert await asyncio.to_thread(once.answer) == QUEUE


async def test_a_connection_without_a_request_is_closed_in_time(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "REQUEST_WAIT", 0.1)
    async with listening(accept) as bench:
        with Offer(bench.path) as once:
            assert await asyncio.to_thread(once.answer) is None
        assert bench.listener.counters.garbage == 1


async def test_a_probe_that_connects_and_leaves_is_no_garbage(listening: Listening) -> None:
    async with listening(accept) as bench:
        Offer(bench.path).close()
        await asyncio.to_thread(offer, bench.path)
        await bench.idle()
        assert bench.listener.counters.accepted == 2
        assert bench.listener.counters.garbage == 0


async def test_two_connections_are_handled_simultaneously(listening: Listening) -> None:
    both = asyncio.Barrier(2)

    async def meet(accepted: AcceptedMessage) -> hook.Answer:
        await both.wait()
        return QUEUE

    async with listening(meet) as bench:
        answers = await asyncio.gather(*(asyncio.to_thread(offer, bench.path) for _ in range(2)))
    assert answers == [QUEUE, QUEUE]


async def test_five_hundred_odd_connections_leave_no_descriptor(listening: Listening, tmp_path: Path) -> None:
    packets = [*GARBAGE.values(), request()]

    def many(path: str) -> None:
        for number in range(500):
            makers = (WRONG["pipe"], lambda _: sealed(b"x"), lambda _: sealed(b"y"))
            fds = [make(tmp_path) for make in makers[: number % 4]]
            with Offer(path) as once:
                once.send_raw(packets[number % len(packets)], fds)
                if number % 3:
                    once.answer()
            for fd in fds:
                os.close(fd)

    async with listening(accept) as bench:
        await asyncio.to_thread(many, bench.path)
        await bench.idle()
        assert bench.listener.counters.accepted == 500
        assert len(bench.log("intake.garbage")) < 50, "garbage is logged at a limited rate"
        assert await asyncio.to_thread(offer, bench.path) == QUEUE


async def test_incidents_sort_by_time_and_are_distinct() -> None:
    made = [new_incident() for _ in range(1000)]
    assert len(set(made)) == 1000
    assert [i[:9] for i in made] == sorted(i[:9] for i in made)  # 45 bits, five to a letter
    assert all(len(i) == 16 and i.isalnum() for i in made)


async def test_rarely_lets_the_first_through_and_counts_the_rest() -> None:
    rarely = RateLimiter(3600)
    assert rarely.allow() == 0
    assert [rarely.allow() for _ in range(3)] == [None] * 3


async def test_an_answer_that_finds_no_descriptor_closes_the_connection_and_the_next_one_is_given(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook offers its message again."""
    long = hook.Answer(Action.QUEUE, submissions=(hook.Submission(prepend=b"X-Long: " + b"x" * 200_000 + b"\n"),))

    async def handle(accepted: AcceptedMessage) -> hook.Answer:
        return long

    true = os.memfd_create

    def none(name: str, flags: int) -> int:
        if name == "answer":
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
        return true(name, flags)

    async with listening(handle) as bench:
        with monkeypatch.context() as patch:
            patch.setattr(os, "memfd_create", none)
            with Offer(bench.path) as refused:
                await asyncio.to_thread(refused.send)
                await bench.idle()
                assert bench.log("intake.answer-failed")[0]["why"] == os.strerror(errno.ENFILE)
        assert await asyncio.to_thread(offer, bench.path) == long


async def test_a_client_that_goes_in_the_moment_of_its_answer_leaves_nothing(listening: Listening) -> None:
    """It is not queued: only the hook does that, and it is gone."""

    async def handle(accepted: AcceptedMessage) -> hook.Answer:
        client.close()
        return hook.Answer(Action.QUEUE, submissions=(hook.Submission(), hook.Submission()))

    async with listening(handle) as bench:
        client = Offer(bench.path)
        await asyncio.to_thread(client.send)
        await bench.idle()
        assert bench.listener.counters.answered == 0
        assert bench.log("intake.answer-failed")[0]["why"] == os.strerror(errno.EPIPE)


async def test_every_stage_can_be_reached_and_only_by_the_table() -> None:
    assert set(TRANSITIONS) == set(Stage)
    reached = [Stage.REQUEST]
    for stage in reached:
        reached += [after for after in TRANSITIONS[stage] if after not in reached]
    assert set(reached) == set(Stage)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for stage, allowed in TRANSITIONS.items():
            for after in Stage:
                connection = Connection(None, ours)
                connection.stage = stage
                if after in allowed:
                    connection._enter(after)
                    assert connection.stage is after
                else:
                    with pytest.raises(LocalProtocolError, match=f"from {stage.value} to {after.value}"):
                        connection._enter(after)
