"""Warlord-compatible scan: rules W1 to W12 of SPAMCONTROL's badmimetypes and badloadertypes.

One pass over the lines, no MIME tree, no decoding. It detects what Warlord detects and misses what Warlord misses
(folded or quoted header lines, short first lines, names across a line break, other encodings). Two intended
differences: state is never carried over to the next message, and the last line of a list needs no newline.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from contentfilter.scanners.signatures.lines import WINDOW, Text

SIGNATURE_LETTERS = 9
LOADER_LETTERS = 5
FIRST_LINE = 10  # minimum length of the first data line
DATA_LINE = 6  # minimum length of any other tested line
LONGEST_LINE = 1000  # characters of a line that are compared
DECLARATION = b"content-transfer-encoding: base64"
SENTINEL = b"L"  # Warlord has this letter in front of each line

_LINE = re.compile(rb"[^\n]*+\n?")


class Hit(NamedTuple):
    """Matched pattern and its line (1-based). ``pattern`` is empty for white space inside base64."""

    loader: bool
    pattern: bytes
    line: int


def keys(patterns: tuple[str, ...], letters: int) -> frozenset[bytes]:
    """Return the search keys (W6, W8): patterns truncated to ``letters``; shorter ones are skipped."""
    return frozenset(p[:letters].encode() for p in patterns if len(p) >= letters)


def scan(data: Text, signatures: frozenset[bytes], loaders: frozenset[bytes], whitespace: bool = False) -> Hit | None:
    """Return the first hit in a message with LF line ends. ``whitespace`` is Warlord's ``!`` mode (W7)."""
    leading = frozenset(pattern[:1] for pattern in loaders)
    declared = inside = False  # W1
    empty_at = -1
    for number, line in enumerate(_lines(data), 1):
        if not line:  # W2
            empty_at, inside = number, False
            continue
        if line[:1] in b"Cc" and line[: len(DECLARATION)].lower() == DECLARATION:  # W3
            declared = True
        first = declared and number == empty_at + 1 and len(line) >= FIRST_LINE  # W4
        inside = inside or first
        if line[:1] == b"-":  # W5 wins over W4
            declared = inside = False
        if not inside:
            continue
        if first and line[:SIGNATURE_LETTERS] in signatures:  # W6
            return Hit(False, line[:SIGNATURE_LETTERS], number)
        if len(line) < DATA_LINE:
            continue
        if whitespace and (b" " in line or b"\t" in line):  # W7
            return Hit(False, b"", number)
        pattern = _loader(SENTINEL + line, leading, loaders)  # W8, W9
        if pattern:
            return Hit(True, pattern, number)
    return None


def _loader(line: bytes, leading: frozenset[bytes], loaders: frozenset[bytes]) -> bytes:
    """Return the first of ``loaders`` in ``line``, or an empty value."""
    for letter in leading:
        at = line.find(letter)
        while at >= 0:
            if line[at : at + LOADER_LETTERS] in loaders:
                return line[at : at + LOADER_LETTERS]
            at = line.find(letter, at + 1)
    return b""


def _lines(data: Text) -> Iterator[bytes]:
    """Yield the lines, each truncated to LONGEST_LINE (W10): a single line may be the complete message."""
    start, size = 0, len(data)
    while start < size:
        end, complete = start, False
        while end < size and not complete:
            line = _LINE.match(data, end, end + WINDOW)
            end = line.end() if line else size
            complete = data[end - 1] == 10
        yield bytes(data[start : min(end - complete, start + LONGEST_LINE)])
        start = end
