"""The event feed: over TCP only known keys get events; no subscriber costs the daemon memory or ends it."""

import asyncio
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pytest
import pytest_asyncio
import zmq
import zmq.asyncio
from lab.daemon import PACKAGE, WAIT, Daemon
from lab.offer import offer
from lab.process import free_port

from contentfilter.bus.messages import Event
from contentfilter.bus.publisher import HIGH_WATER, MEMORY_MAX, SUBSCRIPTIONS_MAX
from contentfilter.bus.sockets import addresses
from contentfilter.config.keys import Keys, load_keys, public, read_secret, write_secret
from contentfilter.config.load import read_settings
from contentfilter.errors import ConfigError
from contentfilter.log import make_logger
from contentfilter.settings import EventSettings, ServiceSettings, Settings
from contentfilter.supervisor.feed import BUFFER_MAX, RETRY, EventFeed

Make = Callable[..., Daemon]
ENVIRON = {**os.environ, "PYTHONPATH": str(PACKAGE)}


@dataclass
class Place:
    """A feed that runs, its settings, and subscribers to it."""

    directory: Path
    settings: Settings
    feed: EventFeed
    context: "zmq.asyncio.Context"

    async def allow(self, *secrets: bytes) -> None:
        """Until it is in force: ZeroMQ's client does not try again when it is refused."""
        lines = [b"# who may listen", b"", *(public(secret) + b"  a collector" for secret in secrets)]
        Path(self.settings.events.clients).write_bytes(b"\n".join(lines) + b"\n")
        self.feed.changed()
        async with asyncio.timeout(WAIT):
            while self.feed.collectors() != set(map(public, secrets)):
                await asyncio.sleep(0.01)

    @property
    def pid(self) -> int:
        assert self.feed.pid is not None
        return self.feed.pid

    @property
    def server(self) -> bytes:
        return public(read_secret(self.settings.events.key))

    def subscribe(self, secret: bytes | None, server: bytes | None = None, **options: int) -> Any:
        each = self.context.socket(zmq.SUB)
        for name, value in {"LINGER": 0, "RECONNECT_IVL": 20, **options}.items():
            each.setsockopt(getattr(zmq, name), value)
        if secret is not None:
            each.curve_serverkey = server or self.server
            each.curve_secretkey, each.curve_publickey = secret, public(secret)
        each.subscribe(b"")
        each.connect(self.settings.events.listen)
        return each

    async def hears(self, *subscribers: Any, seconds: float = WAIT) -> bool:
        """True when all of them get an event."""
        async with asyncio.timeout(seconds):
            waiting = list(subscribers)
            while waiting:
                self.feed.publish(Event("mail.done", {"id": "x"}))
                waiting = [each for each in waiting if not await each.poll(20)]
        return True


@pytest_asyncio.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    events = EventSettings(
        listen=f"tcp://127.0.0.1:{free_port()}", key=str(tmp_path / "key"), clients=str(tmp_path / "clients")
    )
    write_secret(events.key)
    (tmp_path / "clients").touch()
    with tempfile.TemporaryDirectory(prefix="cf-", dir="/tmp") as run:
        settings = Settings(events=events, service=ServiceSettings(run=run))
        feed = EventFeed(make_logger("json", "error"), lambda: settings)
        feed.start()
        made = Place(tmp_path, settings, feed, zmq.asyncio.Context())
        running = asyncio.create_task(feed.run())
        yield made
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        made.context.destroy(linger=0)
        feed.close()


def secret() -> bytes:
    made: bytes = zmq.curve_keypair()[1]
    return made


@pytest.mark.asyncio
async def test_a_known_key_gets_events_and_nobody_else_does(place: Place) -> None:
    known = secret()
    await place.allow(known)
    well = place.subscribe(known)
    strangers = [
        place.subscribe(secret()),  # a key, but not one of the list
        place.subscribe(None),  # NULL: no key at all
        place.subscribe(known, server=public(secret())),  # takes another daemon for this one
    ]
    plain = place.context.socket(zmq.SUB)
    plain.plain_username, plain.plain_password, plain.linger = b"admin", b"admin", 0
    plain.subscribe(b"")
    plain.connect(place.settings.events.listen)
    for _ in range(10):
        assert await place.hears(well)
        while await well.poll(0):
            await well.recv_multipart()
    assert [await each.poll(50) for each in (*strangers, plain)] == [0, 0, 0, 0]


@pytest.mark.asyncio
async def test_a_key_that_is_taken_away_hears_nothing_from_the_reload_on(place: Place) -> None:
    first, second = secret(), secret()
    await place.allow(first, second)
    kept, dropped = place.subscribe(first), place.subscribe(second)
    assert await place.hears(kept, dropped)
    await place.allow(first)
    for each in (kept, dropped):
        while await each.poll(50):
            await each.recv_multipart()
    assert await place.hears(kept)  # it connects again by itself
    assert await dropped.poll(100) == 0
    before = place.pid
    place.feed.changed()
    await asyncio.sleep(0)
    assert await place.hears(kept)
    assert place.pid == before  # nothing new: no collector is cut off


@pytest.mark.asyncio
async def test_a_subscriber_that_does_not_read_loses_events_and_costs_a_bounded_queue(place: Place) -> None:
    known = secret()
    await place.allow(known)
    slow, quick = place.subscribe(known, RCVHWM=10, RCVBUF=4096), place.subscribe(known)
    assert await place.hears(slow, quick)
    text = os.urandom(2048).hex()  # 4 KiB
    sent = 5 * HIGH_WATER
    for number in range(sent):
        place.feed.publish(Event("mail.report", {"n": number, "text": text}))
        if number % 20 == 0:
            await asyncio.sleep(0.002)
            while await quick.poll(0):
                await quick.recv_multipart()
    assert await place.hears(quick)
    got = 0
    while await slow.poll(300):
        await slow.recv_multipart()
        got += 1
    # What is above the queue: the subscriber's own, and the buffers of the kernel (some MB at most).
    assert got < HIGH_WATER + 2000 < sent
    assert await place.hears(slow, quick)


@pytest.mark.asyncio
async def test_a_subscriber_that_sends_long_frames_is_cut_off(place: Place) -> None:
    known = secret()
    await place.allow(known)
    hostile, well = place.subscribe(known), place.subscribe(known)
    assert await place.hears(hostile, well)
    watch = hostile.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    hostile.subscribe(b"x" * 100_000)
    assert await watch.poll(WAIT * 1000)
    assert await place.hears(well)
    hostile.disable_monitor()


@pytest.mark.asyncio
async def test_an_address_in_use_is_logged_once(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    await place.allow()
    other = EventFeed(make_logger("json", "error"), lambda: place.settings)
    for _ in range(2):
        assert await other._apply() == RETRY
    assert capfd.readouterr().err.count("Address already in use") == 1
    other.close()


QUIET = 22.0  # seconds, above two heartbeats of 10 s
LEAVES = """
import os, sys, time, zmq
listen, server, secret = sys.argv[1], sys.argv[2].encode(), sys.argv[3].encode()
each = zmq.Context().socket(zmq.SUB)
each.curve_serverkey, each.curve_secretkey, each.curve_publickey = server, secret, zmq.curve_public(secret)
each.connect(listen)
for number in range(3000):
    each.subscribe(b"%d " % number + b"x" * 500)
time.sleep(0.1 * int(sys.argv[4]))
os._exit(0)
"""
"""A collector that subscribes to more than a queue holds, and leaves. With ZMTP heartbeats at the other end, libzmq
4.3.5 ended that process by an assertion a heartbeat later (zeromq/libzmq issue 4364)."""


@pytest.mark.asyncio
async def test_a_collector_that_subscribes_a_lot_and_leaves_ends_nothing(place: Place) -> None:
    known = secret()
    await place.allow(known)
    well = place.subscribe(known)
    assert await place.hears(well)
    before = place.pid
    words = (place.settings.events.listen, place.server.decode(), known.decode())
    leaving = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", LEAVES, *words, str(wait))
        for wait in (5, 10, 20, 30)
    ]
    for each in leaving:
        await each.wait()
    await asyncio.sleep(QUIET)  # without an event: the process reads subscriptions only when it sends
    assert place.pid == before
    assert await place.hears(well)


@pytest.mark.asyncio
async def test_a_feed_that_dies_is_started_again(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    known = secret()
    await place.allow(known)
    well = place.subscribe(known)
    for _ in range(2):
        assert await place.hears(well)
        before = place.pid
        os.kill(before, signal.SIGABRT)
        async with asyncio.timeout(WAIT):
            while place.feed.pid in (None, before):
                await asyncio.sleep(0.01)
        while await well.poll(50):
            await well.recv_multipart()
    assert await place.hears(well)
    assert capfd.readouterr().err.count(f"its process ended, status -{signal.SIGABRT.value}") == 2


@pytest.mark.asyncio
async def test_the_feed_ends_with_its_supervisor(place: Place) -> None:
    await place.allow()
    with open(f"/proc/{place.pid}/stat") as stat_file:
        place.feed._disconnect()  # as the kernel does for a supervisor that was killed
        async with asyncio.timeout(WAIT):
            while alive(stat_file):
                await asyncio.sleep(0.01)


def alive(stat_file: TextIO) -> bool:
    try:
        stat_file.seek(0)
        return stat_file.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False


# ---------------------------------------------------------------- local subscribers


def local_subscriber(place: Place) -> Any:
    each = place.context.socket(zmq.SUB)
    each.linger = 0
    each.subscribe(b"")
    each.connect(addresses(place.settings.service.run)["events"])
    return each


def by_hand(place: Place, data: bytes, times: int = 1) -> None:
    """Send what no libzmq would send, as a subscriber: the handshake of ZMTP 3, then ``data``."""
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 3) + b"SUB"
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(WAIT)
        client.connect(str(Path(place.settings.service.run, "events.sock")))
        client.sendall(b"\xff" + b"\0" * 8 + b"\x7f\x03\0NULL" + b"\0" * 48)
        client.recv(64, socket.MSG_WAITALL)
        client.sendall(b"\x04" + bytes([len(ready)]) + ready)
        for _ in range(times):
            client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        while client.recv(65_536):
            pass


ENDLESS = (b"\x01\xff" + b"x" * 255) * 4096  # 1 MiB of parts of one message, with more to come


@pytest.mark.asyncio
async def test_a_local_message_without_end_ends_the_process_at_its_memory_limit(place: Place) -> None:
    """The supervisor only sees that a process has ended; others subscribe again by themselves."""
    well = local_subscriber(place)
    assert await place.hears(well)
    before, memory = place.pid, resident()
    with pytest.raises(ConnectionError):
        await asyncio.to_thread(by_hand, place, ENDLESS, MEMORY_MAX >> 20)
    async with asyncio.timeout(3 * WAIT):
        while place.feed.pid in (None, before):
            await asyncio.sleep(0.01)
    assert resident() < memory + 50_000_000
    while await well.poll(50):
        await well.recv_multipart()
    assert await place.hears(well)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.asyncio
async def test_too_many_subscriptions_end_the_process(place: Place) -> None:
    well = local_subscriber(place)
    assert await place.hears(well)
    before = place.pid
    given_up = b"".join(b"\0\5" + change + b"%04d" % number for number in range(9999) for change in (b"\1", b"\0"))
    await asyncio.to_thread(by_hand, place, given_up, 3)
    assert await place.hears(well)
    assert place.pid == before
    with suppress(ConnectionError):
        await asyncio.to_thread(
            by_hand, place, b"".join(b"\0\6\1%05d" % number for number in range(SUBSCRIPTIONS_MAX + 1))
        )
    async with asyncio.timeout(WAIT):
        while place.feed.pid == before:
            await asyncio.sleep(0.01)


@pytest.mark.asyncio
async def test_a_process_that_does_not_read_costs_a_bounded_buffer(place: Place) -> None:
    well = local_subscriber(place)
    assert await place.hears(well)
    os.kill(place.pid, signal.SIGSTOP)
    event = Event("mail.done", {"text": "x" * 100_000})
    for _ in range(1000):
        place.feed.publish(event)
    assert place.feed._source is not None
    assert len(place.feed._source._unsent) <= BUFFER_MAX
    os.kill(place.pid, signal.SIGCONT)
    assert await place.hears(well)


@pytest.mark.asyncio
async def test_a_removed_socket_is_bound_again(place: Place) -> None:
    well = local_subscriber(place)
    assert await place.hears(well)
    path = Path(place.settings.service.run, "events.sock")
    path.unlink()
    assert place.feed.mend() == (str(path),)
    assert place.feed.mend() == ()
    while await well.poll(50):
        await well.recv_multipart()
    assert await place.hears(well)


# ---------------------------------------------------------------- keys and settings


def test_a_key_file_is_for_its_owner_only_and_never_written_again(tmp_path: Path) -> None:
    path = tmp_path / "key"
    made = write_secret(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        write_secret(str(path))
    assert read_secret(str(path)) == made
    assert made.decode() not in repr(Keys(made, frozenset()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": ""}, r"key: the feed goes over the network only with keys"),
        ({"clients": ""}, r"clients: the feed goes over the network only with keys"),
        ({"key": "/nowhere/key"}, r"/nowhere/key: \[events\] key: cannot read it: No such file"),
    ],
)
def test_over_the_network_only_with_keys(tmp_path: Path, change: dict[str, str], words: str) -> None:
    write_secret(str(tmp_path / "key"))
    (tmp_path / "clients").touch()
    events = {"listen": "tcp://127.0.0.1:1", "key": str(tmp_path / "key"), "clients": str(tmp_path / "clients")}
    assert load_keys(EventSettings(**events)) is not None
    with pytest.raises(ConfigError, match=words):
        load_keys(EventSettings(**(events | change)))
    assert load_keys(EventSettings()) is None


def test_what_is_no_key_is_told_with_its_line(tmp_path: Path) -> None:
    write_secret(str(tmp_path / "key"))
    events = EventSettings("tcp://127.0.0.1:1", str(tmp_path / "key"), str(tmp_path / "clients"))
    for wrong in (b"short", b"#" * 40, b"x" * 41, b"\xff" * 40):
        (tmp_path / "clients").write_bytes(b"# list\n\n" + wrong + b"\n")
        with pytest.raises(ConfigError, match=r"clients:3: not a public key"):
            load_keys(events)
    (tmp_path / "clients").write_bytes(b"")
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(ConfigError, match="everybody here can read it"):
        load_keys(events)


@pytest.mark.parametrize(
    "text",
    ["tcp://localhost:1", "tcp://127.0.0.1", "tcp://1.2.3.4:0", "tcp://1.2.3.999:5", "tcp://[::g]:1", "ipc:///x"],
)
def test_an_address_that_is_none_is_told_with_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "contentfilter.toml"
    path.write_text(f'[events]\nlisten = "{text}"\n')
    problems = read_settings(str(path))[1]
    assert [(p.line, "[events] listen" in p.text) for p in problems if not p.warning] == [(2, True)]
    for well in ("off", "tcp://*:9465", "tcp://192.0.2.1:9465", "tcp://[::1]:9465"):
        path.write_text(f'[events]\nlisten = "{well}"\n')
        assert read_settings(str(path))[1] == ()


# ---------------------------------------------------------------- the daemon and the command line


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "contentfilter", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT, env=ENVIRON)


def test_tail_on_another_machine_sees_the_daemons_mail(daemon: Make, tmp_path: Path) -> None:
    made = json.loads(run("events-key", "--json", str(tmp_path / "collector.key")).stdout)
    server = run("events-key", str(tmp_path / "server.key")).stdout.strip()
    assert run("events-key", str(tmp_path / "server.key")).stdout.strip() == server
    assert made["made"] is True
    (tmp_path / "clients").write_text(made["public"] + " collector\n")
    listen = f"tcp://127.0.0.1:{free_port()}"
    events = {"listen": listen, "key": str(tmp_path / "server.key"), "clients": str(tmp_path / "clients")}
    with daemon({"service": {"workers": 1}, "events": events}) as running:
        running.wait_for("events.ready")
        words = ["tail", "--connect", listen, "--server-key", server, "--key", made["file"], "--count", "1", "--json"]
        command = [sys.executable, "-P", "-m", "contentfilter", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRON) as reader:
            while reader.poll() is None:
                assert offer(running.socket)
            assert reader.stdout is not None
            assert json.loads(reader.stdout.readline())["event"] == "mail.done"
        assert reader.returncode == 0
        workers, feed = running.workers(), running.feed()
        assert feed is not None
        os.kill(feed, signal.SIGKILL)
        running.wait_for("events.failed")
        running.wait_for("events.ready", 2)
        assert offer(running.socket)
        assert running.workers() == workers
        stranger = run("events-key", "--json", str(tmp_path / "stranger.key"))
        words[words.index(made["file"])] = json.loads(stranger.stdout)["file"]
        refused = run(*words)
        assert (refused.returncode, "refused" in refused.stderr) == (1, True)
    usage = run("tail", "--connect", listen)
    assert (usage.returncode, "used together" in usage.stderr) == (2, True)
