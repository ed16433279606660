"""Signature engine (chksignature and chkloadertype): detects programs in a message.

Two modes. ``mime`` (the default) decodes each leaf of the message in every way that some mail reader would, up to ten
layers deep, and examines how the content begins: a program's own headers (programs.py, with chksignature), and the bits
of the listed signatures; a loader type counts only in decoded content that begins as a program does. ``compatible`` is
Warlord's scan, line by line.

The scan is a pure function of the message: no I/O, memory independent of the size, and time as work.py bounds it. A
message that exceeds a limit is not clean: a truncated scan without a detection raises BackendError with
``Cause.LIMITS``.
"""

import itertools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import ahocorasick_rs
import pybase64

from contentfilter.errors import BackendError, Cause
from contentfilter.model import BytesLike, Scanner, readable
from contentfilter.scanners.signatures import compatible, decoders, mime, smime
from contentfilter.scanners.signatures.lines import Text, base64_run
from contentfilter.scanners.signatures.markers import Markers
from contentfilter.scanners.signatures.mime import Kind, Leaf
from contentfilter.scanners.signatures.programs import DEFAULT_FORMATS, Format, Formats
from contentfilter.scanners.signatures.rules import (
    LETTERS,
    LIBRARY,
    Fragment,
    Mode,
    Rule,
    Rules,
    Signature,
    default_loadertypes,
    default_signatures,
    parse_loadertypes,
    parse_signatures,
)
from contentfilter.scanners.signatures.work import OutOfWorkError, Work

__all__ = [
    "Detection",
    "Engine",
    "Rule",
    "Rules",
    "default_loadertypes",
    "default_signatures",
    "parse_loadertypes",
    "parse_signatures",
]

HEAD = 64  # decoded bytes that identify the content: a DOS header
SAMPLE = 512  # decoded bytes that show whether the content is base64 again
LAYERS = 10  # nested encodings
DOCUMENT = 1024 * 1024  # bytes of decoded text in one walk
OVERLAP = 3  # decoding windows that are walked again with the text that follows
SMALL = 65_536  # bytes; a message up to this size is copied, which is faster than a view
LONGEST_NAME = 64  # bytes

_BASE64, _QUOTED, _COMPOSITE = int(Kind.BASE64), int(Kind.QUOTED), int(Kind.COMPOSITE)
_RUN, _UUENCODE, _YENC, _BINHEX = int(Kind.RUN), int(Kind.UUENCODE), int(Kind.YENC), int(Kind.BINHEX)
_LEAF = 8_000  # work for each leaf
_READING = 6_000  # and for each way to decode it
_NAME_BYTE = 0.5  # and for each byte that is searched for names
_FIELD = re.compile(rb"[!-9;-~]++[ \t]*+:|--")
_NAME = re.compile(rb"[A-Za-z0-9_.-]*\Z")
_NO_LETTERS = bytes(set(range(256)) - set(LETTERS.encode()))
_PRINTABLE = bytes((*range(32, 127), 9, 10, 13))


@dataclass(frozen=True, slots=True)
class Detection:
    """First match of a rule in the message."""

    scanner: Scanner  # SIGNATURES or LOADERTYPES
    rule: str  # the pattern of the list
    description: str  # printable
    part: str  # its position, for people: "part 2.1, base64, line 57"
    layers: int  # encodings that were removed


class Engine:
    """Compiled rules of one configuration, used for every message by any thread.

    ``signatures`` and ``loadertypes`` are None if their setting is off. ``formats`` are those that are found by their
    own headers, in mode "mime" and with ``signatures``.
    """

    __slots__ = (
        "_compatible_keys",
        "_rules",
        "formats",
        "fragments",
        "marks",
        "names",
        "overlapping",
        "prefixes",
        "quoted_starts",
        "raw_starts",
        "signatures",
    )

    def __init__(
        self,
        signatures: Rules | None,
        loadertypes: Rules | None,
        mode: Mode = "mime",
        formats: Collection[Format] = DEFAULT_FORMATS,
    ) -> None:
        first = signatures.rules if signatures else ()
        second = loadertypes.rules if loadertypes else ()
        self._rules = first + second
        self._compatible_keys = None
        if mode == "compatible":
            self._compatible_keys = (
                compatible.keys(tuple(rule.pattern for rule in first), compatible.SIGNATURE_LETTERS),
                compatible.keys(tuple(rule.pattern for rule in second), compatible.LOADER_LETTERS),
            )
        self.signatures = tuple(Signature.compile(rule) for rule in first)
        self.prefixes = tuple(signature.prefix for signature in self.signatures)
        self.formats = Formats(frozenset(formats if signatures else ()))
        binary = (signature.prefix for signature in self.signatures if not signature.text)
        self.raw_starts = (b"MZ", *self.formats.starts, *smime.STARTS, *binary)
        self.quoted_starts = (b"=", *{prefix[:1] for prefix in self.raw_starts})
        self.fragments = tuple(fragment for rule in second for fragment in Fragment.compile(rule))
        needles = {fragment.whole for fragment in self.fragments if not fragment.library}
        self.overlapping = bool(needles)
        if any(fragment.library for fragment in self.fragments):
            needles |= {b"32." + bytes(end) for end in itertools.product(b"dD", b"lL", b"lL")}
        self.names = ahocorasick_rs.BytesAhoCorasick(sorted(needles))
        starts = {rule.pattern[:3].partition("*")[0].encode() for rule in first}
        starts |= {pybase64.b64encode(start)[: len(start) * 4 // 3] for start in (b"MZ", *self.formats.starts)}
        self.marks = Markers(tuple(sorted(start for start in starts if len(start) > 1)))

    def scan(self, data: BytesLike, *, inline: bool = False) -> Detection | None:
        """Return the first detection, or None. Synchronous; keeps no reference to ``data``.

        ``inline``: on an event loop; OutOfWorkError is raised if the scan takes long and must be repeated in a thread.
        Raises BackendError if nothing was detected and a limit truncated the scan, and for no other reason.
        """
        if not self._rules:
            return None
        with memoryview(data) as view:
            size = view.nbytes
            text = bytes(view) if size <= SMALL else view.cast("B")
            if self._compatible_keys:
                return self._detection_of_hit(compatible.scan(text, *self._compatible_keys))
            return _Scan(self, Work(size, inline=inline)).message(text)

    def _detection_of_hit(self, hit: compatible.Hit | None) -> Detection | None:
        if hit is None:
            return None
        pattern = hit.pattern.decode("ascii")
        rule = next(rule for rule in self._rules if rule.pattern.startswith(pattern))
        scanner = Scanner.LOADERTYPES if hit.loader else Scanner.SIGNATURES
        return Detection(scanner, rule.pattern, rule.description, f"line {hit.line}", 0)


class _Scan:
    """Scan of one message: its remaining work, and the path to the content being examined."""

    __slots__ = ("_engine", "_trail", "_work")

    def __init__(self, engine: Engine, work: Work) -> None:
        self._engine = engine
        self._work = work
        self._trail: list[tuple[Text, Leaf, str]] = []

    def message(self, data: Text) -> Detection | None:
        """Scan the message itself. Raises BackendError (LIMITS), and OutOfWorkError if it may go on in a thread."""
        try:
            detection = self.document(data, 0)
        except OutOfWorkError as limit:
            if limit.inline:
                raise
            detection = None
            self._work.mark_truncated(str(limit))
        if detection is None and self._work.truncated:
            raise BackendError(Cause.LIMITS, "", f"not scanned to the end: {self._work.truncated}")
        return detection

    def document(self, data: Text, layers: int) -> Detection | None:
        """Scan all leaves of a message or of decoded text."""
        for leaf in mime.leaves(data, self._engine.marks, self._work):
            self._work.spend(_LEAF)
            for encoding, windows in self._readings(data, leaf):
                self._work.spend(_READING)
                self._trail.append((data, leaf, encoding))
                detection = self._content(windows, encoding, layers, leaf)
                if detection is not None:
                    return detection
                self._trail.pop()
        return None

    def _readings(self, data: Text, leaf: Leaf) -> list[tuple[str, Iterator[bytes]]]:
        """Return the leaf decoded in each way that its first bytes, its header and its mark allow."""
        start, end, kind, _, _ = leaf
        engine, work = self._engine, self._work
        head = bytes(data[start : min(end, start + decoders.FIRST)])
        readings: list[tuple[str, Iterator[bytes]]] = []
        if kind & (_BASE64 | _RUN):
            readings.append(("base64", decoders.base64(data, start, end, work)))
            if b"=" in head.rstrip(_NO_LETTERS):
                readings.append(("base64", decoders.base64(data, start, end, work, "joined")))
                readings.append(("base64", decoders.base64(data, start, end, work, "zero")))
        elif base64_run(head) >= mime.RUN:
            readings.append(("base64", decoders.base64(data, start, end, work)))
        if head.startswith(engine.raw_starts):
            readings.append(("8bit", decoders.raw(data, start, end, work)))
        if kind & _QUOTED or head.startswith(engine.quoted_starts):
            readings.append(("quoted-printable", decoders.quoted(data, start, end, work)))
        if kind & _UUENCODE:
            readings.append(("uuencode", decoders.uuencode(data, start, end, work)))
            readings.append(("xxencode", decoders.uuencode(data, start, end, work, xx=True)))
        if kind & _YENC:
            readings.append(("yEnc", decoders.yenc(data, start, end, work)))
        if kind & _BINHEX:
            readings.append(("BinHex", decoders.binhex(data, start, end, work)))
        return readings

    def _content(self, windows: Iterator[bytes], encoding: str, layers: int, leaf: Leaf) -> Detection | None:
        """Test whether decoded content is a program; search text for nested content."""
        pieces, size = [], 0
        for window in windows:
            pieces.append(window)
            size += len(window)
            if size >= SAMPLE:
                break
        first = b"".join(pieces)
        if not first:
            return None
        engine, head = self._engine, first[:HEAD]
        binary = encoding not in ("8bit", "quoted-printable")
        if head.startswith(engine.prefixes):
            for signature in engine.signatures:
                if signature.matches(head) and (
                    not signature.text or b"\0" in head or (binary and _is_encoded(signature, first))
                ):
                    return self._detection(Scanner.SIGNATURES, signature.rule, signature.rule.description)
        if found := engine.formats.first(head):
            return self._detection(Scanner.SIGNATURES, Rule(*found), found[1])
        if head.startswith(b"MZ") and b"\0" in head:  # text never contains NUL, a DOS header always does
            return self._program(first, windows)
        if smime.is_signed_data(head):
            signed = smime.content(itertools.chain((first,), windows), self._work)
            return self._documents(next(signed, b""), signed, layers + 1)
        if not (binary or (leaf.kind & _QUOTED and encoding == "quoted-printable")):
            return None
        text = (
            binary
            and b"\0" not in head
            and not head.startswith(b"%PDF-")
            and (leaf.kind & (_BASE64 | _UUENCODE) or _is_text(first))
        )
        if text or leaf.kind & _COMPOSITE or _FIELD.match(first) or base64_run(first) >= mime.RUN:
            return self._documents(first, windows, layers + 1)
        return None

    def _documents(self, first: bytes, windows: Iterator[bytes], layers: int) -> Detection | None:
        """Scan decoded text in pieces of bounded size; each piece begins with the end of the previous one.

        After the first, only pieces with a mark are scanned.
        """
        if layers >= LAYERS:
            self._work.mark_truncated(f"more than {LAYERS} nested encodings")
            return None
        pieces, size, marked = [first], len(first), True
        for window in windows:
            marked = marked or self._engine.marks.any(pieces[-1], window)
            pieces.append(window)
            size += len(window)
            if size >= DOCUMENT:
                detection = self.document(b"".join(pieces), layers) if marked else None
                if detection is not None:
                    return detection
                pieces = pieces[-OVERLAP:]
                size = sum(map(len, pieces))
                marked = any(map(self._engine.marks.any, (b"", *pieces), pieces))
        return self.document(b"".join(pieces), layers) if marked else None

    def _program(self, first: bytes, windows: Iterator[bytes]) -> Detection | None:
        """Examine content that begins with MZ: its second header, and the names of loaders in all of it."""
        engine, offset = self._engine, self._engine.formats.second_header(first)
        if not (offset or engine.fragments):
            return None
        before, at = b"", 0  # the end of what was read, and how much that is
        for piece in itertools.chain((first,), windows):
            if offset and at + len(piece) >= offset + 4:
                recent = before + piece
                start = offset - at + len(before)
                second = engine.formats.second(recent[start : start + 4])
                if second:
                    return self._detection(Scanner.SIGNATURES, Rule(*second), second[1])
                offset = 0
            if engine.fragments:
                self._work.spend(_NAME_BYTE * len(piece))
                detection = self._loader(before, piece)
                if detection is not None:
                    return detection
            elif not offset:
                return None
            at += len(piece)
            before = (before + piece if len(piece) < LONGEST_NAME else piece)[-LONGEST_NAME:]
        return None

    def _loader(self, before: bytes, piece: bytes) -> Detection | None:
        """Search a piece of a program for the name of a loader; ``before`` is what comes in front of it."""
        seam = before + piece[:LONGEST_NAME]  # a name may span two pieces
        for block in (seam, piece) if before else (piece,):
            for _, start, end in self._engine.names.find_matches_as_indexes(block, self._engine.overlapping):
                rule = self._rule(block, start, end)
                if rule is not None:
                    name = _name(block, start, end)
                    return self._detection(Scanner.LOADERTYPES, rule, f"program that names {name}")
        return None

    def _rule(self, block: bytes, start: int, end: int) -> Rule | None:
        """Return the rule that matches here or, for the name of a library, the one closest to its spelling."""
        found = block[start:end]
        nearest = None
        for fragment in self._engine.fragments:
            if fragment.library and found.lower() == LIBRARY:
                if fragment.whole in found:
                    return fragment.rule
                nearest = nearest or fragment.rule
            elif fragment.whole == found and fragment.matches(block, start):
                return fragment.rule
        return nearest

    def _detection(self, scanner: Scanner, rule: Rule, description: str) -> Detection:
        places = []
        for data, leaf, encoding in self._trail:
            name = "part " + ".".join(map(str, leaf.path)) if leaf.path else "body"
            undeclared = "" if leaf.declared else ", undeclared"
            places.append(f"{name}{undeclared}, {encoding}, line {_line(data, leaf.start)}")
        layers = sum(encoding != "8bit" for _, _, encoding in self._trail)
        return Detection(scanner, rule.pattern, description, " > ".join(places), layers)


def _is_encoded(signature: Signature, first: bytes) -> bool:
    """True if text that starts with a signature's bytes is really encoded: if these are base64, base64 must follow."""
    if not signature.base64:
        return True
    return base64_run(first) >= min(mime.RUN, len(first))


def _is_text(first: bytes) -> bool:
    """True if three of four bytes are printable ASCII. Of text that is decoded as base64, one of three is."""
    return 4 * len(first.translate(None, _PRINTABLE)) <= len(first)


def _name(block: bytes, start: int, end: int) -> str:
    """Return the complete name around a match, for people."""
    before = block[max(0, start - LONGEST_NAME // 2) : start]
    stem = _NAME.search(before)
    return readable((stem[0] if stem else b"") + block[start:end])


def _line(data: Text, at: int) -> int:
    """Return the line number of ``at``, 1-based."""
    return 1 + sum(bytes(data[base : min(at, base + SMALL)]).count(b"\n") for base in range(0, at, SMALL))
