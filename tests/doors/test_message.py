"""Descriptors that come from anybody: what is taken, what is refused, and that none is ever lost."""

import mmap
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab.offer import sealed, unnamed

from contentfilter.doors.message import ENVELOPE_LIMIT, SMALL, open_message, open_pair, read_envelope
from contentfilter.errors import MessageError

CONTENT = b"Subject: x\n\nbody\n" * 5000  # large enough to be mapped
SIZE = len(CONTENT)


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
def test_a_wrong_descriptor_is_refused_and_closed(kind: str, tmp_path: Path) -> None:
    with pytest.raises(MessageError):
        open_message(WRONG[kind](tmp_path), SIZE)


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_envelope_descriptor_is_refused_and_both_are_closed(kind: str, tmp_path: Path) -> None:
    with pytest.raises(MessageError):
        open_pair([sealed(CONTENT), WRONG[kind](tmp_path)], (SIZE, SIZE))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_descriptors_is_refused_and_all_are_closed(count: int) -> None:
    with pytest.raises(MessageError):
        open_pair([sealed(CONTENT) for _ in range(count)], (SIZE, SIZE))


def test_an_envelope_over_the_limit_is_refused_before_memory_is_taken() -> None:
    with pytest.raises(MessageError, match="envelope of"):
        open_pair([sealed(b""), sealed(b"")], (0, ENVELOPE_LIMIT + 1))


@pytest.mark.parametrize("make", [sealed, unnamed, writable_memfd])
@pytest.mark.parametrize("content", [b"", b"x", b"s" * SMALL, b"m" * (SMALL + 1), CONTENT])
def test_the_bytes_are_exact(make: Callable[[bytes], int], content: bytes) -> None:
    message = open_message(make(content), len(content))
    assert bytes(message.data) == content
    assert os.pread(message.fd, len(content) + 1, 0) == content
    message.close()


@pytest.mark.parametrize(("size", "kind"), [(SMALL, bytes), (SMALL + 1, mmap.mmap)])
def test_a_message_goes_on_in_its_own_file(size: int, kind: type) -> None:
    fd = sealed(b"m" * size)
    message = open_message(fd, size)
    assert message.fd == fd
    assert isinstance(message.data, kind)
    message.close()


def test_a_closed_descriptor_is_a_message_error() -> None:
    fd = sealed(CONTENT)
    os.close(fd)
    with pytest.raises(MessageError):
        read_envelope(fd, SIZE)


def test_the_offset_that_the_hook_left_does_not_matter() -> None:
    fds = [sealed(CONTENT), sealed(b"F\0\0")]
    assert os.lseek(fds[0], 0, os.SEEK_CUR) == SIZE
    message, envelope = open_pair(fds, (SIZE, 3))
    assert (bytes(message.data), envelope) == (CONTENT, b"F\0\0")
    message.close()


def test_a_message_can_be_closed_while_a_thread_still_reads_it() -> None:
    message = open_message(sealed(CONTENT), SIZE)
    still_reading = memoryview(message.data)
    message.close()
    assert message.fd == -1
    assert bytes(still_reading) == CONTENT
    still_reading.release()
