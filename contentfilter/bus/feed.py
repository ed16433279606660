"""Reader of the event feed: events of the daemon from now on, across its restarts.

ZeroMQ reconnects by itself; its monitor reports when the daemon goes and comes. A reader that is too slow
loses events; mail never waits for one. Events that cannot be decoded are counted and skipped.
"""

import enum
import math
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from contentfilter.bus.messages import Event, decode
from contentfilter.bus.sockets import HIGH_WATER, LIMIT, addresses
from contentfilter.deadline import Deadline
from contentfilter.errors import RemoteProtocolError

RECONNECT = 100  # milliseconds between two attempts to reach the daemon
HEARTBEAT = 10_000  # milliseconds between two heartbeats over a network

REFUSALS = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
)
WATCHED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | sum(REFUSALS)

_EVENTS = msgspec.msgpack.Decoder(Event)


class Link(enum.Enum):
    """A change of the connection."""

    UP = "up"
    DOWN = "down"
    REFUSED = "refused"  # our key, or theirs, is wrong; there is no second attempt


@dataclass(frozen=True, slots=True)
class Remote:
    """A daemon on another machine, and the keys for it (Z85)."""

    address: str  # tcp://host:port
    server: bytes  # the daemon's public key
    secret: bytes  # ours


class Feed:
    """``with Feed(run, ("mail.",)) as feed: feed.next(deadline)``. ``topics``: beginnings of events' names.

    ``remote``: instead of the run directory. Raises ZMQError for an invalid address.
    """

    def __init__(self, run: str, topics: tuple[str, ...] = ("",), remote: Remote | None = None) -> None:
        self.malformed = 0
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.SUB)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.RCVHWM, HIGH_WATER),
            (zmq.MAXMSGSIZE, LIMIT),
            (zmq.RECONNECT_IVL, RECONNECT),
        ):
            self._socket.setsockopt(option, value)
        if remote is not None:
            for option, key in (
                (zmq.CURVE_SERVERKEY, remote.server),
                (zmq.CURVE_SECRETKEY, remote.secret),
                (zmq.CURVE_PUBLICKEY, zmq.curve_public(remote.secret)),
            ):
                self._socket.setsockopt(option, key)
            self._socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT)  # notices a dead connection
        for topic in topics:
            self._socket.subscribe(topic.encode())
        self._monitor = self._socket.get_monitor_socket(WATCHED)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._watched: int | None = None
        self._socket.connect(remote.address if remote is not None else addresses(run)["events"])

    def watch(self, fd: int, *, reading: bool) -> None:
        """Let :meth:`next` return early, with None, when there is input at ``fd``, or when its other end is closed."""
        self._poller.register(fd, zmq.POLLIN if reading else zmq.POLLERR)
        self._watched = fd

    def next(self, deadline: Deadline) -> Event | Link | None:
        """The next event or change of the connection; None at the deadline, or if the watched descriptor is ready."""
        while True:
            ready: dict[Any, int] = dict(self._poller.poll(math.ceil(deadline.left() * 1000)))
            if self._watched in ready:
                return None
            if self._monitor in ready:  # first: events from before a lost connection are late, not lost
                change = parse_monitor_message(self._monitor.recv_multipart())
                if change["event"] in REFUSALS:
                    return Link.REFUSED
                return Link.DOWN if change["event"] == zmq.EVENT_DISCONNECTED else Link.UP
            if self._socket in ready:
                if (event := self._event()) is not None:
                    return event
            elif deadline.expired():
                return None

    def _event(self) -> Event | None:
        parts = self._socket.recv_multipart()
        try:
            return decode(parts[-1], _EVENTS) if len(parts) == 2 else None
        except RemoteProtocolError:
            self.malformed += 1
            return None

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._context.destroy(linger=0)

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
