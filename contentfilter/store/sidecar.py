"""Sidecar of a quarantined message, and the search for one. Nothing here does I/O.

The sidecar is JSON: the fields of the message's record, and beside them the envelope as hexadecimal
bytes, because the printable addresses may have lost some. Fields that this version does not know stay
in the file when a release is noted.
"""

import fnmatch
import mmap
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from contentfilter.errors import QuarantineError
from contentfilter.model import ScanStatus, readable
from contentfilter.verdict.headers import header_block
from contentfilter.verdict.record import ScanRecord

FIELD_SHOWN = 500
"""Characters of Message-ID and Subject in the sidecar."""

_INCIDENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_FIELD = re.compile(rb"^(Message-ID|Subject)[ \t]*:([^\n]*(?:\n[ \t][^\n]*)*)", re.IGNORECASE | re.MULTILINE)


class EnvelopeHex(msgspec.Struct, frozen=True):
    sender: str = ""
    recipients: tuple[str, ...] = ()


class Release(msgspec.Struct, frozen=True):
    """One time that the message was handed to qmail-queue."""

    time: float
    by: str
    to: tuple[str, ...]  # readable addresses


class Sidecar(msgspec.Struct, frozen=True):
    """One sidecar."""

    incident: str
    sha256: str = ""
    size: int = 0
    time: float = 0.0  # when it was kept; seconds since 1970
    origin: str = ""
    remote: str = ""
    user: str = ""
    message_id: str = ""
    subject: str = ""
    rule: str = ""
    reason: str = ""
    decision: str = ""
    scans: tuple[ScanRecord, ...] = ()
    versions: dict[str, str] = {}
    envelope_hex: EnvelopeHex = EnvelopeHex()
    withheld_from: tuple[int, ...] = ()
    released: tuple[Release, ...] = ()
    damaged: str = ""  # why the sidecar cannot be used; never in the file

    @property
    def sender(self) -> bytes:
        return bytes.fromhex(self.envelope_hex.sender)

    @property
    def recipients(self) -> tuple[bytes, ...]:
        """All recipients of the message."""
        return tuple(bytes.fromhex(text) for text in self.envelope_hex.recipients)

    @property
    def withheld(self) -> tuple[bytes, ...]:
        """Those who did not get it."""
        return tuple(bytes.fromhex(self.envelope_hex.recipients[index]) for index in self.withheld_from)

    @property
    def signatures(self) -> tuple[str, ...]:
        """The names that hit: each scanner's, and the rule that decided."""
        found = [scan.name for scan in self.scans if scan.status == ScanStatus.FOUND.value and scan.name]
        return tuple(dict.fromkeys([*found, self.rule]))


def valid_incident(text: str) -> bool:
    """Return True if ``text`` may be part of a file name of the quarantine: no separator, no leading dot."""
    return _INCIDENT.fullmatch(text) is not None


def described(data: mmap.mmap | bytes) -> dict[str, str]:
    """Message-ID and Subject of a message, readable, for the sidecar: the first of each."""
    found: dict[str, str] = {}
    for field in _FIELD.finditer(header_block(data)):
        name = field.group(1).lower().replace(b"-", b"_").decode("ascii")
        value = readable(field.group(2)[: 4 * FIELD_SHOWN].replace(b"\r", b"").replace(b"\n", b"").strip())
        found.setdefault(name, value[:FIELD_SHOWN])
        if len(found) == 2:
            break
    return found


def parse(incident: str, data: bytes) -> Sidecar:
    """The sidecar of ``incident``. Raises QuarantineError for one that cannot be trusted."""
    try:
        entry = msgspec.json.decode(data, type=Sidecar)
        for text in (entry.envelope_hex.sender, *entry.envelope_hex.recipients):
            bytes.fromhex(text)
    except (msgspec.DecodeError, ValueError) as error:
        raise QuarantineError(f"{incident}: damaged sidecar: {error}") from None
    if entry.incident != incident or not _SHA256.fullmatch(entry.sha256):
        raise QuarantineError(f"{incident}: damaged sidecar: it names another incident or no message")
    if not all(0 <= index < len(entry.envelope_hex.recipients) for index in entry.withheld_from):
        raise QuarantineError(f"{incident}: damaged sidecar: a recipient that the envelope does not have")
    return entry


def plain(entry: Sidecar) -> dict[str, Any]:
    """The entry for ``--json``: readable addresses beside the exact ones."""
    fields: dict[str, Any] = msgspec.to_builtins(entry)
    return fields | {
        "sender": readable(entry.sender),
        "recipients": [readable(address) for address in entry.recipients],
        "withheld": [readable(address) for address in entry.withheld],
    }


@dataclass(frozen=True, slots=True)
class Search:
    """Conditions that an entry must meet; an empty field asks for nothing.

    Case does not matter. ``*`` and ``?`` stand for any text and any character; without them a pattern
    may stand anywhere in an address, Message-ID or Subject, and must be the whole name of a signature.
    """

    sender: str = ""
    recipient: str = ""
    signature: str = ""
    message_id: str = ""
    subject: str = ""
    incident: str = ""  # prefix
    since: float = 0.0
    until: float = float("inf")
    unreleased: bool = False

    def matches(self, entry: Sidecar) -> bool:
        return (
            entry.incident.startswith(self.incident)
            and self.since <= entry.time < self.until
            and not (self.unreleased and entry.released)
            and _some(self.signature, entry.signatures, whole=True)
            and _some(self.message_id, [entry.message_id])
            and _some(self.subject, [entry.subject])
            and (not self.sender or _some(self.sender, [readable(entry.sender)]))
            and (not self.recipient or _some(self.recipient, map(readable, entry.recipients)))
        )


def _some(pattern: str, values: Iterable[str], whole: bool = False) -> bool:
    """Return True if one of ``values`` matches."""
    if not pattern:
        return True
    wanted = pattern.lower()
    if "*" in wanted or "?" in wanted:
        wanted = wanted.replace("[", "[[]")  # only * and ? are special
        return any(fnmatch.fnmatchcase(value.lower(), wanted) for value in values)
    return any(wanted == value.lower() if whole else wanted in value.lower() for value in values)
