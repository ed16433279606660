"""The rows of simscan's simcontrol, read as simscan reads them and as they were meant.

Facts (source and README of simscan 1.4): a row is ``KEY:name=value,name=value``; KEY is an address, a domain, or
nothing for everybody. A row inherits what it does not say: from the default row, the domain's, and those of ``user``,
``user-ext`` and so on. Of rows with equal keys the first counts. simscanmk knows no comments, and in a row each blank,
quote and comma separates, so that two in a row shift all that follows.
"""

import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from contentfilter.admin.migration import ChangeKind, MigrationReport, numbered
from contentfilter.model import readable

_ROW_MAX = 3999  # simscanmk reads so many bytes as one line
_SEPARATOR = re.compile(rb"[ =\t\n\r,\"']")
_ENDING = re.compile(rb"[!-~]{1,99}")


@dataclass(frozen=True, slots=True)
class SimscanRules:
    """What a row says; None where it says nothing and a less specific row decides."""

    clam: bool | None = None
    spam: bool | None = None
    trophie: bool | None = None
    spam_passthru: bool | None = None
    spam_hits: float | None = None
    size_limit: int | None = None
    attach: tuple[bytes, ...] | None = None
    qmailqueue: bytes | None = None

    def over(self, below: "SimscanRules") -> "SimscanRules":
        """These rules laid over less specific ones."""
        pairs = ((getattr(self, f.name), getattr(below, f.name)) for f in fields(self))
        return SimscanRules(*(mine if mine is not None else theirs for mine, theirs in pairs))

    @property
    def virus(self) -> bool:
        return bool(self.clam or self.trophie)


@dataclass(frozen=True, slots=True)
class SimscanRow:
    """One row of simcontrol that counts. ``key`` is lower-cased; empty for the default row."""

    path: str
    line: int
    key: bytes
    own: SimscanRules


def read_rows(old: Mapping[str, bytes], report: MigrationReport) -> Iterator[SimscanRow]:
    """The rows that count, in the order of ``simcontrol`` or, where there is only that, ``simcontrol.cdb``."""
    text, compiled = old.get("simcontrol"), None
    if "simcontrol.cdb" in old:
        compiled = _records(old["simcontrol.cdb"])
        if compiled is None:
            report.add(ChangeKind.CHECK, "simcontrol.cdb", 0, "damaged", "not a whole cdb file; not used")
    path = "simcontrol"
    records: Iterable[tuple[int, bytes, bytes]] = ()
    if text is not None:
        records = _lines(text, report)
        if compiled is not None and set(compiled) != {made for _, line in numbered(text) if (made := _compile(line))}:
            report.add(
                ChangeKind.CHECK,
                "simcontrol.cdb",
                0,
                "differs from simcontrol",
                "simscan goes by this file, and simcontrol has changed since it was compiled; simcontrol is taken",
            )
    elif compiled is not None:
        path = "simcontrol.cdb"
        records = [(number, key, value) for number, (key, value) in enumerate(compiled, 1)]
        report.add(
            ChangeKind.CHANGED, path, 0, "no simcontrol", "the compiled rows are taken; line numbers count records"
        )
    first: dict[bytes, int] = {}
    for line, key, value in records:
        if key in first:
            why = f"second row for this key: simscan goes by the first, in line {first[key]}, and so do we"
            report.add(ChangeKind.CHECK, path, line, key or b":", why)
            continue
        first[key] = line
        yield SimscanRow(path, line, key, SimscanRules(**dict(_settings(path, line, key, value, report))))


def _compile(line: bytes) -> tuple[bytes, bytes] | None:
    """(key, settings) of a line as simscanmk takes it apart; None for one in which it finds nothing."""
    line = line.partition(b"\0")[0]
    if line.startswith(b":"):
        return b"", line[1:].lstrip(b"\r").partition(b"\r")[0]
    rest = line.lstrip(b":\t\r #")
    if not rest:
        return None
    key, *more = re.split(rb"[:\t\r #]", rest, maxsplit=1)
    return key.lower(), (more[0].lstrip(b"\r").partition(b"\r")[0] if more else b"").lower()


def _lines(text: bytes, report: MigrationReport) -> Iterator[tuple[int, bytes, bytes]]:
    """(line, key, settings) of the rows of simcontrol; what simscanmk misreads is reported."""
    for number, line in numbered(text):
        made, start = _compile(line), line.lstrip(b" \t")
        if made is None and not line.strip(b"\0\r\t #"):
            continue  # nothing but blanks
        trouble = ""
        if b"\0" in line:
            trouble = "a NUL byte, at which simscanmk stops reading the row; left out"
        elif len(line) > _ROW_MAX:
            trouble = f"over {_ROW_MAX} bytes, where simscanmk cuts the row in two; left out"
        elif start.startswith(b"#"):
            if made is None or b"=" not in made[1]:
                report.add(ChangeKind.LEFT, "simcontrol", number, line, "a comment")
                continue
            trouble = (
                f"simscanmk knows no comments: for simscan this is a row for {readable(made[0][:80])}, and in force; "
                "here it is a comment and left out"
            )
        elif start.startswith(b":") and start != line:
            trouble = "with a blank in front simscan finds no default row here; taken as the default row"
            made = b"", start[1:].rstrip(b"\r")
        if trouble:
            report.add(ChangeKind.CHECK, "simcontrol", number, line, trouble)
        if made is not None and not trouble.endswith("left out"):
            yield number, *made


def _records(data: bytes) -> list[tuple[bytes, bytes]] | None:
    """The records of a cdb file in order; None when it is damaged. Format: 256 table heads, records, tables."""
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
    """The valid name-value pairs of a row as they were meant; everything odd is reported."""
    tokens = _SEPARATOR.split(text)
    literal = list(zip(tokens[::2], tokens[1::2], strict=False))
    words = b" ".join(text.split()).replace(b" =", b"=").replace(b"= ", b"=").replace(b",", b" ").split()
    meant = [(name, value.strip(b"\"'")) for name, _, value in (word.partition(b"=") for word in words)]
    if literal != meant:
        reading = b" ".join(n + b"=" + v for n, v in literal)
        report.add(
            ChangeKind.CHECK,
            path,
            line,
            text,
            "every blank, quote and comma separates for simscan, so it reads "
            f"{readable(reading[:200]) or 'nothing'}; here the row is taken as it was meant",
        )
    seen: set[str] = set()
    for raw, value in meant:
        name, subject = readable(raw.lower()), raw + b"=" + value
        if name in seen:
            report.add(
                ChangeKind.CHANGED, path, line, subject, "given twice in the row; the last one counts, as in simscan"
            )
        seen.add(name)
        parsed, kind, why = _value(name, value, key)
        if why:
            report.add(kind, path, line, subject, why)
        if parsed is not None:
            yield name, parsed


def _value(name: str, value: bytes, key: bytes) -> tuple[Any, ChangeKind, str]:
    """(the value or None, and what the report says about it: nothing where the text is empty)."""
    if name in ("clam", "spam", "trophie", "spam_passthru"):
        known = {b"yes": True, b"no": False}.get(value.lower())
        return (
            known,
            ChangeKind.CHECK,
            "" if known is not None else "neither yes nor no; simscan ignores it, and so do we",
        )
    if name == "spam_hits":
        if not re.fullmatch(rb"[0-9]{1,6}(\.[0-9]{0,6})?", value) or float(value) == 0:
            return (
                None,
                ChangeKind.CHECK,
                "not a number above 0, so simscan refuses nearly all mail that spamd sees; left out",
            )
        return float(value), ChangeKind.SAME, ""
    if name == "size_limit":
        if not re.fullmatch(rb"[0-9]{1,12}", value):
            return (
                None,
                ChangeKind.CHECK,
                "not a plain number of bytes, simscan reads only the digits in front; left out",
            )
        return int(value), ChangeKind.SAME, ""
    if name == "attach":
        endings = tuple(ending.lower() for ending in value.split(b":") if ending)
        if not all(map(_ENDING.fullmatch, endings)):
            return None, ChangeKind.CHECK, "endings have to be printable ASCII of at most 99 characters; left out"
        capitals = not key and value != value.lower()
        return (
            endings,
            ChangeKind.CHANGED,
            "simscan never finds capitals in the default row; here they count" if capitals else "",
        )
    if name == "qmailqueue":
        if not re.fullmatch(rb"/[!-~]{1,400}", value):
            return None, ChangeKind.CHECK, "not an absolute path; left out"
        return value, ChangeKind.SAME, ""
    if name == "regex":
        return (
            None,
            ChangeKind.LOST,
            "nothing here searches the text; use a SpamAssassin rule (rawbody) or clamd's .ldb",
        )
    if name == "spamuser":
        return (
            None,
            ChangeKind.LOST,
            "no spamd user of its own per row; keep the preferences under the recipient's address",
        )
    return None, ChangeKind.CHECK, "simscan does not know this name either; left out"


def read_endings(text: bytes, report: MigrationReport) -> tuple[bytes, ...]:
    """The file endings in control/ssattach: simscan takes the first word of each line."""
    endings = []
    for number, line in numbered(text):
        words = [word for word in re.split(rb"[ :\t\r]", line) if word]
        if len(words) > 1:
            report.add(
                ChangeKind.CHANGED, "ssattach", number, line, "only the first ending in a line counts, as in simscan"
            )
        if words and _ENDING.fullmatch(words[0]):
            endings.append(words[0].lower())
        elif words:
            report.add(
                ChangeKind.CHECK, "ssattach", number, line, "not printable ASCII of at most 99 characters; left out"
            )
    return tuple(endings)


def effective(row: SimscanRow, rows: Mapping[bytes, SimscanRow]) -> SimscanRules:
    """A row with all that it inherits: its own, the shorter ``user-ext`` addresses', the domain's, the default's."""
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
