"""Files: replaced atomically, read whole and bounded, and accessed from an event loop with a time limit."""

import asyncio
import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import msgspec

from contentfilter.errors import ConfigError, Problem
from contentfilter.threads import in_thread

T = TypeVar("T")
ANSWER_TIMEOUT = 10.0  # seconds for an operation on a small file
TRANSFER_TIMEOUT = 30.0  # seconds for one that reads or writes a whole table


def replace_file(
    path: str | os.PathLike[str], parts: Iterable[bytes], mode: int, owner: tuple[int, int] | None = None
) -> None:
    """Write beside ``path``, sync, rename, sync the directory: after a crash the old or the new file is there."""
    directory = os.path.dirname(path) or "."
    fd, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=directory)
    try:
        with open(fd, "wb") as file:
            file.writelines(parts)
            status = os.fstat(fd)
            if owner is not None and owner != (status.st_uid, status.st_gid):
                os.fchown(fd, *owner)
            os.fchmod(fd, mode)
            file.flush()
            os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(directory)


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Make what was just renamed or removed in ``directory`` last."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


MAX_PROBLEMS = 100  # per file; what is beyond is counted


class SourceState(msgspec.Struct, frozen=True):
    """State of a file or database that rows came from. Two equal ones mean that it need not be read again."""

    path: str
    mtime_ns: int = 0
    size: int = -1  # -1: there is no such file
    inode: int = 0
    fingerprint: str = ""  # of a database; empty where it has none, and must be read to know


class ProblemCollector:
    """Collects problems of one file and stops at :data:`MAX_PROBLEMS`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._found: list[Problem] = []
        self._more = 0
        self.errors = 0  # all that are not warnings
        self._more_are_warnings = True

    def add(self, line: int, text: str, *, warning: bool = False) -> None:
        """Note one; beyond the limit it is only counted."""
        self.errors += not warning
        if len(self._found) < MAX_PROBLEMS:
            self._found.append(Problem(self.path, line, text, warning))
        else:
            self._more += 1
            self._more_are_warnings &= warning

    def problems(self) -> tuple[Problem, ...]:
        """All of them, and one more where some were only counted."""
        if not self._more:
            return tuple(self._found)
        text = f"{self._more} more problems are not listed"
        return (*self._found, Problem(self.path, 0, text, self._more_are_warnings))


_TRIES = 5  # a file that changes under each of these reads is given up


def read_file(path: str, limit: int) -> tuple[bytes, SourceState]:
    """The whole file, and the state it was in; ``b""`` and size -1 where there is none.

    Raises ConfigError for a file that cannot be read, is not a regular file, or has more than ``limit`` bytes. Never
    waits for the other end of a FIFO, and opens no device: some act on being opened.
    """
    for _ in range(_TRIES):
        try:
            if not (stat.S_ISREG(mode := os.stat(path).st_mode) or stat.S_ISDIR(mode)):  # open() says more of these
                raise ConfigError((Problem(path, 0, "not a regular file"),))
            with open(path, "rb", opener=_open_nonblocking) as file:
                before = os.fstat(file.fileno())
                if not stat.S_ISREG(before.st_mode):
                    raise ConfigError((Problem(path, 0, "not a regular file"),))
                if before.st_size > limit:
                    text = f"{before.st_size} bytes; the limit is {limit}, and no file with more than that is read"
                    raise ConfigError((Problem(path, 0, text),))
                data = file.read(before.st_size + 1)
                after = os.fstat(file.fileno())
        except FileNotFoundError:
            return b"", SourceState(path)
        except OSError as e:
            raise ConfigError((Problem(path, 0, f"cannot read it: {e.strerror}"),)) from e
        if len(data) == before.st_size and _state(path, before) == _state(path, after):
            return data, _state(path, after)
    raise ConfigError((Problem(path, 0, "it keeps changing while it is read"),))


class FileAccess:
    """File operations of one sequence of work, each in a thread and with a time limit.

    A thread that a file system does not answer (NFS, a failing disk) cannot be interrupted, and nobody joins it. Until
    it returns, every further operation fails immediately with the same error: at most one thread is stuck, whatever
    is tried meanwhile, and nothing that was given up is overtaken by what was tried after it.
    """

    def __init__(self) -> None:
        self._pending: ConfigError | None = None  # the error of the operation in progress, should it not end

    async def run(self, path: str, call: Callable[[], T], timeout: float = ANSWER_TIMEOUT) -> T:
        """Return or raise the result of ``call``; ConfigError that names ``path`` if there is none in time."""
        if self._pending is not None:
            raise self._pending
        self._pending = silent = ConfigError((Problem(path, 0, f"it did not answer within {timeout:g} s"),))
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                return await in_thread(partial(self._finish, call))
        except TimeoutError as e:
            raise (silent if limit.expired() else e) from None
        except RuntimeError as e:
            self._pending = None
            raise ConfigError((Problem(path, 0, f"cannot access it: {e}"),)) from e

    async def read(self, path: str, limit: int, timeout: float = ANSWER_TIMEOUT) -> tuple[bytes, SourceState]:
        """As :func:`read_file`."""
        return await self.run(path, partial(read_file, path, limit), timeout)

    def _finish(self, call: Callable[[], T]) -> T:
        try:
            return call()
        finally:
            self._pending = None


def plain_text(data: bytes, report: ProblemCollector) -> bytes:
    """A text that a person saved, as UTF-8 with LF: byte order mark and CR are removed, each with a warning.

    Raises ConfigError for UTF-16 and for anything else that is no text.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError((Problem(report.path, 1, "UTF-16; save the file as UTF-8. Nothing of it is used"),))
    if len(data) < data.count(b"\0") * 4 < len(data) * 3:  # fewer are a matter of their lines
        raise ConfigError((Problem(report.path, 1, "UTF-16, or no text at all; save the file as UTF-8"),))
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
        report.add(1, "starts with a UTF-8 byte order mark, which is ignored", warning=True)
    if (cr := data.find(b"\r")) >= 0:
        report.add(data.count(b"\n", 0, cr) + 1, "lines end in CR, which is ignored", warning=True)
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return data


def first_line(data: bytes) -> bytes:
    """The value of a one-line control file, as qmail reads it."""
    return data.partition(b"\n")[0].rstrip(b" \t")


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _state(path: str, status: os.stat_result) -> SourceState:
    return SourceState(path, status.st_mtime_ns, status.st_size, status.st_ino)


def file_state(path: str) -> SourceState:
    """The present state of one file."""
    try:
        return _state(path, os.stat(path))
    except OSError:
        return SourceState(path)


def memory_file(name: str, content: bytes) -> int:
    """A memfd with ``content``, to be inherited and read from its start."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
    except BaseException:
        os.close(fd)
        raise
    return fd
