"""Event feed: the process that publishes events to local subscribers and, if wanted, to collectors over TCP.

    python -m contentfilter.bus.publisher SOURCE LOCAL PATH [REMOTE ADDRESS KEYS]

SOURCE, LOCAL, REMOTE and KEYS are inherited descriptors: the supervisor's events (:func:`pack_event`), the listening
sockets with their addresses, and the keys (:func:`pack_keys`). Over TCP everything is encrypted, and only known keys
are accepted (CURVE).

A process of its own, because libzmq bounds neither the parts of a message nor the subscriptions of a peer, and has had
assertions that a peer could trigger. Memory (MEMORY_MAX) and subscriptions are bounded for the whole process; beyond
them it ends, and the supervisor starts another one. No subscriber is waited for: each has a queue of bounded length,
and events beyond it are lost to that subscriber alone. Dead connections end by TCP keepalive; ZMTP heartbeats let a
peer end the process (libzmq issue 4364). It also ends with SOURCE, which the supervisor holds.
"""

import asyncio
import os
import resource
import socket
import struct
import sys
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from contentfilter.bus.messages import VERSION, Event
from contentfilter.bus.sockets import LoopSocket
from contentfilter.config.keys import Keys
from contentfilter.hardening import give_up_privileges, give_way

HIGH_WATER = 2_000  # events queued for each subscriber; an event has some kilobytes at most
SUBSCRIPTION_MAX = 1024  # bytes of one part of what a subscriber sends
SUBSCRIPTIONS_MAX = 20_000  # different subscriptions at each of the two sockets
MEMORY_MAX = 768 << 20  # bytes of address space; about half of them are libraries, stacks and reservations of malloc
OOM_SCORE = 600  # before a worker
NICE = 5  # the mail first
HANDSHAKE = 5_000  # milliseconds for a connection to prove its key
DOMAIN = "events"  # of ZAP, ZeroMQ's authentication protocol
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 15, 5, 3  # seconds, seconds, probes without an answer
DEAD = 30_000  # milliseconds until a connection whose peer acknowledges nothing is closed
_SIZES = struct.Struct("=II")


def pack_event(event: Event) -> bytes:
    """For SOURCE: the sizes of both parts of the published message, then the parts (topic, event)."""
    topic, body = event.name.encode(), VERSION + msgspec.msgpack.encode(event)
    return _SIZES.pack(len(topic), len(body)) + topic + body


def pack_keys(keys: Keys) -> bytes:
    """For the descriptor KEYS: our secret key, then those of the collectors, a line for each."""
    return b"\n".join((keys.secret, *sorted(keys.clients)))


def unpack_keys(data: bytes) -> Keys:
    secret, *clients = data.split(b"\n")
    return Keys(secret, frozenset(clients))


class KnownKeys:
    """Credentials provider of pyzmq's authenticator."""

    def __init__(self, clients: frozenset[bytes]) -> None:
        self._clients = clients

    def callback(self, domain: str, key: bytes) -> bool:
        """True if the public key (Z85) may connect."""
        return key in self._clients


class Publisher:
    """An XPUB socket on a listening descriptor, which counts its subscriptions."""

    def __init__(self, made: "zmq.Socket[bytes]", listener: int, address: str) -> None:
        """Raises ZMQError."""
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, HIGH_WATER),
            (zmq.MAXMSGSIZE, SUBSCRIPTION_MAX),
            (zmq.HANDSHAKE_IVL, HANDSHAKE),
            (zmq.USE_FD, listener),
        ):
            made.setsockopt(option, value)
        made.bind(address)
        self._socket = LoopSocket(made)

    def send(self, topic: bytes, body: bytes) -> None:
        self._socket.send(topic, body)  # subscribers that are too slow lose it

    async def watch(self) -> None:
        """Return when there are too many subscriptions."""
        count = 0
        while count <= SUBSCRIPTIONS_MAX:
            for message in await self._socket.receive():
                count += {b"\x01": 1, b"\x00": -1}.get(message[:1], 0)
            await asyncio.sleep(0)


def secured(made: "zmq.Socket[bytes]", address: str, keys: Keys) -> "zmq.Socket[bytes]":
    """The socket, with encryption, authentication and keepalive."""
    for option, value in (
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_IDLE),
        (zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_INTERVAL),
        (zmq.TCP_KEEPALIVE_CNT, KEEPALIVE_COUNT),
        (zmq.TCP_MAXRT, DEAD),
        (zmq.IPV6, int("[" in address)),
        (zmq.CURVE_SERVER, 1),
        (zmq.CURVE_SECRETKEY, keys.secret),
        (zmq.ZAP_DOMAIN, DOMAIN.encode("ascii")),
    ):
        made.setsockopt(option, value)
    return made


async def publish(source: int, publishers: list[Publisher]) -> None:
    """Pass events on until the supervisor is gone."""
    reader, _ = await asyncio.open_unix_connection(sock=socket.socket(fileno=source))
    while True:
        try:
            topic, body = _SIZES.unpack(await reader.readexactly(_SIZES.size))
            parts = await reader.readexactly(topic + body)
        except (asyncio.IncompleteReadError, OSError):
            return
        for publisher in publishers:
            publisher.send(parts[:topic], parts[topic:])


async def run(source: str, local: str, path: str, *remote: str) -> None:
    """Return when the supervisor is gone, or when a bound is reached. Raises ZMQError."""
    context: zmq.Context[Any] = zmq.Context(io_threads=1)
    publishers = [Publisher(context.socket(zmq.XPUB), int(local), f"ipc://{path}")]
    if remote:
        listener, address, keys = remote
        with os.fdopen(int(keys), "rb") as file:
            file.seek(0)
            known = unpack_keys(file.read())
        authenticator = AsyncioAuthenticator(zmq.asyncio.Context(context))
        authenticator.configure_curve_callback(DOMAIN, KnownKeys(known.clients))
        authenticator.start()
        publishers.append(Publisher(secured(context.socket(zmq.XPUB), address, known), int(listener), address))
    works = [asyncio.ensure_future(each.watch()) for each in publishers]
    works.append(asyncio.ensure_future(publish(int(source), publishers)))
    done, _ = await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
    for work in done:
        work.result()  # raises what ended it


def main(arguments: list[str]) -> int:
    """The exit status."""
    give_way(OOM_SCORE, NICE)
    give_up_privileges()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MAX, MEMORY_MAX))
    try:
        asyncio.run(run(*arguments))
    except MemoryError:
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # a context with subscribers that read nothing would wait
