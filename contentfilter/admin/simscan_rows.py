"""Rows of simscan's simcontrol, as simscan reads them and as they were intended.

Facts (source and README of simscan 1.4): a row is ``KEY:name=value,name=value``; KEY is an address, a domain, or
empty for all recipients. A row inherits unset values from the default row, the domain's row, and those of ``user``,
``user-ext`` and so on. Of rows with equal keys the first is used. simscanmk has no comments, and in a row each blank,
quote and comma is a separator, so that two in succession shift all that follows.
"""

import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from contentfilter.admin.migration import ChangeKind, MigrationReport, numbered
from contentfilter.model import readable

_ROW_MAX = 3999  # maximum length of a line in simscanmk
_SEPARATOR = re.compile(rb"[ =\t\n\r,\"']")
_ENDING = re.compile(rb"[!-~]{1,99}")


@dataclass(frozen=True, slots=True)
class SimscanRules:
    """Values of a row; None if unset, so that a less specific row decides."""

    clam: bool | None = None
    spam: bool | None = None
    trophie: bool | None = None
    spam_passthru: bool | None = None
    spam_hits: float | None = None
    size_limit: int | None = None
    attach: tuple[bytes, ...] | None = None
    qmailqueue: bytes | None = None

    def over(self, below: "SimscanRules") -> "SimscanRules":
        """These rules, completed from less specific ones."""
        pairs = ((getattr(self, f.name), getattr(below, f.name)) for f in fields(self))
        return SimscanRules(*(mine if mine is not None else theirs for mine, theirs in pairs))

    @property
    def virus(self) -> bool:
        return bool(self.clam or self.trophie)


@dataclass(frozen=True, slots=True)
class SimscanRow:
    """One effective row of simcontrol. ``key`` is lower-cased; empty for the default row."""

    path: str
    line: int
    key: bytes
    own: SimscanRules


def read_rows(old: Mapping[str, bytes], report: MigrationReport) -> Iterator[SimscanRow]:
    """Effective rows, in the order of ``simcontrol`` or, if that is missing, of ``simcontrol.cdb``."""
    text, compiled = old.get("simcontrol"), None
    if "simcontrol.cdb" in old:
        compiled = _records(old["simcontrol.cdb"])
        if compiled is None:
            report.check("simcontrol.cdb", 0, "damaged", "not a complete cdb file; not used")
    path = "simcontrol"
    records: Iterable[tuple[int, bytes, bytes]] = ()
    if text is not None:
        records = _lines(text, report)
        if compiled is not None and set(compiled) != {made for _, line in numbered(text) if (made := _compile(line))}:
            report.check(
                "simcontrol.cdb",
                0,
                "differs from simcontrol",
                "simscan reads this file, and simcontrol has changed since it was compiled; simcontrol is used",
            )
    elif compiled is not None:
        path = "simcontrol.cdb"
        records = [(number, key, value) for number, (key, value) in enumerate(compiled, 1)]
        report.changed(path, 0, "no simcontrol", "the compiled rows are used; line numbers count records")
    first: dict[bytes, int] = {}
    for line, key, value in records:
        if key in first:
            why = f"second row for this key: the first, in line {first[key]}, is used, as in simscan"
            report.check(path, line, key or b":", why)
            continue
        first[key] = line
        yield SimscanRow(path, line, key, SimscanRules(**dict(_settings(path, line, key, value, report))))


def _compile(line: bytes) -> tuple[bytes, bytes] | None:
    """(key, settings) of a line as simscanmk splits it; None if it finds none."""
    line = line.partition(b"\0")[0]
    if line.startswith(b":"):
        return b"", line[1:].lstrip(b"\r").partition(b"\r")[0]
    rest = line.lstrip(b":\t\r #")
    if not rest:
        return None
    key, *more = re.split(rb"[:\t\r #]", rest, maxsplit=1)
    return key.lower(), (more[0].lstrip(b"\r").partition(b"\r")[0] if more else b"").lower()


def _lines(text: bytes, report: MigrationReport) -> Iterator[tuple[int, bytes, bytes]]:
    """(line, key, settings) of the rows of simcontrol; lines that simscanmk misreads are reported."""
    for number, line in numbered(text):
        made, start = _compile(line), line.lstrip(b" \t")
        if made is None and not line.strip(b"\0\r\t #"):
            continue  # only blanks
        problem = ""
        if b"\0" in line:
            problem = "contains a NUL byte, at which simscanmk stops reading the row; skipped"
        elif len(line) > _ROW_MAX:
            problem = f"over {_ROW_MAX} bytes, where simscanmk cuts the row in two; skipped"
        elif start.startswith(b"#"):
            if made is None or b"=" not in made[1]:
                report.left("simcontrol", number, line, "a comment")
                continue
            problem = (
                f"simscanmk has no comments: for simscan this is a row for {readable(made[0][:80])}, and in force; "
                "here it is a comment and skipped"
            )
        elif start.startswith(b":") and start != line:
            problem = "with a leading blank, simscan does not recognise the default row; used as the default row"
            made = b"", start[1:].rstrip(b"\r")
        if problem:
            report.check("simcontrol", number, line, problem)
        if made is not None and not problem.endswith("skipped"):
            yield number, *made


def _records(data: bytes) -> list[tuple[bytes, bytes]] | None:
    """Records of a cdb file in order; None if it is damaged. Format: 256 table heads, records, tables."""
    if len(data) < 2048:
        return None
    at, end = 2048, min(position for position, _ in struct.iter_unpack("<II", data[:2048]))
    found = []
    while at < end:
        if end > len(data) or at + 8 > end:
            return None
        key_size, value_size = struct.unpack_from("<II", data, at)
        at += 8 + key_size + value_size
        if at > end:
            return None
        found.append((data[at - value_size - key_size : at - value_size], data[at - value_size : at]))
    return found


def _settings(path: str, line: int, key: bytes, text: bytes, report: MigrationReport) -> Iterator[tuple[str, Any]]:
    """Valid name-value pairs of a row as intended; irregularities are reported."""
    tokens = _SEPARATOR.split(text)
    literal = list(zip(tokens[::2], tokens[1::2], strict=False))
    words = b" ".join(text.split()).replace(b" =", b"=").replace(b"= ", b"=").replace(b",", b" ").split()
    meant = [(name, value.strip(b"\"'")) for name, _, value in (word.partition(b"=") for word in words)]
    if literal != meant:
        reading = b" ".join(n + b"=" + v for n, v in literal)
        report.check(
            path,
            line,
            text,
            "for simscan every blank, quote and comma is a separator, so it reads "
            f"{readable(reading[:200]) or 'nothing'}; here the row is used as intended",
        )
    seen: set[str] = set()
    for raw, value in meant:
        name, subject = readable(raw.lower()), raw + b"=" + value
        if name in seen:
            report.changed(path, line, subject, "given twice in the row; the last one is used, as in simscan")
        seen.add(name)
        parsed, kind, why = _value(name, value, key)
        if why:
            report.add(kind, path, line, subject, why)
        if parsed is not None:
            yield name, parsed


def _value(name: str, value: bytes, key: bytes) -> tuple[Any, ChangeKind, str]:
    """(value or None, kind and text of the note; an empty text means no note)."""
    if name in ("clam", "spam", "trophie", "spam_passthru"):
        known = {b"yes": True, b"no": False}.get(value.lower())
        return (
            known,
            ChangeKind.CHECK,
            "" if known is not None else "neither yes nor no; ignored, as in simscan",
        )
    if name == "spam_hits":
        if not re.fullmatch(rb"[0-9]{1,6}(\.[0-9]{0,6})?", value) or float(value) == 0:
            return (
                None,
                ChangeKind.CHECK,
                "not a number above 0, so simscan refuses nearly all mail that spamd scans; skipped",
            )
        return float(value), ChangeKind.SAME, ""
    if name == "size_limit":
        if not re.fullmatch(rb"[0-9]{1,12}", value):
            return (
                None,
                ChangeKind.CHECK,
                "not a plain number of bytes, simscan reads only the leading digits; skipped",
            )
        return int(value), ChangeKind.SAME, ""
    if name == "attach":
        endings = tuple(ending.lower() for ending in value.split(b":") if ending)
        if not all(map(_ENDING.fullmatch, endings)):
            return None, ChangeKind.CHECK, "extensions must be printable ASCII of at most 99 characters; skipped"
        capitals = not key and value != value.lower()
        return (
            endings,
            ChangeKind.CHANGED,
            "simscan never matches capitals in the default row; here they match" if capitals else "",
        )
    if name == "qmailqueue":
        if not re.fullmatch(rb"/[!-~]{1,400}", value):
            return None, ChangeKind.CHECK, "not an absolute path; skipped"
        return value, ChangeKind.SAME, ""
    if name == "regex":
        return (
            None,
            ChangeKind.LOST,
            "not supported; use a SpamAssassin rule (rawbody) or an .ldb signature of clamd",
        )
    if name == "spamuser":
        return (
            None,
            ChangeKind.LOST,
            "there is no spamd user per row; store the preferences under the address of the recipient",
        )
    return None, ChangeKind.CHECK, "unknown to simscan, too; skipped"


def read_endings(text: bytes, report: MigrationReport) -> tuple[bytes, ...]:
    """File extensions in control/ssattach: simscan uses the first word of each line."""
    endings = []
    for number, line in numbered(text):
        words = [word for word in re.split(rb"[ :\t\r]", line) if word]
        if len(words) > 1:
            report.changed("ssattach", number, line, "only the first extension in a line is used, as in simscan")
        if words and _ENDING.fullmatch(words[0]):
            endings.append(words[0].lower())
        elif words:
            report.check("ssattach", number, line, "not printable ASCII of at most 99 characters; skipped")
    return tuple(endings)


def effective(row: SimscanRow, rows: Mapping[bytes, SimscanRow]) -> SimscanRules:
    """Rules of a row with those inherited from shorter ``user-ext`` addresses, the domain and the default row."""
    local, at, domain = row.key.partition(b"@")
    chain = [b""]
    if at:
        parts = local.split(b"-")[:64]
        chain += [domain, *(b"-".join(parts[:n]) + b"@" + domain for n in range(1, len(parts)))]
    rules = SimscanRules()
    for key in chain:
        if key in rows:
            rules = rows[key].own.over(rules)
    return row.own.over(rules)
