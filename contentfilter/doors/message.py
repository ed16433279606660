"""Open the two descriptors that a client passes: the message (read if small, else mapped) and the envelope.

A message is mapped without a copy: it comes from a user of the mail system, or it is a copy that the receiver process
made of what another user passed. A descriptor that is not a readable regular file of the announced size raises
:class:`MessageError`. In every case both descriptors end up owned by the result or closed.
"""

import fcntl
import mmap
import os
import stat
from collections.abc import Sequence

from contentfilter.errors import MessageError
from contentfilter.model import Message

ENVELOPE_LIMIT = 128 * 1024 * 1024  # RECIPIENTS_MAX recipients of the longest legal address fit
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
SMALL = 64 * 1024  # bytes; up to this size one read is cheaper than mapping, page faults and unmapping
_O_PATH = getattr(os, "O_PATH", 0)


def open_pair(fds: Sequence[int], sizes: tuple[int, int]) -> tuple[Message, bytes]:
    """The message and the envelope block of ``fds`` (message first), whose announced ``sizes`` are in bytes.

    Takes ownership of all ``fds``: on any error all are closed. Raises MessageError.
    """
    if len(fds) != 2:
        for fd in fds:
            os.close(fd)
        raise MessageError(f"{len(fds)} descriptors instead of 2")
    try:
        envelope = read_envelope(fds[1], sizes[1])
    except BaseException:
        os.close(fds[0])
        raise
    finally:
        os.close(fds[1])
    return open_message(fds[0], sizes[0]), envelope


def open_message(fd: int, size: int) -> Message:
    """Map or read ``size`` bytes of ``fd``; takes ownership of ``fd``. Raises MessageError."""
    try:
        check_file(fd, size, "message")
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
        check_file(fd, size, "envelope")
        return _read(fd, size, "envelope")
    except OSError as e:
        raise MessageError(f"envelope: {e.strerror}") from e


def check_file(fd: int, size: int, what: str) -> None:
    """Raise MessageError or OSError unless ``fd`` is a regular file of ``size`` bytes, open for reading."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise MessageError(f"{what}: not a regular file")
    if status.st_size != size:
        raise MessageError(f"{what}: {status.st_size} bytes where {size} were announced")
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)  # checked here, because clamd reports what it cannot read as clean
    if flags & os.O_ACCMODE == os.O_WRONLY or flags & _O_PATH:
        raise MessageError(f"{what}: descriptor is not open for reading")


def _read(fd: int, size: int, what: str) -> bytes:
    """Raises MessageError, or OSError if ``fd`` is not open for reading."""
    data = os.pread(fd, size, 0)
    if len(data) != size:
        raise MessageError(f"{what} changed while it was read")
    return data


def sealed_memfd(name: str, data: bytes) -> int:
    """A new memfd that holds ``data`` and can no longer change. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def message_of(data: bytes) -> Message:
    """A message from bytes that no client passed. Raises OSError."""
    return open_message(sealed_memfd("message", data), len(data))
