"""A hostile server in MariaDB's place: it learns no password and no file, and costs little memory and no time."""

import asyncio
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import sql
from lab.peers import Peer

from contentfilter.errors import ConfigError
from contentfilter.settings import MariaDbSettings, ServiceSettings, Settings
from contentfilter.tables import mariadb
from contentfilter.tables.mariadb import read_tables

PASSWORD = b"correct horse battery"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "password").write_bytes(PASSWORD + b"\n")
    (tmp_path / "control").mkdir()
    return tmp_path


def settings(place: Path, peer: Peer, **more: object) -> Settings:
    where = {"socket": peer.path}
    if peer.backend.startswith("tcp:"):
        where = {"socket": "", "port": int(peer.backend.rpartition(":")[2])}
    keys = {"updated_column": "", "password_file": str(place / "password"), "connect_timeout": 2.0, "timeout": 2.0}
    section = MariaDbSettings(**(where | keys | {"load_timeout": 6.0} | more))  # type: ignore[arg-type]
    return Settings(mariadb=section, service=ServiceSettings(control=str(place / "control")))


def refused(place: Path, peer: Peer, **more: object) -> str:
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        asyncio.run(read_tables(settings(place, peer, **more)))
    assert time.monotonic() - began < 12
    text = str(caught.value)
    assert len(text) < 1000
    assert PASSWORD.decode() not in text
    return text


# The password

AUTH_SWITCH = b"\xfe%b\0" + sql.SALT + b"\0"
KEY = b"""-----BEGIN PUBLIC KEY-----
MFwwDQYJKoZIhvcNAQEBBQADSwAwSAJBAKj34GkxFhD90vcNLYLInFEX6Ppy1tPf
9Cnzj4p4WGeKLs1Pt8QuKUpRKfFLfRYC9AIKjbJTWit+CqvjWYzvQwECAwEAAQ==
-----END PUBLIC KEY-----
"""
STEPS = {
    "nothing": (),
    "full authentication": (b"\x01\x04", b"\x01" + KEY),
    "the key": (b"\x01" + KEY,),
    "clear text": (b"\xfemysql_clear_password\0",),
    "twice": (AUTH_SWITCH % b"sha256_password", b"\x01" + KEY),
    "old": (b"\xfe",),
}


@pytest.mark.parametrize("over", ["tcp", "unix"])
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("switch", [False, True], ids=["greeted", "switched"])
@pytest.mark.parametrize(
    "plugin",
    [b"sha256_password", b"caching_sha2_password", b"mysql_clear_password", b"mysql_old_password", b"dialog", b"\xff"],
)
def test_without_tls_nothing_but_a_scramble_is_ever_sent(
    place: Path, plugin: bytes, switch: bool, steps: tuple[bytes, ...], over: str
) -> None:
    heard = []

    def talk(peer: Peer, sock: socket.socket) -> None:
        client = sql.Client(sock)
        heard.append(client)
        client.send(sql.packet(sql.greeting(b"mysql_native_password" if switch else plugin), 0))
        client.read()
        number = 2
        for step in (AUTH_SWITCH % plugin, *steps) if switch else steps:
            client.send(sql.packet(step, number))
            if not client.read():
                return
            number += 2

    with Peer(place if over == "unix" else None, talk, lambda sock: b"") as peer:
        refused(place, peer)
    for client in heard:
        assert PASSWORD not in client.heard
        login = client.heard[: 4 + int.from_bytes(client.heard[:3], "little")]
        assert b"mysql_native_password\0" in login
        assert len(client.heard) - len(login) <= 4 + 20, "at most one more scramble"


def test_an_authentication_that_is_not_answered_is_named(place: Path) -> None:
    def talk(peer: Peer, sock: socket.socket) -> None:
        client = sql.Client(sock)
        client.send(sql.packet(sql.greeting(b"mysql_native_password"), 0))
        client.read()
        client.send(sql.packet(AUTH_SWITCH % b"caching_sha2_password", 2))
        client.read()

    with Peer(place, talk, lambda sock: b"") as peer:
        assert "asks for authentication by 'caching_sha2_password'" in refused(place, peer)


def test_a_server_that_asks_for_a_file_gets_none(place: Path) -> None:
    heard = []

    def answer(client: sql.Client, query: bytes) -> None:
        client.send(sql.packet(b"\xfb" + str(place / "password").encode(), 1))
        heard.append(client.read())

    with sql.server(place, answer) as peer:
        refused(place, peer)
    assert set(heard) <= {b""}


def test_a_file_is_not_asked_for_in_any_other_place_either(place: Path) -> None:
    heard = []

    def talk(peer: Peer, sock: socket.socket) -> None:
        client = sql.Client(sock)
        sql.log_in(client)
        while command := client.read():
            heard.append(command)
            client.send(sql.packet(b"\xfb/etc/passwd", 1))

    with Peer(place, talk, lambda sock: b"") as peer:
        refused(place, peer)
    assert not any(b"root" in command for command in heard)


# Memory and time


def endless(first: list[bytes], piece: bytes) -> sql.Answer:
    """After ``first``, one payload again and again, in numbered packets, as fast as the client reads."""

    def answer(client: sql.Client, query: bytes) -> None:
        if b"COUNT" in query:
            client.send(sql.packets([b"\x01", sql.column(b"f"), sql.EOF, sql.text(b"1"), sql.EOF]))
            return
        client.send(sql.packets(first))
        many = min(256, 1 + 65_536 // (1 + len(piece)))
        number = len(first) + 1
        while True:
            client.send(sql.packets([piece] * many, number))
            number += many

    return answer


COLUMNS = [b"\x01", sql.column(b"address"), sql.EOF]
FLOODS = {
    "one value in endless packets": endless(COLUMNS, b"\xfe" + (1 << 40).to_bytes(8, "little") + b"x" * 0xFFFFF6),
    "rows": endless(COLUMNS, sql.text(b"u@x.example")),
    "bad rows": endless(COLUMNS, sql.text(b"u u" * 1000)),
    "large rows": endless(COLUMNS, sql.text(b"x" * (7 << 20))),
    "large options": endless(
        [b"\x02", sql.column(b"address"), sql.column(b"virus"), sql.EOF],
        sql.text(b"a@x.example") + sql.text(b"x" * (1 << 20)),
    ),
    "columns": endless([b"\xfe" + (1 << 60).to_bytes(8, "little")], sql.column(b"address")),
    "large columns": endless([b"\x10"], sql.column(b"a" * (1 << 20))),
    "result sets": endless([*COLUMNS, sql.MORE], sql.OK[:3] + b"\x0a\0\0\0"),
    "empty packets": endless([], b""),
    "errors": endless([], b"\xff\x10\x04" + b"x" * (7 << 20)),
}

MEASURED = """
import asyncio, resource, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from lab import sql
from tables.test_hostile_mariadb import FLOODS, settings
from contentfilter.errors import ConfigError
from contentfilter.tables.mariadb import read_tables
place = Path(sys.argv[1])
name = sys.stdin.read()

with sql.server(place, FLOODS[name]) as peer:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        asyncio.run(read_tables(settings(place, peer)))
        print("loaded")
    except ConfigError as error:
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, str(error)[:300])
"""


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of_anything_costs_little_memory_and_ends_in_time(place: Path, name: str) -> None:
    root = Path(__file__).parents[1]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-c", MEASURED, str(place), str(root)],
        input=name,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert time.monotonic() - began < 60
    megabytes, _, text = done.stdout.partition(" ")
    assert text, done.stderr
    print(megabytes, text)
    assert int(megabytes) < 400, text


def test_the_bound_on_everything_together_ends_a_refresh_that_is_in_time(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mariadb, "MAX_RECEIVED", 1 << 20)
    for name in ("rows", "bad rows", "result sets"):
        with sql.server(place, FLOODS[name]) as peer:
            assert "sends more than 1048576 bytes" in refused(place, peer)
    with sql.server(place, FLOODS["columns"]) as peer:
        assert "more than 64 columns" in refused(place, peer)
    with sql.server(place, FLOODS["large rows"]) as peer:
        monkeypatch.setattr(mariadb, "MAX_PACKET", 1 << 20)
        assert "a packet of more than" in refused(place, peer)


def test_others_get_their_turn_while_rows_flood_in(place: Path) -> None:
    turns: list[float] = []

    async def watch() -> None:
        while True:
            began = time.thread_time()
            await asyncio.sleep(0)
            turns.append(time.thread_time() - began)

    async def load() -> None:
        watching = asyncio.create_task(watch())
        with pytest.raises(ConfigError):
            await read_tables(settings(place, peer, load_timeout=2.0))
        watching.cancel()

    # Many packets in each segment, so that the stream's buffer is never empty.
    with sql.server(place, FLOODS["rows"]) as peer:
        asyncio.run(load())
    assert max(turns) < 0.05, "CPU seconds of one callback"


# Nonsense


def corrupted(seed: int) -> Callable[[sql.Client, bytes], None]:
    rng = random.Random(seed)
    good = [b"\x02", sql.column(b"address"), sql.column(b"virus"), sql.EOF, sql.text(b"a@x.example") * 2, sql.EOF]

    def answer(client: sql.Client, query: bytes) -> None:
        data = bytearray(sql.packets(good))
        for _ in range(rng.randrange(1, 6)):
            how, at = rng.randrange(4), rng.randrange(len(data))
            if how == 0:
                data[at] = rng.randrange(256)
            elif how == 1:
                del data[at : at + rng.randrange(1, 9)]
            elif how == 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            else:
                data[at:] = b"" if at else data
            data = data or bytearray(b"\0")
        client.send(bytes(data))

    return answer


def test_malformed_packets_are_our_error_or_rows_and_nothing_else(place: Path) -> None:
    seeds = iter(range(150))

    def answer(client: sql.Client, query: bytes) -> None:
        corrupted(next(numbers))(client, query)

    texts: list[str] = []
    outcomes = {"error": 0, "rows": 0}
    before = threading.active_count()
    for seed in seeds:
        numbers = iter(range(seed * 10, seed * 10 + 10))
        with sql.server(place, answer) as peer:
            config = settings(place, peer, timeout=0.1, load_timeout=0.5, fingerprint_query="SELECT 1")
            try:
                asyncio.run(read_tables(config))
                outcomes["rows"] += 1
            except ConfigError as error:
                outcomes["error"] += 1
                texts.append(str(error))
    assert all(map(str.isprintable, texts))
    assert outcomes["error"] > 20
    assert threading.active_count() <= before + 1


def test_a_greeting_of_nonsense_is_our_error(place: Path) -> None:
    rng = random.Random(5)
    good = sql.packet(sql.greeting(b"mysql_native_password"), 0)
    for _ in range(60):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = data[: rng.randrange(1, len(data) + 1)]

        def talk(peer: Peer, sock: socket.socket, data: bytes = bytes(data)) -> None:
            client = sql.Client(sock)
            client.send(data)
            client.read()
            client.send(sql.packet(b"\x00", 2))

        with Peer(place, talk, lambda sock: b"") as peer:
            assert str(peer.path) in refused(place, peer, connect_timeout=0.3)


def test_a_password_that_is_not_latin_1_goes_to_the_server_as_its_bytes(place: Path) -> None:
    from hashlib import sha1

    password = "Zürich€".encode()
    (place / "password").write_bytes(password + b"\n")
    heard = []

    def talk(peer: Peer, sock: socket.socket) -> None:
        client = sql.Client(sock)
        client.send(sql.packet(sql.greeting(b"mysql_native_password"), 0))
        heard.append(client.read())

    with Peer(place, talk, lambda sock: b"") as peer:
        refused(place, peer)
    stage = sha1(password).digest()
    mask = sha1(sql.SALT + sha1(stage).digest()).digest()
    assert bytes(a ^ b for a, b in zip(stage, mask, strict=True)) in heard[0]
