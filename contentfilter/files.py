"""Files that a crash leaves whole: the old one or the new one, never half of either."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterable

import aiofiles
import msgspec

from contentfilter.errors import ConfigError, Problem


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
        self._more_are_warnings = True

    def add(self, line: int, text: str, *, warning: bool = False) -> None:
        """Note one; beyond the limit it is only counted."""
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


async def read_file(path: str, limit: int) -> tuple[bytes, SourceState]:
    """The whole file, and the state it was in; ``b""`` and size -1 where there is none.

    Raises ConfigError for a file that cannot be read, is not a regular file, or has more than ``limit`` bytes.
    """
    for _ in range(_TRIES):
        try:
            # Not blocking: nobody may make us wait for the other end of a named pipe.
            async with aiofiles.open(path, "rb", opener=_open_nonblocking) as file:
                before = os.fstat(file.fileno())
                if not stat.S_ISREG(before.st_mode):
                    raise ConfigError((Problem(path, 0, "not a regular file"),))
                if before.st_size > limit:
                    raise ConfigError((Problem(path, 0, f"{before.st_size} bytes; the limit is {limit}"),))
                data = await file.read(before.st_size + 1)
                after = os.fstat(file.fileno())
        except FileNotFoundError:
            return b"", SourceState(path)
        except OSError as e:
            raise ConfigError((Problem(path, 0, f"cannot read it: {e.strerror}"),)) from e
        if len(data) == before.st_size and _state(path, before) == _state(path, after):
            return data, _state(path, after)
    raise ConfigError((Problem(path, 0, "it keeps changing while it is read"),))


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
