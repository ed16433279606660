"""chksignature and chkloadertype: is something in this message a program?

Two modes. ``mime`` (the default) reads each leaf of the message in every way that some mail reader would, decodes it,
up to three layers of base64, and compares the first bits with the list of signatures; a loader type counts only in
decoded content that begins as a program. ``compatible`` is Warlord's line by line scan.

The scan is a plain function of the message: no I/O, linear time, memory independent of the size. Work that a hostile
message can multiply (content inside content, searches through whole programs) is paid from a budget
of ``BUDGET`` times the size, and its parts are counted (mime.ScanLimits). Who hides behind
such a limit is not clean: a scan that found nothing and left something out raises BackendError with ``Cause.LIMITS``.
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
from contentfilter.scanners.signatures.mime import As, Leaf, Marks, ScanLimits, Text
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

HEAD = 64  # decoded bytes that decide what content is: a DOS header
ENOUGH = 512  # ... and how many show that it is base64 again
LAYERS = 4  # encodings around each other: base64 three times, and one more
DOCUMENT = 2 * 1024 * 1024  # decoded text that is walked at once
OVERLAP = 3  # ... and how many decoding windows of it are walked again with what follows
BUDGET = 8
SMALL = 65_536
LONGEST_NAME = 64

_BASE64, _QUOTED, _COMPOSITE = int(As.BASE64), int(As.QUOTED), int(As.COMPOSITE)
_RUN, _UUENCODE = int(As.RUN), int(As.UUENCODE)
_FIELD = re.compile(rb"[!-9;-~]++[ \t]*+:|--")
_NAME = re.compile(rb"[A-Za-z0-9_.-]*\Z")
_NO_LETTERS = bytes(set(range(256)) - set(LETTERS.encode()))


@dataclass(frozen=True, slots=True)
class Detection:
    """The first thing found; it decides."""

    scanner: Scanner  # SIGNATURES or LOADERTYPES
    rule: str  # the pattern of the list
    description: str  # printable
    part: str  # where, for people: "part 2.1, base64, line 57"
    layers: int  # encodings that were undone to see it


class Engine:
    """The scan for one configuration: compiled once, used for every message, by any thread.

    ``signatures`` and ``loadertypes`` are None where the switch is off.
    """

    __slots__ = (
        "_rules",
        "_warlord",
        "firsts",
        "fragments",
        "marks",
        "names",
        "overlapping",
        "prefixes",
        "raw",
        "signatures",
    )

    def __init__(
        self, signatures: Rules | None, loadertypes: Rules | None, mode: Literal["mime", "compatible"] = "mime"
    ) -> None:
        first = signatures.rules if signatures else ()
        second = loadertypes.rules if loadertypes else ()
        self._rules = first + second
        self._warlord = None
        if mode == "compatible":
            self._warlord = (
                compatible.cut(tuple(rule.pattern for rule in first), compatible.SIGNATURE_LETTERS),
                compatible.cut(tuple(rule.pattern for rule in second), compatible.LOADER_LETTERS),
            )
        self.signatures = tuple(Signature.compile(rule) for rule in first)
        self.prefixes = tuple(signature.prefix for signature in self.signatures)
        self.raw = (b"MZ", *(signature.prefix for signature in self.signatures if not signature.text))
        self.firsts = (b"=", *{prefix[:1] for prefix in self.raw})  # of a program in quoted-printable
        self.fragments = tuple(fragment for rule in second for fragment in Fragment.compile(rule))
        needles = {fragment.whole for fragment in self.fragments if not fragment.library}
        self.overlapping = bool(needles)
        if any(fragment.library for fragment in self.fragments):
            needles |= {b"32." + bytes(end) for end in itertools.product(b"dD", b"lL", b"lL")}
        self.names = ahocorasick_rs.BytesAhoCorasick(sorted(needles))
        starts = {rule.pattern[:3].partition("*")[0].encode() for rule in first} | {b"TV"}
        self.marks = Marks(tuple(sorted(start for start in starts if len(start) > 1)))

    def scan(self, data: BytesLike) -> Detection | None:
        """The first finding, or None. Synchronous; keeps no reference to ``data``.

        Raises BackendError where nothing was found and something was left out for a limit, and on nothing else.
        """
        if not self._rules:
            return None
        with memoryview(data) as view:
            size = view.nbytes
            text = bytes(view) if size <= SMALL else view.cast("B")
            if self._warlord:
                return self._compatible(compatible.scan(text, *self._warlord))
            return _Scan(self, size).whole(text)

    def _compatible(self, hit: compatible.Hit | None) -> Detection | None:
        if hit is None:
            return None
        pattern = hit.pattern.decode("ascii")
        rule = next(rule for rule in self._rules if rule.pattern.startswith(pattern))
        scanner = Scanner.LOADERTYPES if hit.loader else Scanner.SIGNATURES
        return Detection(scanner, rule.pattern, rule.description, f"line {hit.line}", 0)


class _Scan:
    """One message: what is left of the budget, and the way down to the content that is looked at."""

    __slots__ = ("_budget", "_effort", "_engine", "_trail")

    def __init__(self, engine: Engine, size: int) -> None:
        self._engine = engine
        self._budget = BUDGET * size + DOCUMENT
        self._effort = ScanLimits()
        self._trail: list[tuple[Text, Leaf, str]] = []

    def whole(self, data: Text) -> Detection | None:
        """The message itself."""
        finding = self.document(data, 0)
        if finding is None and self._effort.left_out:
            raise BackendError(Cause.LIMITS, "", f"not looked at to the end: {self._effort.left_out}")
        return finding

    def _pay(self, size: int) -> bool:
        """Whether ``size`` bytes more may be looked at."""
        if self._budget <= 0:
            self._effort.mark_truncated("too much encoded content")
            return False
        self._budget -= size
        return True

    def document(self, data: Text, layers: int) -> Detection | None:
        """A message, or decoded text: all of its leaves."""
        for leaf in mime.leaves(data, self._engine.marks, self._effort):
            finding = self._leaf(data, leaf, layers)
            if finding is not None:
                return finding
        return None

    def _leaf(self, data: Text, leaf: Leaf, layers: int) -> Detection | None:
        """A leaf, read in each way that its first bytes and its header allow."""
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
        if head.startswith(engine.raw):
            readings.append(("8bit", decoders.raw(data, start, end)))
        if kind & _QUOTED or head.startswith(engine.firsts):
            readings.append(("quoted-printable", decoders.quoted(data, start, end)))
        if kind & _UUENCODE:
            readings.append(("uuencode", decoders.uuencode(data, start, end)))
        for encoding, windows in readings:
            self._trail.append((data, leaf, encoding))
            finding = self._content(windows, encoding, layers, kind)
            if finding is not None:
                return finding
            self._trail.pop()
        return None

    def _content(self, windows: Iterator[bytes], encoding: str, layers: int, kind: int) -> Detection | None:
        """Decoded content: is it a program, and if it is text, is there a program in it?"""
        first = next(windows, b"")
        while len(first) < ENOUGH:
            more = next(windows, None)
            if more is None:
                break
            first += more
        engine, head = self._engine, first[:HEAD]
        binary = encoding in ("base64", "uuencode")
        if head.startswith(engine.prefixes):
            for signature in engine.signatures:
                if signature.matches(head) and (not signature.text or (binary and _meant(signature, first))):
                    return self._found(Scanner.SIGNATURES, signature.rule, signature.rule.description)
        if head.startswith(b"MZ") and b"\0" in head:  # text never has a NUL, a DOS header always
            return self._program(first, windows) if engine.fragments else None
        if layers + 1 >= LAYERS or not (binary or (kind & _QUOTED and encoding == "quoted-printable")):
            return None
        text = binary and b"\0" not in head and not head.startswith(b"%PDF-")
        if text or kind & _COMPOSITE or _FIELD.match(first) or mime.base64_run(first) >= mime.RUN:
            return self._documents(first, windows, layers + 1)
        return None

    def _documents(self, first: bytes, windows: Iterator[bytes], layers: int) -> Detection | None:
        """Walk decoded text, a bounded piece at a time; each piece begins with the end of the one before.

        After the first piece only those are walked in which some part, blob or uuencode may begin.
        """
        pieces, size, marked = [first], len(first), True
        self._budget -= size
        for window in windows:
            if not self._pay(len(window)):
                return None
            marked = marked or self._engine.marks.any(pieces[-1], window)
            pieces.append(window)
            size += len(window)
            if size >= DOCUMENT:
                finding = self.document(b"".join(pieces), layers) if marked else None
                if finding is not None:
                    return finding
                pieces = pieces[-OVERLAP:]
                size = sum(map(len, pieces))
                marked = any(map(self._engine.marks.any, (b"", *pieces), pieces))
        return self.document(b"".join(pieces), layers) if marked else None

    def _program(self, first: bytes, windows: Iterator[bytes]) -> Detection | None:
        """Look for a loader's name in a whole program."""
        before = b""
        for piece in itertools.chain((first,), windows):
            if not self._pay(len(piece)):
                return None
            seam = before + piece[:LONGEST_NAME]  # a name may lie across two windows
            for block in (seam, piece) if before else (piece,):
                for _, start, end in self._engine.names.find_matches_as_indexes(block, self._engine.overlapping):
                    rule = self._rule(block, start, end)
                    if rule is not None:
                        name = _name(block, start, end)
                        return self._found(Scanner.LOADERTYPES, rule, f"program that names {name}")
            before = (before + piece if len(piece) < LONGEST_NAME else piece)[-LONGEST_NAME:]
        return None

    def _rule(self, block: bytes, start: int, end: int) -> Rule | None:
        """The rule that stands at this place, or, for a library's name, the one that is nearest to its spelling."""
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

    def _found(self, scanner: Scanner, rule: Rule, description: str) -> Detection:
        places = []
        for data, leaf, encoding in self._trail:
            name = "part " + ".".join(map(str, leaf.path)) if leaf.path else "body"
            undeclared = "" if leaf.declared else ", undeclared"
            places.append(f"{name}{undeclared}, {encoding}, line {_line(data, leaf.start)}")
        layers = sum(encoding != "8bit" for _, _, encoding in self._trail)
        return Detection(scanner, rule.pattern, description, " > ".join(places), layers)


def _meant(signature: Signature, first: bytes) -> bool:
    """Whether text that begins as a signature's bytes does is meant so: if these are base64, base64 must follow."""
    if not signature.base64:
        return True
    return mime.base64_run(first) >= min(mime.RUN, len(first))


def _name(block: bytes, start: int, end: int) -> str:
    """The name around a match, for people."""
    before = block[max(0, start - LONGEST_NAME // 2) : start]
    stem = _NAME.search(before)
    return readable((stem[0] if stem else b"") + block[start:end])


def _line(data: Text, at: int) -> int:
    """1-based."""
    return 1 + sum(bytes(data[base : min(at, base + SMALL)]).count(b"\n") for base in range(0, at, SMALL))
