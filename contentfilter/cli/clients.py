"""``contentfilter clients``: list, look up and change the recipient tables clamavclients and spamdclients.

Changes are made in the text files of the control directory. A running daemon reads them within ``[tables] refresh``
seconds, or immediately with ``contentfilter reload``. Tables in a database can be read here, but not changed.
"""

import asyncio
import csv
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click

from contentfilter.cli.clients_diff import accept, diff
from contentfilter.cli.progress import progress
from contentfilter.config.controls import read_controls
from contentfilter.config.load import load_settings
from contentfilter.deadline import Deadline
from contentfilter.errors import ConfigError, Problem
from contentfilter.files import ProblemCollector
from contentfilter.model import readable
from contentfilter.policy.addresses import EXEMPT, candidates, deciding, parse_key
from contentfilter.policy.options import ALL_OPTIONS, OPTIONS
from contentfilter.settings import Settings
from contentfilter.tables.edit import Edit, change_table, locked
from contentfilter.tables.files import MAX_SIZE
from contentfilter.tables.keeper import read_source
from contentfilter.tables.rows import TABLES, Rows, parse_row, parse_table, row_text

LOCK_WAIT = 10.0  # seconds
GLOBALS = {"clamavclients": "clamglobal", "spamdclients": "spamglobal"}
_CHOICE = {"clamav": TABLES[:1], "spamd": TABLES[1:], "both": TABLES}
_HEADINGS = (b"email", b"e-mail", b"mail", b"address", b"recipient", b"key", b"user")

Command = Callable[..., None]


def _table_option(command: Command) -> Command:
    return click.option(
        "--table",
        "tables",
        type=click.Choice(list(_CHOICE)),
        default="both",
        show_default=True,
        callback=lambda _ctx, _option, value: _CHOICE[value],
        help="clamav: clamavclients; spamd: spamdclients.",
    )(command)


_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_dry_run_option = click.option("--dry-run", is_flag=True, help="Only print what would change.")


@click.group(commands=[diff, accept])
def clients() -> None:
    """List and change the recipient tables.

    A key is user@domain, @domain or domain, .domain (all its sub-domains) or * (all recipients). The most specific row
    decides, whether it protects or exempts.
    """


@clients.command("list")
@_table_option
@_json_option
@click.argument("text", required=False)
@click.pass_obj
def list_rows(config_path: str, tables: tuple[str, ...], as_json: bool, text: str | None) -> None:
    """Print the rows, or those whose key contains TEXT. Status 1: no rows."""
    rows, problems = _read(load_settings(config_path))
    part = os.fsencode(text or "").lower()
    chosen = {
        name: [(key, value) for key, value in table.items() if part in key]
        for name, table in _tables(rows).items()
        if name in tables
    }
    if as_json:
        _print_json({name: [_as_json(*row) for row in table] for name, table in chosen.items()})
    else:
        _print_problems(problems)
        if len(tables) > 1 and any(chosen.values()):
            click.echo("Table\tRow")  # a single table is printed in the format of its file
        for name, table in chosen.items():
            prefix = name.encode() + b"\t" if len(tables) > 1 else b""
            click.echo(b"".join(b"%b%b\n" % (prefix, row_text(*row)) for row in table), nl=False)
    sys.exit(0 if any(chosen.values()) else 1)


@clients.command()
@_table_option
@_json_option
@click.argument("address")
@click.pass_obj
def lookup(config_path: str, tables: tuple[str, ...], as_json: bool, address: str) -> None:
    """Show whether mail to ADDRESS is checked, and which row decides. Status 1: neither table says yes."""
    settings = load_settings(config_path)
    controls, _ = asyncio.run(read_controls(settings.service.control))
    rows, problems = _read(settings)
    answers = {
        name: _answer(table, rows.default_domain, settings, address) | {"global": bool(controls.values[GLOBALS[name]])}
        for name, table in _tables(rows).items()
        if name in tables
    }
    if as_json:
        _print_json({"address": address, "tables": answers})
    else:
        _print_problems(problems)
        for name, answer in answers.items():
            _print_answer(name, answer)
    sys.exit(0 if any(answer["answer"] == "yes" for answer in answers.values()) else 1)


def _answer(table: Mapping[bytes, bytes], domain: bytes, settings: Settings, address: str) -> dict[str, Any]:
    recipient, extension = os.fsencode(address), settings.tables.extension.encode()
    found = deciding(table, recipient, extension, domain)
    steps = [
        {"key": readable(key), "kind": kind.value, "row": _effect(table.get(key))}
        for kind, key in candidates(recipient, extension, domain)
    ]
    kind, key = found if found else (None, b"")
    effect = _effect(table.get(key)) if found else None
    return {
        "answer": {"check": "yes", "exempt": "exempt", None: "no"}[effect],
        "key": readable(key) if found else None,
        "kind": kind.value if kind else None,
        "steps": steps,
    }


def _effect(value: bytes | None) -> str | None:
    return None if value is None else "exempt" if value == EXEMPT else "check"


def _print_answer(name: str, answer: dict[str, Any]) -> None:
    why = {
        "yes": f"yes, by {answer['key']} ({answer['kind']})",
        "exempt": f"no, exempt by !{answer['key']} ({answer['kind']})",
        "no": "no, no row applies",
    }
    click.echo(f"{name}: {why[answer['answer']]}")
    decided = False
    for step in answer["steps"]:
        row = step["row"] or "no row"
        if step["row"] and decided:
            row += ", but a more specific row has decided"
        decided = decided or bool(step["row"])
        click.echo(f"    {step['key']}: {row}")
    if answer["global"]:
        click.echo(f"    {GLOBALS[name]} is 1: all recipients are checked, regardless of this table")


@clients.command()
@_table_option
@_dry_run_option
@_json_option
@click.option("--exempt", is_flag=True, help="Exempt the addresses (the same as ! in front).")
@click.argument("keys", nargs=-1, required=True)
@click.pass_obj
def add(
    config_path: str, tables: tuple[str, ...], dry_run: bool, as_json: bool, exempt: bool, keys: tuple[str, ...]
) -> None:
    """Add rows. An existing row with the opposite meaning is changed.

    Options follow their key: bob@example.com virus=mark. They need --table clamav or --table spamd.
    """
    allowed = OPTIONS[tables[0]] if len(tables) == 1 else ()
    put = _rows(keys, allowed, exempt=exempt)
    _change(config_path, tables, put, dry_run=dry_run, as_json=as_json)


@clients.command()
@_table_option
@_dry_run_option
@_json_option
@click.argument("keys", nargs=-1, required=True)
@click.pass_obj
def remove(config_path: str, tables: tuple[str, ...], dry_run: bool, as_json: bool, keys: tuple[str, ...]) -> None:
    """Remove rows, including exempting ones. Status 1: none of them existed."""
    drop = {key for _, key in _parsed(keys)}
    edits = _change(config_path, tables, {}, drop, dry_run=dry_run, as_json=as_json)
    sys.exit(0 if any(edit.removed for edit in edits) else 1)


@clients.command("import")
@_table_option
@_dry_run_option
@_json_option
@click.option("--replace", is_flag=True, help="Remove all rows that are not in FILE.")
@click.argument("file", type=click.File("rb"))
@click.pass_obj
def import_rows(
    config_path: str, tables: tuple[str, ...], dry_run: bool, as_json: bool, replace: bool, file: Any
) -> None:
    """Add the rows of FILE (- is standard input): one key per line, or CSV with the keys in one column.

    All or nothing: if one line is invalid, nothing is imported and all invalid lines are listed.
    """
    name = getattr(file, "name", "-")
    with progress(f"reading {name}"):
        text = file.read(MAX_SIZE + 1)
    if len(text) > MAX_SIZE:
        raise click.UsageError(f"{name}: more than {MAX_SIZE} bytes")
    allowed = OPTIONS[tables[0]] if len(tables) == 1 else ()  # a row with options belongs in one table only
    with progress(f"checking {text.count(10):,} lines"):
        put, problems = parse_table(_first_cells(text), name, allowed)
    bad = [problem for problem in problems if not problem.warning]
    if bad or not put:
        _print_problems(problems)
        click.echo(f"contentfilter: {'invalid lines' if bad else 'no rows'} in {name}; nothing is imported", err=True)
        sys.exit(1)
    if not as_json:
        _print_problems(problems)
    with progress(f"writing {len(put):,} rows"):
        _change(config_path, tables, put, only=replace, dry_run=dry_run, as_json=as_json)


def _first_cells(text: bytes) -> bytes:
    """The column with the keys, one line for each line of ``text``. Text that is not CSV is returned unchanged."""
    head = text.partition(b"\n")[0].removeprefix(b"\xef\xbb\xbf")
    separator = next((s for s in (b",", b";", b"\t") if s in head), b"")
    cells = [cell.strip(b" \r\"'").lower() for cell in head.split(separator or b"\n")]
    column = next((cells.index(heading) for heading in _HEADINGS if heading in cells), -1)
    if not separator and column < 0:
        return text
    delimiter, place = (separator or b",").decode(), max(column, 0)

    def cell(line: str) -> str:  # line by line, to keep the line numbers
        row = next(csv.reader((line,), delimiter=delimiter), [])
        return row[place].strip() if len(row) > place else ""

    keys = [cell(line).encode("latin-1") for line in text.decode("latin-1").removesuffix("\n").split("\n")]
    if column >= 0:
        keys[0] = b""
    return b"\n".join(keys)


def _rows(words: Sequence[str], allowed: Collection[bytes], *, exempt: bool) -> dict[bytes, bytes]:
    """The rows of a command line: keys, each with its options behind it. Raises UsageError."""
    lines: list[bytes] = []
    for raw in map(os.fsencode, words):
        option = raw.partition(b"=")[0] in ALL_OPTIONS
        if option and not lines:
            raise click.UsageError(f"{readable(raw)!r}: an option follows its key")
        if option:
            lines[-1] += b" " + raw
        else:
            lines.append((EXEMPT if exempt and not raw.startswith(EXEMPT) else b"") + raw)
    rows = {}
    for line in lines:
        report = ProblemCollector("")
        row = parse_row(line, 0, report, allowed)
        wrong = next((problem.text for problem in report.problems() if not problem.warning), "")
        if row is None or wrong:
            text = wrong.partition("; the row is")[0].removesuffix(". The line is skipped")
            raise click.UsageError(text or f"{readable(line)!r} is not a row")
        if row[1] == EXEMPT and b" " in line:
            raise click.UsageError(f"{readable(line)!r}: an exempt row has no options")
        rows[row[0]] = row[1]
    return rows


def _parsed(keys: Collection[str]) -> Iterator[tuple[str, bytes]]:
    for raw in keys:
        key, wrong = parse_key(os.fsencode(raw.removeprefix("!")))
        if wrong:
            raise click.UsageError(f"{raw!r}: {wrong}")
        yield raw, key


def _change(
    config_path: str,
    tables: tuple[str, ...],
    put: Mapping[bytes, bytes],
    drop: Collection[bytes] = (),
    *,
    only: bool = False,
    dry_run: bool,
    as_json: bool,
) -> list[Edit]:
    settings = load_settings(config_path)
    control = settings.service.control
    if settings.tables.source != "files":
        text = f'[tables] source is "{settings.tables.source}": change the tables there'
        raise ConfigError((Problem(config_path, 0, text),))
    if not os.path.isdir(control):
        raise ConfigError((Problem(control, 0, "no such directory"),))

    async def run() -> list[Edit]:
        async with locked(control, Deadline.after(LOCK_WAIT)):
            paths = [os.path.join(control, name) for name in tables]
            return [await change_table(path, put, drop, only=only, write=not dry_run) for path in paths]

    edits = asyncio.run(run())
    if as_json:
        _print_json({"dry_run": dry_run, "tables": dict(zip(tables, map(asdict, edits), strict=True))})
        return edits
    for name, edit in zip(tables, edits, strict=True):
        counts = [f"{count:,} {what}" for what, count in asdict(edit).items() if count and what != "same"]
        would = "would be " if dry_run and counts else ""
        click.echo(f"{name}: {would}{', '.join(counts) or 'nothing to change'}")
    if not dry_run and any(edit.differs for edit in edits):
        click.echo(
            f"in force within {settings.tables.refresh:g} s, or immediately with: contentfilter reload", err=True
        )
    return edits


def _read(settings: Settings) -> tuple[Rows, tuple[Problem, ...]]:
    with progress("reading the tables"):
        found = asyncio.run(read_source(settings))
    return found or (Rows(), ())  # None only if a previous state is given


def _tables(rows: Rows) -> dict[str, Mapping[bytes, bytes]]:
    return dict(zip(TABLES, (rows.clamav, rows.spamd), strict=True))


def _as_json(key: bytes, value: bytes) -> dict[str, Any]:
    exempt = value == EXEMPT
    return {"key": readable(key), "exempt": exempt, "options": "" if exempt else readable(value)}


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))


def _print_problems(problems: Collection[Problem]) -> None:
    for problem in problems:
        click.echo(f"{'warning' if problem.warning else 'error'}: {problem}", err=True)
