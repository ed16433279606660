"""More messages than slots: the queue, the deferral as busy, and that no local user keeps mail out."""

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab.offer import ENVELOPE, MESSAGE, Offer, offer, sealed

from contentfilter.deadline import Deadline
from contentfilter.doors.admission import AcceptedMessage
from contentfilter.model import Action
from contentfilter.policy.admission import LARGE
from contentfilter.wire import hook
from contentfilter.wire.envelope import parse

pytestmark = pytest.mark.asyncio

QUEUE = hook.Answer(Action.QUEUE, submissions=(hook.Submission(),))
Listening = Callable[..., Any]
LARGE_MESSAGE = b"Subject: large\n\n" + b"x" * LARGE


class Handling:
    """Handles nothing until ``go`` is set; records the order."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.order: list[bytes] = []

    async def __call__(self, accepted: AcceptedMessage) -> hook.Answer:
        self.order.append(accepted.origin.user or accepted.origin.remote_ip)
        await self.go.wait()
        return QUEUE


def stranger(ip: str) -> dict[bytes, bytes]:
    return {b"TCPREMOTEIP": ip.encode()}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def answers(offers: list[Offer]) -> list[hook.Answer | None]:
    found = await asyncio.gather(*(asyncio.to_thread(each.answer) for each in offers))
    for each in offers:
        each.close()
    return found


async def test_the_queue_decides_which_message_is_handled_next(listening: Listening) -> None:
    handling = Handling()
    async with listening(handling, max_in_flight=1) as bench:
        offers = [Offer(bench.path).send(environ=stranger("192.0.2.1"))]
        await until(lambda: len(handling.order) == 1)
        for message, environ in (
            (LARGE_MESSAGE, stranger("192.0.2.1")),
            (MESSAGE, stranger("192.0.2.2")),
            (MESSAGE, stranger("192.0.2.3")),
            (MESSAGE, stranger("198.51.100.1")),
            (MESSAGE, {**stranger("192.0.2.4"), b"SMTPAUTHUSER": b"joe"}),
        ):
            offers.append(Offer(bench.path).send(message, environ=environ))
            await until(lambda: bench.listener.waiting == len(offers) - 1)
        assert {c.stage.value for c in bench.listener.connections} == {"handling", "waiting"}
        handling.go.set()
        assert await answers(offers) == [QUEUE] * 6
    # Our own user, the two networks in turn, the oldest one for its age although it is large, the rest.
    assert handling.order[1:] == [b"joe", b"192.0.2.2", b"198.51.100.1", b"192.0.2.1", b"192.0.2.3"]


async def test_a_message_without_a_slot_in_time_is_deferred_as_busy_and_recorded(listening: Listening) -> None:
    handling = Handling()
    async with listening(handling, max_in_flight=1, admission_wait=0.1) as bench:
        first = Offer(bench.path).send()
        await until(lambda: len(handling.order) == 1)
        late = await asyncio.to_thread(offer, bench.path, environ=stranger("192.0.2.9"))
        assert late.action is Action.DEFER
        assert late.text.startswith("content filter busy, please try again [")
        assert late.text.endswith("] (#4.3.2)")
        ((pending, envelope, why, seconds),) = bench.handler.rejected
        assert pending.incident in late.text
        assert (why, pending.origin.remote_ip) == ("content filter busy", b"192.0.2.9")
        assert envelope == parse(ENVELOPE)
        assert 0.1 <= seconds < 5
        assert bench.listener.counters.busy == 1
        handling.go.set()
        assert await answers([first]) == [QUEUE]
        assert await asyncio.to_thread(offer, bench.path) == QUEUE


async def test_a_record_that_fails_defers_all_the_same(listening: Listening) -> None:
    async with listening(Handling(), max_in_flight=1, admission_wait=0.05) as bench:
        bench.handler.rejected_busy = None  # not even callable
        bench.listener.set_exhausted("memory")
        assert (await asyncio.to_thread(offer, bench.path)).action is Action.DEFER
        assert bench.log("intake.internal-error")


async def test_a_hook_that_goes_away_leaves_the_queue(listening: Listening) -> None:
    handling = Handling()
    async with listening(handling, max_in_flight=1) as bench:
        first = Offer(bench.path).send()
        await until(lambda: len(handling.order) == 1)
        Offer(bench.path).send().close()
        await until(lambda: bench.listener.counters.gone == 1)
        assert bench.listener.waiting == 0
        assert bench.log("intake.client-gone")[0]["stage"] == "waiting"
        handling.go.set()
        assert await answers([first]) == [QUEUE]


async def test_when_the_queue_is_full_the_greediest_source_is_shed(listening: Listening) -> None:
    handling = Handling()
    async with listening(handling, max_in_flight=1, max_waiting=3) as bench:
        offers = [Offer(bench.path).send(environ=stranger("192.0.2.1"))]
        await until(lambda: len(handling.order) == 1)
        for _ in range(6):
            offers.append(Offer(bench.path).send(environ=stranger("192.0.2.1")))
        await until(lambda: bench.listener.counters.crowded == 3)
        other = Offer(bench.path).send(environ=stranger("198.51.100.1"))
        await until(lambda: bench.listener.counters.crowded == 4)
        handling.go.set()
        assert await answers([other]) == [QUEUE]
        said = await answers(offers)
        assert (said.count(QUEUE), said.count(None)) == (3, 4), "closed without an answer: the hook offers again"


async def test_too_little_memory_makes_mail_wait_and_then_defers_it_with_the_reason(listening: Listening) -> None:
    async def accept(accepted: AcceptedMessage) -> hook.Answer:
        return QUEUE

    async with listening(accept, admission_wait=0.1) as bench:
        bench.listener.set_exhausted("memory")
        said = await asyncio.to_thread(offer, bench.path)
        assert "short of memory" in said.text
        assert said.text.endswith("(#4.3.1)")
    async with listening(accept) as bench:
        bench.listener.set_exhausted("disk")
        waiting = Offer(bench.path).send()
        await until(lambda: bench.listener.waiting == 1)
        bench.listener.set_exhausted("")
        assert await answers([waiting]) == [QUEUE]


async def test_large_messages_in_flight_are_bounded_by_their_bytes(listening: Listening) -> None:
    handling = Handling()
    async with listening(handling, max_in_flight=10, max_bytes=len(LARGE_MESSAGE)) as bench:
        offers = [Offer(bench.path).send(LARGE_MESSAGE) for _ in range(3)]
        await until(lambda: len(handling.order) == 1 and bench.listener.waiting == 2)
        offers.append(Offer(bench.path).send())
        await until(lambda: len(handling.order) == 2)  # the small one passes them by
        handling.go.set()
        assert await answers(offers) == [QUEUE] * 4


async def test_a_sparse_giant_is_deferred_before_a_byte_of_it_is_read(listening: Listening, tmp_path: Path) -> None:
    async def accept(accepted: AcceptedMessage) -> hook.Answer:
        return QUEUE

    size = 100 << 30
    with (tmp_path / "sparse").open("wb+") as file:
        file.truncate(size)
        async with listening(accept, max_message=1 << 30) as bench:
            with Offer(bench.path) as once:
                envelope = sealed(ENVELOPE)
                once.send_raw(
                    hook.encode_request(hook.Request(0, 60.0, size, len(ENVELOPE), {})), [file.fileno(), envelope]
                )
                os.close(envelope)
                said = await asyncio.to_thread(once.answer)
            assert said.action is Action.DEFER
            assert "larger than the content filter takes" in said.text
            assert bench.log("intake.bad-message")[0]["why"] == f"{size} bytes"


async def test_a_message_that_is_cut_while_it_waits_is_deferred(listening: Listening) -> None:
    """It is not opened before it has a slot, and then compared with what was announced."""
    handling = Handling()
    async with listening(handling, max_in_flight=1) as bench:
        first = Offer(bench.path).send()
        await until(lambda: len(handling.order) == 1)
        theirs, envelope = os.memfd_create("changing"), sealed(ENVELOPE)
        os.write(theirs, LARGE_MESSAGE)
        sizes = (len(LARGE_MESSAGE), len(ENVELOPE))
        waiting = Offer(bench.path).send_raw(hook.encode_request(hook.Request(0, 60.0, *sizes, {})), [theirs, envelope])
        await until(lambda: bench.listener.waiting == 1)
        os.ftruncate(theirs, 10)
        handling.go.set()
        assert await answers([first]) == [QUEUE]
        (said,) = await answers([waiting])
        assert said is not None
        assert "could not be taken over" in said.text
        os.close(theirs)
        os.close(envelope)


async def test_waiting_messages_are_answered_when_the_listener_stops(listening: Listening) -> None:
    handling = Handling()
    async with listening(handling, max_in_flight=1) as bench:
        offers = [Offer(bench.path).send() for _ in range(3)]
        await until(lambda: bench.listener.waiting == 2)
        bench.listener.stop()
        handling.go.set()
        assert await answers(offers) == [QUEUE] * 3


async def test_aborted_ones_that_wait_close_without_an_answer(listening: Listening) -> None:
    handling = Handling()
    async with listening(handling, max_in_flight=1) as bench:
        offers = [Offer(bench.path).send() for _ in range(3)]
        await until(lambda: bench.listener.waiting == 2)
        await bench.listener.abort("shutdown", Deadline.after(5))
        assert await answers(offers) == [None] * 3


async def test_a_local_flood_of_whole_requests_gets_no_more_than_its_share(listening: Listening) -> None:
    handling = Handling()
    async with listening(handling, max_in_flight=1, max_waiting=8) as bench:
        flood = [Offer(bench.path).send(environ=stranger("192.0.2.1"))]
        await until(lambda: len(handling.order) == 1)
        flood += [Offer(bench.path).send(environ=stranger("192.0.2.1")) for _ in range(40)]
        await until(lambda: bench.listener.counters.crowded == 32)
        mail = [Offer(bench.path).send(environ=stranger(f"198.51.{n}.1")) for n in range(3)]
        await until(lambda: bench.listener.counters.crowded == 35)
        handling.go.set()
        assert await answers(mail) == [QUEUE] * 3
        await answers(flood)
    assert {f"198.51.{n}.1".encode() for n in range(3)} <= set(handling.order[1:6]), "among the first five"


async def test_credentials_are_the_kernels_whatever_a_peer_sends(listening: Listening) -> None:
    """SCM_CREDENTIALS in the packet are ignored, and the environment of a local user proves nothing."""
    seen: list[AcceptedMessage] = []

    async def look(accepted: AcceptedMessage) -> hook.Answer:
        seen.append(accepted)
        return QUEUE

    async with listening(look) as bench:
        with Offer(bench.path) as once:
            fds = [sealed(MESSAGE), sealed(ENVELOPE)]
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds))
            who = b"".join(n.to_bytes(4, sys.byteorder) for n in (os.getpid(), os.getuid(), os.getgid()))
            packet = hook.encode_request(hook.Request(0, 60.0, len(MESSAGE), len(ENVELOPE), {b"UID": b"0"}))
            once.socket.sendmsg([packet], [rights, (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, who)])
            for fd in fds:
                os.close(fd)
            said = await asyncio.to_thread(once.answer)
        assert said == QUEUE
        assert (seen[0].origin.uid, seen[0].origin.pid) == (os.getuid(), os.getpid())
