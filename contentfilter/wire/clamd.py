"""Codec of clamd's commands and answers, without I/O.

Theory. Commands carry the prefix ``z``, so they and their answers end with NUL; some complaints
of clamd end with LF even then, so either byte ends an answer. One command per connection: a
second answer is an error. A scan's answer is read from the right, because only its last word
(OK, FOUND, ERROR) is fixed. Only ``stream: OK`` and ``fd[N]: OK`` mean clean; any answer that is
neither clean, found nor a known complaint is a RemoteProtocolError.

Sources: clamd(8), clamd.conf(5), and the answers of clamd 1.4 to experiments.
"""

import enum
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Generic, TypeVar

from contentfilter.errors import Cause, LocalProtocolError, RemoteProtocolError
from contentfilter.wire.buffer import ReceiveBuffer, printable

T = TypeVar("T")

COMMANDS = frozenset({"VERSION", "INSTREAM", "FILDES"})
CHUNK = 262_144  # bytes per INSTREAM chunk
ANSWER_LIMIT = 4096

_LINE_END = re.compile(rb"[\0\n]")
_PREFIX = re.compile(rb"(?:\d{1,10}: )?(?:(?:stream|fd\[\d{1,10}\]): )?")
_CLEAN = re.compile(rb"(?:\d{1,10}: )?(?:stream|fd\[\d{1,10}\]): OK")
_EXTENDED = re.compile(rb"\([0-9a-fA-F]{32,128}:\d{1,20}\)$")


# ---------------------------------------------------------------- commands


def command(name: str) -> bytes:
    """One command on the wire. Anything not in COMMANDS (SHUTDOWN above all) is a LocalProtocolError."""
    if name not in COMMANDS:
        raise LocalProtocolError(f"{name!r} is not a command that this program gives to clamd")
    return b"z" + name.encode("ascii") + b"\0"


def fildes() -> bytes:
    """FILDES and the one byte that the descriptor travels with: a single sendmsg carries all."""
    return command("FILDES") + b"\0"


def instream(data: memoryview) -> Generator[tuple[bytes | memoryview, ...], None, None]:
    """INSTREAM as batches for sendmsg: lengths (4 bytes, big-endian) and slices of ``data``, no copies."""
    head = command("INSTREAM")
    size = len(data)
    for start in range(0, size, CHUNK):
        piece = data[start : start + CHUNK]
        last = start + CHUNK >= size
        yield head + len(piece).to_bytes(4, "big"), piece, bytes(4) if last else b""
        head = b""
    if not size:
        yield (head + bytes(4),)


# ---------------------------------------------------------------- answers


@dataclass(frozen=True, slots=True)
class Clean:
    """Scanned, nothing found."""


@dataclass(frozen=True, slots=True)
class Found:
    """A signature matched; ``name`` is printable ASCII, without clamd's hash and size."""

    name: str


@dataclass(frozen=True, slots=True)
class Failed:
    """No verdict, and the reason that clamd gave. ``refused``: it does not support this command, or not here."""

    cause: Cause
    text: str
    refused: bool = False


ScanAnswer = Clean | Found | Failed


@dataclass(frozen=True, slots=True)
class Version:
    """``database`` and ``built`` are None while clamd has no official database.

    clamd prints the date in its own time zone and does not say which; it is taken as UTC,
    which is near enough for an age in days.
    """

    product: str
    database: int | None = None
    built: datetime | None = None


class AnswerReader(Generic[T]):
    """Reader of one answer: feed it bytes, or the end of input, until it returns the event."""

    __slots__ = ("_buffer", "_parse")

    def __init__(self, parse: Callable[[bytes], T]) -> None:
        self._buffer = ReceiveBuffer()
        self._parse = parse

    def feed(self, data: bytes) -> T | None:
        """The event, or None while the answer is incomplete. Errors: RemoteProtocolError."""
        self._buffer.feed(data)
        line = self._buffer.line(_LINE_END, ANSWER_LIMIT)
        if line is None:
            return None
        if len(self._buffer):
            raise RemoteProtocolError(f"more than one answer, the first was {printable(line)!r}")
        return self._parse(line)

    def end(self) -> T:
        """The peer closed before the answer was whole: always RemoteProtocolError."""
        if len(self._buffer):
            raise RemoteProtocolError("answer cut off")
        raise RemoteProtocolError("closed without an answer")


def scan_reader() -> AnswerReader[ScanAnswer]:
    return AnswerReader(parse_scan)


def version_reader() -> AnswerReader[Version]:
    return AnswerReader(parse_version)


def parse_scan(line: bytes) -> ScanAnswer:
    """The answer to INSTREAM or FILDES, without its end."""
    if _CLEAN.fullmatch(line):
        return Clean()
    prefix = _PREFIX.match(line)
    text = line[prefix.end() :] if prefix else line
    if text.endswith(b" FOUND"):
        name = _EXTENDED.sub(b"", text[: -len(b" FOUND")]).strip()
        if not name:
            raise RemoteProtocolError("FOUND without a name")
        return Found(printable(name))
    return _complaint(text, line)


# (text inside the complaint, lower case) -> cause, tried in this order.
_CAUSES: tuple[tuple[bytes, Cause], ...] = (
    (b"size limit exceeded", Cause.TOO_BIG),
    (b"exceeded max", Cause.TOO_BIG),
    (b"can't allocate memory", Cause.MEMORY),
    (b"can't map file into memory", Cause.MEMORY),
    (b"out of memory", Cause.MEMORY),
    (b"exceeded time limit", Cause.TIMEOUT),
    (b"time limit reached", Cause.TIMEOUT),
    (b"timed out", Cause.TIMEOUT),
    (b"read timeout", Cause.TIMEOUT),
    (b"reloading", Cause.RELOADING),
    (b"scanner still active", Cause.RELOADING),
    (b"accept() error", Cause.DOWN),
)
_REFUSALS = (
    b"no file descriptor received",
    b"ancillary data",
    b"unknown command",
    b"command unavailable",
    b"not a regular file",
)
# Complaints that do not end with the word ERROR.
_BARE = (b"UNKNOWN COMMAND", b"COMMAND READ TIMED OUT", b"COMMAND UNAVAILABLE", b"PROTOCOL ERROR", b"Command invalid")


def _complaint(text: bytes, line: bytes) -> Failed:
    if not text.endswith(b"ERROR") and not text.startswith(_BARE):
        raise RemoteProtocolError(f"not an answer to a scan: {printable(line)!r}")
    lower = text.lower()
    cause = next((cause for part, cause in _CAUSES if part in lower), Cause.BAD_REPLY)
    shown = printable(text.removesuffix(b"ERROR").strip()) or "ERROR"
    return Failed(cause, shown, any(part in lower for part in _REFUSALS))


_VERSION = re.compile(
    rb"(?P<product>[\x21-\x7e][\x20-\x2e\x30-\x7e]{0,99})"
    rb"(?:/(?P<database>\d{1,9})/[A-Za-z]{3} (?P<month>[A-Za-z]{3}) +(?P<day>\d{1,2})"
    rb" (?P<hour>\d\d):(?P<minute>\d\d):(?P<second>\d\d) (?P<year>\d{4}))?"
)
_MONTHS = (b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec")


def parse_version(line: bytes) -> Version:
    """``ClamAV 1.4.6/27500/Tue Dec 24 09:30:00 2024``, or the product alone while no database is loaded."""
    match = _VERSION.fullmatch(line)
    if match is None:
        raise RemoteProtocolError(f"not an answer to VERSION: {printable(line)!r}")
    product = printable(match["product"])
    if match["database"] is None:
        return Version(product)
    try:
        day, hour, minute, second = (int(match[part]) for part in ("day", "hour", "minute", "second"))
        month = _MONTHS.index(match["month"]) + 1
        built = datetime(int(match["year"]), month, day, hour, minute, second, tzinfo=UTC)
    except ValueError as error:
        raise RemoteProtocolError(f"not a date: {printable(line)!r}") from error
    return Version(product, int(match["database"]), built)


# ---------------------------------------------------------------- signature names


class SignatureClass(enum.Enum):
    """Classes of signatures, which can have different actions; only the first is plainly a virus."""

    MALWARE = "malware"
    PUA = "pua"  # possibly unwanted application
    PHISHING = "phishing"
    MACRO = "macro"
    ENCRYPTED = "encrypted"
    LIMITS = "limits"  # not scanned to the end: not a virus, but not clean either
    BROKEN = "broken"
    STRUCTURED = "structured"  # credit card and social security numbers
    UNOFFICIAL = "unofficial"  # from a database that ClamAV does not sign


_CLASSES: tuple[tuple[str, SignatureClass], ...] = (
    ("Heuristics.Limits.", SignatureClass.LIMITS),
    ("Heuristics.Encrypted.", SignatureClass.ENCRYPTED),
    ("Heuristics.Phishing.", SignatureClass.PHISHING),
    ("Heuristics.Safebrowsing.", SignatureClass.PHISHING),
    ("Heuristics.OLE2.ContainsMacros", SignatureClass.MACRO),
    ("Heuristics.Structured.", SignatureClass.STRUCTURED),
    ("Heuristics.Broken.", SignatureClass.BROKEN),
    ("Heuristics.PDF.ObfuscatedNameObject", SignatureClass.BROKEN),
    ("Heuristics.Zip.OverlappingFiles", SignatureClass.BROKEN),
    ("PUA.", SignatureClass.PUA),
)


def signature_class(name: str) -> SignatureClass:
    """The class of a signature, from its name. Its author counts more than what it claims to be."""
    if name.endswith(".UNOFFICIAL"):
        return SignatureClass.UNOFFICIAL
    for start, kind in _CLASSES:
        if name.startswith(start):
            return kind
    if name.split(".", 2)[1:2] == ["Phishing"]:  # official names read Platform.Category.Name-number-revision
        return SignatureClass.PHISHING
    return SignatureClass.MALWARE
