"""From the two descriptors that a hook passes to the message, mapped unless it is small, and the envelope's bytes.

A message is mapped without a copy when nobody can change it any more (a sealed memfd) or when its owner
is a system user. Otherwise it is copied into a file of our own first: a local user could truncate
the file under our mapping, and reading there would kill the worker with SIGBUS. Descriptors that are
no readable regular files of the announced size raise :class:`MessageError`. Whatever
happens, both descriptors are owned by the result or closed.
"""

import fcntl
import mmap
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from contentfilter.errors import MessageError
from contentfilter.model import Message

ENVELOPE_LIMIT = 128 * 1024 * 1024  # 100,000 recipients of the longest legal address fit
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
SMALL = 64 * 1024  # bytes; up to here one read costs less than to map, touch and unmap
_CHUNK = 4 * 1024 * 1024
_O_PATH = getattr(os, "O_PATH", 0)


@dataclass(frozen=True, slots=True)
class Spool:
    """Where copies of doubtful messages go: memory up to ``memory`` bytes, then unnamed files in ``directory``."""

    directory: str
    memory: int = 16 * 1024 * 1024


def open_pair(fds: Sequence[int], sizes: tuple[int, int], *, trusted: bool, spool: Spool) -> tuple[Message, bytes]:
    """The message and the envelope block behind ``fds`` (message first), with their announced ``sizes``.

    Takes ownership of all ``fds``: on any error every one is closed.
    """
    if len(fds) != 2:
        for fd in fds:
            os.close(fd)
        raise MessageError(f"{len(fds)} descriptors where 2 belong")
    try:
        envelope = read_envelope(fds[1], sizes[1])
    except BaseException:
        os.close(fds[0])
        raise
    finally:
        os.close(fds[1])
    return open_message(fds[0], sizes[0], trusted=trusted, spool=spool), envelope


def open_message(fd: int, size: int, *, trusted: bool, spool: Spool) -> Message:
    """Map or read ``size`` bytes of ``fd``; takes ownership of ``fd``. Raises MessageError."""
    try:
        _check(fd, size, "message")
        sealed = _sealed(fd)
        if size and not (trusted or sealed):
            fd, doubtful = _copy(fd, size, spool), fd
            os.close(doubtful)
        if size <= SMALL:
            return Message(fd, size, _read(fd, size, "message"))
        # MAP_PRIVATE: older kernels refuse a shared mapping of a write-sealed memfd.
        return Message(fd, size, mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))
    except OSError as e:
        os.close(fd)
        raise MessageError(f"message: {e.strerror}") from e
    except BaseException:
        os.close(fd)
        raise


def read_envelope(fd: int, size: int) -> bytes:
    """Exactly ``size`` bytes of ``fd``, which stays open. Raises MessageError."""
    if size > ENVELOPE_LIMIT:
        raise MessageError(f"envelope of {size} bytes")
    try:
        _check(fd, size, "envelope")
        return _read(fd, size, "envelope")
    except OSError as e:
        raise MessageError(f"envelope: {e.strerror}") from e


def _check(fd: int, size: int, what: str) -> None:
    """Raises MessageError or OSError unless it is a regular file of ``size`` bytes: nothing else is read."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise MessageError(f"{what}: not a regular file")
    if status.st_size != size:
        raise MessageError(f"{what}: {status.st_size} bytes where {size} were announced")


def _read(fd: int, size: int, what: str) -> bytes:
    """Raises MessageError, or OSError where ``fd`` is not open for reading."""
    data = os.pread(fd, size, 0)
    if len(data) != size:
        raise MessageError(f"{what} changed while it was read")
    return data


def _sealed(fd: int) -> bool:
    """True when nobody can change the message any more. Raises MessageError or OSError."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)  # clamd calls what it cannot read clean
    if flags & os.O_ACCMODE == os.O_WRONLY or flags & _O_PATH:
        raise MessageError("message: descriptor is not open for reading")
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:  # EINVAL: this kind of file cannot be sealed
        return False


def _copy(source: int, size: int, spool: Spool) -> int:
    """A new descriptor of our own with the first ``size`` bytes of ``source``."""
    in_memory = size <= spool.memory
    if in_memory:
        target = os.memfd_create("message", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        target = os.open(spool.directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | os.O_EXCL, 0o600)
    try:
        done = 0
        while done < size:
            count = os.sendfile(target, source, done, min(size - done, _CHUNK))
            if count == 0:
                raise MessageError("message shrank while it was copied")
            done += count
        if in_memory:
            fcntl.fcntl(target, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(target)
        raise
    return target


def message_of(data: bytes) -> Message:
    """A message of our own, sealed in memory: for bytes that no hook passed."""
    fd = os.memfd_create("message", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return open_message(fd, len(data), trusted=True, spool=Spool(""))
