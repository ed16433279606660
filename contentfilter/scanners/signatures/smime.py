"""Opaque S/MIME (RFC 8551, 3.5.2): the message inside CMS signed-data.

A reader shows what the signature covers, so the walk does. Only the path to that content is parsed, in DER and in the
indefinite lengths of BER that openssl writes. Encrypted and compressed data (enveloped-data, compressed-data) stay
closed.
"""

import re
from collections.abc import Iterator

from contentfilter.scanners.signatures.work import Work

STARTS = (b"\x30\x80", b"\x30\x81", b"\x30\x82", b"\x30\x83", b"\x30\x84")  # a SEQUENCE of 128 bytes or more
_SIGNED = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02"  # 1.2.840.113549.1.7.2
_SIGNED_WITHIN = 32  # bytes from the start
_LENGTH = rb"(?:[\x00-\x80]|\x81.|\x82..|\x83...|\x84....)"
# encapContentInfo: id-data, [0] EXPLICIT, and the header of the OCTET STRING, primitive or constructed.
_CONTENT = re.compile(
    rb"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x01\xa0" + _LENGTH + rb"([\x04\x24])(" + _LENGTH + rb")", re.DOTALL
)
_SEARCHED = 4096  # bytes in front of the content: version and digest algorithms
_OCTETS = 0x04
_CHUNK = 2_000  # work for each piece of a constructed OCTET STRING


def is_signed_data(head: bytes) -> bool:
    """True if decoded content that begins with ``head`` is CMS signed-data."""
    return head.startswith(STARTS) and _SIGNED in head[:_SIGNED_WITHIN]


def content(windows: Iterator[bytes], work: Work) -> Iterator[bytes]:
    """Yield the signed content of ``windows``, which begin with the signed-data. Anything malformed ends it."""
    stream = _Stream(windows)
    found = _CONTENT.search(stream.peek(_SEARCHED))
    if found is None:
        return
    length = _length(found[2])
    stream.skip(found.end())
    if found[1] == b"\x04":
        yield from stream.take(length)
        return
    while True:
        work.spend(_CHUNK)
        head = stream.peek(6)
        if len(head) < 2 or head[0] != _OCTETS:
            return
        size = 2 + (head[1] & 0x7F if head[1] > 0x80 else 0)
        if size > 6:
            return
        length = _length(head[1:size])
        stream.skip(size)
        yield from stream.take(length)


def _length(field: bytes) -> int:
    """Return the value of a length field; 0 for the indefinite one."""
    return field[0] & 0x7F if field[0] <= 0x80 else int.from_bytes(field[1:], "big")


class _Stream:
    """Bytes of an iterator of windows, read in other pieces. Holds a window, and what was peeked."""

    __slots__ = ("_at", "_buffer", "_windows")

    def __init__(self, windows: Iterator[bytes]) -> None:
        self._windows = windows
        self._buffer = b""
        self._at = 0

    def peek(self, size: int) -> bytes:
        """Return the next ``size`` bytes, fewer at the end."""
        while len(self._buffer) - self._at < size and (more := next(self._windows, None)) is not None:
            self._buffer = self._buffer[self._at :] + more
            self._at = 0
        return self._buffer[self._at : self._at + size]

    def skip(self, size: int) -> None:
        """Consume bytes that were peeked."""
        self._at += size

    def take(self, size: int) -> Iterator[bytes]:
        """Yield and consume the next ``size`` bytes."""
        while size > 0:
            if self._at >= len(self._buffer):
                more = next(self._windows, None)
                if more is None:
                    return
                self._buffer, self._at = more, 0
            piece = self._buffer[self._at : self._at + size]
            self._at += len(piece)
            size -= len(piece)
            if piece:
                yield piece
