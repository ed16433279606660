"""``contentfilter top`` on the real system: a live screen on a terminal, plain lines elsewhere."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from typing import Any

import pytest
from e2e import mails
from lab.clamd import Clamd
from lab.system import System

WAIT = 30.0
PROTECTED = b"virus-only@mixed.example"


def words(system: System, *more: str) -> list[str]:
    return [sys.executable, "-P", "-m", "contentfilter", "--config", str(system.daemon.config), "top", *more]


class Screen:
    """A top on a terminal of 40 lines and 160 columns."""

    def __init__(self, system: System) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
        self.before = termios.tcgetattr(self.master)
        environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *words(system, "--interval", "0.2")],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environ | {"TERM": "xterm"},
        )
        self.output = b""

    def read(self) -> str:
        """All so far, without colours."""
        while select.select([self.master], [], [], 0.05)[0]:
            try:
                self.output += os.read(self.master, 65_536)
            except OSError:
                break
        return re.sub(r"\x1b\[[0-9;]*m", "", self.output.decode())

    def until(self, text: str, do: Callable[[], Any] = lambda: None) -> None:
        end = time.monotonic() + WAIT
        while text not in self.read():
            assert time.monotonic() < end, self.output[-4000:]
            do()

    def end(self) -> int:
        end = time.monotonic() + WAIT
        while self.process.poll() is None:
            assert time.monotonic() < end
            self.read()
        return self.process.returncode

    def restored(self) -> bool:
        """Echo and lines are as they were, the cursor is there, and the screen before is back."""
        return termios.tcgetattr(self.master)[3] == self.before[3] and self.read().rstrip().endswith("\x1b[?1049l")


@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "Ctrl-C"])
def test_a_live_screen_with_rates_and_decisions_ends_with_a_key_and_leaves_the_terminal_as_it_was(
    make_system: Callable[..., System], clamd: Clamd, key: bytes
) -> None:
    system = make_system(clamd=clamd)
    screen = Screen(system)
    try:
        screen.until("worker 0 pid")
        screen.until("Eicar-Test-Signature", lambda: system.deliver(mails.VIRUS, PROTECTED))
        screen.until("sender@example.net -> virus-only@mixed.example")
        screen.until("mail is flowing")
        assert re.search(r"clamd: [0-9.]+/s, median [0-9.]+ ms", screen.read())
        os.write(screen.master, key)
        assert screen.end() == 0
        assert screen.restored()
    finally:
        screen.process.kill()
        screen.process.wait()
        os.close(screen.master)


def test_it_stays_while_the_daemon_is_away_and_says_so(make_system: Callable[..., System]) -> None:
    system = make_system()
    screen = Screen(system)
    try:
        screen.until("no mail since the start")
        assert system.daemon.stop() == 0
        screen.until("the daemon does not answer")
        screen.output = b""
        system.daemon.start()
        screen.until("no mail since the start")
        os.write(screen.master, b"q")
        assert screen.end() == 0
    finally:
        screen.process.kill()
        screen.process.wait()
        os.close(screen.master)


def test_once_prints_a_screen_without_a_terminal(make_system: Callable[..., System], clamd: Clamd) -> None:
    system = make_system(clamd=clamd)
    with subprocess.Popen(words(system, "--once", "--interval", "3"), stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            system.deliver(mails.VIRUS, PROTECTED)
        assert process.stdout is not None
        text = process.stdout.read()
    assert process.returncode == 0
    assert text.startswith("mail is flowing\n")
    assert re.search(r"^last [0-9]+ s: [0-9.]+/s, .*\(reject [0-9.]+/s\)$", text, re.MULTILINE)
    assert "Eicar-Test-Signature" in text
    assert "\x1b" not in text


def test_json_is_one_object_in_a_line_until_the_reader_goes(make_system: Callable[..., System]) -> None:
    system = make_system()
    command = words(system, "--json", "--interval", "0.2")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            found = [json.loads(process.stdout.readline()) for _ in range(2)]
            process.stdout.close()
            assert process.wait(WAIT) == 0
            assert process.stderr.read() == b""
        finally:
            process.kill()
    assert [each["glance"]["ok"] for each in found] == [True, True]
    assert found[1]["rates"]["seconds"] > found[0]["rates"]["seconds"]
    assert found[1]["status"]["state"] == "ready"


def test_an_interrupt_ends_plain_output_without_a_word(make_system: Callable[..., System]) -> None:
    system = make_system()
    command = words(system, "--interval", "0.2")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT) == 0
        assert process.stderr.read() == b""
