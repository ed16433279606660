"""Message digests: two messages are equal to a scanner if only the volatile parts of their Received fields differ.

A client that retries sends the same message, and our own qmail-smtpd writes a new Received field on top of it:
another date, perhaps another name and address of the client (large providers retry from another host). Those
words are cut out if they have a strict form; all else is in the digest (SHA-256), and so is where the holes are.

What can an attacker hide in the words that are cut out? A date, a host name, an address: letters, digits and
``._:@+-[]``, 255 bytes at most for each, in the first Received field only; nothing that is content to anyone. The
client's words have a digest of their own, for answers that depend on who delivers the message.
"""

import asyncio
import hashlib
import re
from dataclasses import dataclass
from typing import NamedTuple

from contentfilter.model import BytesLike, Message

LOOK = 4_096  # bytes at the beginning, in which our own Received field must end
THREAD_ABOVE = 262_144  # bytes; about 0.2 ms. More is hashed off the event loop

_FIRST = re.compile(rb"(?:Received-SPF:[^\n]*\n(?:[ \t][^\n]*\n)*)?Received: from ([^\n]*\n(?:[ \t][^\n]*\n)*)")
_FOLD = (b"", b" ", b"\t")
_NAME = rb"[A-Za-z0-9._:\[\]-]{1,255}"
_INFO = rb"(?:[A-Za-z0-9._@+-]{0,255}@)?"
_CLIENT = re.compile(_NAME + rb" (?:\((?:HELO|EHLO) " + _NAME + rb"\) )?\(" + _INFO + _NAME + rb"\)")
_DAY = rb"(?:[A-Z][a-z]{2}, )?\d{1,2} [A-Z][a-z]{2} \d{4}"
_DATE = re.compile(_DAY + rb" \d\d:\d\d:\d\d [+-]\d{4}(?: \([A-Z]{1,5}\))?(?=\r?\n\Z)")


@dataclass(frozen=True, slots=True)
class Digest:
    """``core``: all but the words that differ between tries. ``client``: those about who delivers it."""

    core: bytes
    client: bytes


class VolatileSpans(NamedTuple):
    """Positions of the words that are different in each try: from, to."""

    client: tuple[int, int] | None = None
    date: tuple[int, int] | None = None

    def spans(self) -> tuple[tuple[int, int], ...]:
        return tuple(span for span in self if span is not None)


NONE = VolatileSpans()


def volatile_spans(data: BytesLike) -> VolatileSpans:
    """Find them in any message; linear in LOOK."""
    head = bytes(data[:LOOK])
    field = _FIRST.match(head)
    if field is None:
        return NONE
    start, end = field.span(1)
    if head[end : end + 1] in _FOLD and end < len(data):
        return NONE  # we do not see where it ends
    client = _CLIENT.match(head, start, end)
    semicolon = head.rfind(b"; ", start, end)
    date = _DATE.match(head, semicolon + 2, end) if semicolon >= 0 else None
    return VolatileSpans(client and client.span(), date and date.span())


def digest(data: BytesLike, words: VolatileSpans) -> Digest:
    """The digests of a message with its own words."""
    removed = 0
    holes: dict[str, int] = {}  # positions after removal: what goes in there is all that can differ
    for name, span in (("client", words.client), ("date", words.date)):
        if span is not None:
            holes[name] = span[0] - removed
            removed += span[1] - span[0]
    with memoryview(data) as view:
        core = hashlib.sha256(f"{len(view) - removed} {holes}\n".encode("ascii"))
        at = 0
        for start, end in (*words.spans(), (len(view), len(view))):
            with view[at:start] as piece:
                core.update(piece)
            at = end
        client = b"" if words.client is None else bytes(view[slice(*words.client)])
    return Digest(core.digest(), hashlib.sha256(client).digest())


class Content:
    """One message to be compared with others. Hashed on demand, and only once."""

    def __init__(self, message: Message) -> None:
        self._message = message
        self._words = volatile_spans(message.data)
        self.size = message.size - sum(end - start for start, end in self._words.spans())
        """Without those words: only messages of the same size can be the same."""
        self._digest: asyncio.Future[Digest | None] | None = None

    def hashing(self) -> "asyncio.Future[Digest | None]":
        """The digest, now or soon; None if the message had been closed. Begins immediately."""
        if self._digest is None:
            loop, data = asyncio.get_running_loop(), self._message.data
            if len(data) > THREAD_ABOVE:
                view = memoryview(data)  # keeps it mapped
                self._digest = loop.run_in_executor(None, _hashed, view, self._words)
            else:
                self._digest = loop.create_future()
                closed = len(data) != self._message.size
                self._digest.set_result(None if closed else digest(data, self._words))
        return self._digest

    async def digest(self) -> Digest | None:
        return await asyncio.shield(self.hashing())


def _hashed(view: memoryview, words: VolatileSpans) -> Digest | None:
    with view:
        return digest(view, words)
