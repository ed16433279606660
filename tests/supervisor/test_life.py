"""The daemon's life with the service manager: start, socket activation, watchdog, drain, second instance."""

import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab.daemon import WAIT, Daemon
from lab.offer import Offer, offer

from contentfilter.model import Action

Make = Callable[..., Daemon]


def test_ready_is_said_when_every_worker_accepts(daemon: Make) -> None:
    with daemon({"service": {"workers": 3}}) as running:
        ready = running.notifications[-1]
        assert ready["STATUS"] == "3 workers, configuration 1"
        assert len(running.workers()) == len(running.wait_for("worker.ready", 3)) == 3
        assert offer(running.socket).action is Action.QUEUE
        assert running.stop() == 0
        assert running.wait_notified("STOPPING") == {"STOPPING": "1"}


def test_a_bad_configuration_is_refused_with_78_and_the_problem(daemon: Make) -> None:
    running = daemon({"service": {"workers": "many"}})
    try:
        running.start(wait=False)
        assert running.wait_exit() == 78
        assert "workers" in running.log("text")[0]["text"]
    finally:
        running.clean()


def test_workers_inherit_three_descriptors_and_nothing_of_the_service_manager(daemon: Make) -> None:
    with daemon(watchdog=30.0, environ={"LISTEN_FDS": "1", "LISTEN_PID": "1"}) as running:
        outputs = {os.readlink(f"/proc/{running.pid}/fd/{n}") for n in (1, 2)}
        for pid in running.workers():
            environ = Path(f"/proc/{pid}/environ").read_bytes()
            for name in (b"NOTIFY_SOCKET", b"LISTEN_", b"WATCHDOG_"):
                assert name not in environ
            links = [os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")]
            assert not any("contentfilter.lock" in link or "configuration" in link for link in links)
            writable = {os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd") if is_writer(pid, n)}
            assert writable <= outputs, "the lifeline's other end must be the supervisor's alone"


def is_writer(pid: int, number: str) -> bool:
    """True for the writing end of a pipe."""
    if not os.readlink(f"/proc/{pid}/fd/{number}").startswith("pipe:"):
        return False
    flags = next(line for line in Path(f"/proc/{pid}/fdinfo/{number}").read_text().splitlines() if "flags" in line)
    return bool(int(flags.split()[1], 8) & os.O_ACCMODE)


def test_a_message_under_way_is_answered_before_the_end(daemon: Make, gate: Any) -> None:
    with daemon() as running, Offer(running.socket) as under_way:
        under_way.send(gate.message)
        gate.wait()
        running.signal(signal.SIGTERM)
        running.wait_for("worker.drain", 2)
        assert not os.path.exists(running.socket), "new hooks find nobody and wait for the next daemon"
        gate.open()
        assert under_way.answer().action is Action.QUEUE
        assert running.wait_exit() == 0


def test_what_is_not_finished_in_time_is_dropped_without_an_answer(daemon: Make, gate: Any) -> None:
    with daemon({"service": {"drain": 0.3}}) as running, Offer(running.socket) as under_way:
        under_way.send(gate.message)
        gate.wait()
        assert running.stop() == 0
        assert under_way.answer() is None


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(second: signal.Signals, daemon: Make, gate: Any) -> None:
    with daemon() as running, Offer(running.socket) as under_way:
        under_way.send(gate.message)
        gate.wait()
        running.signal(signal.SIGTERM)
        running.wait_for("worker.drain", 2)
        running.signal(second)
        assert under_way.answer() is None
        assert running.wait_exit(5) == 0


def test_a_second_daemon_is_refused_and_the_first_goes_on(daemon: Make) -> None:
    with daemon() as first:
        words, environ = first.command()
        environ.pop("NOTIFY_SOCKET")
        done = subprocess.run(words, env=environ, capture_output=True, timeout=WAIT, check=False)
        assert done.returncode == 1
        assert b"another contentfilter is running" in done.stderr
        assert offer(first.socket).action is Action.QUEUE


def test_a_foreign_live_socket_is_not_stolen(daemon: Make) -> None:
    running = daemon()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as foreign:
        foreign.bind(running.socket)
        foreign.listen(64)
        try:
            running.start(wait=False)
            assert running.wait_exit() == 1
            assert "another process listens there" in running.log("text")[-1]["text"]
            Offer(running.socket).close()
        finally:
            running.clean()


def test_a_stale_socket_file_is_replaced(daemon: Make) -> None:
    running = daemon()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(running.socket)
    with running:
        assert offer(running.socket).action is Action.QUEUE


def test_systemds_socket_is_used_and_outlives_the_daemon(daemon: Make) -> None:
    with daemon(activated=True) as running:
        assert running.wait_for("service.start")[0]["activated"] is True
        assert offer(running.socket).action is Action.QUEUE
        assert running.stop() == 0
        with Offer(running.socket) as between:  # nobody is running: it waits in systemd's queue
            between.send()
            running.start()
            assert between.answer().action is Action.QUEUE


def test_the_watchdog_is_fed_while_workers_live_and_starves_when_none_does(daemon: Make) -> None:
    good, deadly = {"service": {"workers": 1}}, {"service": {"workers": 1}, "tables": {"extension": "?"}}
    with daemon(good, watchdog=0.2) as running:
        for _ in range(3):
            running.wait_notified("WATCHDOG", "1")
        running.configure(deadly)
        running.reload()
        running.wait_for("worker.died", 2)
        running.notified_now()
        running.wait_for("worker.died", 5)  # with the growing delays well over a second
        assert not [n for n in running.notified_now() if "WATCHDOG" in n]
        running.configure(good)
        running.reload()
        running.wait_for("worker.ready", 2)
        running.wait_notified("WATCHDOG", "1")
