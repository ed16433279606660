"""Workers die, hang and are replaced; the supervisor itself dies. No message is lost by any of it."""

import asyncio
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from lab.daemon import WAIT, Daemon
from lab.offer import Offer, offer, offer_until_answered

from contentfilter.bus import messages, sockets
from contentfilter.log import make_logger
from contentfilter.model import Action
from contentfilter.supervisor import process
from contentfilter.supervisor.pool import WorkerPool
from contentfilter.supervisor.process import WorkerProcess
from contentfilter.supervisor.workers import Workers

Make = Callable[..., Daemon]


def who(running: Daemon) -> int:
    """The pid of a worker that answers."""
    return int(offer_until_answered(running.socket, b"WHO\n").text.split()[0])


def wait_gone(pid: int) -> None:
    """Until process ``pid``, which is no child of ours, has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([fd], [], [], WAIT)[0], f"process {pid} is still there"
    os.close(fd)


class Child(WorkerProcess):
    """A process that is not there."""

    def __init__(self, slot: int, killed: list[int], now: float, *, ready: bool = True) -> None:
        self.slot, self.pid = slot, 4000 + slot
        self.started = self.seen = now
        self.ready, self.stuck, self.retiring, self.beat = ready, False, False, None
        self._killed = killed

    @property
    def status(self) -> int:
        return 1

    def kill(self) -> None:
        self._killed.append(self.pid)

    def retire(self) -> None:
        self.retiring = True


def pool_of(spawn: Any) -> WorkerPool:
    bus: Any = SimpleNamespace(command=lambda command, pids: None)
    return WorkerPool(spawn, make_logger("json", "error"), Workers(bus))


def test_a_killed_worker_lets_go_of_its_message_and_is_replaced(daemon: Make, gate: Any) -> None:
    with daemon({"service": {"workers": 1}}) as running, Offer(running.socket) as held:
        held.send(gate.message)
        victim = gate.wait()
        os.kill(victim, signal.SIGKILL)
        assert held.answer() is None, "the hook must see that nobody works on it any more"
        died = running.wait_for("worker.died")[0]
        assert (died["child"], died["status"]) == (victim, -signal.SIGKILL)
        assert who(running) != victim
        assert len(running.workers()) == 1


def test_the_other_workers_go_on_meanwhile(daemon: Make, gate: Any) -> None:
    with daemon() as running, Offer(running.socket) as held:
        held.send(gate.message)
        other = gate.wait()
        for pid in running.workers():
            if pid != other:
                os.kill(pid, signal.SIGKILL)
        running.wait_for("worker.ready", 3)
        gate.open()
        assert held.answer().action is Action.QUEUE


def test_a_stopped_worker_is_killed_and_replaced(daemon: Make) -> None:
    with daemon({"service": {"workers": 1, "stuck_after": 1.0}}) as running:
        victim = running.workers()[0]
        os.kill(victim, signal.SIGSTOP)
        assert running.wait_for("worker.stuck")[0]["child"] == victim
        assert who(running) != victim


def test_a_worker_that_blocks_its_event_loop_is_killed_and_replaced(daemon: Make) -> None:
    with daemon({"service": {"workers": 1, "stuck_after": 1.0}}) as running, Offer(running.socket) as stuck:
        victim = running.workers()[0]
        stuck.send(b"STUCK\n")
        assert stuck.answer() is None
        assert running.wait_for("worker.stuck")[0]["child"] == victim
        assert who(running) != victim


def test_a_busy_worker_is_not_taken_for_stuck(daemon: Make, gate: Any) -> None:
    with daemon({"service": {"workers": 1, "stuck_after": 1.0, "heartbeat": 0.1}}, watchdog=1.0) as running:
        with Offer(running.socket) as held:
            held.send(gate.message)
            gate.wait()
            for _ in range(4):  # the watchdog's pace: two seconds in all
                running.wait_notified("WATCHDOG")
            gate.open()
            assert held.answer().action is Action.QUEUE
        assert running.log("worker.stuck") == []


@pytest.mark.asyncio
async def test_a_supervisor_that_slept_does_not_kill_its_healthy_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    killed: list[int] = []

    pool = pool_of(lambda slot, ended: Child(slot, killed, now))
    pool.resize(1)
    for moment in (1001.0, 1031.0):  # thirty seconds between two looks: it was us who slept
        now = moment
        pool.check(10.0)
    assert killed == []
    for moment in (1034.0, 1038.0, 1040.0):
        now = moment
        pool.check(10.0)
    assert killed == []
    now = 1042.0
    pool.check(10.0)
    assert killed == [4000]


@pytest.mark.asyncio
async def test_a_successor_that_cannot_start_or_dies_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "FIRST_DELAY", 0.01)
    spawned: list[Child] = []
    ends: list[Any] = []
    refuse = 0

    def spawn(slot: int, ended: Any) -> Child:
        nonlocal refuse
        if refuse:
            refuse -= 1
            raise OSError(11, "Resource temporarily unavailable")
        child = Child(slot, [], time.monotonic(), ready=False)
        child.pid += 100 * len(spawned)
        spawned.append(child)
        ends.append(ended)
        return child

    async def count(wanted: int) -> None:
        async with asyncio.timeout(WAIT):
            while len(spawned) < wanted:
                await asyncio.sleep(0.005)

    def beat(child: Child) -> messages.Heartbeat:
        return messages.Heartbeat(child.pid, 1, 0, 0.0, (), 0, {})

    pool = pool_of(spawn)
    pool.resize(1)
    pool.heard(beat(spawned[0]))
    refuse = 2
    pool.replace_all()
    assert pool.unreplaced() == [0]
    await count(2)
    ends[1](spawned[1])  # it dies before it is ready
    assert pool.unreplaced() == [0]
    await count(3)
    assert not spawned[0].retiring
    assert pool.full()
    pool.heard(beat(spawned[2]))
    assert pool.unreplaced() == []
    assert spawned[0].retiring
    assert pool.deaths == {"exit": 1, "signal": 0, "stuck": 0, "start": 2}
    pool.replace_all()
    await count(4)
    ends[2](spawned[2])  # the old one dies first
    assert pool.unreplaced() == []
    assert not pool.full()
    pool.heard(beat(spawned[3]))
    assert pool.full()


def test_workers_that_die_at_every_start_are_retried_with_growing_delays_and_recover(daemon: Make) -> None:
    with daemon({"service": {"workers": 1}}) as running:
        running.configure({"service": {"workers": 1}, "tables": {"extension": "?"}})
        running.reload()
        died = running.wait_for("worker.died", 5)
        moments = [line["time"] for line in died]
        assert moments == sorted(moments)
        assert all(line["status"] == 3 for line in died)
        started = len(running.log("worker.start"))
        assert started <= 7, "it must not spin"
        running.configure({"service": {"workers": 1}})
        running.reload()
        assert who(running)


def test_orphaned_workers_finish_their_messages_and_end(daemon: Make, gate: Any) -> None:
    with daemon() as running, Offer(running.socket) as held:
        held.send(gate.message)
        gate.wait()
        workers = running.workers()
        running.kill()
        running.wait_for("worker.orphaned", 2)
        running.wait_for("worker.drain", 2)
        successor = daemon(directory=running.directory)
        try:
            successor.start()  # takes the path over although a worker still finishes its message
            assert offer(successor.socket).action is Action.QUEUE
            gate.open()
            assert held.answer().action is Action.QUEUE
            for pid in workers:
                wait_gone(pid)
            assert successor.stop() == 0
        finally:
            successor.clean()


def test_a_rolling_restart_replaces_every_worker_and_nobody_notices(daemon: Make) -> None:
    with daemon() as running:
        before = set(running.workers())
        stop, failures, answered = threading.Event(), [], 0

        def keep_offering() -> None:
            nonlocal answered
            while not stop.is_set():
                try:
                    answer = offer(running.socket)
                except OSError as error:
                    failures.append(error)
                    continue
                if answer is None or answer.action is not Action.QUEUE:
                    failures.append(answer)
                answered += 1

        client = threading.Thread(target=keep_offering)
        client.start()
        try:
            reply = sockets.ask(str(running.directory), messages.AskReload(restart=True), WAIT)
            assert reply == messages.Done(True, 2)
            for pid in before:
                wait_gone(pid)
        finally:
            stop.set()
            client.join()
        assert failures == []
        assert answered > 0
        assert not before & set(running.workers())
        assert len(running.workers()) == 2
        assert running.log("worker.died") == []


def test_a_changed_number_of_workers_takes_effect_at_reload(daemon: Make) -> None:
    with daemon({"service": {"workers": 3}}) as running:
        running.configure({"service": {"workers": 1}})
        running.reload()
        running.wait_for("worker.stop", 2)
        running.configure({"service": {"workers": 2}})
        running.reload()
        running.wait_for("worker.ready", 4)
        assert len(running.workers()) == 2
        assert running.log("worker.died") == []
