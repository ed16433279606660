"""Result of a migration: the files to write, and every difference in meaning with its file and line.

:mod:`contentfilter.admin.migrate_hsphere` and :mod:`contentfilter.admin.migrate_simscan` build one from the bytes of
the old control files. Nothing here reads or writes a file.
"""

import enum
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partialmethod

from contentfilter.model import readable
from contentfilter.policy.addresses import EVERYBODY, parse_key

CONTROL = "/etc/contentfilter/control"
"""Directory for the new control files, separate from qmail's, so that it is possible to return to the old filter."""

LISTED = 1000  # differences listed per file and kind; further ones are counted
_PRINTABLE = re.compile(rb"[!-~]+")
_PATTERN = re.compile(rb"[*?\[\]\\]")
Value = str | bool | float


class ChangeKind(enum.Enum):
    """Result for one setting of the old filter, the least important first."""

    SAME = "same"  # converted, with the same meaning
    LEFT = "left"  # not a file of the content filter
    CHANGED = "changed"  # converted, and the text describes the difference
    LOST = "lost"  # not supported; the text describes the alternative
    CHECK = "check"  # a person has to decide; the text describes the choice


@dataclass(frozen=True, slots=True)
class MigrationNote:
    """One line of the report. ``subject`` and ``text`` are printable ASCII; ``line`` is 0 if none applies."""

    kind: ChangeKind
    path: str
    line: int
    subject: str
    text: str


@dataclass(frozen=True, slots=True)
class NewFile:
    """File to write: its path below the output directory, its content, and its purpose."""

    path: str
    content: bytes
    purpose: str


@dataclass(frozen=True, slots=True)
class Migration:
    """Files and notes of one migration."""

    files: tuple[NewFile, ...]
    differences: tuple[MigrationNote, ...]

    @property
    def needs_a_person(self) -> bool:
        """True if something was not converted or has to be decided."""
        return any(d.kind in (ChangeKind.LOST, ChangeKind.CHECK) for d in self.differences)


class MigrationReport:
    """Collector of notes: the first :data:`LISTED` per kind and file, and the number of further ones."""

    def __init__(self) -> None:
        self._listed: list[MigrationNote] = []
        self._count: Counter[tuple[str, ChangeKind]] = Counter()

    def add(self, kind: ChangeKind, path: str, line: int, subject: bytes | str, text: str) -> None:
        """Add a note. ``subject`` is quoted from the old file and truncated to 80 characters."""
        self._count[path, kind] += 1
        if self._count[path, kind] > LISTED:
            return
        what = readable(subject.encode("utf-8", "replace") if isinstance(subject, str) else subject[:1000])
        what = what if len(what) <= 80 else what[:77] + "..."
        self._listed.append(MigrationNote(kind, path, line, what, text))

    same = partialmethod(add, ChangeKind.SAME)
    left = partialmethod(add, ChangeKind.LEFT)
    changed = partialmethod(add, ChangeKind.CHANGED)
    lost = partialmethod(add, ChangeKind.LOST)
    check = partialmethod(add, ChangeKind.CHECK)

    def differences(self) -> tuple[MigrationNote, ...]:
        """All notes in the order found, then the numbers of those that are not listed."""
        more = [
            MigrationNote(
                kind, path, 0, f"{count - LISTED} more", "of the same kind in this file; they are not listed here"
            )
            for (path, kind), count in self._count.items()
            if count > LISTED
        ]
        return (*self._listed, *more)


def numbered(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers from 1, without the LF; a CR stays. No empty last line."""
    start, number = 0, 1
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        yield number, data[start:end]
        start, number = end + 1, number + 1


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row of clamavclients or spamdclients: ``key [name=value ...]``, ``!key`` for an exempt one."""

    key: bytes
    exempt: bool = False
    options: tuple[tuple[str, str], ...] = ()

    def line(self) -> bytes:
        """The row in the format of the file, without the line end."""
        options = "".join(f" {name}={value}" for name, value in self.options)
        return (b"!" if self.exempt else b"") + self.key + options.encode("ascii")


def table_key(raw: bytes) -> bytes | None:
    """``raw`` as a key of our tables (:mod:`contentfilter.policy.addresses`), or None if that is impossible.

    Supported wildcards of other filters: ``*@*``, ``*@domain``, ``*@*.domain``, ``*.domain``. Only printable ASCII is
    accepted.
    """
    key = raw.lower()
    if key in (b"*@*", b"@*"):
        key = EVERYBODY
    elif key.startswith((b"*@*.", b"@*.", b"*.")):
        key = key[key.index(b"*.") + 1 :]
    elif key.startswith(b"*@"):
        key = key[1:]
    if not _PRINTABLE.fullmatch(key) or key[:1] in b"#!" or (key != EVERYBODY and _PATTERN.search(key)):
        return None
    return parse_key(key)[0] or None


def table_file(name: str, origin: str, rows: Iterable[TableRow]) -> NewFile:
    """The file for one recipient table."""
    head = f"# Written by contentfilter migrate from {origin}. One key per line; ! in front exempts.\n"
    body = b"".join(row.line() + b"\n" for row in rows)
    return NewFile(f"control/{name}", head.encode("ascii") + body, f"goes to {CONTROL}/{name}")


def options_file(origin: str, options: Mapping[str, str]) -> NewFile:
    """The file ``control/options``."""
    head = f"# Written by contentfilter migrate from {origin}. H-Sphere's parameters: name, blank, value.\n"
    body = "".join(f"{name} {value}\n" for name, value in options.items())
    return NewFile("control/options", (head + body).encode("ascii"), f"goes to {CONTROL}/options")


NAMES = ("me", "envnoathost")
"""qmail's controls that the tables need: the domain of a recipient that has none."""


def name_files(old: Mapping[str, bytes], report: MigrationReport) -> Iterator[NewFile]:
    """Copies of :data:`NAMES`, since our controls have a directory of their own."""
    for name in NAMES:
        if name not in old:
            continue
        first = old[name].partition(b"\n")[0].rstrip(b" \t\r")
        if _PRINTABLE.fullmatch(first):
            report.same(name, 1, first, f"copied to control/{name}: the domain of recipients without one")
            yield NewFile(f"control/{name}", first + b"\n", f"goes to {CONTROL}/{name}")
        else:
            report.check(name, 1, first, "not a host name in printable ASCII; skipped")


def settings_file(origin: str, settings: Mapping[str, Mapping[str, Value]]) -> NewFile:
    """``contentfilter.toml`` with the sections and keys that differ from the defaults."""
    text = f"# Written by contentfilter migrate from {origin}. Other settings have their defaults.\n"
    for section, keys in settings.items():
        # JSON's strings, booleans and finite numbers are TOML's too.
        text += f"\n[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    return NewFile("contentfilter.toml", text.encode("ascii"), "goes to /etc/contentfilter/contentfilter.toml")


def queue_file(origin: str, lines: Iterable[str]) -> NewFile:
    """``queue.conf``, as far as the old control files determine it."""
    text = f"# Written by contentfilter migrate from {origin}. Lines of: name, blank, value.\n"
    return NewFile(
        "queue.conf", (text + "".join(f"{x}\n" for x in lines)).encode("ascii"), "goes to /etc/contentfilter/queue.conf"
    )
