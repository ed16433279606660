"""Copies of poison messages: whole or not at all, whatever becomes of the client."""

import os
from pathlib import Path

import pytest

from contentfilter.model import Message
from contentfilter.store import poison
from contentfilter.store.poison import keep_poison, poison_kept

SIZE = 3_000_000


def message(size: int = SIZE) -> Message:
    return Message(os.memfd_create("message"), size, b"x" * size)


def test_a_client_that_leaves_while_its_message_is_copied_cannot_cut_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection closes the message as soon as the handling is cancelled; the thread that copies it goes on."""
    leaving, fsync = message(), os.fsync

    def leave(fd: int) -> None:
        leaving.close()
        fsync(fd)

    monkeypatch.setattr(os, "fsync", leave)
    kept = keep_poison(str(tmp_path), "f" * 32, leaving, {})
    assert Path(kept).stat().st_size == SIZE


def test_a_message_that_is_closed_before_it_is_copied_leaves_no_copy(tmp_path: Path) -> None:
    left = message()
    left.close()
    with pytest.raises(OSError, match="closed"):
        keep_poison(str(tmp_path), "f" * 32, left, {})
    assert poison_kept(str(tmp_path)) == []


def test_a_message_is_copied_once(tmp_path: Path) -> None:
    first = keep_poison(str(tmp_path), "a" * 32, message(10), {})
    os.utime(first, (1, 1))
    assert keep_poison(str(tmp_path), "a" * 32, message(10), {}) == first
    assert poison_kept(str(tmp_path)) == [("a" * 32, 10, 1.0)]


def test_the_oldest_copies_make_room_and_what_is_too_large_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poison, "MAX_COPIES", 2)
    monkeypatch.setattr(poison, "MAX_BYTES", 100)
    assert keep_poison(str(tmp_path), "large", message(101), {}) == ""
    for at, name in enumerate(("one", "two", "three"), 1):
        os.utime(keep_poison(str(tmp_path), name, message(40), {}), (at, at))
    assert [name for name, _, _ in poison_kept(str(tmp_path))] == ["two", "three"]
    keep_poison(str(tmp_path), "four", message(90), {})
    assert sorted(os.listdir(tmp_path / "poison")) == ["four.eml", "four.json"]
