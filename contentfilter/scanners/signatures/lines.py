"""Lines of a text: their ends, headers, empty lines, and runs of base64, in time linear in what is looked at."""

import re
import sys

import ahocorasick_rs

Text = bytes | memoryview

PIECE = 98_304  # bytes searched or decoded in one call: few calls, but below malloc's mmap threshold (128 KiB)
WINDOW = 1 << 20  # bytes that one regular expression match may read

# No possessive groups: Python before 3.11.5 (Debian 12 has 3.11.2) does not undo the partial match of a group that
# fails. The number of repetitions per match is limited, and `end_of` continues from there: memory stays bounded.
_HEADER = re.compile(
    rb"(?:(?!--)[!-9;-~]++[ \t]*+:[^\r\n]*+(?:\r\n?|\n|\Z)|[ \t]++[^\s][^\r\n]*+(?:\r\n?|\n|\Z)){0,1000}"
)
_EMPTY_LINES = (b"\n\n", b"\n\r\n", b"\r\r", b"\n \n", b"\n--", b"\r--")  # the last two end a section
_EMPTY = ahocorasick_rs.BytesAhoCorasick(_EMPTY_LINES)
_REST = re.compile(rb"[^\r\n]*+")
_LETTERS = rb"[A-Za-z0-9+/=]++"
_BASE64_LINES = re.compile(rb"(?:" + _LETTERS + rb"[ \t]*+(?:[\r\n]++[ \t]*+|\Z)){0,1000}")
BASE64_LINE = re.compile(_LETTERS + rb"[ \t]*+\Z")


def after_line(data: Text, at: int) -> int:
    """Return the start of the line after ``at``."""
    size = len(data)
    while at < size:
        line = _REST.match(data, at, at + WINDOW)
        end = line.end() if line else size
        if end - at < WINDOW:
            ends = bytes(data[end : end + 2])
            return end + (2 if ends == b"\r\n" else len(ends[:1]))
        at = end
    return size


def header_end(data: Text, at: int) -> int:
    """Return the end of the fields that start at ``at``. Lines longer than the window are followed to their end."""
    while (found := _HEADER.match(data, at, at + WINDOW)) and found.end() > at:
        at = after_line(data, found.end() - 1) if found.end() == at + WINDOW else found.end()
    return at


def empty_line(data: Text, at: int) -> int:
    """Return the position of the section's next empty line, or its end."""
    size = 256
    while at < len(data):
        found = _EMPTY.find_matches_as_indexes(data[at : at + size + 2])
        if found:
            return int(at + found[0][1])
        at += size
        size = min(2 * size, PIECE)
    return len(data)


def end_of(pattern: re.Pattern[bytes], data: Text, at: int, end: int = sys.maxsize) -> int:
    """Return the end of the repeated group of ``pattern`` that starts at ``at``. Each match may stop anywhere in it."""
    while (found := pattern.match(data, at, min(end, at + WINDOW))) and found.end() > at:
        at = found.end()
    return at


def base64_run(data: Text, start: int = 0, end: int = sys.maxsize) -> int:
    """Return the end of the complete lines of base64 letters that start at ``start``."""
    return end_of(_BASE64_LINES, data, start, end)
