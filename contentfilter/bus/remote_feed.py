"""Remote event feed: a process for collectors on other machines. TCP, encrypted, only for known keys (CURVE).

    python -m contentfilter.bus.remote_feed RUN LISTEN LISTENER KEYS LIFELINE

It subscribes to the daemon's own feed and publishes what it gets. A process of its own, started by the supervisor,
because collectors are not trusted with the daemon's life: libzmq has had assertions that a peer could trigger. No
collector is waited for: each has a queue of bounded length, and events beyond it are lost to that collector alone.
Dead connections end by TCP keepalive; ZMTP heartbeats let a peer end the process (libzmq issue 4364).

LISTENER, KEYS and LIFELINE are inherited descriptors: the listening socket, the keys (:func:`pack_keys`), and a pipe
that is closed when the supervisor is gone.
"""

import asyncio
import os
import sys
from typing import Any

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from contentfilter.bus.sockets import SUBSCRIPTION_MAX, addresses
from contentfilter.config.keys import Keys
from contentfilter.hardening import give_up_privileges

HIGH_WATER = 2_000  # events kept for each collector; an event has some kilobytes at most
HANDSHAKE = 5_000  # milliseconds for a connection to prove its key
DOMAIN = "events"  # of ZAP, ZeroMQ's authentication protocol
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 15, 5, 3  # seconds, seconds, probes without an answer
DEAD = 30_000  # milliseconds until a connection whose peer acknowledges nothing is closed


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
        """True if the public key (Z85) may come in."""
        return key in self._clients


def open_publisher(context: "zmq.Context[Any]", listen: str, listener: int, keys: Keys) -> "zmq.Socket[bytes]":
    """A PUB socket on the listening descriptor. ``listen`` is its address. Raises ZMQError."""
    made: zmq.Socket[bytes] = context.socket(zmq.PUB)
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.SNDHWM, HIGH_WATER),
        (zmq.MAXMSGSIZE, SUBSCRIPTION_MAX),
        (zmq.HANDSHAKE_IVL, HANDSHAKE),
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_IDLE),
        (zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_INTERVAL),
        (zmq.TCP_KEEPALIVE_CNT, KEEPALIVE_COUNT),
        (zmq.TCP_MAXRT, DEAD),
        (zmq.IPV6, int("[" in listen)),
        (zmq.USE_FD, listener),
        (zmq.CURVE_SERVER, 1),
        (zmq.CURVE_SECRETKEY, keys.secret),
        (zmq.ZAP_DOMAIN, DOMAIN.encode("ascii")),
    ):
        made.setsockopt(option, value)
    made.bind(listen)
    return made


async def publish(run: str, listen: str, listener: int, keys: Keys) -> None:
    """Pass events on. Does not return."""
    context = zmq.asyncio.Context(io_threads=1)
    authenticator = AsyncioAuthenticator(context)
    authenticator.configure_curve_callback(DOMAIN, KnownKeys(keys.clients))
    authenticator.start()
    source = context.socket(zmq.SUB)
    source.setsockopt(zmq.RCVHWM, HIGH_WATER)
    source.subscribe(b"")
    source.connect(addresses(run)["events"])
    publisher = open_publisher(zmq.Context(context), listen, listener, keys)  # not asyncio's: a send must not wait
    while True:
        parts = await source.recv_multipart()
        try:
            publisher.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            pass  # collectors that are too slow lose events


async def until_orphaned(lifeline: int) -> None:
    """Until the supervisor is gone."""
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(lifeline, gone.set)
    await gone.wait()


async def run(arguments: list[str]) -> None:
    directory, listen, *fds = arguments
    listener, keys, lifeline = map(int, fds)
    with os.fdopen(keys, "rb") as file:
        file.seek(0)
        known = unpack_keys(file.read())
    works = [
        asyncio.ensure_future(until_orphaned(lifeline)),
        asyncio.ensure_future(publish(directory, listen, listener, known)),
    ]
    done, _ = await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
    for work in done:
        work.result()  # raises what ended it
    os._exit(0)  # a context with collectors that read nothing would wait


if __name__ == "__main__":
    give_up_privileges()
    asyncio.run(run(sys.argv[1:]))
