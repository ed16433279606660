"""Release token: the header line of a message released from quarantine, and the store of tokens already used.

``X-ContentFilter-Released: INCIDENT; by=USER; expires=UNIX-TIME; nonce=HEX; sha256=HEX; mac=HEX`` is the first line
of a released message. qmail-local sends a forwarded copy through the hook again; the token lets it pass unscanned if

* the HMAC-SHA256 matches: it covers the line and the set of envelope recipients, and the line names the hash of every
  byte below it. It is checked first, so only our own tokens cost a hash;
* nothing is above the line but what qmail itself adds to mail of this machine: the Received lines of qmail-queue and
  Delivered-To. qmail-smtpd adds a Received line of another form, so a token that came over SMTP never counts;
* it was not used before. Its use is durable before the message passes. A crash in between makes the next attempt
  a second use, which is scanned like any mail: the token errs on the side of scanning. The quarantine still has the
  message, and an operator can release it again.
"""

import asyncio
import hashlib
import hmac
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Executor
from pathlib import Path

import msgspec

from contentfilter.deadline import Deadline
from contentfilter.files import sync_directory
from contentfilter.model import BytesLike

LIFETIME = 7 * 86_400.0
"""Seconds for which a token is valid: as long as qmail-send keeps trying (queuelifetime)."""
TOKEN_WITHIN = 1 << 16
"""Bytes at the start of a message that may contain the line."""
USED_DIRECTORY = "released"  # in the state directory
USED_MAX = 100_000
"""Used tokens that are remembered; beyond that, none is accepted until some expire."""

_CLEAN_UP = 600.0  # seconds between two removals of expired entries
_GRACE = 86_400.0  # seconds after its expiry for which a used token is remembered: the clock may be set back
_ABOVE = (
    rb"(?:Received: \(qmail [0-9]{1,10} invoked by (?:uid [0-9]{1,10}|alias)\); [0-9A-Za-z: +-]{1,40}\n"
    rb"|Delivered-To: [^\r\n\0]{1,1100}\n)*+"
)
_TOKEN = re.compile(
    _ABOVE + rb"(X-ContentFilter-Released: ([A-Za-z0-9_-]{1,64}); by=[A-Za-z0-9._@-]{1,32}; expires=([0-9]{1,12}); "
    rb"nonce=([0-9a-f]{32}); sha256=([0-9a-f]{64})); mac=([0-9a-f]{64})\n"
)


class ReleaseToken(msgspec.Struct, frozen=True):
    """A valid token of a message."""

    incident: str
    expires: int  # seconds since 1970
    nonce: str


def sign(
    secret: bytes, incident: str, by: str, expires: int, sha256: str, recipients: Iterable[bytes], nonce: str = ""
) -> bytes:
    """The token's line, with its line end. ``nonce``: 32 hexadecimal digits; empty: random."""
    user = re.sub(r"[^A-Za-z0-9._@-]", "_", by)[:32] or "_"
    nonce = nonce or secrets.token_hex(16)
    text = f"X-ContentFilter-Released: {incident}; by={user}; expires={expires}; nonce={nonce}; sha256={sha256}"
    line = text.encode("ascii")
    return line + b"; mac=" + _mac(secret, line, recipients) + b"\n"


def has_token(data: BytesLike) -> bool:
    """True if ``data`` begins as a released message does; microseconds for other mail."""
    return _TOKEN.match(bytes(data[:TOKEN_WITHIN])) is not None


def verify(data: BytesLike, secret: bytes, now: float, recipients: Iterable[bytes]) -> ReleaseToken | None:
    """The token of ``data`` if it is valid for exactly these recipients and bytes; None for all other mail.

    Without a secret (it could not be read) no token is valid: with an empty key
    anybody could sign.
    """
    token = _TOKEN.match(bytes(data[:TOKEN_WITHIN])) if secret else None
    if token is None or int(token[3]) < now:
        return None
    if not hmac.compare_digest(_mac(secret, token[1], recipients), token[6]):
        return None
    with memoryview(data) as whole, whole[token.end() :] as below:
        if hashlib.sha256(below).hexdigest().encode("ascii") != token[5]:
            return None
    return ReleaseToken(token[2].decode("ascii"), int(token[3]), token[4].decode("ascii"))


def _mac(secret: bytes, line: bytes, recipients: Iterable[bytes]) -> bytes:
    addresses = b"".join(b"%d:%s," % (len(each), each) for each in sorted({each.lower() for each in recipients}))
    signed = b"contentfilter release 2\0" + line + b"\0" + addresses
    return hmac.new(secret, signed, "sha256").hexdigest().encode("ascii")


class UsedTokens:
    """Tokens already used: an empty file each, named by expiry and nonce. All workers share the directory."""

    def __init__(self, state: Path) -> None:
        self._directory = state / USED_DIRECTORY
        self._lock = threading.Lock()
        self._count, self._cleaned = 0, float("-inf")

    async def accept(
        self, data: BytesLike, secret: bytes, recipients: tuple[bytes, ...], disk: Executor | None, deadline: Deadline
    ) -> str:
        """Verify and use the token of ``data``; returns its incident, or an empty string if there is no valid one.

        Raises OSError or TimeoutError if its use cannot be stored.
        """
        if not has_token(data):
            return ""
        now = time.time()
        token = await asyncio.to_thread(verify, data, secret, now, recipients)
        if token is None:
            return ""
        async with deadline.timeout():
            first = await asyncio.get_running_loop().run_in_executor(disk, self.use, token, now)
        return token.incident if first else ""

    def use(self, token: ReleaseToken, now: float) -> bool:
        """Mark as used; False if it was used before, or if too many are remembered. Durable on return.

        Blocks on the disk. Raises OSError.
        """
        self._directory.mkdir(mode=0o700, exist_ok=True)
        with self._lock:
            if not 0 <= now - self._cleaned < _CLEAN_UP:
                self._count, self._cleaned = self._clean_up(now), now
            if self._count >= USED_MAX:
                return False
            self._count += 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            os.close(os.open(self._directory / f"{token.expires}-{token.nonce}", flags, 0o600))
        except FileExistsError:
            return False
        sync_directory(self._directory)
        sync_directory(self._directory.parent)
        return True

    def _clean_up(self, now: float) -> int:
        """Remove entries of expired tokens; returns how many remain."""
        remaining = 0
        for name in os.listdir(self._directory):
            expires = name.partition("-")[0]
            if expires.isdecimal() and int(expires) + _GRACE < now:
                (self._directory / name).unlink(missing_ok=True)
            else:
                remaining += 1
        return remaining
