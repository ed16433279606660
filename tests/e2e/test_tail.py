"""``contentfilter tail`` on the real system: what it prints, what it omits, and how it ends."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from e2e import mails
from lab.clamd import Clamd
from lab.system import System

WAIT = 30.0
NOBODY, PROTECTED = b"nobody@elsewhere.example", b"virus-only@mixed.example"


class Follower:
    """A tail that runs, and the lines that it has printed."""

    def __init__(self, system: System, *words: str) -> None:
        command = [sys.executable, "-P", "-m", "contentfilter", "--config", str(system.daemon.config), "tail", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._news = threading.Condition()
        self._threads = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self.process.stdout, self.lines), (self.process.stderr, self.errors))
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, file: Any, into: list[str]) -> None:
        for line in file:
            with self._news:
                into.append(line.rstrip("\n"))
                self._news.notify_all()

    def until(self, true: Callable[[], bool]) -> None:
        with self._news:
            assert self._news.wait_for(true, WAIT), (self.lines, self.errors)

    def end(self) -> int:
        """After it has ended by itself: its status, with all lines read."""
        status = self.process.wait(WAIT)
        for thread in self._threads:
            thread.join(WAIT)
        return status


@pytest.fixture
def follow(make_system: Callable[..., System], clamd: Clamd) -> Iterator[Callable[..., tuple[System, Follower]]]:
    """A system, and a tail on it that has got its first event (an unrelated one; lines are cleared)."""
    with ExitStack() as stack:

        def make(*words: str) -> tuple[System, Follower]:
            system = make_system(clamd=clamd)
            follower = Follower(system, *words)
            stack.callback(follower.process.wait, WAIT)
            stack.callback(follower.process.kill)
            return system, follower

        yield make


def deliver_until(system: System, follower: Follower, true: Callable[[], bool], message: bytes = mails.PLAIN) -> None:
    """A subscription takes a moment: the first messages may pass unseen."""
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end, (follower.lines, follower.errors)
        system.deliver(message, NOBODY)
        select.select([], [], [], 0.05)


def test_each_message_is_a_line_with_its_incident(follow: Callable[..., tuple[System, Follower]]) -> None:
    system, follower = follow()
    deliver_until(system, follower, lambda: bool(follower.lines))
    refused = system.deliver(mails.VIRUS, PROTECTED)
    follower.until(lambda: any("reject" in line for line in follower.lines))
    (line,) = [line for line in follower.lines if "reject" in line]
    assert "sender@example.net -> virus-only@mixed.example" in line
    incident = line.rpartition("[")[2].rstrip("]")
    assert f"[{incident}]" in refused.text
    assert "clamd: Eicar-Test-Signature" in line


def test_filters_let_only_what_was_asked_for_through(follow: Callable[..., tuple[System, Follower]]) -> None:
    words = ("--decision", "reject", "--sender", "@example.net", "--recipient", "*mixed*", "--event", "mail.done")
    system, follower = follow(*words, "--origin", "stranger", "--rule", "eicar", "--count", "1", "--json")
    end = time.monotonic() + WAIT
    while follower.process.poll() is None:
        assert time.monotonic() < end
        system.deliver(mails.PLAIN, PROTECTED)
        system.deliver(mails.VIRUS, b"x@protected.example")  # the wrong recipient
        system.deliver(mails.VIRUS, PROTECTED, sender=b"s@other.example")  # the wrong sender
        system.deliver(mails.VIRUS, PROTECTED)
    assert follower.end() == 0
    (line,) = follower.lines
    found = json.loads(line)
    assert (found["decision"], found["sender"]) == ("reject", "sender@example.net")
    assert found["recipients"] == [PROTECTED.decode()]
    assert abs(found["time"] - time.time()) < WAIT


def test_verbose_tells_the_story(follow: Callable[..., tuple[System, Follower]]) -> None:
    system, follower = follow("-v")
    deliver_until(system, follower, lambda: any(line.startswith("    decision") for line in follower.lines))
    assert any("nothing to check" in line for line in follower.lines)


def test_it_follows_the_daemon_into_its_next_life_and_says_so(follow: Callable[..., tuple[System, Follower]]) -> None:
    system, follower = follow()
    deliver_until(system, follower, lambda: bool(follower.lines))
    assert system.daemon.stop() == 0
    follower.until(lambda: any("the event feed has stopped" in line for line in follower.errors))
    before = len(follower.lines)
    system.daemon.start()
    follower.until(lambda: any("the event feed is back" in line for line in follower.errors))
    assert "contentfilter why --since" in follower.errors[-1]
    deliver_until(system, follower, lambda: len(follower.lines) > before)
    assert follower.process.poll() is None


def test_ctrl_c_ends_it_without_a_word(follow: Callable[..., tuple[System, Follower]]) -> None:
    system, follower = follow()
    deliver_until(system, follower, lambda: bool(follower.lines))
    follower.process.send_signal(signal.SIGINT)
    assert (follower.end(), follower.errors) == (0, [])


def test_it_ends_when_its_reader_goes_though_nothing_happens(make_system: Callable[..., System]) -> None:
    system = make_system()
    command = [sys.executable, "-P", "-m", "contentfilter", "--config", str(system.daemon.config), "tail"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            while not select.select([process.stdout], [], [], 0)[0]:
                system.deliver(mails.PLAIN, NOBODY)
            process.stdout.close()
            assert process.wait(WAIT) == 0
            assert process.stderr.read() == b""
        finally:
            process.kill()


def test_nothing_that_a_sender_wrote_drives_the_terminal(follow: Callable[..., tuple[System, Follower]]) -> None:
    system, follower = follow("-v")
    evil = b'a\x1b[2J\x07\r\n\x9b31m"\xe2\x80\xae@example.net'
    end = time.monotonic() + WAIT
    while not any("a?[2J" in line for line in follower.lines):
        assert time.monotonic() < end, follower.lines
        system.deliver(b"Subject: \x1b]0;x\x07\nMessage-Id: <\x1b[31m@x>\n\nx\n", NOBODY, evil, sender=evil)
    text = "\n".join(follower.lines)
    assert all(character == "\n" or character.isprintable() for character in text)
    assert max(map(len, follower.lines)) <= 400


def test_without_a_daemon_it_ends_immediately_with_the_remedy(make_system: Callable[..., System]) -> None:
    system = make_system()
    assert system.daemon.stop() == 0
    for command in ("tail", "top"):
        whole = [sys.executable, "-P", "-m", "contentfilter", "--config", str(system.daemon.config), command]
        done = subprocess.run(whole, capture_output=True, text=True, timeout=WAIT, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert "systemctl start contentfilter" in done.stderr


def test_it_has_no_use_for_more_than_a_look(follow: Callable[..., tuple[System, Follower]]) -> None:
    """A tail that is not read holds nobody up: the daemon answers mail all the same."""
    system, follower = follow()
    os.kill(follower.process.pid, signal.SIGSTOP)
    try:
        for _ in range(5):
            assert system.deliver(mails.PLAIN, NOBODY).status == 0
    finally:
        os.kill(follower.process.pid, signal.SIGCONT)
