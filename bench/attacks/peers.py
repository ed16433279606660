"""Hostile servers that the daemon asks: clamd, spamd, MariaDB. They listen at ``peer`` (a path, or a port)."""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lab.peers import read_spamd

from attacks.kit import Place

Talk = Callable[[socket.socket], None]


def _serve(place: Place, talk: Talk) -> None:
    """Each connection gets a thread. Does not return."""
    if place.peer.startswith("/"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(place.peer)
        os.chmod(place.peer, 0o666)
    else:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", int(place.peer)))
    listener.listen(256)

    def one(connection: socket.socket) -> None:
        with connection:
            connection.settimeout(60.0)
            try:
                talk(connection)
            except OSError:
                pass

    while True:
        threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()


def _ask_clamd(connection: socket.socket) -> list[int]:
    """The question's descriptors. A PING is answered."""
    data, fds, _, _ = socket.recv_fds(connection, 65_536, 8)
    if b"PING" in data:
        connection.sendall(b"PONG\0")
    elif b"VERSION" in data:
        connection.sendall(b"ClamAV 1.4.0/27000/Mon Jan  1 00:00:00 2024\0")
    return fds


def clamd_writes(place: Place) -> None:
    """Compromised clamd: it writes into what it is given, truncates it, extends it, reopens it for writing."""

    def talk(connection: socket.socket) -> None:
        for fd in _ask_clamd(connection):
            for attempt in (
                lambda fd=fd: os.pwrite(fd, b"X" * 4096, 0),
                lambda fd=fd: os.ftruncate(fd, 0),
                lambda fd=fd: os.ftruncate(fd, 1 << 30),
                lambda fd=fd: os.pwrite(os.open(f"/proc/self/fd/{fd}", os.O_RDWR), b"Y" * 4096, 0),
                lambda fd=fd: os.truncate(f"/proc/self/fd/{fd}", 0),
                lambda fd=fd: os.lseek(fd, 1 << 40, os.SEEK_SET),
            ):
                try:
                    attempt()
                except OSError:
                    pass
            os.close(fd)
            connection.sendall(b"fd[10]: OK\0")

    _serve(place, talk)


def clamd_endless(place: Place) -> None:
    """Compromised clamd: answers without an end, one byte at a time, of 4 KiB of spaces, or of nothing."""
    turn = iter(range(1 << 62))

    def talk(connection: socket.socket) -> None:
        for fd in _ask_clamd(connection):
            os.close(fd)
        way = next(turn) % 4
        if way == 0:
            while True:
                connection.sendall(b"x" * 65_536)
        elif way == 1:
            while True:
                connection.sendall(b" ")
                time.sleep(0.01)
        elif way == 2:
            connection.sendall(b"fd[10]: " + b" " * 4000 + b"\x01 FOUND\0" * 100_000)
        time.sleep(60)

    _serve(place, talk)


def spamd_head(place: Place) -> None:
    """Compromised spamd: heads of nothing but spaces, numbers of 4 KiB, endless lines, lengths that lie."""
    heads = (
        b"SPAMD/1.1 0 EX_OK\r\nSpam:" + b" " * 4000 + b"\x01\r\n\r\n",
        b"SPAMD/1.1 0 EX_OK" + b" " * 100_000,
        b"SPAMD/1.1 0 EX_OK\r\n" + b"X: y\r\n" * 100_000,
        b"SPAMD/1.1 0 EX_OK\r\nSpam: True ; " + b"9" * 4000 + b" / " + b"9" * 4000 + b"\r\n\r\n",
        b"SPAMD/1.1 0 EX_OK\r\nContent-length: 99999999999999999999\r\nSpam: True ; 1e999 / nan\r\n\r\nx",
        b"SPAMD/1.1 0 EX_OK\r\nContent-length: 100000000\r\nSpam: True ; 9 / 5\r\n\r\n" + b"X-Spam: " * 1_000_000,
        b"SPAMD/1.1 0 EX_OK\r\nSpam: True ; 9.0 / 5.0\r\n\r\n" + (b"X-Spam-Status:" + b" \t" * 400 + b"\n") * 2000,
    )
    turn = iter(range(1 << 62))

    def talk(connection: socket.socket) -> None:
        question = read_spamd(connection)
        if question.startswith(b"PING"):
            connection.sendall(b"SPAMD/1.5 0 PONG\r\n")
        else:
            connection.sendall(heads[next(turn) % len(heads)])

    _serve(place, talk)


def spamd_endless(place: Place) -> None:
    """Compromised spamd: a body without an end, and answers that come a byte at a time."""
    turn = iter(range(1 << 62))

    def talk(connection: socket.socket) -> None:
        read_spamd(connection)
        slow = next(turn) % 2
        connection.sendall(b"SPAMD/1.1 0 EX_OK\r\nSpam: True ; 9.0 / 5.0\r\n\r\n")
        while True:
            connection.sendall(b"x" if slow else b"x" * 65_536)
            time.sleep(0.01 * slow)

    _serve(place, talk)


def all_spam(place: Place) -> None:
    """A spamd that calls everything spam."""

    def talk(connection: socket.socket) -> None:
        question = read_spamd(connection)
        fields = b"X-Spam-Flag: YES\nX-Spam-Status: Yes, score=9.0 required=5.0 tests=A version=4.0\n\n"
        length = b"Content-length: %d\r\n" % len(fields)
        if question.startswith(b"PING"):
            connection.sendall(b"SPAMD/1.5 0 PONG\r\n")
        else:
            connection.sendall(b"SPAMD/1.1 0 EX_OK\r\n" + length + b"Spam: True ; 9.0 / 5.0\r\n\r\n" + fields)

    _serve(place, talk)


PASSWORD = b"password-of-the-lab"


def _packet(number: int, body: bytes) -> bytes:
    return struct.pack("<I", len(body))[:3] + bytes([number & 255]) + body


_GREETING = _packet(
    0,
    b"\x0a5.5.5-hostile\0"
    + struct.pack("<I", 1)
    + b"saltsalt\0"
    + b"\xff\xf7\x21\x02\0\xff\x81\x15"
    + b"\0" * 10
    + b"saltsaltsalt\0"
    + b"mysql_native_password\0",
)


def _mariadb(place: Place, after: Callable[[socket.socket], None]) -> None:
    def talk(connection: socket.socket) -> None:
        connection.sendall(_GREETING)
        connection.recv(65_536)
        after(connection)

    _serve(place, talk)


def mariadb_endless(place: Place) -> None:
    """Hostile MariaDB: result packets of 16 MiB without an end, after a login that succeeds."""
    full = b"\xff\xff\xff"

    def after(connection: socket.socket) -> None:
        connection.sendall(_packet(2, b"\0\0\0\x02\0\0\0"))
        while True:
            if not connection.recv(65_536):
                return
            for number in range(1, 1 << 20):
                connection.sendall(full + bytes([number & 255]) + b"x" * 0xFFFFFF)

    _mariadb(place, after)


def mariadb_rows(place: Place) -> None:
    """Hostile MariaDB: every query has 4,000 columns, and rows without an end."""

    def after(connection: socket.socket) -> None:
        connection.sendall(_packet(2, b"\0\0\0\x02\0\0\0"))
        while connection.recv(65_536):
            column = b"\x03def" + b"\0" * 4 + b"\x01a" + b"\x00\x0c\x21\0" + b"\xff\xff\0\0\xfd\0\0\0\0\0"
            connection.sendall(_packet(1, b"\x01") + _packet(2, column) + _packet(3, b"\xfe\0\0\x02\0"))
            for number in range(4, 1 << 62):
                connection.sendall(_packet(number, b"\xfc\xff\xff" + b"a" * 65_535))

    _mariadb(place, after)


def mariadb_password(place: Place) -> None:
    """Hostile MariaDB: it asks for the password in clear, or by a key of its own (RSA exchange), again and again."""
    plugins = (b"mysql_clear_password", b"sha256_password", b"caching_sha2_password", b"dialog", b"auth_gssapi_client")
    turn = iter(range(1 << 62))

    def after(connection: socket.socket) -> None:
        for number in range(2, 200, 4):
            plugin = plugins[next(turn) % len(plugins)]
            connection.sendall(_packet(number, b"\xfe" + plugin + b"\0" + b"salt" * 5 + b"\0"))
            answer = connection.recv(65_536)
            if plugin == b"caching_sha2_password" and answer:
                connection.sendall(_packet(number + 2, b"\x01\x04"))  # "authenticate in full"
                answer = connection.recv(65_536)
            if not answer:
                return
            if PASSWORD in answer or answer[4:] in (b"\x01", b"\x02"):  # the password, or a request for our key
                with open(f"{place.scratch}/password", "ab") as taken:
                    taken.write(plugin + b"\n")

    _mariadb(place, after)


def password_taken(place: Place) -> str:
    path = Path(f"{place.scratch}/password")
    return f"the password was offered to {path.read_text().split()[0]}" if path.exists() else ""
