"""A kept message goes to the real qmail-queue, once, and is not caught again on its way.

In front of the original bytes stands one line,
``X-ContentFilter-Released: INCIDENT; by=USER; expires=UNIX-TIME; sha256=HEX; mac=HEX``.
When qmail-local forwards the message it passes the hook again, with Received and Delivered-To lines
above ours; :func:`released` knows it by that line. The HMAC-SHA256 covers the line, and the line names
the hash of every byte below it. The MAC is checked first, so only our own tokens cost a hash. Anyone who
can read a released message could send the same bytes again until the token ends: honour it only for
messages that do not come in over SMTP.
"""

import asyncio
import hashlib
import hmac
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from contentfilter.deadline import Deadline
from contentfilter.errors import ContentFilterError, QuarantineError
from contentfilter.model import BytesLike, readable
from contentfilter.store.quarantine import Quarantine
from contentfilter.store.sidecar import Release, Sidecar
from contentfilter.wire import envelope as envelope_format

KEY_FILE = "release.key"
LIFETIME = 7 * 86_400.0
"""Seconds for which a token holds: as long as qmail-send keeps trying (queuelifetime)."""

TOKEN_WITHIN = 1 << 16
"""Bytes at the start of a message in which the line is looked for: room for the lines of a hundred hops."""

_NAME = b"X-ContentFilter-Released:"
_SECRET_SIZE = 32
_PIECE = 1 << 20
_EMPTY_LINE = re.compile(rb"^\r?\n", re.MULTILINE)
_TOKEN = re.compile(
    rb"(X-ContentFilter-Released: ([A-Za-z0-9_-]{1,64}); by=[A-Za-z0-9._@-]{1,32}; expires=([0-9]{1,12}); "
    rb"sha256=([0-9a-f]{64})); mac=([0-9a-f]{64})\n"
)

_STATUSES = {
    11: "an address is longer than 1002 bytes",
    31: "it refused the message for good",
    51: "out of memory",
    52: "it ran out of time",
    53: "write error; perhaps the disk is full",
    54: "it could not read the message or the envelope",
    55: "it could not read a control file",
    56: "the network to the queue host failed",
    61: "trouble with qmail's home directory",
    62: "trouble with the queue directory",
    63: "trouble with a file in queue/pid",
    64: "trouble with a file in queue/pid",
    65: "trouble with a file in queue/mess",
    66: "trouble with a file in queue/intd or queue/todo",
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


def sign(secret: bytes, incident: str, by: str, expires: int, sha256: str) -> bytes:
    """The trace line, with its line end."""
    user = re.sub(r"[^A-Za-z0-9._@-]", "_", by)[:32] or "_"
    line = f"X-ContentFilter-Released: {incident}; by={user}; expires={expires}; sha256={sha256}".encode("ascii")
    return line + b"; mac=" + _mac(secret, line) + b"\n"


def released(data: BytesLike, secret: bytes, now: float) -> str | None:
    """The incident from which ``data`` was released; None where it was not, or where a byte was changed since.

    Only the first line of that name counts, in the header and within TOKEN_WITHIN; lines of other names
    may stand above it. Microseconds where there is none. Without a secret (it could not be read) nothing was
    released: with an empty key anybody could sign.
    """
    if not secret:
        return None
    head = bytes(data[:TOKEN_WITHIN])
    start = 0 if head.startswith(_NAME) else head.find(b"\n" + _NAME) + 1
    if _EMPTY_LINE.search(head, 0, start):
        return None
    token = _TOKEN.match(head, start)
    if token is None or int(token[3]) < now:
        return None
    if not hmac.compare_digest(_mac(secret, token[1]), token[5]):
        return None
    with memoryview(data) as whole, whole[token.end() :] as below:
        if hashlib.sha256(below).hexdigest().encode("ascii") != token[4]:
            return None
    return token[2].decode("ascii")


def _mac(secret: bytes, line: bytes) -> bytes:
    return hmac.new(secret, b"contentfilter release 1\0" + line, "sha256").hexdigest().encode("ascii")


@dataclass(frozen=True, slots=True)
class Releaser:
    """Everything that releases have in common."""

    quarantine: Quarantine
    queue: Path  # the real qmail-queue
    secret: bytes
    by: str  # who asks
    lifetime: float = LIFETIME
    clock: Callable[[], float] = time.time

    async def release(
        self, incident: str, deadline: Deadline, to: tuple[bytes, ...] = (), again: bool = False
    ) -> Release:
        """Hand the message to qmail-queue, for ``to`` or those from whom it was withheld.

        The entry is marked only after qmail-queue has exited 0. Raises QuarantineError; OSError where the
        message went out but could not be marked.
        """
        with self.quarantine.held(incident) as entry:
            if entry.released and not again:
                raise QuarantineError(f"{incident}: released before, by {entry.released[-1].by}")
            recipients = to or entry.withheld
            if not recipients:
                raise QuarantineError(f"{incident}: was withheld from nobody; say to whom it shall go")
            try:
                envelope = envelope_format.build(entry.sender, recipients)
            except ContentFilterError as error:
                raise QuarantineError(f"{incident}: {error}") from None
            now = self.clock()
            with self.quarantine.message(incident) as message:
                _verify(entry, message)
                line = sign(self.secret, incident, self.by, int(now + self.lifetime), entry.sha256)
                await submit(self.queue, line, message, envelope, deadline)
            release = Release(now, self.by, tuple(map(readable, recipients)))
            await self.quarantine.note_release(incident, release)
            return release


def _verify(entry: Sidecar, message: BufferedReader) -> None:
    """Only the very bytes that were kept go out."""
    if hashlib.file_digest(message, "sha256").hexdigest() != entry.sha256:
        raise QuarantineError(f"{entry.incident}: the message's bytes are not those that were kept")
    message.seek(0)


async def submit(program: Path, line: bytes, message: BufferedReader, envelope: bytes, deadline: Deadline) -> None:
    """Run ``program`` as a qmail-queue: ``line`` and ``message`` on descriptor 0, then ``envelope`` on 1.

    Should we die half-way, it finds the envelope without its final NUL and queues nothing. Raises
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
                raise QuarantineError(f"{program}: no end within the time") from None
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
        while piece := message.read(_PIECE):
            await loop.sock_sendall(to_message, piece)
        to_message.close()
        await loop.sock_sendall(to_envelope, envelope)
        to_envelope.close()
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True
