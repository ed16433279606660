"""A FUSE file system whose files hang: one at read, one at getattr, one at the flush that close() waits for.

Mounted by root and served by a process of its own: the kernel ends all waits when that process ends, and a process that
waits for the file system could not end it.
"""

import ctypes
import os
import struct

from attacks.kit import Place

NAMES = {b"read": 2, b"getattr": 3, b"flush": 4}  # name -> inode
SIZE = 18
INIT, LOOKUP, GETATTR, OPEN, READ, RELEASE, FLUSH, OPENDIR = 26, 1, 3, 14, 15, 18, 25, 27
FORGET, INTERRUPT = 2, 36
ENOSYS, ENOENT = 38, 2
_HEADER = struct.Struct("<IIQQIIII")


def _attributes(inode: int) -> bytes:
    directory = inode == 1
    mode = 0o40755 if directory else 0o100644
    numbers = (inode, 0 if directory else SIZE, 1, 0, 0, 0)
    return struct.pack("<6Q10I", *numbers, 0, 0, 0, mode, 1, 65534, 65534, 0, 4096, 0)


def mount(place: Place) -> None:
    """Mount it at ``scratch``/fuse (root only), and serve it from a child."""
    directory = f"{place.scratch}/fuse"
    os.mkdir(directory)
    fd = os.open("/dev/fuse", os.O_RDWR)
    options = b"fd=%d,rootmode=40000,user_id=65534,group_id=65534,allow_other" % fd
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"fuse", directory.encode(), b"fuse", 6, options):  # 6: nosuid, nodev
        raise OSError(ctypes.get_errno(), "cannot mount FUSE")
    if not os.fork():
        _serve(fd)
    os.close(fd)


def unmount(place: Place) -> None:
    ctypes.CDLL(None).umount2(f"{place.scratch}/fuse".encode(), 2)


def _serve(fd: int) -> None:
    opened: set[int] = set()
    while True:
        try:
            data = os.read(fd, 1 << 17)
        except OSError:
            return
        _, code, unique, inode, *_ = _HEADER.unpack_from(data)
        body = data[_HEADER.size :]
        error, answer = 0, b""
        if code in (FORGET, INTERRUPT):
            continue
        if code in (READ, FLUSH) or (code == GETATTR and inode == NAMES[b"getattr"] and inode in opened):
            if code == READ and inode == NAMES[b"flush"]:
                answer = b"Subject: x\n\nhello\n"
            else:
                continue  # never
        elif code == INIT:
            answer = struct.pack("<IIIIHHIIHHI7I", 7, 31, 65536, 0, 12, 9, 65536, 1, 0, 0, 0, *(0,) * 7)
        elif code == LOOKUP:
            found = NAMES.get(body.rstrip(b"\0"))
            error = 0 if found else -ENOENT
            answer = struct.pack("<4Q2I", found, 0, 0, 0, 0, 0) + _attributes(found) if found else b""
        elif code == GETATTR:
            answer = struct.pack("<QII", 0, 0, 0) + _attributes(inode)
        elif code in (OPEN, OPENDIR):
            opened.add(inode)
            answer = struct.pack("<QII", 0, 1, 0)  # direct I/O: nothing is cached
        elif code != RELEASE:
            error = -ENOSYS
        try:
            os.write(fd, struct.pack("<IiQ", 16 + len(answer), error, unique) + answer)
        except OSError:
            pass  # the one that asked is gone
