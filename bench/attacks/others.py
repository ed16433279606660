"""Attacks over the daemon's other sockets: HTTP, control socket, bus, event feed."""

import os
import socket
import struct
import threading
import time

import zmq

from attacks.kit import PAUSE, Held, Place, connect, forever


def _http(place: Place, data: bytes = b"") -> socket.socket:
    made = socket.socket()
    made.settimeout(5.0)
    try:
        made.connect(("127.0.0.1", place.http))
        made.sendall(data)
    except OSError:
        made.close()
        raise
    return made


def http_spaces(place: Place) -> None:
    """Anybody at the HTTP port: a request of 8 KiB whose field is nothing but spaces, for backtracking patterns."""
    shapes = (
        b"GET / HTTP/1.1\r\nX:" + b" " * 8000,
        b"GET /" + b"/." * 4000,
        b"GET / HTTP/1.1\r\nX:" + b"\t \r\n " * 1600,
    )
    forever(lambda: [_http(place, shape + b"\x01\r\n\r\n").close() for shape in shapes], 0.01)


def http_slow(place: Place) -> None:
    """Anybody at the HTTP port: connections that send a byte a second, and read nothing."""
    held: list[socket.socket] = []

    def once() -> None:
        for each in held[:]:
            try:
                each.send(b"x")
            except OSError:
                held.remove(each)
                each.close()
        if len(held) < 2000:
            held.append(_http(place, b"GET /metrics HTTP/1.1\r\nX: "))

    forever(once, PAUSE)


def http_flood(place: Place) -> None:
    """Anybody at the HTTP port: requests as fast as possible, pipelined, with endless headers, never read."""
    held = Held(500)
    lines = b"".join(b"X-%d: %s\r\n" % (n, b"y" * 100) for n in range(600))

    def once() -> None:
        held.add(_http(place, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 50))
        _http(place, b"GET / HTTP/1.1\r\n" + lines).close()

    forever(once, 0.005)


def control_bomb(place: Place) -> None:
    """Member of the group: questions of nested arrays, of 64 KiB of noise, of numbers without an end."""
    path = f"{place.run}/control.sock"
    bombs = (
        b"\x82\xa4type\xa9AskStatus\xa1x" + b"\x91" * 60_000 + b"\xc0",
        b"\x01\x82\xa4type\xa9AskStatus\xa1x" + b"\x91" * 5_000 + b"\xc0",
        b"[" * 60_000,
        b"{" * 60_000,
        b'{"type":"AskStatus","x":' + b"[" * 50_000 + b"]" * 9_000,
        b'{"a":' * 12_000,
        b"9" * 65_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff" * 10,
        os.urandom(65_000),
        b"x" * 300_000,
    )

    def once() -> None:
        for bomb in bombs:
            with connect(path, socket.SOCK_STREAM) as asker:
                try:
                    asker.sendall(bomb)
                    asker.shutdown(socket.SHUT_WR)
                    asker.recv(65_536)
                except OSError:
                    pass

    forever(once, PAUSE)


def control_slow(place: Place) -> None:
    """Member of the group: as many connections to the control socket as possible, and questions whose answer waits."""
    held = Held(3000)

    def once() -> None:
        asker = connect(f"{place.run}/control.sock", socket.SOCK_STREAM)
        held.add(asker)
        asker.sendall(b"\x81\xa4type")

    forever(once)


def _greet(path: str, kind: bytes) -> socket.socket:
    """A ZMTP connection, after the handshake, by hand."""
    made = connect(path, socket.SOCK_STREAM)
    made.sendall(b"\xff" + b"\0" * 8 + b"\x7f\x03\0NULL" + b"\0" * 16 + b"\0" + b"\0" * 31)
    greeting = b""
    while len(greeting) < 64:
        part = made.recv(64 - len(greeting))
        if not part:
            raise OSError("closed")
        greeting += part
    body = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind + b"\x08Identity" + struct.pack(">I", 0)
    made.sendall(b"\x04" + bytes([len(body)]) + body)
    made.recv(200)
    return made


def _multipart(place: Place, name: str, kind: bytes, size: int) -> None:
    """One message whose parts never end, and connections that announce what never comes."""
    part = b"\x03" + struct.pack(">Q", size) + b"\0" * size
    path = f"{place.run}/{name}.sock"

    def once() -> None:
        with _greet(path, kind) as made:
            while True:
                made.sendall(part)

    threading.Thread(target=forever, args=(once, 0.1), daemon=True).start()
    held = Held(200)

    def announce() -> None:
        made = _greet(path, kind)
        held.add(made)
        made.sendall(b"\x03" + struct.pack(">Q", 1 << 62))

    forever(announce, 0.01)


def events_multipart(place: Place) -> None:
    """Member of the group: a subscription of parts without an end at the local event feed."""
    _multipart(place, "events", b"SUB", 1000)


def events_large(place: Place) -> None:
    """Member of the group: parts of a mebibyte at the local event feed."""
    _multipart(place, "events", b"SUB", 1 << 20)


def events_subscriptions(place: Place) -> None:
    """Member of the group: 3,000 subscriptions from each of many connections that then leave, and read nothing."""
    held = Held(100)

    def once() -> None:
        made = _greet(f"{place.run}/events.sock", b"SUB")
        held.add(made)
        for number in range(3000):
            made.sendall(b"\x00\x09\x01%08d" % number)

    forever(once, 0.02)


def workers_multipart(place: Place) -> None:
    """Another program of the daemon's user: a message of parts without an end at the workers' bus."""
    _multipart(place, "workers", b"DEALER", 1 << 20)


def workers_noise(place: Place) -> None:
    """Another program of the daemon's user: malformed reports, and nested ones, at the workers' bus."""
    made: zmq.Socket[bytes] = zmq.Context().socket(zmq.DEALER)
    made.setsockopt(zmq.SNDHWM, 100)
    made.connect(f"ipc://{place.run}/workers.sock")
    while True:
        for bomb in (b"\x91" * 50_000 + b"\xc0", b"\x01" + b"\x81\xa1a" * 10_000, os.urandom(1000), b""):
            made.send(bomb)
        time.sleep(0.01)


def _collector(place: Place) -> "zmq.Socket[bytes]":
    made: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
    made.setsockopt(zmq.LINGER, 0)
    made.curve_secretkey = place.feed_key.encode()
    made.curve_serverkey = made.curve_publickey = zmq.curve_public(place.feed_key.encode())
    made.connect(place.feed)
    return made


def collector_subscriptions(place: Place) -> None:
    """Collector with a key: 3,000 subscriptions, then it leaves; and heartbeats that are never answered."""
    while True:
        made = _collector(place)
        made.setsockopt(zmq.HEARTBEAT_IVL, 10)
        for number in range(3000):
            made.subscribe(b"%d" % number)
        time.sleep(0.5)
        made.close()


def collector_flood(place: Place) -> None:
    """Collector with a key: hundreds of subscribers that read nothing, and connections without a handshake."""
    kept = [_collector(place) for _ in range(200)]
    for each in kept:
        each.setsockopt(zmq.RCVHWM, 1)
        each.subscribe(b"")
    host, _, port = place.feed.removeprefix("tcp://").rpartition(":")
    held = Held(500)

    def once() -> None:
        made = socket.socket()
        held.add(made)
        made.settimeout(5.0)
        made.connect((host, int(port)))
        made.sendall(os.urandom(500))

    forever(once, 0.01)
