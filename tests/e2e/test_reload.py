"""Reloads all the time, of tables and of settings, harm no message, whatever its size and its stage."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.hook import until
from lab.offer import Offer
from lab.peers import Peer, read_clamd

from contentfilter.model import Action
from contentfilter.wire import hook

HEAD = b"From: a@example.net\nSubject: hello\n\n"
SIZES = (0, 1 << 10, 300 << 10, 2 << 20, 20 << 20)
PROTECTED, ELSEWHERE = b"user@protected.example", b"user@elsewhere.example"


def slowly(peer: Peer, sock: socket.socket) -> None:
    """A clamd whose scan takes longer than a reload, and that finds what says VIRUS."""
    data, fds, _, _ = socket.recv_fds(sock, 4096, 4)
    if b"PING" in data or b"VERSION" in data:
        return sock.sendall(b"PONG\0" if b"PING" in data else b"ClamAV 1.4.0/27000/Mon Jan  1 00:00:00 2024\0")
    head = os.pread(fds[0], 200, 0)
    os.close(fds[0])
    time.sleep(0.2)
    return sock.sendall(b"fd[10]: Test-Virus FOUND\0" if b"VIRUS" in head else b"fd[10]: OK\0")


class Reloading:
    """Changes a table, then a setting, and reloads, until the end of the block."""

    def __init__(self, system: Any, settings: dict[str, dict[str, Any]]) -> None:
        self._system, self._settings = system, settings
        self._end = threading.Event()
        self.errors: list[BaseException] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()

    def _run(self) -> None:
        number = 0
        daemon = self._system.daemon
        try:
            while not self._end.is_set():
                number += 1
                if number % 2:
                    self._replace(daemon.directory / "control" / "clamavclients", f"@protected.example\n@{number}.x\n")
                else:
                    self._settings["signatures"] = {"thread_above": 1000 + number}
                    daemon.configure(self._settings)
                daemon.reload()
                daemon.wait_for("worker.reload", number)
        except BaseException as error:
            self.errors.append(error)

    @staticmethod
    def _replace(path: Path, text: str) -> None:
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").replace(path)


def snapshots(pid: int) -> int:
    """Table snapshots that a worker has mapped: one for each application that is open."""
    return sum("tables.snapshot" in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())


def late(system: Any) -> hook.Answer | None:
    """A hook that connects, and sends its request several reloads later."""
    with Offer(system.daemon.socket) as once:
        time.sleep(0.4)
        return once.send(HEAD + b"late\n").answer()


def test_reloads_all_the_time_harm_no_message(make_system: Any, tmp_path: Path) -> None:
    with Peer(tmp_path, slowly, read_clamd) as clamd:
        settings = {"service": {"workers": 1, "max_in_flight": 3}, "spamd": {"backends": []}}
        system = make_system(clamd=clamd, settings=settings, controls={"clamavclients": "@protected.example\n"})
        settings |= {"origin": {"smtp_users": [str(os.getuid())], "bounce_users": []}}
        settings |= {"clamd": {"backends": [clamd.backend], "proof": 0.0}}
        reloading = Reloading(system, settings)

        def one(number: int) -> tuple[int, bool, tuple[int, list[int], str]]:
            size, virus = SIZES[number % len(SIZES)], number % 3 == 0
            message = HEAD + b"VIRUS " * virus + os.urandom(8).hex().encode() + b"x" * size
            split = number % 2 == 0
            done = system.deliver(message, PROTECTED, *([ELSEWHERE] if split else []))
            assert all(each.message.endswith(message) for each in done.queued)
            return (
                number,
                split,
                (done.status, sorted(each.envelope_bytes.count(b"\0T") for each in done.queued), done.text[:1]),
            )

        with reloading(), ThreadPoolExecutor(8) as threads:
            lates = [threads.submit(late, system) for _ in range(3)]
            results = list(threads.map(one, range(60)))
            answers = [each.result(60) for each in lates]
        assert reloading.errors == []
        for number, split, result in results:
            if number % 3:
                assert result == (0, [1, 1] if split else [1], ""), number
            elif split:  # kept for the protected recipient, delivered to the other
                assert result == (0, [1], ""), number
            else:
                assert (result[0], result[1]) == (82, []), number
                assert result[2] == "D", number
        assert [each.action for each in answers if each] == [Action.QUEUE] * 3
        assert len(system.daemon.log("worker.reload")) > 10
        assert system.daemon.log("intake.internal-error") == []
        assert {line["results"] is not None for line in system.daemon.log("mail.report")} == {True}
        (worker,) = system.daemon.workers()
        until(lambda: snapshots(worker) == 1, "only the newest application is open")


def test_a_message_that_waits_for_a_slot_outlives_the_configuration_it_came_under(
    make_system: Any, tmp_path: Path
) -> None:
    with Peer(tmp_path, slowly, read_clamd) as clamd:
        system = make_system(
            clamd=clamd,
            settings={"service": {"workers": 1, "max_in_flight": 1}},
            controls={"clamavclients": "@protected.example\n"},
        )
        offers = [Offer(system.daemon.socket) for _ in range(6)]
        block = b"Fa@b\0T" + PROTECTED + b"\0\0"
        for number, each in enumerate(offers):
            each.send(HEAD + b"%d" % number, block)
        for number in range(3):
            system.daemon.reload()
            system.daemon.wait_for("worker.reload", number + 1)
        said = [each.answer() for each in offers]
        for each in offers:
            each.close()
        assert [answer.action for answer in said if answer] == [Action.QUEUE] * 6
        assert system.daemon.log("intake.internal-error") == []
