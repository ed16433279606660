"""Descriptors that come from anybody: what is taken, what is refused, and that none is ever lost."""

import fcntl
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab.offer import sealed, unnamed

from contentfilter.doors.message import ENVELOPE_LIMIT, SEALS, SMALL, Spool, open_message, open_pair, read_envelope
from contentfilter.errors import MessageError

CONTENT = b"Subject: x\n\nbody\n" * 5000  # large enough to be mapped
SIZE = len(CONTENT)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(str(tmp_path))


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


def writable_memfd(content: bytes) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    return fd


def file_opened(flags: int) -> Callable[[Path], int]:
    def make(directory: Path) -> int:
        path = directory / "file"
        path.write_bytes(CONTENT)
        return os.open(path, flags)

    return make


def pipe_end(_: Path) -> int:
    ours, other = os.pipe()
    os.close(other)
    return ours


def unix_socket(_: Path) -> int:
    one, other = socket.socketpair()
    other.close()
    return one.detach()


def device(_: Path) -> int:
    return os.open("/dev/zero", os.O_RDONLY)


WRONG = {
    "directory": lambda d: os.open(d, os.O_RDONLY),
    "pipe": pipe_end,
    "socket": unix_socket,
    "device": device,
    "write-only": file_opened(os.O_WRONLY),
    "append-only": file_opened(os.O_WRONLY | os.O_APPEND),
    "path-only": file_opened(getattr(os, "O_PATH", 0)),
    "shorter": lambda _: sealed(CONTENT[:-1]),
    "growing": lambda _: sealed(CONTENT + b"more"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("trusted", [True, False])
def test_a_wrong_descriptor_is_refused_and_closed(kind: str, trusted: bool, spool: Spool, tmp_path: Path) -> None:
    with pytest.raises(MessageError):
        open_message(WRONG[kind](tmp_path), SIZE, trusted=trusted, spool=spool)


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_envelope_descriptor_is_refused_and_both_are_closed(kind: str, spool: Spool, tmp_path: Path) -> None:
    with pytest.raises(MessageError):
        open_pair([sealed(CONTENT), WRONG[kind](tmp_path)], (SIZE, SIZE), trusted=True, spool=spool)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_descriptors_is_refused_and_all_are_closed(count: int, spool: Spool) -> None:
    with pytest.raises(MessageError):
        open_pair([sealed(CONTENT) for _ in range(count)], (SIZE, SIZE), trusted=True, spool=spool)


def test_an_envelope_over_the_limit_is_refused_before_memory_is_taken(spool: Spool) -> None:
    with pytest.raises(MessageError, match="envelope of"):
        open_pair([sealed(b""), sealed(b"")], (0, ENVELOPE_LIMIT + 1), trusted=True, spool=spool)


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("make", [sealed, unnamed, writable_memfd])
@pytest.mark.parametrize("content", [b"", b"x", b"s" * SMALL, b"m" * (SMALL + 1), CONTENT])
def test_the_bytes_are_exact(make: Callable[[bytes], int], content: bytes, trusted: bool, spool: Spool) -> None:
    message = open_message(make(content), len(content), trusted=trusted, spool=spool)
    assert bytes(message.data) == content
    assert os.pread(message.fd, len(content) + 1, 0) == content
    message.close()


@pytest.mark.parametrize(("size", "kind"), [(SMALL, bytes), (SMALL + 1, mmap.mmap)])
def test_a_sealed_message_goes_on_in_its_own_file(size: int, kind: type, spool: Spool) -> None:
    fd = sealed(b"m" * size)
    message = open_message(fd, size, trusted=False, spool=spool)
    assert message.fd == fd
    assert isinstance(message.data, kind)
    message.close()


@pytest.mark.parametrize("make", [unnamed, writable_memfd])
def test_a_strangers_file_can_be_cut_under_us_without_harm(make: Callable[[bytes], int], spool: Spool) -> None:
    fd = make(CONTENT)
    theirs = os.dup(fd)
    message = open_message(fd, SIZE, trusted=False, spool=spool)
    os.ftruncate(theirs, 0)
    os.close(theirs)
    assert bytes(message.data) == CONTENT  # a mapping of the file itself would raise SIGBUS here
    assert fcntl.fcntl(message.fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    message.close()


def test_a_half_sealed_memfd_counts_as_unsealed(spool: Spool) -> None:
    fd = writable_memfd(CONTENT)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW)
    message = open_message(fd, SIZE, trusted=False, spool=spool)
    assert fcntl.fcntl(message.fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    message.close()


def test_a_large_doubtful_message_goes_to_an_unnamed_file(tmp_path: Path) -> None:
    message = open_message(unnamed(CONTENT), SIZE, trusted=False, spool=Spool(str(tmp_path), memory=SIZE - 1))
    assert bytes(message.data) == CONTENT
    assert os.fstat(message.fd).st_dev == os.stat(tmp_path).st_dev
    assert os.fstat(message.fd).st_nlink == 0
    assert list(tmp_path.iterdir()) == []
    message.close()


def test_no_room_for_a_copy_is_a_message_error(tmp_path: Path) -> None:
    with pytest.raises(MessageError):
        open_message(unnamed(CONTENT), SIZE, trusted=False, spool=Spool(str(tmp_path / "missing"), memory=1))


def test_a_closed_descriptor_is_a_message_error(spool: Spool) -> None:
    fd = sealed(CONTENT)
    os.close(fd)
    with pytest.raises(MessageError):
        read_envelope(fd, SIZE)


def test_the_offset_that_the_hook_left_does_not_matter(spool: Spool) -> None:
    fds = [sealed(CONTENT), sealed(b"F\0\0")]
    assert os.lseek(fds[0], 0, os.SEEK_CUR) == SIZE
    message, envelope = open_pair(fds, (SIZE, 3), trusted=False, spool=spool)
    assert (bytes(message.data), envelope) == (CONTENT, b"F\0\0")
    message.close()


def test_a_message_can_be_closed_while_a_thread_still_reads_it(spool: Spool) -> None:
    message = open_message(sealed(CONTENT), SIZE, trusted=True, spool=spool)
    still_reading = memoryview(message.data)
    message.close()
    assert message.fd == -1
    assert bytes(still_reading) == CONTENT
    still_reading.release()
