"""The hook under test: building it, handing messages over as qmail-smtpd does, and a scripted daemon for it."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lab.compiler import compiled
from lab.lifeline import end_with_us

from contentfilter.wire import hook as wire

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "queue_hook").glob("*.c"))
STRICT = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
LAYOUT = ["-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections", "-Wl,-z,noseparate-code"]
COMPILERS = {
    "musl": ["musl-gcc", *STRICT, "-static", *LAYOUT, "-Wl,-z,norelro"],
    "gcc": ["gcc", *STRICT, "-static", *LAYOUT],
    "clang": ["clang", *STRICT],
    "impatient": ["gcc", *STRICT, "-DGRACE_MS=300", "-DABORT_MS=300", "-DREADING_S=1"],
    "impatient static": ["musl-gcc", *STRICT, "-static", "-DGRACE_MS=300", "-DABORT_MS=300", "-DREADING_S=1"],
    "sanitize": ["gcc", *STRICT, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
Variant = Literal["musl", "gcc", "clang", "impatient", "impatient static", "sanitize"]
Kind = Literal["closed", "pipe", "read end", "full pipe", "deaf pipe", "socket", "file"]
GCOV = os.environ.get("CONTENTFILTER_GCOV", "")  # `make coverage`: the directory where every hook adds its counts
# gcov counts at exit(), which the hook does without. One C library and no sanitizers, so all have the same branches.
COUNTED = ["-O0", "--coverage", "-fprofile-update=atomic", "-D_exit=exit"]
FINAL = 30.0  # seconds after which a test that waits has failed


def build(directory: Path, variant: Variant | None = None, *, counts: bool = bool(GCOV)) -> Path:
    """Compile the hook into ``directory`` if it is missing there. Default: the variant that a user would get.

    ``counts=False``: without gcov, for tests in which each system call fails in turn: gcov's own would be among them.
    """
    variant = variant or ("musl" if shutil.which("musl-gcc") else "gcc")
    name = f"contentfilter-queue-{variant.replace(' ', '-')}"
    if counts:
        return compiled(directory, f"{name}-counted", [*_counted(variant), *SOURCES])
    return compiled(directory, name, [*COMPILERS[variant], *SOURCES])


def _counted(variant: Variant) -> list[str]:
    """The command that compiles the same hook with gcov, which counts in a directory of this build."""
    times = [word for word in COMPILERS[variant] if word.startswith("-D")]
    compiler = "musl-gcc" if shutil.which("musl-gcc") else "gcc"
    counts = Path(GCOV) / variant.replace(" ", "-")
    counts.mkdir(exist_ok=True)
    counts.chmod(0o1777)  # some hooks run as another user
    return [compiler, *STRICT, *times, "-static", *COUNTED, "-dumpdir", f"{counts}/"]


@dataclass(frozen=True, slots=True)
class HookResult:
    status: int  # negative: the signal that ended it
    pid: int
    stderr: bytes
    texts: dict[int, bytes]  # contents of the pipes and files that were given as descriptors


class HookProcess:
    """A hook that runs: message and envelope are written to it as qmail-smtpd would."""

    def __init__(
        self,
        program: Path,
        message: bytes,
        envelope: bytes,
        environ: Mapping[str, str],
        fds: Mapping[int, Kind],
        directory: Path,
        arguments: tuple[str, ...] = (),
    ) -> None:
        self._kept: list[int] = []
        self._readers: dict[int, int] = {}
        children: dict[int, int] = {}
        message_end, envelope_end = os.pipe(), os.pipe()
        plan: dict[int, Kind] = {2: "pipe", **fds}
        actions: list[tuple[Any, ...]] = []
        for number, end in ((0, message_end[0]), (1, envelope_end[0])):
            if plan.get(number) != "closed":
                children[number] = end
        for number, kind in plan.items():
            if kind == "closed":
                actions.append((os.POSIX_SPAWN_CLOSE, number))
            elif number > 1:
                children[number] = self._make(number, kind, directory)
        # Above every number that is given, so that no dup2 overwrites the source of another.
        high = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 200) for number, fd in children.items()}
        actions += [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in high.items()]
        self.pid = os.posix_spawn(
            program, [str(program), *arguments], dict(environ), file_actions=actions, setsigdef=[signal.SIGPIPE]
        )
        end_with_us(self.pid)
        for fd in (*high.values(), *children.values()):
            os.close(fd)
        for number, fd in ((0, message_end[0]), (1, envelope_end[0])):
            if number not in children:
                os.close(fd)
        self._writer = threading.Thread(
            target=_write, args=(message_end[1], message, envelope_end[1], envelope), daemon=True
        )
        self._writer.start()

    def _make(self, number: int, kind: Kind, directory: Path) -> int:
        if kind == "file":
            path = directory / f"fd{number}"
            self._readers[number] = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            return os.open(path, os.O_WRONLY)
        if kind == "socket":
            ours, theirs = socket.socketpair()
            self._readers[number] = ours.detach()
            return theirs.detach()
        reader, writer = os.pipe()
        if kind == "read end":
            self._kept.append(writer)
            return reader
        if kind == "deaf pipe":  # its reader is gone
            os.close(reader)
            return writer
        if kind == "full pipe":
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
            os.write(writer, b"x" * 4096)
        self._readers[number] = reader
        return writer

    def kill(self, sig: int = signal.SIGKILL) -> None:
        os.kill(self.pid, sig)

    def wait(self, seconds: float = FINAL) -> HookResult:
        """Its end. A hook that is still there after ``seconds`` is killed and the test fails."""
        pidfd = os.pidfd_open(self.pid)
        try:
            with contextlib.closing(_Poll(pidfd)) as poll:
                if not poll.ready(seconds):
                    self.kill()
                    os.waitpid(self.pid, 0)
                    raise AssertionError(f"the hook is still there after {seconds} s")
        finally:
            os.close(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        texts = {number: _read_all(fd) for number, fd in self._readers.items()}
        for fd in self._kept:
            os.close(fd)
        self._writer.join(FINAL)
        return HookResult(status, self.pid, texts.pop(2, b""), texts)


class _Poll:
    def __init__(self, fd: int) -> None:
        import select

        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def ready(self, seconds: float) -> bool:
        return bool(self._poll.poll(seconds * 1000))

    def close(self) -> None:
        pass


def _write(message_fd: int, message: bytes, envelope_fd: int, envelope: bytes) -> None:
    for fd, data in ((message_fd, message), (envelope_fd, envelope)):
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        except BrokenPipeError:
            pass  # it may leave without reading; Python ignores SIGPIPE as qmail-smtpd does
        finally:
            os.close(fd)


def _read_all(fd: int) -> bytes:
    os.set_blocking(fd, False)
    parts = []
    try:
        while part := os.read(fd, 65536):
            parts.append(part)
    except BlockingIOError:
        pass
    os.close(fd)
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Raw:
    """A packet as it is. ``fds`` go along and are closed then; ``body`` goes along in a sealed memfd."""

    packet: bytes
    body: bytes | None = None
    fds: tuple[int, ...] = ()


CLOSE = "close"  # take the request, close without an answer
SILENT = "silent"  # take the request and never answer

Reply = wire.Answer | Raw | Literal["close", "silent"]


@dataclass(frozen=True, slots=True)
class Offer:
    """Request of the hook, and the facts about its sender."""

    request: wire.Request
    message: bytes  # the first MiB
    digest: str  # SHA-256 of the whole
    envelope: bytes
    seals: int  # of the message's descriptor; -1 where it is no memfd
    pid: int
    uid: int
    links: int  # names that the message's file has


def accepted(prepend: bytes = b"") -> wire.Answer:
    """Queue it for all, with this in front."""
    return wire.Answer(wire.Action.QUEUE, submissions=(wire.Submission(prepend),))


def split(*submissions: wire.Submission) -> wire.Answer:
    return wire.Answer(wire.Action.QUEUE, submissions=submissions)


def sealed(body: bytes) -> int:
    fd = os.memfd_create("answer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(body)
    while view:
        view = view[os.write(fd, view) :]
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


class FakeDaemon:
    """Answers the n-th offer with the n-th reply; the last one is repeated."""

    def __init__(
        self,
        path: Path,
        *replies: Reply | Callable[[Offer], Reply],
        backlog: int = 16,
        handle: Callable[[int], object] = lambda fd: None,
    ) -> None:
        """``handle`` gets each descriptor that came with an offer."""
        self.path = path
        self._handle = handle
        self.replies = replies
        self.offers: list[Offer] = []
        self.reports: list[wire.CommitReport] = []
        self._changed = threading.Condition()
        self._open: list[socket.socket] = []
        self._serving = 0
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        path.chmod(0o666)
        self._listener.listen(backlog)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> "FakeDaemon":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """As a daemon that dies: the listener and every connection close, the path stays."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(FINAL)
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def wait(self, offers: int = 0, reports: int = 0) -> None:
        """Wait until ``offers`` requests and ``reports`` reports have arrived."""
        with self._changed:
            done = self._changed.wait_for(lambda: len(self.offers) >= offers and len(self.reports) >= reports, FINAL)
        assert done, f"{len(self.offers)} offers and {len(self.reports)} reports after {FINAL} s"

    def settle(self) -> None:
        """Until it has heard everything that those said who are gone."""
        with self._changed:
            assert self._changed.wait_for(lambda: not self._serving, FINAL), "somebody is still connected"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            with self._changed:
                self._serving += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            offer = _take(connection, self._handle)
            with self._changed:
                reply = self.replies[min(len(self.offers), len(self.replies) - 1)]
                self.offers.append(offer)
                self._changed.notify_all()
            if callable(reply):
                reply = reply(offer)
            if reply == CLOSE:
                connection.shutdown(socket.SHUT_RDWR)
            elif reply != SILENT:
                self._answer(connection, reply)
        except OSError:
            pass  # stopped, or the hook is gone
        finally:
            with self._changed:
                self._serving -= 1
                self._changed.notify_all()

    def _answer(self, connection: socket.socket, reply: Any) -> None:
        if isinstance(reply, wire.Answer):
            encoded = wire.encode_answer(reply)
            reply = Raw(encoded.packet, encoded.body)
        fds = list(reply.fds)
        if reply.body is not None:
            fds.append(sealed(reply.body))
        socket.send_fds(connection, [reply.packet], fds)
        for fd in fds:
            os.close(fd)
        packet = connection.recv(65536)
        if packet:
            with self._changed:
                self.reports.append(wire.decode_report(packet))
                self._changed.notify_all()


def _take(connection: socket.socket, handle: Callable[[int], object]) -> Offer:
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    packet, fds, flags, _ = socket.recv_fds(connection, wire.REQUEST_MAX + 1, 8)
    if not packet:
        raise ConnectionResetError
    assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
    request = wire.decode_request(packet)
    message, envelope = fds
    digest = hashlib.sha256()
    at, first = 0, b""
    while part := os.pread(message, 1 << 20, at):
        first = first or part
        at += len(part)
        digest.update(part)
    assert at == request.message_size
    content = os.pread(envelope, request.envelope_size + 1, 0)
    assert len(content) == request.envelope_size
    try:
        seals = fcntl.fcntl(message, fcntl.F_GET_SEALS)
    except OSError:
        seals = -1
    links = os.fstat(message).st_nlink
    # As clamd does: leave the shared position somewhere else.
    os.lseek(message, 3, os.SEEK_SET)
    os.lseek(envelope, 1, os.SEEK_SET)
    for fd in fds:
        handle(fd)
        os.close(fd)
    return Offer(request, first, digest.hexdigest(), content, seals, pid, uid, links)


@dataclass
class HookLab:
    """A hook, a stand-in behind it, a place for the daemon's socket, and the configuration that joins them."""

    directory: Path
    program: Path
    standin: Any  # lab.standin.Standin
    daemons: list[FakeDaemon] = field(default_factory=list)

    @property
    def socket(self) -> Path:
        return self.directory / "queue.sock"

    def daemon(self, *replies: Reply | Callable[[Offer], Reply]) -> FakeDaemon:
        daemon = FakeDaemon(self.socket, *replies)
        self.daemons.append(daemon)
        return daemon

    def configure(self, **settings: object) -> Path:
        """Write queue.conf; the socket and the stand-in are given, the rest are the built-in defaults."""
        values = {"socket": self.socket, "queue": self.standin.program, "budget": 20} | settings
        path = self.directory / "queue.conf"
        unfinished = path.with_suffix(".new")  # other hooks may be reading it
        unfinished.write_text("".join(f"{name} {value}\n" for name, value in values.items()))
        return unfinished.replace(path)

    def start(
        self,
        message: bytes = b"Subject: test\n\nhello\n",
        envelope: bytes = b"Fsender@example.org\0Trecipient@example.com\0\0",
        *,
        env: Mapping[str, str] | None = None,
        knobs: Mapping[str, str] | None = None,
        fds: Mapping[int, Kind] | None = None,
        arguments: tuple[str, ...] = (),
        program: Path | None = None,
        **settings: object,
    ) -> HookProcess:
        environ = {"CONTENTFILTER_QUEUE_CONF": str(self.configure(**settings))}
        environ |= self.standin.environ(**(knobs or {})) | dict(env or {})
        return HookProcess(program or self.program, message, envelope, environ, fds or {}, self.directory, arguments)

    def run(self, *args: Any, **options: Any) -> HookResult:
        return self.start(*args, **options).wait()

    def close(self) -> None:
        for daemon in self.daemons:
            daemon.stop()


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for what another process does and nobody reports."""
    end = time.monotonic() + FINAL
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)
