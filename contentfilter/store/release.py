"""Release: hands a quarantined message to the real qmail-queue once, with a token that lets a forwarded copy pass."""

import asyncio
import hashlib
import os
import secrets
import socket
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import aiofiles

from contentfilter.deadline import Deadline
from contentfilter.errors import ContentFilterError, QuarantineError
from contentfilter.model import readable
from contentfilter.store.quarantine import Quarantine
from contentfilter.store.release_token import LIFETIME, sign
from contentfilter.store.sidecar import Release, Sidecar
from contentfilter.wire import envelope as envelope_format

KEY_FILE = "release.key"
_SECRET_SIZE = 32
_PIECE = 1 << 20
_STATUSES = {
    11: "an address is longer than 1002 bytes",
    31: "it refused the message permanently",
    51: "out of memory",
    52: "it ran out of time",
    53: "write error; perhaps the disk is full",
    54: "it could not read the message or the envelope",
    55: "it could not read a control file",
    56: "the network to the queue host failed",
    61: "problem with qmail's home directory",
    62: "problem with the queue directory",
    63: "problem with a file in queue/pid",
    64: "problem with a file in queue/pid",
    65: "problem with a file in queue/mess",
    66: "problem with a file in queue/intd or queue/todo",
    71: "the queue host refused it for now",
    81: "internal defect in qmail-queue",
    91: "it did not accept the envelope",
    120: "it could not be started",
}


def load_secret(state: Path) -> bytes:
    """The key of this installation, made at first use. Raises OSError, also where others may read it."""
    path = state / KEY_FILE
    try:
        return _read_secret(path)
    except FileNotFoundError:
        pass
    temporary = path.with_name(f".{KEY_FILE}-{secrets.token_hex(8)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(secrets.token_bytes(_SECRET_SIZE))
            file.flush()
            os.fsync(fd)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass  # another process was faster: theirs holds
    finally:
        temporary.unlink()
    return _read_secret(path)


def _read_secret(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077 or status.st_size != _SECRET_SIZE:
            raise PermissionError(f"{path}: must be a file of {_SECRET_SIZE} bytes that only its owner may read")
        return file.read(_SECRET_SIZE)


@dataclass(frozen=True, slots=True)
class Releaser:
    """Quarantine, program and key with which messages are released."""

    quarantine: Quarantine
    queue: Path  # the real qmail-queue
    secret: bytes
    by: str  # the user who releases
    lifetime: float = LIFETIME
    clock: Callable[[], float] = time.time

    async def release(
        self,
        incident: str,
        deadline: Deadline,
        to: tuple[bytes, ...] = (),
        again: bool = False,
        forward: tuple[bytes, ...] = (),
    ) -> Release:
        """Hand the message to qmail-queue, for ``to`` or those from whom it was withheld.

        The token is valid for one message through the hook, to exactly the addresses ``forward``: those to which the
        recipients forward. By default it is valid for the recipients themselves.

        The entry is marked only after qmail-queue has exited 0. Raises QuarantineError; OSError where the
        message went out but could not be marked.
        """
        with self.quarantine.held(incident) as entry:
            if entry.released and not again:
                raise QuarantineError(f"{incident}: released before, by {entry.released[-1].by}")
            recipients = to or entry.withheld
            if not recipients:
                raise QuarantineError(f"{incident}: was withheld from nobody; name the recipients with --to")
            try:
                envelope = envelope_format.build(entry.sender, recipients)
            except ContentFilterError as error:
                raise QuarantineError(f"{incident}: {error}") from None
            now = self.clock()
            with self.quarantine.message(incident) as message:
                _verify(entry, message)
                expires = int(now + self.lifetime)
                line = sign(self.secret, incident, self.by, expires, entry.sha256, forward or recipients)
                await submit(self.queue, line, message, envelope, deadline)
            release = Release(now, self.by, tuple(map(readable, recipients)))
            await self.quarantine.note_release(incident, release)
            return release


def _verify(entry: Sidecar, message: BufferedReader) -> None:
    """Raise QuarantineError unless the bytes are those that were stored."""
    if hashlib.file_digest(message, "sha256").hexdigest() != entry.sha256:
        raise QuarantineError(f"{entry.incident}: the message has changed since it was stored")
    message.seek(0)


async def submit(program: Path, line: bytes, message: BufferedReader, envelope: bytes, deadline: Deadline) -> None:
    """Run ``program`` as a qmail-queue: ``line`` and ``message`` on descriptor 0, then ``envelope`` on 1.

    If this process dies half-way, the program finds an envelope without its final NUL and queues nothing. Raises
    QuarantineError for every exit status but 0.
    """
    ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
    try:
        for end in ours:
            end.setblocking(False)
        try:
            process = await asyncio.create_subprocess_exec(program, stdin=theirs[0], stdout=theirs[1])
        except OSError as error:
            raise QuarantineError(f"{program}: {error.strerror}; is it the real qmail-queue?") from None
        finally:
            for end in theirs:
                end.close()
        try:
            async with deadline.timeout():
                taken = await _feed(ours[0], ours[1], line, message, envelope)
                status = await process.wait()
        except BaseException as error:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            if isinstance(error, TimeoutError):
                raise QuarantineError(f"{program}: timed out") from None
            raise
    finally:
        for end in ours:
            end.close()
    if status:
        why = _STATUSES.get(status, "") if status > 0 else "killed by a signal"
        raise QuarantineError(f"{program} left with status {status}{': ' if why else ''}{why}; nothing was queued")
    if not taken:
        raise QuarantineError(f"{program} left with status 0 before it had read everything")


async def _feed(
    to_message: socket.socket, to_envelope: socket.socket, line: bytes, message: BufferedReader, envelope: bytes
) -> bool:
    """The envelope only after the whole message. False where the reader left early; its status says why."""
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(to_message, line)
        async with aiofiles.open(message.fileno(), "rb", closefd=False) as file:
            while piece := await file.read(_PIECE):
                await loop.sock_sendall(to_message, piece)
        to_message.close()
        await loop.sock_sendall(to_envelope, envelope)
        to_envelope.close()
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True
