"""A MIME walk that no trick with the structure can lead astray, in one pass and without copying.

Readers disagree about broken mail, so the walk does not choose: it yields every place where some reader would
let content begin, with every encoding that some reader would apply.

- Any line that begins with ``--`` may start a part, whether a boundary was declared or not. A part that a declared
  boundary opened is yielded once more if an undeclared one cut it short.
- A header ends at the first empty line, and also at the first line that is no field. What follows may be a header
  again (message/rfc822, a bounce, a pasted message), up to 30 levels deep.
- LF, CRLF and a bare CR end lines. Field names and values may be folded, repeated, oddly cased, quoted, commented.
- In text, base64 lines and uuencode that begin at any line are content of their own.

The leaves of one kind don't overlap, so the sum of their sizes, and the work, is linear in the message. What each part
costs is bounded, too: an :class:`Effort` counts them, through all encoded content of a message, and says when something
was left out. No single call looks at more than a megabyte, so that other threads get their turn.
"""

import enum
import re
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import ahocorasick_rs

Text = bytes | memoryview

PIECE = 98_304  # bytes searched or decoded at once: few calls, yet below malloc's mmap threshold (128 KiB)
WINDOW = 1 << 20  # bytes that one match may look at
NESTED = 30  # headers directly inside each other
LOOSE = 100_000  # undeclared parts, and begin lines; after that only declared boundaries count
PARTS = 250_000  # all parts; what comes after is one leaf
DELIMITERS = 1_000_000  # lines that could be boundaries, declared or not; what comes after is one leaf, too
BOUNDARIES = 10_000
LONGEST_LINE = 1000  # of a delimiter line or a field's value: what is looked at
FIELD_WINDOW = 4096
RUN = 342  # letters, 256 bytes: shorter undeclared base64 is a quotation, not an attachment

# No possessive groups: Python before 3.11.5 (Debian 12 has 3.11.2) does not undo what a group matched in part when it
# fails. Groups repeat at most so often per match, and `_end` goes on from there: their memory stays bounded.
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


class As(enum.IntFlag):
    """How a leaf's bytes may be meant. Several flags: readers may differ."""

    PLAIN = 0
    BASE64 = 1  # declared
    QUOTED = 2  # declared quoted-printable
    COMPOSITE = 4  # declared multipart or message: the decoded content is a tree of its own
    RUN = 8  # undeclared lines of base64, nothing else in between
    UUENCODE = 16  # after a begin line


# IntFlag arithmetic costs a microsecond; the walk uses the numbers.
_BASE64, _QUOTED, _COMPOSITE = int(As.BASE64), int(As.QUOTED), int(As.COMPOSITE)


class Leaf(NamedTuple):
    """Bytes ``start`` to ``end`` of the text, to be read as ``kind`` (flags of As) says."""

    start: int
    end: int
    kind: int
    path: tuple[int, ...]  # numbers as in IMAP's part specifiers; empty for the body of the message itself
    declared: bool  # a declared boundary opened this part, or it is the message itself


class ScanLimits:
    """What one message may still cost: counts down, and remembers whether something was left out for it."""

    __slots__ = ("delimiters", "left_out", "loose", "parts")

    def __init__(self) -> None:
        self.parts = PARTS
        self.loose = LOOSE
        self.delimiters = DELIMITERS
        self.left_out = ""  # what, for people; empty: everything was looked at

    def mark_truncated(self, what: str) -> None:
        self.left_out = self.left_out or what


class Marks:
    """Finds the line starts that matter: ``--``, ``begin``, and the given first letters of base64 blobs.

    Immutable; one for each configuration.
    """

    DELIMITER, BEGIN, BLOB = range(3)

    def __init__(self, blobs: tuple[bytes, ...]) -> None:
        starts = [b"--", b"begin", *blobs]
        self._kinds = [min(at, self.BLOB) for at in range(len(starts)) for _ in b"\r\n"]
        patterns = [newline + start for start in starts for newline in (b"\n", b"\r")]
        self._overlap = max(map(len, patterns)) - 1
        self._all = ahocorasick_rs.BytesAhoCorasick(patterns)
        self._delimiters = ahocorasick_rs.BytesAhoCorasick(patterns[:2])  # three times as fast

    def find(self, data: Text, quiet: Callable[[], bool]) -> Iterator[tuple[int, int]]:
        """Kind and position (after the newline) of each mark, in order. While ``quiet``, only delimiters matter."""
        kinds, size = self._kinds, len(data)
        for base in range(0, size, PIECE):
            piece = data if size <= PIECE else data[base : base + PIECE + self._overlap]
            if quiet() and not self._delimiters.find_matches_as_indexes(piece):
                continue
            for pattern, start, _ in self._all.find_matches_as_indexes(piece):
                if start < PIECE:
                    yield kinds[pattern], base + start + 1

    def any(self, before: bytes, piece: bytes) -> bool:
        """Whether a mark stands in ``piece``, or begins in ``before``, the bytes in front of it."""
        search = self._all.find_matches_as_indexes
        return bool(search(before[-self._overlap :] + piece[: self._overlap]) or search(piece))


class _Level:
    """A declared boundary: where its multipart stands, and how many parts were seen."""

    __slots__ = ("count", "path")

    def __init__(self, path: tuple[int, ...]) -> None:
        self.path = path
        self.count = 0


class _Section:
    """What lies between two delimiter lines: the places where its content may begin."""

    __slots__ = ("base64", "declared", "path", "starts")

    def __init__(self, path: tuple[int, ...], *, declared: bool) -> None:
        self.path = path
        self.declared = declared
        self.starts: list[tuple[int, int]] = []  # position, flags
        self.base64 = False  # declared so by any header

    def leaves(self, end: int) -> Iterator[Leaf]:
        for start, kind in self.starts:
            if start < end:
                yield Leaf(start, end, kind, self.path, self.declared)


def leaves(data: Text, marks: Marks, effort: ScanLimits) -> Iterator[Leaf]:
    """Every leaf of a message or of decoded content, in the order in which they are known to end.

    ``effort`` is that of the whole message, whatever content is inside which.
    """
    return _Walk(data, marks, effort).leaves()


class _Walk:
    """One pass over one text: the section that is open, and what was declared so far."""

    __slots__ = ("_blob_end", "_boundaries", "_data", "_effort", "_marks", "_section", "_waiting")

    def __init__(self, data: Text, marks: Marks, effort: ScanLimits) -> None:
        self._data = data
        self._marks = marks
        self._effort = effort
        self._boundaries: dict[bytes, _Level] = {}
        self._section = self._open(0, (), declared=True)
        self._waiting: _Section | None = None  # a declared part that an undeclared delimiter cut short
        self._blob_end = 0

    def leaves(self) -> Iterator[Leaf]:
        data, size, effort = self._data, len(self._data), self._effort
        for kind, at in self._lines():
            if kind == Marks.DELIMITER:
                effort.delimiters -= 1
                if effort.parts <= 0 or effort.delimiters <= 0:
                    effort.mark_truncated(f"more than {PARTS if effort.parts <= 0 else DELIMITERS} parts")
                    break
                yield from self._delimiter(at)
            elif kind == Marks.BEGIN:
                if self._loosely():
                    yield from _uuencode(data, at, self._section.path)
            elif at >= self._blob_end and not self._section.base64:
                for leaf in _blob(data, at, self._section.path):
                    self._blob_end = leaf.end
                    yield leaf
        yield from self._section.leaves(size)
        if self._waiting is not None:
            yield from self._waiting.leaves(size)

    def _lines(self) -> Iterator[tuple[int, int]]:
        data = self._data
        if bytes(data[:2]) == b"--":
            yield Marks.DELIMITER, 0
        if bytes(data[:5]) == b"begin":
            yield Marks.BEGIN, 0
        yield from self._marks.find(data, lambda: self._section.base64)

    def _loosely(self) -> bool:
        """Whether one more thing that nobody declared may be looked at."""
        self._effort.loose -= 1
        if self._effort.loose < 0:
            self._effort.mark_truncated(f"more than {LOOSE} undeclared parts")
            return False
        return True

    def _delimiter(self, at: int) -> Iterator[Leaf]:
        """A line that begins with ``--``: one section ends, another begins."""
        data, section = self._data, self._section
        line = _LINE.match(data, at + 2, at + 2 + LONGEST_LINE)
        name = bytes(line[1] if line else b"").rstrip()
        level = self._boundaries.get(name) or self._boundaries.get(name[:-2] if name.endswith(b"--") else name)
        if level is None and not self._loosely():
            return
        self._effort.parts -= 1
        yield from section.leaves(at)
        start = _after_line(data, at)
        if level is None:
            self._waiting = self._waiting or (section if section.declared else None)
            self._section = self._open(start, section.path, declared=False)
            return
        if self._waiting is not None:
            yield from self._waiting.leaves(at)
            self._waiting = None
        level.count += 1
        path = (*level.path[:NESTED], level.count)
        self._section = self._open(start, path, declared=True)

    def _open(self, start: int, path: tuple[int, ...], *, declared: bool) -> _Section:
        """Read the header, or headers, at ``start``."""
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
            if kind & _COMPOSITE:  # else it is text in which lines look like fields
                self._effort.mark_truncated(f"more than {NESTED} headers inside each other")
        section.base64 = bool(kind & _BASE64)
        return section

    def _fields(self, start: int, end: int, path: tuple[int, ...]) -> int:
        """The flags that the header fields set; boundaries found on the way are remembered."""
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
        """The flags of one field. A word anywhere in its value counts: quotes, comments, parameters may surround it."""
        name, _, value = text.lower().partition(b":")
        name = name.rstrip()
        if name == b"content-transfer-encoding":
            return (_BASE64 if b"base64" in value else 0) | (_QUOTED if b"quoted" in value else 0)
        if name != b"content-type":
            return 0
        if b"boundary" in value:
            if len(self._boundaries) >= BOUNDARIES:
                self._effort.mark_truncated(f"more than {BOUNDARIES} boundaries")
                return 0
            for quoted, token in _BOUNDARY.findall(text):
                boundary = quoted.replace(b"\\", b"") if quoted else token
                self._boundaries.setdefault(boundary[:LONGEST_LINE].rstrip(), _Level(path))
        return _COMPOSITE if b"multipart/" in value or b"message/" in value else 0


def _after_line(data: Text, at: int) -> int:
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
    """Where the fields end that start at ``at``. A line that goes on beyond the window is walked to its end."""
    while (found := _HEADER.match(data, at, at + WINDOW)) and found.end() > at:
        at = _after_line(data, found.end() - 1) if found.end() == at + WINDOW else found.end()
    return at


def _empty_line(data: Text, at: int) -> int:
    """Where the section's next empty line is, or its end."""
    size = 256
    while at < len(data):
        found = _EMPTY.find_matches_as_indexes(data[at : at + size + 2])
        if found:
            return int(at + found[0][1])
        at += size
        size = min(2 * size, PIECE)
    return len(data)


def _end(pattern: re.Pattern[bytes], data: Text, at: int, end: int = sys.maxsize) -> int:
    """Where the repeated group of ``pattern`` ends, which starts at ``at``. It may be cut anywhere."""
    while (found := pattern.match(data, at, min(end, at + WINDOW))) and found.end() > at:
        at = found.end()
    return at


def base64_run(data: Text, start: int = 0, end: int = sys.maxsize) -> int:
    """Where whole lines of base64 letters end, which start at ``start``."""
    return _end(_BASE64_LINES, data, start, end)


def _uuencode(data: Text, at: int, path: tuple[int, ...]) -> Iterator[Leaf]:
    """What a begin line announces."""
    begin = _BEGIN.match(data, at)
    if begin is not None and (start := _after_line(data, at)) < len(data):
        kind = As.BASE64 if begin[1] else As.UUENCODE
        yield Leaf(start, len(data), int(kind), path, declared=False)


def _blob(data: Text, at: int, path: tuple[int, ...]) -> Iterator[Leaf]:
    """Base64 in the middle of a text, if ``at`` is its first line and there are enough of them."""
    before = bytes(data[max(0, at - 100) : at]).rstrip(b"\r\n")
    line = before[max(before.rfind(b"\n"), before.rfind(b"\r")) + 1 :]
    if len(line) >= 40 and _BASE64_LINE.match(line):
        return
    end = base64_run(data, at)
    if end - at >= RUN:
        yield Leaf(at, end, int(As.RUN), path, declared=False)
