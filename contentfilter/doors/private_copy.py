"""Copies of files that somebody else may still change: sealed memory, or an unnamed file of ours where it is large.

A file that its owner cuts while it is mapped here ends the reader with SIGBUS.
"""

import fcntl
import mmap
import os

from contentfilter.errors import MessageError

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
IN_MEMORY = 16 * 1024 * 1024  # bytes; larger copies are unnamed files
_CHUNK = 4 * 1024 * 1024


def is_immutable(fd: int) -> bool:
    """True if nobody can change the file any longer: sealed, and of ordinary pages.

    A mapping of huge pages ends its reader when there are none left, sealed or not. Raises OSError.
    """
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:  # EINVAL: this kind of file cannot be sealed
        return False
    return sealed and os.fstatvfs(fd).f_bsize == mmap.PAGESIZE


def private_copy(source: int, size: int, directory: str) -> int:
    """A new private file with the first ``size`` bytes of ``source``, which stays open.

    ``directory``: for large copies. Raises MessageError or OSError.
    """
    in_memory = size <= IN_MEMORY
    if in_memory:
        target = os.memfd_create("copy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        target = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | os.O_EXCL, 0o400)
    try:
        done = 0
        while done < size:
            count = os.sendfile(target, source, done, min(size - done, _CHUNK))
            if count == 0:
                raise MessageError("it shrank while it was copied")
            done += count
        if in_memory:
            fcntl.fcntl(target, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(target)
        raise
    return target
