"""Handing over connections to the receiver: in batches, in order, and never as the last who closes."""

import asyncio
import os
import socket
from typing import Any

import pytest

from contentfilter.doors.handover import BATCH, CLOSED, GIVEN, MAX_PENDING, HandOver

WAIT = 10.0


class Target:
    """The socket to the receiver, with a note of which descriptors were open at each packet."""

    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner
        self.given: list[list[int]] = []
        self.open_at_closed: list[list[bool]] = []
        self.full = False

    def setblocking(self, flag: bool) -> None:
        self._inner.setblocking(flag)

    def sendmsg(self, parts: Any, ancillary: Any, *more: Any) -> int:
        if self.full:
            raise BlockingIOError
        self.given.append(list(ancillary[0][2]))
        return self._inner.sendmsg(parts, ancillary)

    def send(self, packet: bytes) -> int:
        if self.full:
            raise BlockingIOError
        self.open_at_closed.append([os.path.exists(f"/proc/self/fd/{fd}") for fd in self.given[-1]])
        return self._inner.send(packet)


def connections(count: int) -> tuple[list[socket.socket], list[socket.socket]]:
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
    return [one for one, _ in pairs], [other for _, other in pairs]


def received(receiver: socket.socket) -> list[tuple[bytes, list[int]]]:
    found = []
    while True:
        try:
            packet, fds, _, _ = socket.recv_fds(receiver, 100, BATCH + 1)
        except BlockingIOError:
            return found
        found.append((packet, fds))


@pytest.mark.asyncio
async def test_a_batch_is_given_then_closed_here_and_then_announced() -> None:
    ours, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    receiver.setblocking(False)
    target: Any = Target(ours)
    hand_over = HandOver(asyncio.get_running_loop(), target)
    hooks, accepted = connections(BATCH + 3)
    for each in accepted:
        hand_over.take(each)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    packets = received(receiver)
    assert [packet[:1] for packet, _ in packets] == [GIVEN, CLOSED, GIVEN, CLOSED]
    assert [len(fds) for _, fds in packets] == [BATCH, 0, 3, 0]
    assert packets[0][0][1:] == packets[1][0][1:] != packets[2][0][1:]
    assert [set(states) for states in target.open_at_closed] == [{False}, {False}]
    hooks[BATCH].send(b"first of the second batch")
    taken = socket.socket(fileno=packets[2][1][0])
    assert taken.recv(100) == b"first of the second batch"
    for fd in (*packets[0][1], *packets[2][1][1:]):
        os.close(fd)
    for each in (*hooks, taken, ours, receiver):
        each.close()


@pytest.mark.asyncio
async def test_while_the_receiver_takes_nothing_connections_stay_open_and_their_number_is_bounded() -> None:
    ours, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    receiver.setblocking(False)
    target: Any = Target(ours)
    target.full = True
    hand_over = HandOver(asyncio.get_running_loop(), target)
    hooks, accepted = connections(2)
    hand_over.take(accepted[0])
    await asyncio.sleep(0.05)
    hand_over.take(accepted[1])
    hooks[0].setblocking(False)
    with pytest.raises(BlockingIOError):
        hooks[0].recv(1)
    assert not hand_over.full()
    hand_over._pending.extend([-1] * (MAX_PENDING - 2))
    assert hand_over.full()
    while len(hand_over._pending) > 2:
        hand_over._pending.pop()
    target.full = False
    async with asyncio.timeout(WAIT):
        while not (packets := received(receiver)):
            await asyncio.sleep(0.01)
    assert [len(fds) for _, fds in packets] == [2, 0]
    for fd in packets[0][1]:
        os.close(fd)
    for each in (*hooks, ours, receiver):
        each.close()
