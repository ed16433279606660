"""A real ``contentfilter serve`` in a directory of its own, as a context manager.

Without pytest, so that demo and bench use it too. Readiness comes from sd_notify on a real datagram
socket; log lines are read from the daemon's stderr as they come, so a test waits for an event, never for time.
"""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lab import watchdog
from lab.lifeline import end_with_us

import contentfilter

WAIT = 30.0  # seconds for anything a daemon is expected to do
PACKAGE = Path(contentfilter.__file__).resolve().parents[1]  # the daemon runs the very package under test

Table = Mapping[str, Mapping[str, Any]]


def toml(settings: Table) -> str:
    """Settings as TOML. Strings, numbers, booleans and lists of them."""
    lines = []
    for section, keys in settings.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()]
    return "\n".join(lines) + "\n"


def _zombie(pid: str) -> bool:
    """Ended, but not reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _helper(pid: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"contentfilter.receiver" in words or b"contentfilter.bus.publisher" in words


class Daemon:
    """Started by :meth:`start` or ``with``; stopped and checked for tracebacks at the end.

    ``command``: what to run instead of ``contentfilter --config FILE serve``; the file's path is appended.
    ``activated``: a listening socket is passed as systemd would. ``watchdog``: seconds, 0 for none.
    """

    def __init__(
        self,
        settings: Table | None = None,
        *,
        directory: Path | None = None,
        command: Sequence[str] = (),
        options: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        activated: bool = False,
        watchdog: float = 0.0,
        tracebacks_allowed: bool = False,
    ) -> None:
        self._own_directory = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="cf-", dir="/tmp"))
        self.socket = str(self.directory / "queue.sock")
        self.config = self.directory / "contentfilter.toml"
        self._command, self._options = tuple(command), tuple(options)
        self._environ = dict(environ or {})
        self._activated = activated
        self._watchdog = watchdog
        self._tracebacks_allowed = tracebacks_allowed
        self._settings: Table = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._listener: socket.socket | None = None
        self._notify: socket.socket | None = None
        self.notifications: list[dict[str, str]] = []
        self.configure(settings or {})

    # Configuration

    def configure(self, settings: Table) -> None:
        """Write the file; sections given here are merged over the directory's own."""
        for name in ("state", "control"):
            (self.directory / name).mkdir(mode=0o700 if name == "state" else 0o755, exist_ok=True)
        base: dict[str, dict[str, Any]] = {
            "listen": {"socket": self.socket},
            "http": {"listen": "off"},
            "canary": {"enabled": False},
            "service": {
                "workers": 2,
                "run": str(self.directory),
                "state": str(self.directory / "state"),
                "control": str(self.directory / "control"),
                "heartbeat": 0.2,
            },
        }
        for section, keys in settings.items():
            base.setdefault(section, {}).update(keys)
        self._settings = base
        self.write_config(toml(base))

    def write_config(self, text: str) -> None:
        self.config.write_text(text)

    # Life

    def start(self, *, wait: bool = True) -> "Daemon":
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        path = self.directory / "notify.sock"
        path.unlink(missing_ok=True)
        self._notify.bind(str(path))
        words, environ = self.command()
        self._process = self._activate(words, environ) if self._activated else self._popen(words, environ)
        end_with_us(self._process.pid)
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        if wait:
            self.wait_notified("READY", "1")
        return self

    def command(self) -> tuple[list[str], dict[str, str]]:
        """Command line of :meth:`start`, and its environment."""
        environ = {**os.environ, "NOTIFY_SOCKET": str(self.directory / "notify.sock"), **self._environ}
        watched = str(Path(__file__).with_name("watched")) if watchdog.REPORT in environ else ""
        paths = (environ.get("PYTHONPATH", ""), watched, str(PACKAGE))  # a test may have a sitecustomize of its own
        environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        if self._watchdog:
            environ["WATCHDOG_USEC"] = str(int(self._watchdog * 1_000_000))
        command = self._command or (sys.executable, "-P", "-m", "contentfilter", "--config")
        return [*command, str(self.config)] + (
            [] if self._command else ["serve", "--allow-root", *self._options]
        ), environ

    def _popen(self, words: list[str], environ: dict[str, str], **more: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(words, env=environ, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, **more)

    def _activate(self, words: list[str], environ: dict[str, str]) -> subprocess.Popen[bytes]:
        """Descriptor 3 is the socket; the pid is known only after the fork, so a shell sets it and execs."""
        if self._listener is None:
            Path(self.socket).unlink(missing_ok=True)
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._listener.bind(self.socket)
            self._listener.listen(64)
        fd = self._listener.fileno()
        script = f'exec 3<&{fd}; [ {fd} = 3 ] || exec {fd}<&-; LISTEN_PID=$$ exec "$@"'
        environ |= {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "queue"}
        return self._popen(["bash", "-c", script, "sh", *words], environ, pass_fds=(fd,))

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        for raw in process.stderr:
            try:
                line = json.loads(raw)
            except ValueError:
                line = {"event": "text", "text": raw.decode("utf-8", "replace").rstrip("\n")}
            with self._news:
                self._lines.append(line)
                self._news.notify_all()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def workers(self) -> list[int]:
        """The pids of the workers."""
        text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(word) for word in text.split() if not _zombie(word) and not _helper(word)]

    def feed(self) -> int | None:
        """The pid of the process that publishes events."""
        for word in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            if not _zombie(word) and b"contentfilter.bus.publisher" in Path(f"/proc/{word}/cmdline").read_bytes():
                return int(word)
        return None

    def reload(self) -> None:
        """SIGHUP. Wait for what it brings with :meth:`wait_for`."""
        os.kill(self.pid, signal.SIGHUP)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def use(self, package: Path) -> None:
        """From the next start on, run the package that lies in this directory."""
        self._environ["PYTHONPATH"] = str(package)

    def wait_exit(self, seconds: float = WAIT) -> int:
        """The exit status, once the daemon is gone and its log is read (its workers' too)."""
        assert self._process is not None
        status = self._process.wait(seconds)
        self._reader.join(seconds)
        if self._reader.is_alive():
            raise TimeoutError("somebody still holds the daemon's stderr")
        return status

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        assert self._process is not None
        if self._process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.wait_exit()

    def kill(self) -> None:
        """SIGKILL the supervisor only."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(WAIT)

    # What it says

    def log(self, event: str | None = None) -> list[dict[str, Any]]:
        """The lines so far, those of one event if named."""
        with self._news:
            return [line for line in self._lines if event in (None, line.get("event"))]

    def wait_for(
        self, event: str, count: int = 1, *, where: Callable[[dict[str, Any]], bool] = lambda line: True
    ) -> list[dict[str, Any]]:
        """Wait until ``count`` lines of ``event`` are in the log."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self._lines if line.get("event") == event and where(line)]

        with self._news:
            if not self._news.wait_for(lambda: len(found()) >= count, WAIT):
                raise TimeoutError(f"{len(found())} of {count} lines {event}; the log:\n{self._tail()}")
            return found()

    def wait_notified(self, name: str, value: str | None = None) -> dict[str, str]:
        """The next datagram to the service manager with ``name``."""
        assert self._notify is not None
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            if not select.select([self._notify], [], [], 0.2)[0]:
                if self._process is not None and self._process.poll() is not None:
                    self._reader.join(5)
                    raise RuntimeError(f"exited with {self._process.returncode}:\n{self._tail()}")
                continue
            words = self._notification()
            if name in words and value in (None, words[name]):
                return words
        raise TimeoutError(f"no {name} from the daemon; the log:\n{self._tail()}")

    def notified_now(self) -> list[dict[str, str]]:
        """The datagrams that have arrived and were not read yet."""
        found = []
        assert self._notify is not None
        while select.select([self._notify], [], [], 0)[0]:
            found.append(self._notification())
        return found

    def _notification(self) -> dict[str, str]:
        assert self._notify is not None
        words = dict(line.split("=", 1) for line in self._notify.recv(65536).decode().split("\n"))
        self.notifications.append(words)
        return words

    def _tail(self) -> str:
        return "\n".join(json.dumps(line) for line in self._lines[-40:])

    def tracebacks(self) -> list[dict[str, Any]]:
        """Lines that show a defect."""
        return [line for line in self.log() if "exception" in line or "Traceback" in line.get("text", "")]

    def __enter__(self) -> "Daemon":
        try:
            return self.start()
        except BaseException:
            self.clean()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
            if kind is None and not self._tracebacks_allowed and (found := self.tracebacks()):
                raise AssertionError(f"traceback in the log: {found}")
        finally:
            self.clean()

    def clean(self) -> None:
        """End what still runs and remove the directory; ``with`` does this."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._notify is not None:
            self._notify.close()
        if self._listener is not None:
            self._listener.close()
        if self._own_directory:
            shutil.rmtree(self.directory, ignore_errors=True)
