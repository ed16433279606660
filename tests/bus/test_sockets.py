"""Sockets of the daemon: malformed messages are counted and dropped, questions are answered, events published."""

import asyncio
import os
import select
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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
from contentfilter.bus.publisher import HIGH_WATER
from contentfilter.deadline import Deadline
from contentfilter.errors import RemoteProtocolError
from contentfilter.log import make_logger
from contentfilter.model import Action
from contentfilter.settings import ServiceSettings, Settings
from contentfilter.supervisor.control import CONNECTIONS_MAX
from contentfilter.supervisor.feed import EventFeed

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


NESTED = messages.VERSION + b"\x82\xa4type\xa9AskStatus\xa1x" + b"\x91" * 5000 + b"\xc0"


def test_a_message_that_is_nested_too_deeply_is_malformed() -> None:
    for _, decoder in FRAMES:
        with pytest.raises(RemoteProtocolError):
            messages.decode(NESTED, decoder)
    inside_a_field = msgspec.msgpack.encode({"type": "EventBatch", "pid": 1, "events": []})[:-1]
    deep = inside_a_field + b"\x91\x82\xa4name\xa1x\xa6fields\x81\xa1x" + b"\x91" * 100_000 + b"\xc0"
    with pytest.raises(RemoteProtocolError):
        messages.decode(messages.VERSION + deep, messages.REPORTS)


def undisturbed(running: Daemon, where: str, count: int) -> None:
    """``count`` malformed messages were counted; mail and workers go on."""
    assert running.wait_for("bus.malformed")[0]["where"] == where
    limit = Deadline.after(WAIT)
    while status(running).malformed < count:
        assert not limit.expired()
    assert offer(running.socket).action is Action.QUEUE
    assert {w.pid for w in status(running).workers} == set(running.workers())


def test_noise_on_the_bus_is_counted_and_disturbs_nobody(daemon: Make, context: zmq.Context) -> None:
    with daemon() as running:
        each = context.socket(zmq.DEALER)
        each.connect(sockets.addresses(str(running.directory))["workers"])
        each.send(b"garbage")
        each.send(NESTED)
        each.send_multipart([b"one", b"two", b"three", b"four"])
        each.send(messages.encode(messages.Heartbeat(999_999, 1, 0, 0.0, (), 0, {})))
        undisturbed(running, "workers", 3)


def control(running: Daemon) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(WAIT)
    client.connect(str(running.directory / "control.sock"))
    return client


def test_noise_on_the_control_socket_is_refused_and_disturbs_nobody(daemon: Make) -> None:
    garbage = (b"garbage", NESTED, messages.encode(messages.Done(True, 1)), b"x" * 10_000_000)
    with daemon() as running:
        for question in garbage:
            with control(running) as client:
                try:
                    client.sendall(question)
                    client.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # it does not read everything
                reply = client.recv(65_536)
                assert isinstance(messages.decode(reply, messages.REPLIES), messages.Refused)
        with control(running) as client:
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100) == b""
        undisturbed(running, "control", len(garbage))
        assert status(running).malformed == len(garbage)


def test_a_control_client_costs_bounded_memory_and_time(daemon: Make) -> None:
    """The message without end of a ZeroMQ socket, and clients that say nothing: as many as their uid may have."""
    with daemon() as running, ExitStack() as stack:
        before = resident(running.pid)
        with control(running) as client, pytest.raises(OSError):  # noqa: PT012 - at whichever of them
            for _ in range(200):
                client.sendall(b"x" * (1 << 20))
        silent = [stack.enter_context(control(running)) for _ in range(100)]
        closed = [client for client in silent if select.select([client], [], [], 0.5)[0]]
        assert len(closed) >= 100 - CONNECTIONS_MAX
        assert resident(running.pid) < before + 20_000_000
        for client in silent:
            client.close()
        assert status(running).state == "ready"


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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
    assert modes == {"workers": 0o600, "control": 0o660, "events": 0o660}


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
        feed = EventFeed(make_logger("json", "error"), lambda: Settings(service=ServiceSettings(run=run)))
        feed.start()
        try:
            reader = context.socket(zmq.SUB)
            reader.setsockopt(zmq.RCVHWM, 1)
            reader.subscribe(b"")
            reader.connect(sockets.addresses(run)["events"])
            limit = Deadline.after(WAIT)
            while not reader.poll(10):  # until it has subscribed
                assert not limit.expired()
                feed.publish(messages.Event("mail.done", {"n": -1}))
                await asyncio.sleep(0)
            sent = 20 * HIGH_WATER
            for number in range(sent):
                feed.publish(messages.Event("mail.done", {"n": number, "text": "x" * 500}))
                await asyncio.sleep(0)
            found = []
            while reader.poll(100):
                topic, frame = reader.recv_multipart()
                assert topic == b"mail.done"
                found.append(messages.decode(frame, EVENTS).fields["n"])
                await asyncio.sleep(0)
            numbers = [number for number in found if number >= 0]
            assert 0 < len(numbers) < sent
            assert numbers == sorted(numbers)
        finally:
            feed.close()


@pytest.mark.asyncio
async def test_commands_reach_a_worker_in_order_once_it_has_reported() -> None:
    with tempfile.TemporaryDirectory(prefix="cf-", dir="/tmp") as run:
        supervisor = sockets.SupervisorBus(run)
        workers = [sockets.WorkerBus(run, pid) for pid in (7, 8)]
        try:
            for worker, pid in zip(workers, (7, 8), strict=True):
                worker.send(messages.Heartbeat(pid, 1, 0, 0.0, (), 0, {}))
            assert {(await supervisor.report()).pid for _ in workers} == {7, 8}
            supervisor.command(messages.Configure(0, b""), (9,))  # unknown: nobody gets it
            for number in range(1, 501):
                supervisor.command(messages.Configure(number, b"x"), (7, 8))
            supervisor.command(messages.Configure(501, b"for one"), (8,))
            for worker, last in zip(workers, (500, 501), strict=True):
                async with asyncio.timeout(WAIT):
                    got = [await worker.command() for _ in range(last)]
                assert [command.generation for command in got] == list(range(1, last + 1))
        finally:
            for worker in workers:
                worker.close()
            supervisor.close()
