"""Access to files from an event loop: within a time limit, and with one stuck thread at most."""

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from contentfilter.errors import ConfigError
from contentfilter.files import FileAccess, read_file

pytestmark = pytest.mark.asyncio


@pytest.fixture
def end() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def stuck() -> int:
    return sum(thread.name == "housekeeping" for thread in threading.enumerate())


async def test_a_call_that_hangs_is_an_error_in_time_and_no_other_call_starts_until_it_has_ended(
    end: threading.Event,
) -> None:
    access, before = FileAccess(), stuck()
    texts = []
    for path in ("/first", "/second", "/third"):
        with pytest.raises(ConfigError) as caught:
            await access.run(path, lambda: end.wait(60), 0.1)
        texts.append(str(caught.value))
    assert texts == ["/first: it did not answer within 0.1 s"] * 3, "the one that hangs is named, always in one way"
    assert stuck() == before + 1
    assert await FileAccess().run("/other", lambda: 5) == 5, "it counts for its own sequence of work only"
    end.set()
    async with asyncio.timeout(10):
        while stuck() > before:
            await asyncio.sleep(0.01)
    assert await access.run("/fourth", lambda: 4) == 4


async def test_the_loop_goes_on_and_a_cancelled_wait_ends_although_the_call_hangs(end: threading.Event) -> None:
    task = asyncio.create_task(FileAccess().run("/x", lambda: end.wait(60)))
    await asyncio.sleep(0.05)
    task.cancel()
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_errors_of_the_call_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    access = FileAccess()

    def times_out() -> None:
        raise OSError(errno.ETIMEDOUT, "an NFS server gives up")  # a TimeoutError, though not ours

    with pytest.raises(OSError, match="gives up"):
        await access.run("/x", times_out)
    with pytest.raises(ValueError, match="invalid literal"):
        await access.run("/x", lambda: int("x"))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no more threads")))
        with pytest.raises(ConfigError, match="/x: cannot access it: no more threads"):
            await access.run("/x", lambda: 1)
    assert await access.run("/x", lambda: 1) == 1


async def test_no_device_is_opened_and_no_pipe_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    opened: list[object] = []
    really = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path) or really(path, *rest))
    for name in ("pipe", "device"):
        with pytest.raises(ConfigError, match="not a regular file"):
            read_file(str(tmp_path / name), 100)
    assert opened == []
