"""What is not delivered is kept: message and sidecar, complete or absent, readable by nobody else.

``DIR/messages/ab/abcdef….eml`` holds the bytes under their SHA-256; ``DIR/entries/INCIDENT.json`` says
what it was. The sidecar is written last, so an entry that exists has its message. Any failure is
raised as OSError and turns into a deferral: what cannot be kept is not removed.
"""

import asyncio
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import aiofiles
import msgspec

from contentfilter.deadline import Deadline
from contentfilter.model import Message

_PIECE = 1 << 20


class Quarantine:
    """The quarantine below one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    async def keep(self, incident: str, message: Message, facts: dict[str, Any], deadline: Deadline) -> str:
        """Store ``message`` and its sidecar; returns the SHA-256 in hex. Raises OSError or TimeoutError."""
        async with deadline.timeout():
            name = await asyncio.to_thread(self._keep_message, message)
            sidecar = {"incident": incident, "sha256": name, "size": message.size, **facts}
            entries = self._below("entries")
            temporary = entries / f".new-{incident}"
            try:
                async with aiofiles.open(temporary, "xb", opener=_private) as file:
                    await file.write(msgspec.json.encode(sidecar) + b"\n")
                    await file.flush()
                    await asyncio.to_thread(os.fsync, file.fileno())
                os.rename(temporary, entries / f"{incident}.json")
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            await asyncio.to_thread(_sync_directory, entries)
        return name

    def _keep_message(self, message: Message) -> str:
        """Off the loop: hash, and copy unless these very bytes are kept already."""
        digest = hashlib.sha256()
        pieces = range(0, message.size, _PIECE)
        for start in pieces:
            digest.update(message.data[start : start + _PIECE])
        name = digest.hexdigest()
        folder = self._below("messages", name[:2])
        if (folder / f"{name}.eml").exists():
            return name
        fd, temporary = tempfile.mkstemp(dir=folder, prefix=".new-")
        try:
            with os.fdopen(fd, "wb") as file:
                for start in pieces:
                    file.write(message.data[start : start + _PIECE])
                file.flush()
                os.fsync(fd)
            os.rename(temporary, folder / f"{name}.eml")
        except BaseException:
            os.unlink(temporary)
            raise
        _sync_directory(folder)
        return name

    def _below(self, *names: str) -> Path:
        """The folder of that name; each new level is private, whatever the umask."""
        folder = self.directory
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in names:
            folder /= name
            folder.mkdir(mode=0o700, exist_ok=True)
        return folder


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _sync_directory(folder: Path) -> None:
    """Make the rename last through a crash."""
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
