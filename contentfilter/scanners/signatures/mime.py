"""MIME walk: every leaf of a message that any mail reader would see, in one pass and without copying.

Mail readers disagree about broken messages, so the walk does not choose: it yields every position at which some
reader would start the content, with every encoding that some reader would apply. docs/mime.md lists the readings.

- Delimiters: a declared boundary starts a part, and may as well be junk inside the part before it. Only a *firm*
  boundary, about which no two readers disagree, ends all open sections.
- Headers: a header ends at the first empty line, and also at the first line that is not a field. Another header may
  follow (message/rfc822, a bounce, a pasted message), up to 30 levels deep. LF, CRLF and a bare CR end lines. Field
  names and values may be folded, repeated, in any case, quoted, commented.
- Encodings: wherever a field for them occurs outside a header that is beyond doubt, content in that encoding may start
  at each of the next lines that could end a header.
- Lines: uuencode, yEnc, BinHex, base64 and programs that start at any line are leaves of their own.

Each section is examined from each of its starts to its end. Sections overlap if boundaries are ambiguous; the work
(:mod:`work`) bounds the sum. No single call processes more than a megabyte, so other threads can run in between.
"""

import enum
import re
from collections.abc import Iterator
from typing import NamedTuple

from contentfilter.scanners.signatures.lines import (
    BASE64_LINE,
    PIECE,
    WINDOW,
    Text,
    after_line,
    base64_run,
    empty_line,
    end_of,
    header_end,
)
from contentfilter.scanners.signatures.markers import Marker, Markers
from contentfilter.scanners.signatures.work import Work

NESTED = 30  # headers directly nested in each other
BOUNDARIES = 10_000
LONGEST_LINE = 1000  # bytes of a delimiter line that are compared
LONGEST_VALUE = 65_536  # bytes of a field that are searched
LONGEST_HEADER = 65_536  # bytes of a header that can declare a firm boundary
JUNK_LINES = 3
RUN = 342  # letters, 256 bytes decoded: shorter undeclared base64 is a quotation, not an attachment

# Work of the steps, in nanoseconds, with the interpreter's part.
_MARK = 3_000
_SECTION = 10_000
_FIELD = 5_000
_HEADER_BYTE = 30
_LINE_STEP = 3_000
_START = 3_000

_BLANK = re.compile(rb"[ \t\r\n]*+")
_LINE = re.compile(rb"([^\r\n]*+)(?:\r\n?|\n)?")
_BLANK_LINE = re.compile(rb"[ \t]*+(?:[\r\n]|\Z)")
_FIELD_LINE = re.compile(rb"[!-9;-~]++[ \t]*+:|[ \t]")
_BEGIN = re.compile(rb"begin(-base64)?[ \t]")
_VALUE = re.compile(rb"[^\r\n]*+(?:(?:\r\n?|\n)[ \t][^\r\n]*+)*")
_BOUNDARY = re.compile(
    rb"boundary(?:\*[0-9]*+\*?+)?[ \t\r\n]*+=[ \t\r\n]*+(?:\"((?:[^\"\\]|\\.)*)\"?|([^\s;\"(]*+))",
    re.IGNORECASE | re.DOTALL,
)

# A header that all readers see alike: fields and folded lines that end in LF or CRLF, then an empty line.
_STRICT_HEADER = re.compile(rb"(?:[!-9;-~]++:[^\r\n\0]*+\r?+\n(?:[ \t]++[^\s\0][^\r\n\0]*+\r?+\n)*)+\r?+\n[ \t\r\n]*+")
_CONTENT_TYPE = re.compile(rb"^content-type:([^\n]*+(?:\n[ \t][^\n]*+)*)", re.IGNORECASE | re.MULTILINE)
_ENCODED = re.compile(rb"^content-transfer-encoding:(?![ \t]*+(?:7bit|8bit|binary)[ \t\r]*+$)", re.I | re.MULTILINE)
_MULTIPART = re.compile(
    rb"\s*+multipart/[a-z0-9-]++\s*+(?:;\s*+[a-z0-9-]++=(?:[a-z0-9'+_,./:?=-]++|\"[^\"\\]*+\")\s*+)+;?+\s*+", re.I
)
_FIRM_BOUNDARY = re.compile(
    rb"boundary=(?:([a-z0-9'+_,./:?=-]{1,70})|\"([a-z0-9'()+_,./:=? -]{1,70})\")(?=[\s;]|$)", re.I
)
_RFC822 = re.compile(rb"\s*+message/rfc822\s*+", re.I)


class Kind(enum.IntFlag):
    """Content of a leaf. Several flags may be set, because mail readers differ."""

    PLAIN = 0
    BASE64 = 1  # declared
    QUOTED = 2  # declared quoted-printable
    COMPOSITE = 4  # declared multipart or message: the decoded content is a MIME tree
    RUN = 8  # consecutive undeclared lines of base64
    UUENCODE = 16  # after a begin line: uuencode or xxencode
    YENC = 32  # after a =ybegin line
    BINHEX = 64  # after the banner of BinHex 4.0


# IntFlag arithmetic costs a microsecond; the walk uses the numbers.
_BASE64, _QUOTED, _COMPOSITE = int(Kind.BASE64), int(Kind.QUOTED), int(Kind.COMPOSITE)


_KINDS = {Marker.BEGIN: Kind.UUENCODE, Marker.YENC: Kind.YENC, Marker.BINHEX: Kind.BINHEX}


class Leaf(NamedTuple):
    """Bytes ``start`` to ``end`` of the text, and the encodings (flags of Kind) that readers may apply."""

    start: int
    end: int
    kind: int
    path: tuple[int, ...]  # numbers as in IMAP's part specifiers; empty for the body of the message itself
    declared: bool  # opened by a declared boundary, or the message itself


class _Boundary:
    """Declared boundary: path of its multipart, and the number of parts so far."""

    __slots__ = ("count", "path")

    def __init__(self, path: tuple[int, ...]) -> None:
        self.path = path
        self.count = 0


class _Section:
    """Text after a delimiter line: the positions at which its content may start."""

    __slots__ = ("declared", "kind", "path", "starts")

    def __init__(self, path: tuple[int, ...], *, declared: bool) -> None:
        self.path = path
        self.declared = declared
        self.starts: list[tuple[int, int]] = []  # position, flags
        self.kind = 0  # flags of all its headers

    def leaves(self, end: int) -> Iterator[Leaf]:
        """Yield one leaf per start; the section ends at ``end``."""
        for start, kind in self.starts:
            if start < end:
                yield Leaf(start, end, kind, self.path, self.declared)


def leaves(data: Text, marks: Markers, work: Work) -> Iterator[Leaf]:
    """Yield every leaf of a message or of decoded content, in the order of their ends.

    ``work`` belongs to the message and is shared by all content nested in it. Raises OutOfWorkError.
    """
    return _Walker(data, marks, work).leaves()


class _Walker:
    """One pass over one text: the open sections, and the boundaries declared so far."""

    __slots__ = (
        "_blob_end",
        "_boundaries",
        "_data",
        "_fields_until",
        "_firm",
        "_loose",
        "_marks",
        "_newest",
        "_open",
        "_work",
    )

    def __init__(self, data: Text, marks: Markers, work: Work) -> None:
        self._data = data
        self._marks = marks
        self._work = work
        self._boundaries: dict[bytes, _Boundary] = {}
        self._firm: list[_Boundary] = []  # active, outermost first
        self._blob_end = 0
        self._fields_until = 0  # the encodings that fields name are known up to here
        self._newest = self._section(0, (), firm=True)
        self._loose = _Boundary(())  # stands for none: content that a field in a doubtful header declares
        self._open = {_Boundary(()): self._newest}  # by the boundary that opened it

    def _inside_base64(self) -> bool:
        """True if the text at hand is declared as base64."""
        return bool(self._newest.kind & _BASE64)

    def leaves(self) -> Iterator[Leaf]:
        data, work = self._data, self._work
        for mark, at in self._marks.find(data, work, self._inside_base64):
            work.spend(_MARK)
            if mark is Marker.DELIMITER:
                yield from self._delimiter(at)
            elif mark is Marker.BLOB:
                if at >= self._blob_end and not self._is_start(at, _BASE64):
                    self._blob_end = _blob_end(data, at)
                    if self._blob_end - at >= RUN:
                        yield Leaf(at, len(data), int(Kind.RUN), self._newest.path, declared=False)
            elif mark is Marker.PROGRAM:
                if not self._is_start(at, 0):
                    yield Leaf(at, len(data), 0, self._newest.path, declared=False)
            elif mark is Marker.ENCODING:
                if at >= self._fields_until and bytes(data[max(0, at - 7) : at + 10]).lower() == b"transfer-encoding":
                    yield from self._encoding(at)
            else:
                yield from _encoded(data, at, mark, self._newest.path)
        yield from self._close(len(data))

    def _close(self, end: int) -> Iterator[Leaf]:
        """End all open sections."""
        for section in self._open.values():
            yield from section.leaves(end)
        self._open.clear()

    def _delimiter(self, at: int) -> Iterator[Leaf]:
        """Handle a line that begins with ``--``: a section ends and another begins."""
        data = self._data
        line = _LINE.match(data, at + 2, at + 2 + LONGEST_LINE)
        name = bytes(line[1] if line else b"").rstrip()
        boundary, last = self._boundaries.get(name), False
        if boundary is None and name.endswith(b"--"):
            boundary, last = self._boundaries.get(name[:-2]), True
        if boundary is None:
            return  # content may start after it, but only where a mark is
        start = after_line(data, at)
        firm = boundary in self._firm and self._is_whole_line(at, start)
        if firm:
            yield from self._close(at)
            del self._firm[self._firm.index(boundary) + (not last) :]
        elif boundary in self._open:
            yield from self._open.pop(boundary).leaves(at)
        boundary.count += not last
        path = (*boundary.path[:NESTED], boundary.count)
        self._newest = self._open[boundary] = self._section(start, path, firm=firm and not last)

    def _is_whole_line(self, at: int, start: int) -> bool:
        """True if the line from ``at`` to ``start`` is one for readers that know only LF."""
        data = self._data
        return (at == 0 or data[at - 1] == 10) and (start == len(data) or data[start - 1] == 10)

    def _section(self, start: int, path: tuple[int, ...], *, firm: bool) -> _Section:
        """Parse the header, or nested headers, at ``start``. ``firm``: every reader sees a part here."""
        data, work = self._data, self._work
        section = _Section(path, declared=True)
        starts, at, kind = section.starts, start, 0
        for depth in range(NESTED):
            work.spend(_SECTION)
            end = at if data[at : at + 1] in (b" ", b"\t") else header_end(data, at)
            if end == at and depth and not kind & _COMPOSITE:
                break
            body = end_of(_BLANK, data, end)
            work.spend(_HEADER_BYTE * (body - at))
            kind |= self._fields(at, end, path)
            seen = kind
            if body == end and end < len(data) and bytes(data[end : end + 2]) != b"--":
                # No empty line: some readers start the content here, others after the next empty line.
                if end > at or not depth:
                    starts.append((end, kind))
                body = end_of(_BLANK, data, empty_line(data, end))
                kind |= self._fields(end, body, path)
            elif firm and at < end:
                firm = self._strict(at, body)
            starts.append((body, kind))
            if (end == at and kind == seen) or body >= len(data):
                break
            at = body
        else:
            if kind & _COMPOSITE:  # otherwise it is text whose lines look like fields
                work.mark_truncated(f"more than {NESTED} nested headers")
        section.kind = kind
        work.spend(_START * len(starts))
        return section

    def _strict(self, start: int, body: int) -> bool:
        """Examine a header about which readers could disagree; activate its boundary if they can't.

        Returns True if the content is a message whose header may do the same.
        """
        if body - start > LONGEST_HEADER:
            return False
        header = bytes(self._data[start:body])
        if not _STRICT_HEADER.fullmatch(header):
            return False
        self._fields_until = body
        types = _CONTENT_TYPE.findall(header)
        if len(types) != 1 or _ENCODED.search(header):
            return False
        if _RFC822.fullmatch(types[0]):
            return True
        if types[0].lower().count(b"boundary") == 1 and _MULTIPART.fullmatch(types[0]):
            found = _FIRM_BOUNDARY.search(types[0])
            boundary = self._boundaries.get((found[1] or found[2]).rstrip()) if found else None
            if boundary is not None and boundary not in self._firm:
                self._firm.append(boundary)
        return False

    def _fields(self, start: int, end: int, path: tuple[int, ...]) -> int:
        """Return the flags that the header fields set, and store the boundaries that they declare."""
        data, kind = self._data, 0
        for base in range(start, end, PIECE):
            piece = bytes(data[base : min(end, base + PIECE + LONGEST_VALUE)])
            if b"\0" in piece:
                piece = piece.replace(b"\0", b"")
            lower = piece.lower()
            at = lower.find(b"content-t")
            while 0 <= at < PIECE:
                if at == 0 or lower[at - 1] in b"\r\n":
                    found = _VALUE.match(piece, at, at + LONGEST_VALUE)
                    if found is not None:
                        self._work.spend(_FIELD + _HEADER_BYTE * len(found[0]))
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
            for quoted, token in _BOUNDARY.findall(text):
                if len(self._boundaries) >= BOUNDARIES:
                    self._work.mark_truncated(f"more than {BOUNDARIES} boundaries")
                    break
                boundary = (quoted.replace(b"\\", b"") if quoted else token)[:LONGEST_LINE].rstrip()
                self._boundaries.setdefault(boundary, _Boundary(path))
        return _COMPOSITE if b"multipart/" in value or b"message/" in value else 0

    def _encoding(self, at: int) -> Iterator[Leaf]:
        """Handle a field that names an encoding, in a header about which readers may disagree.

        Content may start at each line that could be the first after the header. The first empty line ends the header
        for every reader, but not every reader needs one.
        """
        data, limit = self._data, min(len(self._data), at + LONGEST_HEADER)
        lines, line = [], at
        while (line := after_line(data, line)) < limit:
            self._work.spend(_LINE_STEP)
            if _BLANK_LINE.match(data, line, line + WINDOW):
                lines.append(end_of(_BLANK, data, line))
                if data[line - 1] == 10 and bytes(data[line : line + 2]).startswith((b"\n", b"\r\n")):
                    break
            elif not _FIELD_LINE.match(data, line, line + LONGEST_LINE):
                lines.append(line)
        self._fields_until = line
        self._work.spend(_HEADER_BYTE * (line - at))
        text = bytes(data[at:line]).lower()
        kind = (_BASE64 if b"base64" in text else 0) | (_QUOTED if b"quoted" in text else 0)
        if not kind:
            return
        if self._loose in self._open:
            yield from self._open.pop(self._loose).leaves(at)
        section = self._open[self._loose] = _Section(self._newest.path, declared=False)
        self._work.spend(_START * len(lines))
        section.starts += [(start, kind) for start in lines if not self._is_start(start, kind)]

    def _is_start(self, at: int, flag: int) -> bool:
        """True if the newest section has this start already."""
        return any(start == at and kind & flag == flag for start, kind in self._newest.starts)


def _encoded(data: Text, at: int, mark: Marker, path: tuple[int, ...]) -> Iterator[Leaf]:
    """Yield the content after a begin line, a =ybegin line or the banner of BinHex."""
    kind = _KINDS[mark]
    if mark is Marker.BEGIN:
        begin = _BEGIN.match(data, at)
        if begin is None:
            return
        if begin[1]:
            kind = Kind.BASE64
    if (start := after_line(data, at)) < len(data):
        yield Leaf(start, len(data), int(kind), path, declared=False)


def _blob_end(data: Text, at: int) -> int:
    """Return the end of the base64 that starts at ``at``; ``at`` itself if that is not its first line."""
    before = bytes(data[max(0, at - 100) : at]).rstrip(b"\r\n")
    line = before[max(before.rfind(b"\n"), before.rfind(b"\r")) + 1 :]
    if len(line) >= 40 and BASE64_LINE.match(line):
        return at
    end = base64_run(data, at)
    for _ in range(JUNK_LINES):  # a line that looks like a delimiter does not end it for every reader
        if end - at >= RUN or bytes(data[end : end + 2]) != b"--":
            break
        end = base64_run(data, after_line(data, end))
    return end
