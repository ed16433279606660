"""Attempts to change a file through a descriptor of it, as a scanner that has been taken over might make them."""

import ctypes
import fcntl
import mmap
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress

NOBODY = 65534
OTHER_MODE, PUNCH_HOLE = 0, 3  # fallocate(2)
_libc = ctypes.CDLL(None, use_errno=True)


def _fallocate(fd: int, mode: int) -> None:
    _libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(1 << 22))


def _write_mapping(fd: int) -> None:
    with mmap.mmap(fd, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        mapped[:5] = b"MMAP!"


def _unprotect_mapping(fd: int) -> None:
    """A mapping for reading that is made writable later."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    at = libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
    if not libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(4096), mmap.PROT_READ | mmap.PROT_WRITE):
        ctypes.memmove(at, b"MPROT", 5)


def _open_again(fd: int) -> None:
    for flags in (os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        again = os.open(f"/proc/self/fd/{fd}", flags)
        os.write(again, b"AGAIN")
        os.ftruncate(again, 1)


def _give_a_name(fd: int) -> None:
    path = f"{tempfile.gettempdir()}/abused-{os.getpid()}"
    os.link(f"/proc/self/fd/{fd}", path, follow_symlinks=True)
    try:
        os.truncate(path, 0)
    finally:
        os.unlink(path)


def _splice(fd: int) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"SPLICE")
    os.splice(reader, fd, 6) if hasattr(os, "splice") else None


ATTEMPTS: tuple[Callable[[int], object], ...] = (
    lambda fd: os.lseek(fd, 3, os.SEEK_SET),
    lambda fd: os.write(fd, b"WRITE"),
    lambda fd: os.pwrite(fd, b"PWRITE", 0),
    lambda fd: os.ftruncate(fd, 1 << 24),
    lambda fd: os.ftruncate(fd, 0),
    lambda fd: _fallocate(fd, PUNCH_HOLE),
    lambda fd: _fallocate(fd, OTHER_MODE),
    lambda fd: os.copy_file_range(os.open("/etc/passwd", os.O_RDONLY), fd, 10, 0, 0),
    lambda fd: os.sendfile(fd, os.open("/etc/passwd", os.O_RDONLY), 0, 10),
    _splice,
    _write_mapping,
    _unprotect_mapping,
    _open_again,
    _give_a_name,
    lambda fd: os.fchmod(fd, 0o777),
    lambda fd: os.fchown(fd, NOBODY, NOBODY),
    lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0),
    lambda fd: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND | os.O_DIRECT | os.O_ASYNC),
    lambda fd: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK),
    lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
    lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
    _open_again,
)


def abuse(fd: int, *, as_root: bool = False) -> None:
    """Try everything on ``fd``, in a process of another user if this one is root. Nothing tells whether it worked."""
    pid = os.fork()
    if not pid:
        with suppress(OSError):
            if not as_root:
                os.setgroups([])
                os.setuid(NOBODY)
        for attempt in ATTEMPTS:
            with suppress(OSError, ValueError):
                attempt(fd)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0
