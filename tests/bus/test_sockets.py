"""The pool's inside: malformed frames are counted and dropped, questions are answered, events are fed out."""

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from lab.daemon import WAIT, Daemon
from lab.offer import Offer, offer

from contentfilter.bus import messages, sockets
from contentfilter.deadline import Deadline
from contentfilter.errors import RemoteProtocolError
from contentfilter.model import Action

Make = Callable[..., Daemon]

EVENTS = msgspec.msgpack.Decoder(messages.Event)
BEAT = messages.Heartbeat(1, 2, 0, 0.5, (messages.InFlight("ab", "handling", 1.5),), 1, {"accepted": 3})
FRAMES = [
    (BEAT, messages.REPORTS),
    (messages.EventBatch(1, [messages.Event("mail.done", {"id": "ab", "ms": 1.5})]), messages.REPORTS),
    (messages.Configure(7, b"\0blob"), messages.COMMANDS),
    (messages.Ping(), messages.QUESTIONS),
    (messages.AskReload(True), messages.QUESTIONS),
    (messages.Done(False, 3, ("a: b",)), messages.REPLIES),
]


@pytest.mark.parametrize(("frame", "decoder"), FRAMES)
def test_a_frame_survives_the_way(
    frame: messages.BusMessage, decoder: msgspec.msgpack.Decoder[messages.BusMessage]
) -> None:
    assert messages.decode(messages.encode(frame), decoder) == frame


@pytest.mark.parametrize(
    "data",
    [
        b"",
        messages.VERSION,
        b"\x02" + messages.encode(BEAT)[1:],
        messages.encode(BEAT)[:-1],
        messages.encode(BEAT) + b"x",
        messages.encode(messages.Ping()),
        messages.VERSION + msgspec.msgpack.encode({"type": "Heartbeat"}),
        messages.VERSION + msgspec.msgpack.encode(["Heartbeat", "pid", 1]),
    ],
)
def test_a_malformed_frame_is_an_error_of_its_own_kind(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        messages.decode(data, messages.REPORTS)


@given(st.binary(max_size=200))
def test_noise_never_does_anything_else(noise: bytes) -> None:
    for _, decoder in FRAMES:
        try:
            messages.decode(messages.VERSION + noise, decoder)
        except RemoteProtocolError:
            pass


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made = zmq.Context()
    yield made
    made.destroy(linger=1000)


def status(running: Daemon) -> messages.Status:
    reply = sockets.ask(str(running.directory), messages.AskStatus(), WAIT)
    assert isinstance(reply, messages.Status)
    return reply


@pytest.mark.parametrize("where", ["reports", "control"])
def test_noise_on_the_bus_is_counted_and_disturbs_nobody(where: str, daemon: Make, context: zmq.Context) -> None:
    with daemon() as running:
        kind = zmq.PUSH if where == "reports" else zmq.DEALER
        each = context.socket(kind)
        each.connect(sockets.addresses(str(running.directory))[where])
        each.send(b"garbage")
        each.send_multipart([b"one", b"two", b"three", b"four"])
        each.send(messages.encode(messages.Heartbeat(999_999, 1, 0, 0.0, (), 0, {})) if where == "reports" else b"")
        line = running.wait_for("bus.malformed")[0]
        assert line["where"] == where
        seen = status(running).malformed
        while seen < 2:
            seen = status(running).malformed
        assert offer(running.socket).action is Action.QUEUE
        assert {w.pid for w in status(running).workers} == set(running.workers())


def test_the_status_tells_what_each_worker_does(daemon: Make, gate: Any) -> None:
    with daemon({"service": {"workers": 1, "heartbeat": 0.05}}) as running, Offer(running.socket) as held:
        held.send(gate.message)
        pid = gate.wait()
        now = status(running)
        while not now.workers[0].in_flight:
            now = status(running)
        worker = now.workers[0]
        assert (now.state, now.generation, now.restarts, worker.pid) == ("ready", 1, 0, pid)
        assert worker.in_flight[0].stage == "handling"
        gate.open()
        assert held.answer()


def test_nobody_home_is_told_in_time(tmp_path: Path) -> None:
    assert sockets.ask(str(tmp_path), messages.Ping(), 0.1) is None


def test_every_message_is_an_event_for_subscribers(daemon: Make, context: zmq.Context) -> None:
    with daemon({"service": {"workers": 1}}) as running:
        feed = context.socket(zmq.SUB)
        feed.subscribe(b"mail.")
        feed.setsockopt(zmq.RCVTIMEO, int(WAIT * 1000))
        feed.connect(sockets.addresses(str(running.directory))["events"])
        feed.poll(50)  # a subscription takes a moment; the first offers may pass unseen
        while not feed.poll(100):
            assert offer(running.socket)
        topic, frame = feed.recv_multipart()
        event = msgspec.msgpack.decode(frame[1:], type=messages.Event)
        assert (topic, event.name) == (b"mail.done", "mail.done")
        assert len(event.fields["id"]) == 16


def test_the_bus_is_closed_to_other_users(daemon: Make) -> None:
    with daemon() as running:
        modes = {
            name: stat.S_IMODE(os.stat(address.removeprefix("ipc://")).st_mode)
            for name, address in sockets.addresses(str(running.directory)).items()
        }
    assert modes == {"reports": 0o600, "commands": 0o600, "control": 0o660, "events": 0o660}


@pytest.mark.asyncio
async def test_what_a_worker_said_last_is_still_heard_when_it_has_ended() -> None:
    with tempfile.TemporaryDirectory(prefix="cf-", dir="/tmp") as run:
        supervisor, worker = sockets.SupervisorBus(run), sockets.WorkerBus(run, 7)
        try:
            worker.add(messages.Event("mail.done", {"id": "x"}, b"account"))
            worker.close()
            assert await supervisor.waiting(WAIT)
            report = await supervisor.report()
            assert isinstance(report, messages.EventBatch)
            assert report.events == [messages.Event("mail.done", {"id": "x"}, b"account")]
            assert not await supervisor.waiting(0.0)
        finally:
            supervisor.close()


@pytest.mark.asyncio
async def test_events_come_in_bounded_batches_in_order_and_none_is_left_behind_at_the_end() -> None:
    count = 2 * sockets.BATCH + 3
    batches: list[list[int]] = []
    with tempfile.TemporaryDirectory(prefix="cf-", dir="/tmp") as run:
        supervisor, worker = sockets.SupervisorBus(run), sockets.WorkerBus(run, 7)
        try:
            for number in range(count):
                if worker.add(messages.Event("mail.done", {"n": number})):
                    worker.flush()
            worker.close()
            while sum(map(len, batches)) < count:
                assert await supervisor.waiting(WAIT)
                report = await supervisor.report()
                assert isinstance(report, messages.EventBatch)
                batches.append([event.fields["n"] for event in report.events])
        finally:
            supervisor.close()
    assert [len(batch) for batch in batches] == [sockets.BATCH, sockets.BATCH, 3]
    assert [number for batch in batches for number in batch] == list(range(count))


@pytest.mark.asyncio
async def test_a_reader_of_the_feed_that_has_stalled_loses_events_and_keeps_nobody(context: zmq.Context) -> None:
    with tempfile.TemporaryDirectory(prefix="cf-", dir="/tmp") as run:
        supervisor = sockets.SupervisorBus(run)
        try:
            reader = context.socket(zmq.SUB)
            reader.setsockopt(zmq.RCVHWM, 1)
            reader.subscribe(b"")
            reader.connect(sockets.addresses(run)["events"])
            limit = Deadline.after(WAIT)
            while not reader.poll(10):  # until it has subscribed
                assert not limit.expired()
                supervisor.publish(messages.Event("mail.done", {"n": -1}))
            sent = 2 * sockets.HIGH_WATER
            for number in range(sent):
                supervisor.publish(messages.Event("mail.done", {"n": number, "text": "x" * 500}))
            found = []
            while reader.poll(100):
                topic, frame = reader.recv_multipart()
                assert topic == b"mail.done"
                found.append(messages.decode(frame, EVENTS).fields["n"])
            numbers = [number for number in found if number >= 0]
            assert 0 < len(numbers) < sent
            assert numbers == sorted(numbers)
        finally:
            supervisor.close()
