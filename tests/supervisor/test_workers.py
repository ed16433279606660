"""Commands to workers: the newest of each kind reaches each of them, and heartbeats confirm it."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from contentfilter.bus.messages import Configure, Heartbeat, Overrides
from contentfilter.deadline import Deadline
from contentfilter.supervisor.process import WorkerProcess
from contentfilter.supervisor.workers import Workers


class Child(WorkerProcess):
    """A process that is not there."""

    def __init__(self, pid: int) -> None:
        self.pid, self.slot = pid, 0
        self.ready = self.retiring = False
        self.beat = None


def beat(pid: int, generation: int = 1, orders: int = 1) -> Heartbeat:
    return Heartbeat(pid, generation, 0, 0.0, (), 0, {}, orders=orders)


@pytest.mark.asyncio
async def test_a_worker_that_starts_gets_the_newest_commands_with_its_first_heartbeat_and_not_again() -> None:
    sent: list[tuple[Any, list[int]]] = []
    bus: Any = SimpleNamespace(command=lambda command, pids: sent.append((command, list(pids))))
    workers, first, second = Workers(bus), Child(1), Child(2)
    workers.add(first)
    assert workers.heard(first, beat(1))
    assert sent == []
    workers.add(second)
    for command in (Configure(2, b""), Configure(3, b""), Overrides(2)):
        workers.send(command)
    assert [pids for _, pids in sent] == [[1]] * 3
    sent.clear()
    assert workers.heard(second, beat(2))
    assert not workers.heard(second, beat(2))
    assert sent == [(Configure(3, b""), [2]), (Overrides(2), [2])]


@pytest.mark.asyncio
async def test_those_that_do_not_follow_in_time_are_named() -> None:
    bus: Any = SimpleNamespace(command=lambda command, pids: None)
    workers = Workers(bus)
    quick, late, starting, leaving = children = [Child(pid) for pid in (1, 2, 3, 4)]
    leaving.retiring = True
    for child in children:
        workers.add(child)
    workers.heard(late, beat(2))
    waiting = asyncio.create_task(workers.followed(lambda b: b.generation >= 2, Deadline.after(0.2)))
    await asyncio.sleep(0)
    workers.heard(quick, beat(1, generation=2))
    assert await waiting == [late, starting]
    waiting = asyncio.create_task(workers.followed(lambda b: b.generation >= 2, Deadline.after(20)))
    await asyncio.sleep(0)
    workers.heard(late, beat(2, generation=2))
    await asyncio.sleep(0)
    workers.remove(starting)
    assert await waiting == []
