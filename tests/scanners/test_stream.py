"""The conversation itself, on a pair of sockets: what happens when the two directions end at different times."""

import asyncio
import socket
from collections.abc import Iterator

import pytest

from contentfilter.scanners import stream
from contentfilter.scanners.stream import Batch
from contentfilter.wire import clamd

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("nothing_left")]

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


async def test_an_answer_is_read_even_when_nothing_can_be_written_any_more(pair: Pair) -> None:
    ours, theirs = pair
    theirs.sendall(b"INSTREAM size limit exceeded. ERROR\0")
    theirs.close()
    answer, complete = await stream._exchange(ours, iter([(b"question",)]), clamd.scan_reader(), -1, True)
    assert isinstance(answer, clamd.Failed)
    assert not complete


async def test_a_peer_that_closed_without_a_byte_is_the_end_of_input(pair: Pair) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(EOFError):
        await stream._exchange(ours, iter([(b"question",)]), clamd.scan_reader(), -1, True)


@pytest.mark.parametrize("size", [1, 100_000, 5_000_000])
async def test_every_byte_arrives_in_order_through_a_slow_reader(pair: Pair, size: int) -> None:
    ours, theirs = pair
    theirs.setblocking(False)
    loop, heard = asyncio.get_running_loop(), bytearray()
    content = bytes(range(251)) * (size // 251 + 1)

    def batches() -> Iterator[Batch]:
        for start in range(0, len(content), 300_000):
            yield b"<", memoryview(content)[start : start + 300_000], b">", b""

    async def peer() -> None:
        while more := await loop.sock_recv(theirs, 7001):
            heard.extend(more)
        await loop.sock_sendall(theirs, b"stream: OK\0")

    task = asyncio.create_task(peer())
    answer = await stream._exchange(ours, batches(), clamd.scan_reader(), -1, True)
    await task
    assert answer == (clamd.Clean(), True)
    assert heard == b"".join(b"".join(batch) for batch in batches())
    assert not loop.remove_reader(ours)  # nor does anything wait for this socket any more
    assert not loop.remove_writer(ours)


async def test_writing_leaves_the_event_loop_its_turn() -> None:
    """A peer that takes everything at once must not hold the worker: a write pass is bounded."""
    endless = iter(lambda: (bytes(65_536),), None)

    class Bottomless:
        """Stands for the socket: takes whatever it is given."""

        def sendmsg(self, buffers: list[bytes]) -> int:
            return sum(map(len, buffers))

    assert stream._flush(Bottomless(), endless, []) is False  # type: ignore[arg-type]
