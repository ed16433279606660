"""Decoders of transfer encodings, window by window: base64, quoted-printable, uuencode, xxencode, yEnc, BinHex.

Each function yields decoded bytes of ``data[start:end]``: a small window first (most content is identified by its
start), then at most 96 KiB of input at a time, so that memory stays bounded. Bad input raises nothing: bytes that no
decoder would use are skipped. Time is linear, and charged before a window is read, whether it decodes to anything or
not: only OutOfWorkError is raised.
"""

import binascii
import re
from collections.abc import Iterator
from typing import Literal

import pybase64

from contentfilter.scanners.signatures.lines import PIECE, WINDOW, Text
from contentfilter.scanners.signatures.work import Work

FIRST = 1024  # bytes of the first window
_GROWTH = 8
_LINE_SEARCH = 1100  # bytes before a window's end that are searched for a line end
_UU_LINES = 1000
_UU_LENGTH = 100

# Work: a constant for each window, and an amount for each byte, line, escape or group.
_WINDOW = 3_000
_BYTE = 1
_QUOTED_BYTE = 4
_UU_LINE = 2_000
_GROUP = 800
_ESCAPE = 300

_LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
_NO_LETTERS = bytes(set(range(256)) - set(_LETTERS))
_PADDING = re.compile(rb"=+")
_LINE = re.compile(rb"([^\r\n]*+)[\r\n]*+")
_UU_CLEAN = bytes(byte if 32 <= byte <= 96 else 32 for byte in range(256))
_XX_LETTERS = b"+-0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_XX_CLEAN = bytes(32 + _XX_LETTERS.index(byte) if byte in _XX_LETTERS else 32 for byte in range(256))
_YENC = bytes((byte - 42) & 255 for byte in range(256))
_YENC_ESCAPE = re.compile(rb"=([^=])", re.DOTALL)
_YENC_ESCAPED = tuple(bytes(((byte - 64) & 255,)) for byte in range(256))
_HQX_LETTERS = b"!\"#$%&'()*+,-012345689@ABCDEFGHIJKLMNPQRSTUVXYZ[`abcdefhijklmpqr"
_HQX = bytes.maketrans(_HQX_LETTERS, _LETTERS[:64])
_HQX_JUNK = bytes(set(range(256)) - set(_HQX_LETTERS))
_REPEAT = b"\x90"

Padding = Literal["groups", "joined", "zero"]


def raw(data: Text, start: int, end: int, work: Work) -> Iterator[bytes]:
    """Yield the bytes unchanged (7bit, 8bit, binary)."""
    for at, stop in _windows(data, start, end, work):
        yield bytes(data[at:stop])


def base64(data: Text, start: int, end: int, work: Work, padding: Padding = "groups") -> Iterator[bytes]:
    """Decode base64. Line breaks and other bytes outside the alphabet are skipped.

    Decoders differ about padding before the end: it starts a new group, is skipped ("joined"), or counts as the letter
    of value zero.
    """
    rest = b""  # letters of an incomplete group
    for at, stop in _windows(data, start, end, work):
        piece = bytes(data[at:stop])
        if not rest and b"=" not in piece:
            try:
                yield pybase64.b64decode(piece)
                continue
            except binascii.Error:
                pass  # the window ends inside a group
        letters = rest + piece.translate(None, _NO_LETTERS)
        if stop == end:
            letters = letters.rstrip(b"=")
        if b"=" not in letters:
            groups = []
        elif padding == "groups":
            *groups, letters = _PADDING.split(letters)
            work.spend(_GROUP * len(groups))
        else:
            groups, letters = [], letters.replace(b"=", b"A" if padding == "zero" else b"")
        whole = len(letters) & ~3
        groups.append(letters[:whole])
        rest = letters[whole:]
        yield b"".join([_group(group) for group in groups])
    if rest:
        yield _group(rest)


def _group(letters: bytes) -> bytes:
    """Decode letters without padding; bits that do not fill a byte are dropped."""
    return pybase64.b64decode(letters + b"A" * (-len(letters) % 4))[: len(letters) * 3 // 4]


def quoted(data: Text, start: int, end: int, work: Work) -> Iterator[bytes]:
    """Decode quoted-printable (RFC 2045, 6.7); an invalid escape is kept unchanged."""
    for at, stop in _windows(data, start, end, work, escape=True):
        work.spend(_QUOTED_BYTE * (stop - at))
        yield binascii.a2b_qp(bytes(data[at:stop]))


def uuencode(data: Text, start: int, end: int, work: Work, *, xx: bool = False) -> Iterator[bytes]:
    """Decode uuencode, or xxencode: the lines after ``begin`` up to ``end`` or another ``begin``.

    Invalid lines are skipped.
    """
    lines: list[bytes] = []
    clean = _XX_CLEAN if xx else _UU_CLEAN
    batch = 4  # lines in a window; the first window is small
    while start < end:
        found = _LINE.match(data, start, min(end, start + WINDOW))
        if found is None or found.end() == start:
            break
        work.spend(_UU_LINE + found.end() - start)
        line = bytes(data[start : min(found.end(1), start + _UU_LENGTH)])
        start = found.end()
        if line.rstrip() == b"end" or line.startswith(b"begin"):
            break
        line = line if not xx else line.translate(clean)
        if not line or not 32 < line[0] <= 96:
            continue
        letters = ((line[0] - 32 & 63) * 8 + 5) // 6
        lines.append(binascii.a2b_uu(line[:1] + line[1 : 1 + letters].translate(_UU_CLEAN).ljust(letters)))
        if len(lines) >= batch:
            yield b"".join(lines)
            lines, batch = [], _UU_LINES
    if lines:
        yield b"".join(lines)


def yenc(data: Text, start: int, end: int, work: Work) -> Iterator[bytes]:
    """Decode yEnc: the lines after ``=ybegin``, without ``=ypart``, up to ``=yend``."""
    before = b""  # an escape character whose letter is in the next window
    for at, stop in _windows(data, start, end, work):
        piece = bytes(data[at:stop])
        if at == start and piece.startswith(b"=ypart "):
            piece = piece[len(_first_line(piece)) :]
        last = piece.find(b"\n=yend")
        if last >= 0:
            piece = piece[:last]
        piece = before + piece.translate(None, b"\r\n")
        before = b"=" if piece.endswith(b"=") else b""
        piece = piece[: len(piece) - len(before)]
        work.spend(_ESCAPE * piece.count(b"="))
        # An escaped byte is moved by 64; the translation then moves all of them by 42.
        yield _YENC_ESCAPE.sub(lambda escape: _YENC_ESCAPED[escape[1][0]], piece).translate(_YENC)
        if last >= 0:
            return


def binhex(data: Text, start: int, end: int, work: Work) -> Iterator[bytes]:
    """Decode the data fork of BinHex 4.0 (RFC 1741): from the first colon after its banner to the next."""
    head = bytes(data[start : min(end, start + FIRST)])
    colon = head.find(b":")
    if colon < 0:
        return
    start += colon + 1
    decoded = b""
    size = -1  # of the data fork, unknown until its header is complete
    for piece in _expanded(_hqx(data, start, end, work), work):
        if size >= 0:
            decoded = piece
        else:
            decoded += piece
            if not decoded or len(decoded) < (header := decoded[0] + 22):
                continue
            size = int.from_bytes(decoded[header - 10 : header - 6], "big")
            decoded = decoded[header:]
        yield decoded[:size]
        size -= len(decoded)
        if size <= 0:
            return


def _hqx(data: Text, start: int, end: int, work: Work) -> Iterator[bytes]:
    """Yield the six-bit letters of BinHex, decoded; the second colon ends them."""
    rest = b""
    for at, stop in _windows(data, start, end, work):
        piece = bytes(data[at:stop])
        colon = piece.find(b":")
        letters = rest + (piece if colon < 0 else piece[:colon]).translate(_HQX, _HQX_JUNK)
        whole = len(letters) & ~3
        rest = letters[whole:]
        yield pybase64.b64decode(letters[:whole])
        if colon >= 0:
            break
    if rest:
        yield _group(rest)


def _expanded(windows: Iterator[bytes], work: Work) -> Iterator[bytes]:
    """Expand the runs of BinHex: 0x90 and a count repeat the byte before; 0x90 and zero are a literal 0x90."""
    last, held = b"\0", b""
    for window in windows:
        data, at = held + window, 0
        pieces = []
        while 0 <= (mark := data.find(_REPEAT, at)) < len(data) - 1:
            count = data[mark + 1]
            work.spend(_GROUP + count)
            pieces.append(data[at:mark])
            last = data[mark - 1 : mark] if mark > at else last
            if count == 0:
                last = _REPEAT
            pieces.append(last * (count - 1 if count else 1))
            at = mark + 2
        end = mark if mark >= 0 else len(data)
        held = data[end:]
        last = data[end - 1 : end] if end > at else last
        pieces.append(data[at:end])
        yield b"".join(pieces)


def _first_line(piece: bytes) -> bytes:
    found = _LINE.match(piece)
    return found[0] if found else b""


def _windows(data: Text, start: int, end: int, work: Work, *, escape: bool = False) -> Iterator[tuple[int, int]]:
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
        work.spend(_WINDOW + _BYTE * (stop - start))
        yield start, stop
        start = stop
        size = min(size * _GROWTH, PIECE)
