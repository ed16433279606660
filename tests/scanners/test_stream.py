"""The conversation itself, on a pair of sockets: what happens when the two directions end at different times."""

import asyncio
import socket
from collections.abc import Iterator

import pytest

from contentfilter.endpoint import Address
from contentfilter.scanners import stream
from contentfilter.scanners.stream import Batch, Progress
from contentfilter.wire import clamd

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("nothing_left")]

ADDRESS = Address(path="/nowhere")
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


async def exchange(sock: socket.socket, batches: Iterator[Batch]) -> tuple[clamd.ScanAnswer, bool]:
    connection, progress = stream.PlainConnection(sock), Progress(ADDRESS)
    return await stream._exchange(connection, batches, clamd.scan_reader(), True, progress)


async def test_an_answer_is_read_even_when_nothing_can_be_written_any_more(pair: Pair) -> None:
    ours, theirs = pair
    theirs.sendall(b"INSTREAM size limit exceeded. ERROR\0")
    theirs.close()
    answer, complete = await exchange(ours, iter([(b"question",)]))
    assert isinstance(answer, clamd.Failed)
    assert not complete


async def test_a_peer_that_closed_without_a_byte_is_the_end_of_input(pair: Pair) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(EOFError):
        await exchange(ours, iter([(b"question",)]))


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
    answer = await exchange(ours, batches())
    await task
    assert answer == (clamd.Clean(), True)
    assert heard == b"".join(b"".join(batch) for batch in batches())
    assert not loop.remove_reader(ours)  # nor does anything wait for this socket any more
    assert not loop.remove_writer(ours)


async def test_writing_leaves_the_event_loop_its_turn() -> None:
    """A peer that takes everything must not hold the worker: each batch is one turn."""

    class Bottomless:
        """In place of the connection: takes whatever it is given."""

        taken = 0

        async def send(self, batch: Batch) -> None:
            self.taken += 1

    connection, endless = Bottomless(), iter(lambda: (bytes(65_536),), None)
    sending = asyncio.create_task(stream._send(connection, endless, False, Progress(ADDRESS)))  # type: ignore[arg-type]
    for _ in range(10):
        await asyncio.sleep(0)
    assert 5 < connection.taken < 15
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
