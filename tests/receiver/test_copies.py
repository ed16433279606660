"""Private copies of what an untrusted user passed: their bytes are exact, and nobody can change them afterwards."""

import fcntl
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from lab.offer import sealed, unnamed

from contentfilter.doors.message import ENVELOPE_LIMIT, SEALS
from contentfilter.errors import MessageError
from contentfilter.receiver import copies
from contentfilter.receiver.copies import MESSAGE_LIMIT, check_sizes, copy_pair

CONTENT = b"Subject: x\n\nbody\n" * 5000
ENVELOPE = b"F\0Ta@b.example\0\0"
SIZES = len(CONTENT), len(ENVELOPE)


def writable(content: bytes) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    return fd


def read(fds: tuple[int, int]) -> tuple[bytes, bytes]:
    found = os.pread(fds[0], 1 << 20, 0), os.pread(fds[1], 1 << 20, 0)
    for fd in fds:
        os.close(fd)
    return found


@pytest.mark.parametrize("make", [sealed, unnamed, writable])
def test_the_copies_are_exact_sealed_and_other_files(make: Callable[[bytes], int], tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    given = [make(CONTENT), make(ENVELOPE)]
    theirs = [os.dup(fd) for fd in given]
    inodes = {os.fstat(fd).st_ino for fd in theirs}
    made = copy_pair(given, SIZES, str(tmp_path))
    for fd in made:
        assert os.fstat(fd).st_ino not in inodes
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    for fd in theirs:
        if make is not sealed:
            os.ftruncate(fd, 0)
        os.close(fd)
    assert read(made) == (CONTENT, ENVELOPE)
    assert set(os.listdir("/proc/self/fd")) == before, "what was passed is closed"


def test_a_large_copy_is_an_unnamed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "IN_MEMORY", len(CONTENT) - 1)
    made = copy_pair([sealed(CONTENT), sealed(ENVELOPE)], SIZES, str(tmp_path))
    status = os.fstat(made[0])
    assert (status.st_dev, status.st_nlink) == (os.stat(tmp_path).st_dev, 0)
    assert list(tmp_path.iterdir()) == []
    assert read(made) == (CONTENT, ENVELOPE)


def test_no_room_for_a_copy_is_a_message_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "IN_MEMORY", 1)
    with pytest.raises(MessageError, match="No such file"):
        copy_pair([sealed(CONTENT), sealed(ENVELOPE)], SIZES, str(tmp_path / "missing"))


def test_a_file_that_is_cut_while_it_is_copied_is_a_message_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it is copied when it shrinks: never a shorter message, nor one of NULs."""
    monkeypatch.setattr(copies, "_CHUNK", len(CONTENT) // 2)
    true, theirs = os.sendfile, writable(CONTENT)

    def cut(target: int, source: int, offset: int, count: int) -> int:
        if offset:
            os.ftruncate(theirs, 100)
        return true(target, source, offset, count)

    monkeypatch.setattr(copies.os, "sendfile", cut)
    with pytest.raises(MessageError, match="shrank"):
        copy_pair([os.dup(theirs), sealed(ENVELOPE)], SIZES, str(tmp_path))
    os.close(theirs)


def test_a_file_that_changes_size_all_the_time_is_whole_or_refused(tmp_path: Path) -> None:
    theirs, end = writable(CONTENT), threading.Event()

    def change() -> None:
        while not end.is_set():
            os.ftruncate(theirs, 10)
            os.pwrite(theirs, CONTENT, 0)

    changing = threading.Thread(target=change)
    changing.start()
    copied = refused = 0
    for _ in range(300):
        try:
            message, _ = read(copy_pair([os.dup(theirs), sealed(ENVELOPE)], SIZES, str(tmp_path)))
        except MessageError:
            refused += 1
        else:
            copied += 1
            assert len(message) == len(CONTENT)
    end.set()
    changing.join()
    os.close(theirs)
    assert copied + refused == 300


def test_a_sealed_memory_file_of_holes_or_huge_pages_is_never_mapped(tmp_path: Path) -> None:
    """Reading the mapping of a huge page that the machine has not ends a process with SIGBUS."""
    for flags in (0, os.MFD_HUGETLB):
        size = 2 << 20
        try:
            fd = os.memfd_create("holes", os.MFD_ALLOW_SEALING | flags)
            os.ftruncate(fd, size)
        except OSError:
            continue  # this kernel has no huge pages
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        try:
            made = copy_pair([fd, sealed(ENVELOPE)], (size, len(ENVELOPE)), str(tmp_path))
        except MessageError:
            assert flags, "a file of holes is a file"
        else:
            assert os.fstat(made[0]).st_blocks * 512 >= size, "its pages are counted"
            assert read(made)[0] == bytes(size)[: 1 << 20]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_descriptors_is_refused(count: int, tmp_path: Path) -> None:
    with pytest.raises(MessageError, match=f"{count} descriptors"):
        copy_pair([sealed(CONTENT) for _ in range(count)], SIZES, str(tmp_path))


def test_sizes_above_the_limits_are_refused() -> None:
    check_sizes((MESSAGE_LIMIT, ENVELOPE_LIMIT))
    with pytest.raises(MessageError, match="message of"):
        check_sizes((MESSAGE_LIMIT + 1, 10))
    with pytest.raises(MessageError, match="envelope of"):
        check_sizes((10, ENVELOPE_LIMIT + 1))


def pipe(_: Path) -> int:
    ours, other = os.pipe()
    os.close(other)
    return ours


def opened(flags: int) -> Callable[[Path], int]:
    def make(directory: Path) -> int:
        (directory / "m").write_bytes(CONTENT)
        return os.open(directory / "m", flags)

    return make


@pytest.mark.parametrize(
    "make",
    [
        pipe,
        lambda path: os.open(path, os.O_RDONLY),
        lambda _: socket.socket().detach(),
        lambda _: os.open("/dev/zero", os.O_RDONLY),
        lambda _: os.open("/proc/self/status", os.O_RDONLY),
        opened(os.O_WRONLY),
        opened(os.O_PATH),
        lambda _: sealed(CONTENT + b"more"),
        lambda _: sealed(CONTENT[:-1]),
    ],
    ids=["pipe", "directory", "socket", "device", "proc", "write-only", "path", "grown", "shorter"],
)
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_no_readable_file_of_the_announced_size_is_refused(
    make: Callable[[Path], int], place: int, tmp_path: Path
) -> None:
    fds = [sealed(CONTENT), sealed(CONTENT)]
    fds[place] = make(tmp_path)
    with pytest.raises(MessageError):
        copy_pair(fds, (len(CONTENT), len(CONTENT)), str(tmp_path))
