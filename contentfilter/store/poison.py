"""Copies of poison messages, which killed workers, kept for study.

Their number and size are limited: the oldest are removed first. No other user can read them.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from contentfilter.files import replace_file
from contentfilter.model import Message

DIRECTORY = "poison"  # in the state directory
MAX_COPIES = 16
MAX_BYTES = 256 * 1024 * 1024  # of all copies together
_PIECE = 1 << 20


def keep_poison(state: str, fingerprint: str, message: Message, facts: dict[str, Any]) -> str:
    """The path of the copy: written now, or there already. Empty: the message exceeds MAX_BYTES.

    Raises OSError when it cannot be written, and when the message was closed before it was copied.
    """
    directory = Path(state) / DIRECTORY
    directory.mkdir(mode=0o700, exist_ok=True)
    path = directory / f"{fingerprint}.eml"
    if path.exists():
        return str(path)
    if message.size > MAX_BYTES:
        return ""
    with message.view() as view:  # the client may leave meanwhile, and then the message is closed
        _make_room(state, directory, message.size)
        sidecar = msgspec.json.encode(facts | {"time": time.time()})
        replace_file(directory / f"{fingerprint}.json", (sidecar, b"\n"), 0o600)
        replace_file(path, _pieces(view), 0o600)
    return str(path)


def _pieces(view: memoryview) -> Iterator[bytes]:
    for start in range(0, len(view), _PIECE):
        yield bytes(view[start : start + _PIECE])


def _make_room(state: str, directory: Path, size: int) -> None:
    others = poison_kept(state)
    while others and (len(others) >= MAX_COPIES or sum(each for _, each, _ in others) + size > MAX_BYTES):
        name, _, _ = others.pop(0)
        for kind in ("eml", "json"):
            (directory / f"{name}.{kind}").unlink(missing_ok=True)


def poison_kept(state: str) -> list[tuple[str, int, float]]:
    """Fingerprint, size in bytes and time (seconds since 1970) of each copy, the oldest first. Raises OSError."""
    found = []
    directory = os.path.join(state, DIRECTORY)
    if os.path.isdir(directory):
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.endswith(".eml") and not entry.name.startswith("."):
                    status = entry.stat(follow_symlinks=False)
                    found.append((entry.name.removesuffix(".eml"), status.st_size, status.st_mtime))
    return sorted(found, key=lambda each: each[2])
