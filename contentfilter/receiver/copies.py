"""Private copies of what an untrusted user passed: nobody else can change them, and no read of them blocks or faults.

Everything is copied, sealed memory files too: a file of huge pages, or one with holes, is sealed like any other, but
reading its mapping can end the reader with SIGBUS or take memory that was never counted.
"""

import os
from collections.abc import Sequence

from contentfilter.doors.message import ENVELOPE_LIMIT, check_file
from contentfilter.doors.private_copy import private_copy
from contentfilter.errors import MessageError

MESSAGE_LIMIT = 1024 * 1024 * 1024  # bytes


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
            copies.append(private_copy(fd, size, directory))
        except OSError as e:
            raise MessageError(f"{what}: {e.strerror}") from e
        os.close(fd)
    return copies[0], copies[1]
