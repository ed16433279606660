"""Local users who are not trusted: their mail gets through, and what they do to the socket hurts only themselves."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from e2e.mails import PLAIN
from lab import descriptors

from contentfilter.wire import hook

NOBODY = 65534
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")

# Programs of a hostile user, run as another user with the path of the socket. Each says "ready", and then holds on.
COMMON = f"""{Path(descriptors.__file__).read_text()}
import os, resource, sys, time
path, request, garbage = sys.argv[1], bytes.fromhex(sys.argv[2]), b"garbage"
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
ENVELOPE = b"Fa@b.example\\0Tc@d.example\\0\\0"
keep = []

def connect():
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(5)
    connection.connect(path)
    keep.append(connection)
    return connection

def file(data):
    fd = os.memfd_create("x")
    os.write(fd, data)
    return fd

def send(connection, packet, *fds):
    try:
        connection.sendmsg([packet], rights(*fds))
    except OSError:
        pass
"""
ATTACKS = {
    "descriptors that linger": """
        for packet in (request, garbage):
            for wrap in (lambda fd: bad, nested):
                for _ in range(6):
                    bad, there = lingering()
                    given = wrap(bad.fileno())
                    keep.extend((given, there))
                    send(connect(), packet, given.fileno(), file(ENVELOPE))
                    send(connect(), packet, file(ENVELOPE), file(ENVELOPE), given.fileno())
                    bad.close()
    """,
    "pipes, directories and sockets": """
        for bad in (os.pipe()[0], os.open("/", os.O_RDONLY), socket.socket().detach(),
                    os.open("/dev/zero", os.O_RDONLY), os.open("/etc/passwd", os.O_PATH)):
            for packet in (request, garbage):
                send(connect(), packet, bad, file(ENVELOPE))
                send(connect(), packet, file(b"x" * 18), bad)
    """,
    "connections that say nothing": """
        for _ in range(1500):
            try:
                connect()
            except OSError:
                time.sleep(0.005)
    """,
    "messages that never report": """
        message, envelope = file(b"Subject: x\\n\\nhello\\n"), file(ENVELOPE)
        for _ in range(1500):
            try:
                send(connect(), request, message, envelope)
            except OSError:
                time.sleep(0.005)
    """,
}


@contextmanager
def attack(name: str, path: str) -> Iterator[subprocess.Popen[str]]:
    request = hook.encode_request(hook.Request(0, 600.0, 18, 27, {})).hex()
    program = COMMON + textwrap.dedent(ATTACKS[name]) + "\nprint('ready', flush=True)\ntime.sleep(600)\n"
    process = subprocess.Popen([sys.executable, "-c", program, path, request], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_user_holds_up_no_mail_of_others(make_system: Callable[..., Any], name: str) -> None:
    system = make_system(settings={"listen": {"mode": "0666"}})
    os.chmod(system.directory, 0o755)
    assert system.deliver(PLAIN).status == 0
    slowest, sent = 0.0, 0
    with attack(name, system.daemon.socket) as process:
        end = time.monotonic() + 8.0
        while time.monotonic() < end:
            began = time.monotonic()
            assert system.deliver(PLAIN).status == 0
            slowest, sent = max(slowest, time.monotonic() - began), sent + 1
        assert process.poll() is None
    assert slowest < 5.0
    assert sent >= 10


def offer(path: str) -> str:
    """A message of an untrusted user; the first bytes of the answer as text."""
    request = hook.encode_request(hook.Request(0, 60.0, 18, 27, {b"RELAYCLIENT": b""})).hex()
    program = COMMON + "c = connect(); send(c, request, file(b'Subject: x\\n\\nhello\\n'), file(ENVELOPE)); "
    program += "print(c.recv(70000)[:4].decode())"
    words = [sys.executable, "-c", program, path, request]
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout


def test_the_mail_of_an_untrusted_user_is_scanned_and_counts_as_local(make_system: Callable[..., Any]) -> None:
    system = make_system(settings={"listen": {"mode": "0666"}})
    os.chmod(system.directory, 0o755)
    assert offer(system.daemon.socket) == "CFA1\n"
    (line,) = system.daemon.wait_for("mail.done")
    assert (line["origin"], line["uid"]) == ("local", NOBODY)


def test_a_receiver_that_is_killed_is_started_again_with_the_next_connection(make_system: Callable[..., Any]) -> None:
    system = make_system(settings={"listen": {"mode": "0666"}})
    os.chmod(system.directory, 0o755)
    assert offer(system.daemon.socket) == "CFA1\n"
    (started,) = system.daemon.wait_for("receiver.start")
    os.kill(started["child"], signal.SIGKILL)
    system.daemon.wait_for("receiver.died")
    assert offer(system.daemon.socket) == "CFA1\n"
    assert len(system.daemon.wait_for("receiver.start", 2)) == 2


def test_a_user_with_too_many_connections_is_named(make_system: Callable[..., Any], tmp_path: Path) -> None:
    system = make_system(settings={"listen": {"mode": "0666"}})
    os.chmod(system.directory, 0o755)
    with attack("connections that say nothing", system.daemon.socket):
        (line,) = system.daemon.wait_for("intake.refused")
        assert list(line["users"]) == ["nobody"]
