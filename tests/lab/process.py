"""Real daemons for tests, demo and benchmark: start, wait until they answer, stop; none outlives this process."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Self

from lab.lifeline import end_with_us


def exit_on_sigterm() -> None:
    """Turn SIGTERM into SystemExit, so that a program of the bench stops its daemons and removes its directories."""
    signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


class MissingProgramError(Exception):
    """A Debian package with a required program is not installed."""


class NotStartedError(Exception):
    """The daemon exited or did not answer in time; the text ends with its log."""


def find_program(name: str, package: str) -> str:
    """Return the full path of ``name``, also from sbin. Raises MissingProgramError, which names ``package``."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if found is None:
        raise MissingProgramError(f"{name} is not installed: apt-get install {package}")
    return found


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def user_who_reaches(directory: Path, *names: str) -> str | None:
    """As root, return the first of ``names`` that exists, if others can reach ``directory``. None: keep the user."""
    if os.geteuid() or not all(parent.stat().st_mode & 0o001 for parent in directory.resolve().parents):
        return None
    for name in names:
        try:
            pwd.getpwnam(name)
        except KeyError:
            continue
        return name
    return None


def own_name() -> str | None:
    """The name of the user who runs this; None for a uid without a row in passwd, as containers have them."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return None


class Daemon(ABC):
    """Daemon that runs in the foreground as a child: its pid, its log, and the ways to end it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def start(self) -> Self:
        """Start it with :meth:`launch`. Returns itself."""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def launch(self, command: Sequence[str], answers: Callable[[], bool], seconds: float = 30.0) -> None:
        """Start ``command`` and wait until ``answers`` is true. Raises NotStartedError."""
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        end_with_us(self._process.pid)
        end = time.monotonic() + seconds
        while not answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise NotStartedError(f"{command[0]}: no answer\n{self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        """Send a signal to the daemon only, not to its children."""
        os.kill(self.pid, number)

    def stop(self, seconds: float = 10.0) -> None:
        """SIGTERM, and SIGKILL after ``seconds``."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def kill(self) -> None:
        """SIGKILL the daemon and its children. Safe to call twice."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)  # it leads a session of its own
        except ProcessLookupError:
            pass
        self._process.wait()
        self._process = None


class ScannerDaemon(Daemon):
    """Scanner on a Unix socket in its directory and on a TCP port; ``backend`` and ``tcp_backend`` as in settings."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.socket = str(directory / "scanner.sock")
        self.tcp = ("127.0.0.1", free_port())
        self.backend = f"unix:{self.socket}"
        self.tcp_backend = f"tcp:{self.tcp[0]}:{self.tcp[1]}"


def ask(address: str | tuple[str, int], question: bytes, seconds: float = 5.0) -> bytes:
    """Send ``question`` and return the answer up to the end of input; b"" if there is none."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(seconds)
        try:
            sock.connect(address)
            sock.sendall(question)
            answer = b""
            while more := sock.recv(4096):
                answer += more
        except OSError:
            return b""
        return answer
