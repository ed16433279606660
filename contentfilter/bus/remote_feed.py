"""The event feed for collectors on other machines: TCP, encrypted, and only for those whose key we know (CURVE).

It has a ZeroMQ context and thread of its own beside the bus. Nothing here waits for a subscriber: each has a queue of
bounded length, and events beyond it are lost to that subscriber alone. What subscribers send is short or cuts them off.
A key that is taken from the list is refused from the next reload on, because the feed is opened anew for everybody.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from zmq.utils import z85

from contentfilter.bus.messages import VERSION, Event
from contentfilter.config.keys import Keys, load_keys
from contentfilter.deadline import Deadline
from contentfilter.errors import ConfigError
from contentfilter.log import Logger
from contentfilter.settings import Settings

AGAIN = 30.0  # seconds until an address that is in use is tried again
HIGH_WATER = 2_000  # events kept for each subscriber; an event has some kilobytes at most
FRAME = 1024  # bytes of the longest frame that a subscriber may send; the handshake needs some 300
HANDSHAKE = 5_000  # milliseconds for a connection to prove who it is
HEARTBEAT, DEAD = 10_000, 30_000  # milliseconds: who does not answer is cut off, and its queue freed


async def authenticate(socket: Any, clients: frozenset[bytes]) -> None:
    """Answer ZeroMQ's question for each connection whether its key may come in (ZAP, its RFC 27). Until cancelled."""
    while True:
        parts = await socket.recv_multipart()
        known = parts[0] == b"1.0" and parts[5:6] == [b"CURVE"] and z85.encode(parts[6]) in clients
        status = (b"200", b"OK") if known else (b"400", b"unknown key")
        await socket.send_multipart([b"1.0", parts[1], *status, b"", b""])


class RemoteFeed:
    """:meth:`run` once, in the background; the rest is called from the same event loop and never waits."""

    def __init__(self, log: Logger, settings: Callable[[], Settings]) -> None:
        self._log = log
        self._settings = settings
        self._changed = asyncio.Event()
        self._in_force: tuple[str, Keys] | None = None
        self._told = ""
        self._context: zmq.asyncio.Context | None = None
        self._authenticating: asyncio.Task[None] | None = None
        self._zap: Any = None
        self._socket: Any = None

    def changed(self) -> None:
        """The settings, or the files that they name, may have."""
        self._changed.set()

    def publish(self, event: Event) -> None:
        if self._socket is not None:
            try:
                frame = VERSION + msgspec.msgpack.encode(event)
                self._socket.send_multipart([event.name.encode(), frame], zmq.NOBLOCK)
            except zmq.ZMQError:
                pass  # those who are too slow lose events

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                self._changed.clear()
                failed = await self._adopt()
                try:
                    async with Deadline.after(AGAIN if failed else 86_400.0).timeout():
                        await self._changed.wait()
                except TimeoutError:
                    pass
        finally:
            await self._close()

    async def _adopt(self) -> bool:
        """Open, close or leave the feed as the settings want it. True: it should be open and is not."""
        config = self._settings().events
        try:
            keys = await asyncio.to_thread(load_keys, config)
            wanted = None if keys is None else (config.listen, keys)
            if wanted == self._in_force:
                return False
            await self._close()
            if wanted is not None:
                try:
                    self._open(*wanted)
                except zmq.ZMQError:
                    await self._close()
                    raise
                self._log.info("events.ready", address=config.listen, keys=len(wanted[1].clients))
        except (ConfigError, zmq.ZMQError) as error:
            if str(error) != self._told:
                self._log.error("events.failed", listen=config.listen, why=str(error))
            self._told = str(error)
            return True
        self._told = ""
        return False

    def _open(self, listen: str, keys: Keys) -> None:
        """Raises ZMQError."""
        self._context = zmq.asyncio.Context(io_threads=1)
        self._zap = self._context.socket(zmq.REP)
        self._zap.bind("inproc://zeromq.zap.01")
        self._authenticating = asyncio.create_task(authenticate(self._zap, keys.clients))
        each = zmq.Context(self._context).socket(zmq.PUB)  # not asyncio's: a send must not wait
        try:
            for option, value in (
                (zmq.LINGER, 0),
                (zmq.SNDHWM, HIGH_WATER),
                (zmq.MAXMSGSIZE, FRAME),
                (zmq.HANDSHAKE_IVL, HANDSHAKE),
                (zmq.HEARTBEAT_IVL, HEARTBEAT),
                (zmq.HEARTBEAT_TIMEOUT, DEAD),
                (zmq.IPV6, int("[" in listen)),
                (zmq.CURVE_SERVER, 1),
                (zmq.CURVE_SECRETKEY, keys.secret),
                (zmq.ZAP_DOMAIN, b"events"),
            ):
                each.setsockopt(option, value)
            each.bind(listen)
        except BaseException:
            each.close(linger=0)
            raise
        self._socket, self._in_force = each, (listen, keys)

    async def _close(self) -> None:
        if self._authenticating is not None:
            self._authenticating.cancel()
            await asyncio.gather(self._authenticating, return_exceptions=True)
        for each in (self._zap, self._socket):
            if each is not None:
                each.close(linger=0)
        if self._context is not None:
            self._context.term()
        self._authenticating = self._context = self._zap = self._socket = self._in_force = None
