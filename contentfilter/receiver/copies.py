"""Private copies of what an untrusted user passed: nobody else can change them, and no read of them blocks or faults.

Everything is copied, sealed memory files too: a file of huge pages, or one with holes, is sealed like any other, but
reading its mapping can end the reader with SIGBUS or take memory that was never counted.
"""

import fcntl
import os
from collections.abc import Sequence

from contentfilter.doors.message import ENVELOPE_LIMIT, SEALS, check_file
from contentfilter.errors import MessageError

MESSAGE_LIMIT = 1024 * 1024 * 1024  # bytes
IN_MEMORY = 16 * 1024 * 1024  # bytes; larger copies are unnamed files
_CHUNK = 4 * 1024 * 1024


def check_sizes(sizes: tuple[int, int]) -> None:
    """Raise MessageError for a message or an envelope that is never taken from these users."""
    for what, size, limit in zip(("message", "envelope"), sizes, (MESSAGE_LIMIT, ENVELOPE_LIMIT), strict=True):
        if size > limit:
            raise MessageError(f"{what} of {size} bytes")


def copy_pair(fds: Sequence[int], sizes: tuple[int, int], directory: str) -> tuple[int, int]:
    """Copies of message and envelope, whose announced ``sizes`` are in bytes; ``directory``: for large ones.

    Closes ``fds``, which may block. Raises MessageError.
    """
    if len(fds) != 2:
        raise MessageError(f"{len(fds)} descriptors instead of 2")
    copies = []
    for fd, size, what in zip(fds, sizes, ("message", "envelope"), strict=True):
        try:
            check_file(fd, size, what)
            copies.append(_copy(fd, size, directory))
        except OSError as e:
            raise MessageError(f"{what}: {e.strerror}") from e
        os.close(fd)
    return copies[0], copies[1]


def _copy(source: int, size: int, directory: str) -> int:
    """A new private file with the first ``size`` bytes of ``source``. Raises MessageError or OSError."""
    in_memory = size <= IN_MEMORY
    if in_memory:
        target = os.memfd_create("copy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        target = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | os.O_EXCL, 0o600)
    done = 0
    while done < size:
        count = os.sendfile(target, source, done, min(size - done, _CHUNK))
        if count == 0:
            raise MessageError("it shrank while it was copied")
        done += count
    if in_memory:
        fcntl.fcntl(target, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_SEAL)
    return target
