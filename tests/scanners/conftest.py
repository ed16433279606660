"""What the scanners' tests share: messages behind real descriptors."""

import mmap
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from lab.leaks import nothing_leaks

from contentfilter.model import Message

MakeMessage = Callable[..., Message]


@pytest_asyncio.fixture
async def nothing_left() -> AsyncIterator[None]:
    """The whole test, its peers and messages included, leaves no descriptor and no task behind."""
    async with nothing_leaks():
        yield


@pytest.fixture
def message(tmp_path: Path) -> Iterator[MakeMessage]:
    """``message(data)`` or ``message(data, unnamed=True)``: a memfd, or an unnamed file on disk."""
    made: list[Message] = []

    def make(data: bytes, *, unnamed: bool = False) -> Message:
        fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR, 0o600) if unnamed else os.memfd_create("message")
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        mapped = mmap.mmap(fd, len(data), prot=mmap.PROT_READ) if data else b""
        made.append(Message(fd, len(data), mapped))
        return made[-1]

    yield make
    for each in made:
        each.close()  # BufferError here: somebody still holds a view of the message
