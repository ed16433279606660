"""Decoders of transfer encodings, window by window: base64, quoted-printable, uuencode.

Each function yields decoded bytes of ``data[start:end]``: a small window first (most content is identified by its
start), then at most 96 KiB of input at a time, so that memory stays bounded. Bad input raises nothing: bytes that no
decoder would use are skipped. Time is linear.
"""

import binascii
import re
from collections.abc import Iterator

import pybase64

from contentfilter.scanners.signatures.mime import PIECE, WINDOW, Text

FIRST = 1024  # bytes of the first window
_GROWTH = 8
_LINE_SEARCH = 1100  # bytes before a window's end that are searched for a line end
_UU_LINES = 1000
_UU_LENGTH = 100

_LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
_NO_LETTERS = bytes(set(range(256)) - set(_LETTERS))
_PADDING = re.compile(rb"=+")
_LINE = re.compile(rb"([^\r\n]*+)[\r\n]*+")
_UU_CLEAN = bytes(byte if 32 <= byte <= 96 else 32 for byte in range(256))


def raw(data: Text, start: int, end: int) -> Iterator[bytes]:
    """Yield the bytes unchanged (7bit, 8bit, binary)."""
    for at, stop in _windows(data, start, end):
        yield bytes(data[at:stop])


def base64(data: Text, start: int, end: int, *, joined: bool = False) -> Iterator[bytes]:
    """Decode base64. Line breaks and other bytes outside the alphabet are skipped.

    Padding before the end starts a new group; with ``joined`` it is skipped as well. Decoders differ in this.
    """
    rest = b""  # letters of an incomplete group
    for at, stop in _windows(data, start, end):
        piece = bytes(data[at:stop])
        if not rest and b"=" not in piece:
            try:
                yield pybase64.b64decode(piece)
                continue
            except binascii.Error:
                pass  # the window ends inside a group
        letters = rest + piece.translate(None, _NO_LETTERS)
        if joined or stop == end:
            letters = letters.replace(b"=", b"") if joined else letters.rstrip(b"=")
        *groups, letters = _PADDING.split(letters) if b"=" in letters else (letters,)
        whole = len(letters) & ~3
        groups.append(letters[:whole])
        rest = letters[whole:]
        yield b"".join([_group(group) for group in groups])
    if rest:
        yield _group(rest)


def _group(letters: bytes) -> bytes:
    """Decode letters without padding; bits that do not fill a byte are dropped."""
    return pybase64.b64decode(letters + b"A" * (-len(letters) % 4))[: len(letters) * 3 // 4]


def quoted(data: Text, start: int, end: int) -> Iterator[bytes]:
    """Decode quoted-printable (RFC 2045, 6.7); an invalid escape is kept unchanged."""
    for at, stop in _windows(data, start, end, escape=True):
        yield binascii.a2b_qp(bytes(data[at:stop]))


def uuencode(data: Text, start: int, end: int) -> Iterator[bytes]:
    """Decode uuencode: the lines after ``begin`` up to ``end`` or another ``begin``. Invalid lines are skipped."""
    lines: list[bytes] = []
    batch = 4  # lines in a window; the first window is small
    while start < end:
        found = _LINE.match(data, start, min(end, start + WINDOW))
        if found is None or found.end() == start:
            break
        line = bytes(data[start : min(found.end(1), start + _UU_LENGTH)])
        start = found.end()
        if line.rstrip() == b"end" or line.startswith(b"begin"):
            break
        if not line or not 32 < line[0] <= 96:
            continue
        letters = ((line[0] - 32 & 63) * 8 + 5) // 6
        lines.append(binascii.a2b_uu(line[:1] + line[1 : 1 + letters].translate(_UU_CLEAN).ljust(letters)))
        if len(lines) >= batch:
            yield b"".join(lines)
            lines, batch = [], _UU_LINES
    if lines:
        yield b"".join(lines)


def _windows(data: Text, start: int, end: int, *, escape: bool = False) -> Iterator[tuple[int, int]]:
    """Yield growing windows that end at a line end if there is one: groups and escapes are complete there.

    ``escape``: without a line end, never split ``=XX``.
    """
    size = FIRST
    while start < end:
        stop = min(end, start + size)
        if stop < end:
            tail = bytes(data[max(start, stop - _LINE_SEARCH) : stop])
            newline = tail.rfind(b"\n")
            if newline >= 0:
                stop -= len(tail) - newline - 1
            elif escape and b"=" in tail[-2:]:
                stop -= 2 - tail[-2:].index(b"=")
        yield start, stop
        start = stop
        size = min(size * _GROWTH, PIECE)
