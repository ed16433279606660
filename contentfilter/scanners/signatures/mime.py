"""MIME walk: every leaf of a message that any mail reader would see, in one pass and without copying.

Mail readers disagree about broken messages, so the walk does not choose: it yields every position at which some
reader would start the content, with every encoding that some reader would apply.

- Any line that begins with ``--`` may start a part, declared as a boundary or not. A part that a declared boundary
  opened is yielded a second time if an undeclared delimiter interrupted it.
- A header ends at the first empty line, and also at the first line that is not a field. Another header may follow
  (message/rfc822, a bounce, a pasted message), up to 30 levels deep.
- LF, CRLF and a bare CR end lines. Field names and values may be folded, repeated, in any case, quoted, commented.
- Base64 lines and uuencode that start at any line of a text are separate leaves.

Leaves of one kind do not overlap, so the sum of their sizes, and the work, is linear in the size of the message. The
number of parts is bounded as well: :class:`ScanLimits` counts them, across all nested content of a message, and records
when a limit was reached. No single call processes more than a megabyte, so other threads can run in between.
"""

import enum
import re
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import ahocorasick_rs

Text = bytes | memoryview

PIECE = 98_304  # bytes searched or decoded in one call: few calls, but below malloc's mmap threshold (128 KiB)
WINDOW = 1 << 20  # bytes that one regular expression match may read
NESTED = 30  # headers directly nested in each other
UNDECLARED = 100_000  # undeclared parts and begin lines; after these, only declared boundaries count
PARTS = 250_000  # all parts; the rest of the message is one leaf
DELIMITERS = 1_000_000  # lines that could be boundaries, declared or not; the rest is one leaf, too
BOUNDARIES = 10_000
LONGEST_LINE = 1000  # bytes of a delimiter line that are compared
FIELD_WINDOW = 4096
RUN = 342  # letters, 256 bytes decoded: shorter undeclared base64 is a quotation, not an attachment

# No possessive groups: Python before 3.11.5 (Debian 12 has 3.11.2) does not undo the partial match of a group that
# fails. The number of repetitions per match is limited, and `_end` continues from there: memory stays bounded.
_HEADER = re.compile(
    rb"(?:(?!--)[!-9;-~]++[ \t]*+:[^\r\n]*+(?:\r\n?|\n|\Z)|[ \t]++[^\s][^\r\n]*+(?:\r\n?|\n|\Z)){0,1000}"
)
_BLANK = re.compile(rb"[ \t\r\n]*+")
_EMPTY_LINES = (b"\n\n", b"\n\r\n", b"\r\r", b"\n \n", b"\n--", b"\r--")  # the last two end a section
_EMPTY = ahocorasick_rs.BytesAhoCorasick(_EMPTY_LINES)
_LINE = re.compile(rb"([^\r\n]*+)(?:\r\n?|\n)?")
_REST = re.compile(rb"[^\r\n]*+")
_BEGIN = re.compile(rb"begin(-base64)?[ \t]")
_VALUE = re.compile(rb"[^\r\n]*+(?:(?:\r\n?|\n)[ \t][^\r\n]*+)*")
_BOUNDARY = re.compile(
    rb"boundary(?:\*[0-9]*+\*?+)?[ \t\r\n]*+=[ \t\r\n]*+(?:\"((?:[^\"\\]|\\.)*)\"?|([^\s;\"(]*+))",
    re.IGNORECASE | re.DOTALL,
)
_LETTERS = rb"[A-Za-z0-9+/=]++"
_BASE64_LINES = re.compile(rb"(?:" + _LETTERS + rb"[ \t]*+(?:[\r\n]++[ \t]*+|\Z)){0,1000}")
_BASE64_LINE = re.compile(_LETTERS + rb"[ \t]*+\Z")


class Kind(enum.IntFlag):
    """Content of a leaf. Several flags may be set, because mail readers differ."""

    PLAIN = 0
    BASE64 = 1  # declared
    QUOTED = 2  # declared quoted-printable
    COMPOSITE = 4  # declared multipart or message: the decoded content is a MIME tree
    RUN = 8  # consecutive undeclared lines of base64
    UUENCODE = 16  # after a begin line


# IntFlag arithmetic costs a microsecond; the walk uses the numbers.
_BASE64, _QUOTED, _COMPOSITE = int(Kind.BASE64), int(Kind.QUOTED), int(Kind.COMPOSITE)


class Leaf(NamedTuple):
    """Bytes ``start`` to ``end`` of the text, and the encodings (flags of Kind) that readers may apply."""

    start: int
    end: int
    kind: int
    path: tuple[int, ...]  # numbers as in IMAP's part specifiers; empty for the body of the message itself
    declared: bool  # opened by a declared boundary, or the message itself


class ScanLimits:
    """Limits of one message: counters of the remaining parts, and the first limit that truncated the scan."""

    __slots__ = ("delimiters", "parts", "truncated", "undeclared")

    def __init__(self) -> None:
        self.parts = PARTS
        self.undeclared = UNDECLARED
        self.delimiters = DELIMITERS
        self.truncated = ""  # the limit, for people; empty: the scan is complete

    def mark_truncated(self, limit: str) -> None:
        """Record that ``limit`` ended the scan of some content. The first one is kept."""
        self.truncated = self.truncated or limit


class LineStarts:
    """Search for line starts: ``--``, ``begin``, and the given first letters of base64 blobs.

    Immutable; one instance per configuration.
    """

    DELIMITER, BEGIN, BLOB = range(3)

    def __init__(self, blobs: tuple[bytes, ...]) -> None:
        starts = [b"--", b"begin", *blobs]
        self._kinds = [min(at, self.BLOB) for at in range(len(starts)) for _ in b"\r\n"]
        patterns = [newline + start for start in starts for newline in (b"\n", b"\r")]
        self._overlap = max(map(len, patterns)) - 1
        self._all = ahocorasick_rs.BytesAhoCorasick(patterns)
        self._delimiters = ahocorasick_rs.BytesAhoCorasick(patterns[:2])  # three times as fast

    def find(self, data: Text, delimiters_only: Callable[[], bool]) -> Iterator[tuple[int, int]]:
        """Yield kind and position (after the newline) of each match, in order.

        While ``delimiters_only()`` is true, pieces of the text without a delimiter are skipped.
        """
        kinds, size = self._kinds, len(data)
        for base in range(0, size, PIECE):
            piece = data if size <= PIECE else data[base : base + PIECE + self._overlap]
            if delimiters_only() and not self._delimiters.find_matches_as_indexes(piece):
                continue
            for pattern, start, _ in self._all.find_matches_as_indexes(piece):
                if start < PIECE:
                    yield kinds[pattern], base + start + 1

    def any(self, before: bytes, piece: bytes) -> bool:
        """True if ``piece`` contains a match, or one starts in ``before``, the bytes in front of it."""
        search = self._all.find_matches_as_indexes
        return bool(search(before[-self._overlap :] + piece[: self._overlap]) or search(piece))


class _Boundary:
    """Declared boundary: path of its multipart, and the number of parts so far."""

    __slots__ = ("count", "path")

    def __init__(self, path: tuple[int, ...]) -> None:
        self.path = path
        self.count = 0


class _Section:
    """Text between two delimiter lines: the positions at which its content may start."""

    __slots__ = ("base64", "declared", "path", "starts")

    def __init__(self, path: tuple[int, ...], *, declared: bool) -> None:
        self.path = path
        self.declared = declared
        self.starts: list[tuple[int, int]] = []  # position, flags
        self.base64 = False  # declared by any of its headers

    def leaves(self, end: int) -> Iterator[Leaf]:
        """Yield one leaf per start; the section ends at ``end``."""
        for start, kind in self.starts:
            if start < end:
                yield Leaf(start, end, kind, self.path, self.declared)


def leaves(data: Text, line_starts: LineStarts, limits: ScanLimits) -> Iterator[Leaf]:
    """Yield every leaf of a message or of decoded content, in the order of their ends.

    ``limits`` belongs to the message and is shared by all content nested in it.
    """
    return _Walker(data, line_starts, limits).leaves()


class _Walker:
    """One pass over one text: the open section and the boundaries declared so far."""

    __slots__ = ("_blob_end", "_boundaries", "_data", "_interrupted", "_limits", "_line_starts", "_section")

    def __init__(self, data: Text, line_starts: LineStarts, limits: ScanLimits) -> None:
        self._data = data
        self._line_starts = line_starts
        self._limits = limits
        self._boundaries: dict[bytes, _Boundary] = {}
        self._section = self._open(0, (), declared=True)
        self._interrupted: _Section | None = None  # a declared part, interrupted by an undeclared delimiter
        self._blob_end = 0

    def leaves(self) -> Iterator[Leaf]:
        data, size, limits = self._data, len(self._data), self._limits
        for kind, at in self._lines():
            if kind == LineStarts.DELIMITER:
                limits.delimiters -= 1
                if limits.parts <= 0 or limits.delimiters <= 0:
                    limits.mark_truncated(f"more than {PARTS if limits.parts <= 0 else DELIMITERS} parts")
                    break
                yield from self._delimiter(at)
            elif kind == LineStarts.BEGIN:
                if self._take_undeclared():
                    yield from _uuencode(data, at, self._section.path)
            elif at >= self._blob_end and not self._section.base64:
                for leaf in _blob(data, at, self._section.path):
                    self._blob_end = leaf.end
                    yield leaf
        yield from self._section.leaves(size)
        if self._interrupted is not None:
            yield from self._interrupted.leaves(size)

    def _lines(self) -> Iterator[tuple[int, int]]:
        data = self._data
        if bytes(data[:2]) == b"--":
            yield LineStarts.DELIMITER, 0
        if bytes(data[:5]) == b"begin":
            yield LineStarts.BEGIN, 0
        yield from self._line_starts.find(data, lambda: self._section.base64)

    def _take_undeclared(self) -> bool:
        """Count one more undeclared part. False if the limit is reached."""
        self._limits.undeclared -= 1
        if self._limits.undeclared < 0:
            self._limits.mark_truncated(f"more than {UNDECLARED} undeclared parts")
            return False
        return True

    def _delimiter(self, at: int) -> Iterator[Leaf]:
        """Handle a line that begins with ``--``: end the open section and open the next."""
        data, section = self._data, self._section
        line = _LINE.match(data, at + 2, at + 2 + LONGEST_LINE)
        name = bytes(line[1] if line else b"").rstrip()
        boundary = self._boundaries.get(name) or self._boundaries.get(name[:-2] if name.endswith(b"--") else name)
        if boundary is None and not self._take_undeclared():
            return
        self._limits.parts -= 1
        yield from section.leaves(at)
        start = _after_line(data, at)
        if boundary is None:
            self._interrupted = self._interrupted or (section if section.declared else None)
            self._section = self._open(start, section.path, declared=False)
            return
        if self._interrupted is not None:
            yield from self._interrupted.leaves(at)
            self._interrupted = None
        boundary.count += 1
        path = (*boundary.path[:NESTED], boundary.count)
        self._section = self._open(start, path, declared=True)

    def _open(self, start: int, path: tuple[int, ...], *, declared: bool) -> _Section:
        """Parse the header, or nested headers, at ``start`` and return the section."""
        data = self._data
        section = _Section(path, declared=declared)
        starts, at, kind = section.starts, start, 0
        for depth in range(NESTED):
            end = at if data[at : at + 1] in (b" ", b"\t") else _header_end(data, at)
            if end == at and depth and not kind & _COMPOSITE:
                break
            body = _end(_BLANK, data, end)
            kind |= self._fields(at, end, path)
            seen = kind
            if body == end and end < len(data) and bytes(data[end : end + 2]) != b"--":
                # No empty line: some readers start the content here, others after the next empty line.
                if end > at or not depth:
                    starts.append((end, kind))
                body = _end(_BLANK, data, _empty_line(data, end))
                kind |= self._fields(end, body, path)
            starts.append((body, kind))
            if (end == at and kind == seen) or body >= len(data):
                break
            at = body
        else:
            if kind & _COMPOSITE:  # otherwise it is text whose lines look like fields
                self._limits.mark_truncated(f"more than {NESTED} nested headers")
        section.base64 = bool(kind & _BASE64)
        return section

    def _fields(self, start: int, end: int, path: tuple[int, ...]) -> int:
        """Return the flags that the header fields set, and store the boundaries that they declare."""
        data, kind = self._data, 0
        for base in range(start, end, PIECE):
            piece = bytes(data[base : min(end, base + PIECE + FIELD_WINDOW)])
            if b"\0" in piece:
                piece = piece.replace(b"\0", b"")
            lower = piece.lower()
            at = lower.find(b"content-t")
            while 0 <= at < PIECE:
                if at == 0 or lower[at - 1] in b"\r\n":
                    found = _VALUE.match(piece, at, at + FIELD_WINDOW)
                    if found is not None:
                        kind |= self._field(found[0], path)
                at = lower.find(b"content-t", at + 9)
        return kind

    def _field(self, text: bytes, path: tuple[int, ...]) -> int:
        """Return the flags of one field. A word counts anywhere in its value, also in quotes or comments."""
        name, _, value = text.lower().partition(b":")
        name = name.rstrip()
        if name == b"content-transfer-encoding":
            return (_BASE64 if b"base64" in value else 0) | (_QUOTED if b"quoted" in value else 0)
        if name != b"content-type":
            return 0
        if b"boundary" in value:
            if len(self._boundaries) >= BOUNDARIES:
                self._limits.mark_truncated(f"more than {BOUNDARIES} boundaries")
                return 0
            for quoted, token in _BOUNDARY.findall(text):
                boundary = quoted.replace(b"\\", b"") if quoted else token
                self._boundaries.setdefault(boundary[:LONGEST_LINE].rstrip(), _Boundary(path))
        return _COMPOSITE if b"multipart/" in value or b"message/" in value else 0


def _after_line(data: Text, at: int) -> int:
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


def _header_end(data: Text, at: int) -> int:
    """Return the end of the fields that start at ``at``. Lines longer than the window are followed to their end."""
    while (found := _HEADER.match(data, at, at + WINDOW)) and found.end() > at:
        at = _after_line(data, found.end() - 1) if found.end() == at + WINDOW else found.end()
    return at


def _empty_line(data: Text, at: int) -> int:
    """Return the position of the section's next empty line, or its end."""
    size = 256
    while at < len(data):
        found = _EMPTY.find_matches_as_indexes(data[at : at + size + 2])
        if found:
            return int(at + found[0][1])
        at += size
        size = min(2 * size, PIECE)
    return len(data)


def _end(pattern: re.Pattern[bytes], data: Text, at: int, end: int = sys.maxsize) -> int:
    """Return the end of the repeated group of ``pattern`` that starts at ``at``. Each match may stop anywhere in it."""
    while (found := pattern.match(data, at, min(end, at + WINDOW))) and found.end() > at:
        at = found.end()
    return at


def base64_run(data: Text, start: int = 0, end: int = sys.maxsize) -> int:
    """Return the end of the complete lines of base64 letters that start at ``start``."""
    return _end(_BASE64_LINES, data, start, end)


def _uuencode(data: Text, at: int, path: tuple[int, ...]) -> Iterator[Leaf]:
    """Yield the content after a begin line."""
    begin = _BEGIN.match(data, at)
    if begin is not None and (start := _after_line(data, at)) < len(data):
        kind = Kind.BASE64 if begin[1] else Kind.UUENCODE
        yield Leaf(start, len(data), int(kind), path, declared=False)


def _blob(data: Text, at: int, path: tuple[int, ...]) -> Iterator[Leaf]:
    """Yield base64 in the middle of a text, if ``at`` is its first line and it is long enough."""
    before = bytes(data[max(0, at - 100) : at]).rstrip(b"\r\n")
    line = before[max(before.rfind(b"\n"), before.rfind(b"\r")) + 1 :]
    if len(line) >= 40 and _BASE64_LINE.match(line):
        return
    end = base64_run(data, at)
    if end - at >= RUN:
        yield Leaf(at, end, int(Kind.RUN), path, declared=False)
