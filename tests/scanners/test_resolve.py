"""Host names: a name server that is slow, dead or changes its mind never holds mail twice."""

import asyncio
import socket
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from lab import peers
from lab.peers import Peer, read_clamd

from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, Cause
from contentfilter.scanners.resolve import AGAIN, FRESH, Addresses, Resolver
from contentfilter.scanners.stream import StreamContext, UnreachableError, query
from contentfilter.wire import clamd

pytestmark = pytest.mark.asyncio

ONE: Addresses = [(socket.AF_INET, ("192.0.2.1", 783))]
TWO: Addresses = [(socket.AF_INET, ("192.0.2.2", 783))]


class Names:
    """A name server by script: each look-up gets the next answer, and waits while ``dead``."""

    def __init__(self, *answers: Addresses | Exception) -> None:
        self.answers = list(answers)
        self.calls = 0
        self.most = 0
        self._inside = 0
        self.alive = threading.Event()
        self.alive.set()

    async def __call__(self, host: str, port: int) -> Addresses:
        return await asyncio.to_thread(self._answer)

    def _answer(self) -> Addresses:
        self.calls += 1
        self._inside += 1
        self.most = max(self.most, self._inside)
        self.alive.wait(30)
        self._inside -= 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def ask(address: Address, around: StreamContext, connect: float = 5.0, seconds: float = 5.0) -> clamd.ScanAnswer:
    context = replace(around, connect=connect)
    return await query(address, clamd.command("VERSION"), clamd.scan_reader(), context, Deadline.after(seconds))


@pytest.mark.parametrize("host", ["192.0.2.9", "2001:db8::1"])
async def test_an_address_costs_no_look_up(host: str) -> None:
    names = Names(OSError())
    assert [where[0] for _, where in await Resolver(names).find(host, 1)] == [host]
    assert names.calls == 0


async def test_a_dead_name_server_is_told_in_time_and_holds_one_thread_only() -> None:
    names = Names(ONE)
    names.alive.clear()
    around = StreamContext(5.0, Resolver(names))
    try:
        for _ in range(5):
            with pytest.raises(UnreachableError, match=r"no address for scan\.example in time") as caught:
                await ask(Address(host="scan.example", port=1), around, connect=0.02)
            assert caught.value.cause is Cause.TIMEOUT
        assert (names.calls, names.most) == (1, 1)
        assert await asyncio.to_thread(lambda: "free") == "free"
    finally:
        names.alive.set()


async def test_what_is_old_is_used_while_it_is_looked_up_again() -> None:
    now = [0.0]
    names = Names(ONE, TWO)
    resolver = Resolver(names, lambda: now[0])
    assert await resolver.find("scan.example", 783) == ONE
    now[0] += FRESH - 1
    assert (await resolver.find("scan.example", 783), names.calls) == (ONE, 1)
    now[0] += 1
    names.alive.clear()
    assert await resolver.find("scan.example", 783) == ONE  # at once: nobody waits for the new one
    names.alive.set()
    await until(lambda: not resolver._pending)
    assert await resolver.find("scan.example", 783) == TWO


async def test_what_was_known_survives_a_name_server_that_fails() -> None:
    now = [0.0]
    names = Names(ONE, socket.gaierror(socket.EAI_AGAIN, "Temporary failure"))
    resolver = Resolver(names, lambda: now[0])
    await resolver.find("scan.example", 783)
    for _ in range(5):
        now[0] += FRESH
        assert await resolver.find("scan.example", 783) == ONE
        await until(lambda: not resolver._pending)
        now[0] += AGAIN - 1 - FRESH
        assert await resolver.find("scan.example", 783) == ONE
    assert names.calls < 7


async def test_a_name_that_nobody_knows_is_down_with_the_reason() -> None:
    around = StreamContext(5.0, Resolver(Names(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))))
    with pytest.raises(UnreachableError, match="Name or service not known") as caught:
        await ask(Address(host="scan.example", port=1), around)
    assert caught.value.cause is Cause.DOWN


async def test_of_several_addresses_the_next_is_tried_in_time() -> None:
    """The first one is a closed port, the second swallows packets: its queue of connections is full."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        closed = unused.getsockname()
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    taken = [socket.socket() for _ in range(3)]
    for sock in taken:
        sock.setblocking(False)
        sock.connect_ex(full.getsockname())
    with Peer(None, peers.says(b"stream: OK\0"), read_clamd) as peer:
        well = Address.parse(peer.backend)
        found: Addresses = [(socket.AF_INET, where) for where in (closed, full.getsockname(), (well.host, well.port))]
        around = StreamContext(5.0, Resolver(Names(found)))
        assert await ask(Address(host="scan.example", port=1), around, connect=1.0) == clamd.Clean()
        assert peer.connections == 1
        around = StreamContext(5.0, Resolver(Names(found[:2])))
        with pytest.raises(BackendError) as caught:
            await ask(Address(host="scan.example", port=1), around, connect=0.1)
        assert caught.value.cause is Cause.TIMEOUT
    for sock in (*taken, full):
        sock.close()
