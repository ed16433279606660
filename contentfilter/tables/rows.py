"""Rows of the recipient tables, and the text they are written in.

One row per line: ``[!]key [name=value ...]``; ``#`` starts a comment, at the start of a line or after white space.
Keys: :mod:`contentfilter.policy.addresses`. A line that cannot be a row is reported and skipped. Where a key
is repeated the last line counts, and that is reported too. A million rows take about a second.
"""

from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from contentfilter.errors import Problem
from contentfilter.files import ProblemCollector, SourceState, plain_text
from contentfilter.model import readable
from contentfilter.policy.addresses import EXEMPT, PLAIN_KEYS, parse_key
from contentfilter.policy.options import ALL_OPTIONS, OPTIONS, format_options, parse_option

TABLES = ("clamavclients", "spamdclients")
Table = dict[bytes, bytes]
"""Canonical key -> ``b""`` (check), ``b"!"`` (exempt), or the options, each in its one form."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Everything that a snapshot is made of."""

    clamav: Mapping[bytes, bytes] = field(default_factory=dict)
    spamd: Mapping[bytes, bytes] = field(default_factory=dict)
    default_domain: bytes = b""  # what a recipient without domain gets for the look-up
    sources: tuple[SourceState, ...] = ()
    prefs: Collection[bytes] = ()  # owners of SpamAssassin preferences: user@domain and @domain, each once
    damage: tuple[Problem, ...] = ()  # tables that should not take the place of others


def parse_table(text: bytes, path: str, allowed: Collection[bytes] = ALL_OPTIONS) -> tuple[Table, tuple[Problem, ...]]:
    """The rows of ``text`` in the order of their lines, and what is wrong with it.

    ``path`` is for the problems, ``allowed`` are the options that this table has.
    """
    report = ProblemCollector(path)
    return _parse(text, report, allowed)[0], report.problems()


def read_table(
    text: bytes, path: str, allowed: Collection[bytes] = ALL_OPTIONS
) -> tuple[Table, tuple[Problem, ...], tuple[Problem, ...]]:
    """As :func:`parse_table`, and the damage: one problem if most rows are invalid, for it is not what was meant."""
    report = ProblemCollector(path)
    table, skipped = _parse(text, report, allowed)
    problems = report.problems()
    if damage := damaged(skipped, len(table)):
        first = next(problem for problem in problems if not problem.warning)
        return table, problems, (Problem(path, first.line, f"{damage} The first: {first.text}"),)
    return table, problems, ()


def damaged(skipped: int, good: int) -> str:
    """The complaint about rows of which most are invalid, so that none of them should take effect; else empty."""
    if skipped <= good:
        return ""
    return f"{skipped} of {skipped + good} rows are invalid: what is in force stays."


def _parse(text: bytes, report: ProblemCollector, allowed: Collection[bytes]) -> tuple[Table, int]:
    """The rows, and the number of those that were skipped."""
    text = plain_text(text, report)
    skipped = 0
    text += b"" if text.endswith(b"\n") else b"\n"
    folded = text.lower()
    keys: list[bytes] = []
    lines = array("L")  # of each key
    values: dict[int, bytes] = {}  # of the keys whose value is not empty, by index
    at, number = 0, 1
    while at < len(text):
        end = _end_of_plain(folded, at)
        if end > at:
            run = folded[at : end - 1].split(b"\n")
            keys += run
            lines.extend(range(number, number + len(run)))
            number += len(run)
        else:
            end = text.index(b"\n", at) + 1
            before = report.errors
            row = parse_row(text[at : end - 1], number, report, allowed)
            if row is None:
                skipped += report.errors > before
            else:
                if row[1]:
                    values[len(keys)] = row[1]
                keys.append(row[0])
                lines.append(number)
            number += 1
        at = end
    table = dict.fromkeys(keys, b"")
    if len(table) < len(keys):
        _report_repeated(keys, lines, values, report)
        table.update((key, values.get(index, b"")) for index, key in enumerate(keys))
    else:
        table.update((keys[index], value) for index, value in values.items())
    return table, skipped


def _end_of_plain(folded: bytes, at: int) -> int:
    match = PLAIN_KEYS.match(folded, at)
    return match.end() if match else at


def _report_repeated(
    keys: list[bytes], lines: "array[int]", values: dict[int, bytes], report: ProblemCollector
) -> None:
    last: dict[bytes, int] = {}
    for index, key in enumerate(keys):
        before = last.get(key)
        last[key] = index
        if before is not None:
            how = "as in" if values.get(before) == values.get(index) else "unlike in"
            what = f"{short(key)} again, {how} line {lines[before]}; the later line counts"
            report.add(lines[index], what, warning=True)


def parse_row(
    line: bytes, number: int, report: ProblemCollector, allowed: Collection[bytes] = ALL_OPTIONS
) -> tuple[bytes, bytes] | None:
    """Key and value of one line without its end; None for a comment, an empty line and one that was reported."""
    words = line.split()
    comment = next((at for at, word in enumerate(words) if word.startswith(b"#")), len(words))
    del words[comment:]
    if not words:
        return None
    written, options = words[0], words[1:]
    exempt = written.startswith(EXEMPT)
    key, wrong = parse_key(written.removeprefix(EXEMPT))
    if written == EXEMPT:
        wrong = "no blank after !; write !key"
    elif not wrong and not all(b"=" in option for option in options):
        wrong = "only name=value, or a comment that starts with #, may follow a key"
    if wrong:
        report.add(number, f"{short(written)}: {wrong}. The line is skipped")
        return None
    if line[:1] in b" \t":
        report.add(number, "starts with a blank, which is ignored", warning=True)
    if key.startswith(b"@") and b"." not in key and b"@" not in written:
        report.add(number, f"{short(written)} means the domain {readable(key)}, not a mailbox", warning=True)
    good = {}
    for option in options:
        name, _, value = option.partition(b"=")
        text, wrong = parse_option(name, value)
        if name not in ALL_OPTIONS:
            wrong = f"unknown option {short(name)}"
        elif name not in allowed:
            wrong = f"{short(name)} belongs into {next(table for table, names in OPTIONS.items() if name in names)}"
        elif wrong:
            wrong = f"{short(option)}: {wrong}"
        if wrong:
            report.add(number, f"{wrong}; the row is in force without it")
        else:
            good[name] = text
    if exempt:
        return key, EXEMPT
    return key, format_options(good)


def row_text(key: bytes, value: bytes) -> bytes:
    """The line for a row, without its end."""
    if value == EXEMPT:
        return EXEMPT + key
    return key + b" " + value if value else key


def short(data: bytes) -> str:
    """A piece of somebody's text, for a message."""
    text = readable(data[:60])
    return repr(text if len(data) <= 60 else text + "...")
