"""Signature engine (chksignature and chkloadertype): detects programs in a message.

Two modes. ``mime`` (the default) decodes each leaf of the message in every way that some mail reader would, up to three
layers of base64, and compares the first bits with the list of signatures; a loader type counts only in decoded content
that begins as a program does. ``compatible`` is Warlord's scan, line by line.

The scan is a pure function of the message: no I/O, linear time, memory independent of the size. Work that a hostile
message can multiply (nested content, searches through complete programs) is taken from a budget of ``BUDGET`` times
the size, and parts are counted (mime.ScanLimits). A message that exceeds a limit is not clean: a truncated scan
without a detection raises BackendError with ``Cause.LIMITS``.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import ahocorasick_rs

from contentfilter.errors import BackendError, Cause
from contentfilter.model import BytesLike, Scanner, readable
from contentfilter.scanners.signatures import compatible, decoders, mime
from contentfilter.scanners.signatures.mime import Kind, Leaf, LineStarts, ScanLimits, Text
from contentfilter.scanners.signatures.rules import (
    LETTERS,
    LIBRARY,
    Fragment,
    Rule,
    Rules,
    Signature,
    default_loadertypes,
    default_signatures,
    parse_loadertypes,
    parse_signatures,
)

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
LAYERS = 4  # nested encodings: base64 three times, and one more
DOCUMENT = 2 * 1024 * 1024  # bytes of decoded text in one walk
OVERLAP = 3  # decoding windows that are walked again with the text that follows
BUDGET = 8  # bytes of decoded content per byte of the message
SMALL = 65_536  # bytes; a message up to this size is copied, which is faster than a view
LONGEST_NAME = 64  # bytes

_BASE64, _QUOTED, _COMPOSITE = int(Kind.BASE64), int(Kind.QUOTED), int(Kind.COMPOSITE)
_RUN, _UUENCODE = int(Kind.RUN), int(Kind.UUENCODE)
_FIELD = re.compile(rb"[!-9;-~]++[ \t]*+:|--")
_NAME = re.compile(rb"[A-Za-z0-9_.-]*\Z")
_NO_LETTERS = bytes(set(range(256)) - set(LETTERS.encode()))


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

    ``signatures`` and ``loadertypes`` are None if their setting is off.
    """

    __slots__ = (
        "_compatible_keys",
        "_rules",
        "fragments",
        "line_starts",
        "names",
        "overlapping",
        "prefixes",
        "quoted_starts",
        "raw_starts",
        "signatures",
    )

    def __init__(
        self, signatures: Rules | None, loadertypes: Rules | None, mode: Literal["mime", "compatible"] = "mime"
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
        self.raw_starts = (b"MZ", *(signature.prefix for signature in self.signatures if not signature.text))
        self.quoted_starts = (b"=", *{prefix[:1] for prefix in self.raw_starts})
        self.fragments = tuple(fragment for rule in second for fragment in Fragment.compile(rule))
        needles = {fragment.whole for fragment in self.fragments if not fragment.library}
        self.overlapping = bool(needles)
        if any(fragment.library for fragment in self.fragments):
            needles |= {b"32." + bytes(end) for end in itertools.product(b"dD", b"lL", b"lL")}
        self.names = ahocorasick_rs.BytesAhoCorasick(sorted(needles))
        starts = {rule.pattern[:3].partition("*")[0].encode() for rule in first} | {b"TV"}
        self.line_starts = LineStarts(tuple(sorted(start for start in starts if len(start) > 1)))

    def scan(self, data: BytesLike) -> Detection | None:
        """Return the first detection, or None. Synchronous; keeps no reference to ``data``.

        Raises BackendError if nothing was detected and a limit truncated the scan, and for no other reason.
        """
        if not self._rules:
            return None
        with memoryview(data) as view:
            size = view.nbytes
            text = bytes(view) if size <= SMALL else view.cast("B")
            if self._compatible_keys:
                return self._detection_of_hit(compatible.scan(text, *self._compatible_keys))
            return _Scan(self, size).message(text)

    def _detection_of_hit(self, hit: compatible.Hit | None) -> Detection | None:
        if hit is None:
            return None
        pattern = hit.pattern.decode("ascii")
        rule = next(rule for rule in self._rules if rule.pattern.startswith(pattern))
        scanner = Scanner.LOADERTYPES if hit.loader else Scanner.SIGNATURES
        return Detection(scanner, rule.pattern, rule.description, f"line {hit.line}", 0)


class _Scan:
    """Scan of one message: the remaining budget and limits, and the path to the content being examined."""

    __slots__ = ("_budget", "_engine", "_limits", "_trail")

    def __init__(self, engine: Engine, size: int) -> None:
        self._engine = engine
        self._budget = BUDGET * size + DOCUMENT
        self._limits = ScanLimits()
        self._trail: list[tuple[Text, Leaf, str]] = []

    def message(self, data: Text) -> Detection | None:
        """Scan the message itself. Raises BackendError (LIMITS)."""
        detection = self.document(data, 0)
        if detection is None and self._limits.truncated:
            raise BackendError(Cause.LIMITS, "", f"not scanned to the end: {self._limits.truncated}")
        return detection

    def _spend(self, size: int) -> bool:
        """Take ``size`` bytes from the budget. False if it is used up."""
        if self._budget <= 0:
            self._limits.mark_truncated("too much encoded content")
            return False
        self._budget -= size
        return True

    def document(self, data: Text, layers: int) -> Detection | None:
        """Scan all leaves of a message or of decoded text."""
        for leaf in mime.leaves(data, self._engine.line_starts, self._limits):
            detection = self._leaf(data, leaf, layers)
            if detection is not None:
                return detection
        return None

    def _leaf(self, data: Text, leaf: Leaf, layers: int) -> Detection | None:
        """Scan a leaf, decoded in each way that its first bytes and its header allow."""
        start, end, kind, _, _ = leaf
        engine = self._engine
        head = bytes(data[start : min(end, start + decoders.FIRST)])
        readings: list[tuple[str, Iterator[bytes]]] = []
        if kind & (_BASE64 | _RUN):
            readings.append(("base64", decoders.base64(data, start, end)))
            if b"=" in head.rstrip(_NO_LETTERS):
                readings.append(("base64", decoders.base64(data, start, end, joined=True)))
        else:
            if mime.base64_run(head) >= mime.RUN:
                readings.append(("base64", decoders.base64(data, start, mime.base64_run(data, start, end))))
        if head.startswith(engine.raw_starts):
            readings.append(("8bit", decoders.raw(data, start, end)))
        if kind & _QUOTED or head.startswith(engine.quoted_starts):
            readings.append(("quoted-printable", decoders.quoted(data, start, end)))
        if kind & _UUENCODE:
            readings.append(("uuencode", decoders.uuencode(data, start, end)))
        for encoding, windows in readings:
            self._trail.append((data, leaf, encoding))
            detection = self._content(windows, encoding, layers, kind)
            if detection is not None:
                return detection
            self._trail.pop()
        return None

    def _content(self, windows: Iterator[bytes], encoding: str, layers: int, kind: int) -> Detection | None:
        """Test whether decoded content is a program; search text for nested content."""
        first = next(windows, b"")
        while len(first) < SAMPLE:
            more = next(windows, None)
            if more is None:
                break
            first += more
        engine, head = self._engine, first[:HEAD]
        binary = encoding in ("base64", "uuencode")
        if head.startswith(engine.prefixes):
            for signature in engine.signatures:
                if signature.matches(head) and (not signature.text or (binary and _is_encoded(signature, first))):
                    return self._detection(Scanner.SIGNATURES, signature.rule, signature.rule.description)
        if head.startswith(b"MZ") and b"\0" in head:  # text never contains NUL, a DOS header always does
            return self._program(first, windows) if engine.fragments else None
        if layers + 1 >= LAYERS or not (binary or (kind & _QUOTED and encoding == "quoted-printable")):
            return None
        text = binary and b"\0" not in head and not head.startswith(b"%PDF-")
        if text or kind & _COMPOSITE or _FIELD.match(first) or mime.base64_run(first) >= mime.RUN:
            return self._documents(first, windows, layers + 1)
        return None

    def _documents(self, first: bytes, windows: Iterator[bytes], layers: int) -> Detection | None:
        """Scan decoded text in pieces of bounded size; each piece begins with the end of the previous one.

        After the first, only pieces in which a part, base64 or uuencode may start are scanned.
        """
        pieces, size, has_starts = [first], len(first), True
        self._budget -= size
        for window in windows:
            if not self._spend(len(window)):
                return None
            has_starts = has_starts or self._engine.line_starts.any(pieces[-1], window)
            pieces.append(window)
            size += len(window)
            if size >= DOCUMENT:
                detection = self.document(b"".join(pieces), layers) if has_starts else None
                if detection is not None:
                    return detection
                pieces = pieces[-OVERLAP:]
                size = sum(map(len, pieces))
                has_starts = any(map(self._engine.line_starts.any, (b"", *pieces), pieces))
        return self.document(b"".join(pieces), layers) if has_starts else None

    def _program(self, first: bytes, windows: Iterator[bytes]) -> Detection | None:
        """Search a complete program for the name of a loader."""
        before = b""
        for piece in itertools.chain((first,), windows):
            if not self._spend(len(piece)):
                return None
            seam = before + piece[:LONGEST_NAME]  # a name may span two windows
            for block in (seam, piece) if before else (piece,):
                for _, start, end in self._engine.names.find_matches_as_indexes(block, self._engine.overlapping):
                    rule = self._rule(block, start, end)
                    if rule is not None:
                        name = _name(block, start, end)
                        return self._detection(Scanner.LOADERTYPES, rule, f"program that names {name}")
            before = (before + piece if len(piece) < LONGEST_NAME else piece)[-LONGEST_NAME:]
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
    return mime.base64_run(first) >= min(mime.RUN, len(first))


def _name(block: bytes, start: int, end: int) -> str:
    """Return the complete name around a match, for people."""
    before = block[max(0, start - LONGEST_NAME // 2) : start]
    stem = _NAME.search(before)
    return readable((stem[0] if stem else b"") + block[start:end])


def _line(data: Text, at: int) -> int:
    """Return the line number of ``at``, 1-based."""
    return 1 + sum(bytes(data[base : min(at, base + SMALL)]).count(b"\n") for base in range(0, at, SMALL))
