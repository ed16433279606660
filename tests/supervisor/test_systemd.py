"""What is said to systemd and taken from it, on a real datagram socket."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from contentfilter.supervisor.systemd import Notifier, listen_fds, watchdog_interval


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as each:
        each.bind(str(tmp_path / "notify"))
        each.settimeout(10)
        yield each


def test_the_states_are_said_in_the_manuals_words(manager: socket.socket) -> None:
    environ = {"NOTIFY_SOCKET": manager.getsockname()}
    notifier = Notifier.from_environment(environ)
    assert environ == {}, "no child may speak for us"
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.ready("well")
    notifier.reloading()
    notifier.status("so so")
    notifier.alive()
    notifier.stopping()
    said = [manager.recv(1000).decode() for _ in range(5)]
    notifier.close()
    assert said[0] == "READY=1\nSTATUS=well"
    assert said[1].startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert before <= int(said[1].rsplit("=")[-1]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert said[2:] == ["STATUS=so so", "WATCHDOG=1", "STOPPING=1"]


def test_an_abstract_address_works() -> None:
    name = f"contentfilter-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name)
        manager.settimeout(10)
        notifier = Notifier("@" + name)
        notifier.alive()
        notifier.close()
        assert manager.recv(100) == b"WATCHDOG=1"


@pytest.mark.parametrize("address", ["", "/nowhere/at/all", "@" + "x" * 300])
def test_nobody_to_listen_disturbs_nothing(address: str) -> None:
    notifier = Notifier(address)
    notifier.ready("still")
    notifier.close()
    notifier.alive()


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "77"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "78"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
    ],
)
def test_the_watchdogs_pace_is_half_its_limit(environ: dict[str, str], seconds: float) -> None:
    assert watchdog_interval(environ, 77) == seconds
    assert environ == {}


@pytest.mark.parametrize(
    ("environ", "passed"),
    [
        ({}, []),
        ({"LISTEN_FDS": "1"}, []),
        ({"LISTEN_FDS": "1", "LISTEN_PID": "78"}, []),
        ({"LISTEN_FDS": "x", "LISTEN_PID": "77"}, []),
        ({"LISTEN_FDS": "-1", "LISTEN_PID": "77"}, []),
        ({"LISTEN_FDS": "99999", "LISTEN_PID": "77"}, []),
        ({"LISTEN_FDS": "2", "LISTEN_PID": "77"}, [("unknown", 3), ("unknown", 4)]),
        ({"LISTEN_FDS": "2", "LISTEN_PID": "77", "LISTEN_FDNAMES": "queue"}, [("queue", 3), ("unknown", 4)]),
    ],
)
def test_passed_sockets_are_named_made_private_and_taken_out_of_the_environment(
    environ: dict[str, str], passed: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    private: list[tuple[int, bool]] = []
    monkeypatch.setattr(os, "set_inheritable", lambda fd, inheritable: private.append((fd, inheritable)))
    assert listen_fds(environ, 77) == passed
    assert private == [(fd, False) for _, fd in passed]
    assert environ == {}
