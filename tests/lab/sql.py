"""A MariaDB server that may say anything: the handshake as a real one does it, then what the test wants."""

import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from lab.peers import Peer

CAPABILITIES = 0x0008F7FF | 1 << 21  # with PLUGIN_AUTH, without TLS
SALT = b"12345678abcdefghijkl"
OK = b"\0\0\0\2\0\0\0"
EOF = b"\xfe\0\0\2\0"
MORE = b"\xfe\0\0\x0a\0"  # an end of rows that announces another result set


def packet(payload: bytes, number: int) -> bytes:
    return len(payload).to_bytes(3, "little") + bytes((number % 256,)) + payload


def packets(payloads: list[bytes], number: int = 1) -> bytes:
    return b"".join(packet(payload, number + index) for index, payload in enumerate(payloads))


def text(value: bytes | None) -> bytes:
    """A length-encoded string."""
    if value is None:
        return b"\xfb"
    if len(value) < 251:
        return bytes((len(value),)) + value
    return b"\xfe" + struct.pack("<Q", len(value)) + value


def column(name: bytes, kind: int = 253) -> bytes:
    """The description of a column."""
    words = b"".join(text(word) for word in (b"def", b"mail", b"t", b"t", name, name))
    return words + b"\x0c" + struct.pack("<HIBHB", 45, 1000, kind, 0, 0) + b"\0\0"


def greeting(plugin: bytes, capabilities: int = CAPABILITIES) -> bytes:
    return (
        b"\x0a10.11.0-MariaDB\0" + struct.pack("<I", 1) + SALT[:8] + b"\0" + struct.pack("<H", capabilities & 0xFFFF)
        + b"\x2d\2\0" + struct.pack("<H", capabilities >> 16) + bytes((21,)) + bytes(10) + SALT[8:] + b"\0" + plugin
        + b"\0"
    )  # fmt: skip


class Client:
    """The client's side of one connection, as the server reads it. ``heard``: everything that it sent."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.heard = b""

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def read(self) -> bytes:
        """The next packet without its header; empty at the end."""
        head = self._exactly(4)
        return self._exactly(int.from_bytes(head[:3], "little")) if len(head) == 4 else b""

    def commands(self) -> Iterator[bytes]:
        """The commands, each with its first byte: 3 is a query, 14 a ping."""
        while command := self.read():
            yield command

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size and (piece := self._sock.recv(size - len(data))):
            data += piece
        self.heard += data
        return data


Answer = Callable[[Client, bytes], None]
"""Answers a query of a session that is open."""


def log_in(client: Client, plugin: bytes = b"mysql_native_password") -> None:
    client.send(packet(greeting(plugin), 0))
    client.read()
    client.send(packet(OK, 2))


def server(directory: Path | None, answer: Answer) -> Peer:
    """A server that lets everyone in, answers pings and SETs, and leaves each SELECT to ``answer``."""

    def talk(peer: Peer, sock: socket.socket) -> None:
        client = Client(sock)
        log_in(client)
        try:
            for command in client.commands():
                if command[1:].startswith(b"SELECT"):
                    answer(client, command[1:])
                else:
                    client.send(packet(OK, 1))
        except OSError:
            pass  # the client has heard enough

    return Peer(directory, talk, lambda sock: b"")
