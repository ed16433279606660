"""The whole thing in one directory: hook, daemon, strict stand-in for qmail-queue, real clamd and spamd.

Without pytest, so that tests, demo and bench start the same.
"""

import itertools
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lab import hook as hook_lab
from lab.clamd import Clamd
from lab.daemon import Daemon
from lab.hook import HookProcess, HookResult, Kind
from lab.spamd import Spamd
from lab.standin import Queued, Standin
from lab.standin import build as build_standin

from contentfilter.wire import envelope

SMTP = {"PROTO": "TCP", "TCPREMOTEIP": "192.0.2.7", "TCPREMOTEHOST": "mail.example.net"}


@dataclass(frozen=True, slots=True)
class Delivered:
    """Outcome of one message: the hook's status, its text, and what the stand-in queued."""

    status: int
    text: str
    stderr: str
    queued: tuple[Queued, ...]
    pid: int

    @property
    def only(self) -> Queued:
        assert len(self.queued) == 1, f"{len(self.queued)} submissions, status {self.status}, {self.text}"
        return self.queued[0]


def installed_hook() -> Path | None:
    """The hook that came with the wheel, beside this interpreter."""
    path = Path(sys.executable).with_name("contentfilter-queue")
    return path if path.exists() else None


class System:
    """``with System(directory, controls={...}) as system: system.deliver(...)``.

    ``directory`` must be short and open to other users' daemons. ``controls``: files of the control directory.
    ``settings``: sections of contentfilter.toml, over the ones that join the parts. ``command``: see Daemon.
    """

    def __init__(
        self,
        directory: Path,
        *,
        controls: Mapping[str, str] | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        clamd: Clamd | None = None,
        spamd: Spamd | None = None,
        environ: Mapping[str, str] | None = None,
        program: Path | None = None,
        command: Sequence[str] = (),
        activated: bool = False,
        tracebacks_allowed: bool = False,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        sections: dict[str, dict[str, Any]] = {
            "origin": {"smtp_users": [str(os.getuid())], "bounce_users": []},
            # a scripted clamd says OK to the test virus, too
            "clamd": {"backends": [clamd.backend] if clamd else [], "proof": 10.0 if isinstance(clamd, Clamd) else 0.0},
            "spamd": {"backends": [spamd.backend] if spamd else []},
        }
        for section, keys in (settings or {}).items():
            sections.setdefault(section, {}).update(keys)
        self.daemon = Daemon(
            sections,
            directory=directory,
            command=command,
            environ=environ,
            activated=activated,
            tracebacks_allowed=tracebacks_allowed,
        )
        for name, text in (controls or {}).items():
            self.control(name, text)
        self.program = program or hook_lab.build(directory)
        self.queue_program = build_standin(directory)
        self._runs = itertools.count(1)
        self._queued = Path(tempfile.mkdtemp(prefix="queued-", dir=self.directory))  # not of a system before us
        self._queued.chmod(0o755)

    def control(self, name: str, text: str) -> None:
        (self.directory / "control" / name).write_text(text)

    def queue_conf(self, **more: object) -> Path:
        values = {"socket": self.daemon.socket, "queue": self.queue_program, "budget": 60} | more
        path = self.directory / "queue.conf"
        unfinished = self.directory / f"queue.conf.{threading.get_ident()}"  # other hooks may be reading it
        unfinished.write_text("".join(f"{name} {value}\n" for name, value in values.items()))
        return unfinished.replace(path)

    def start_hook(
        self,
        message: bytes,
        recipients: Sequence[bytes] = (b"user@protected.example",),
        *,
        sender: bytes = b"sender@example.net",
        block: bytes | None = None,
        env: Mapping[str, str] | None = None,
        knobs: Mapping[str, str] | None = None,
        fds: Mapping[int, Kind] | None = None,
        **conf: object,
    ) -> tuple[HookProcess, Standin]:
        """A hook under way, and where its stand-in records. ``block``: the envelope's bytes as they are."""
        standin = Standin(self.queue_program, self._queued / str(next(self._runs)))
        environ = {"CONTENTFILTER_QUEUE_CONF": str(self.queue_conf(**conf)), **SMTP}
        environ |= standin.environ(**(knobs or {})) | dict(env or {})
        given: dict[int, Kind] = {6: "pipe", **(fds or {})}
        block = envelope.build(sender, tuple(recipients)) if block is None else block
        return HookProcess(self.program, message, block, environ, given, self.directory), standin

    def deliver(self, message: bytes, *recipients: bytes, **options: Any) -> Delivered:
        """Hand one message over, as notqmail's qmail-smtpd would, and wait for its end."""
        process, standin = self.start_hook(message, recipients or (b"user@protected.example",), **options)
        return self.delivered(process.wait(90), standin)

    @staticmethod
    def delivered(result: HookResult, standin: Standin) -> Delivered:
        text = result.texts.get(6, b"").decode("ascii")
        queued = tuple(standin.queued())
        return Delivered(result.status, text, result.stderr.decode("utf-8", "replace"), queued, result.pid)

    def records(self) -> list[dict[str, Any]]:
        """The one line per message, as logged so far."""
        return self.daemon.log("mail.done")

    def __enter__(self) -> Self:
        self.daemon.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.daemon.__exit__(*error)


@contextmanager
def scanners(directory: Path) -> Iterator[tuple[Clamd, Spamd]]:
    """Both real daemons below ``directory``."""
    with Clamd(directory / "clamd") as clamd, Spamd(directory / "spamd") as spamd:
        yield clamd, spamd
