"""``contentfilter migrate hsphere|simscan DIR``: convert the control files of another filter and report differences.

Exit statuses: 0 everything was converted; 1 something has to be decided by a person; 2 wrong usage, or a file would be
overwritten. The old directory is only read.
"""

import json
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from contentfilter.admin import migrate_hsphere, migrate_simscan
from contentfilter.admin.migration import ChangeKind, Migration, MigrationNote, NewFile
from contentfilter.cli.progress import progress
from contentfilter.model import readable

LARGEST = 256 << 20  # bytes of one old file; a table of a million rows has about 30 MB
_FROM = {"hsphere": migrate_hsphere, "simscan": migrate_simscan}
_ORDER = (ChangeKind.CHECK, ChangeKind.LOST, ChangeKind.CHANGED, ChangeKind.SAME, ChangeKind.LEFT)
_WORDS = {
    ChangeKind.CHECK: "to decide",
    ChangeKind.LOST: "not supported",
    ChangeKind.CHANGED: "changed",
    ChangeKind.SAME: "unchanged",
    ChangeKind.LEFT: "ignored",
}


@click.command()
@click.argument("origin", type=click.Choice(tuple(_FROM)))
@click.argument("directory", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@click.option(
    "--output", metavar="DIR", default="./contentfilter-migrated", show_default=True, help="Output directory."
)
@click.option("--force", is_flag=True, help="Overwrite existing files in the output directory.")
@click.option("--dry-run", is_flag=True, help="Only print the report.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def migrate(origin: str, directory: str, output: str, force: bool, dry_run: bool, as_json: bool) -> None:
    """Convert the control files of H-Sphere or simscan.

    DIR is the control directory of qmail, or its home directory.
    """
    reads = _FROM[origin].READS
    directory = _control(directory, reads)
    with progress(f"reading {directory}"):
        old, others, unreadable = _read(directory, reads)
        found = _FROM[origin].migrate(old, others)
    found = Migration(found.files, (*unreadable, *found.differences))
    if not dry_run:
        _write(found.files, output, directory, force)
    if as_json:
        click.echo(json.dumps(_as_json(origin, directory, output, found), indent=2))
    else:
        _print(found, output, dry_run)
    sys.exit(1 if found.needs_a_person else 0)


def _control(directory: str, reads: Sequence[str]) -> str:
    """The control directory: ``directory`` itself, or the one in it if it is the home of qmail."""
    inner = os.path.join(directory, "control")
    here = any(os.path.lexists(os.path.join(directory, name)) for name in reads)
    return inner if not here and os.path.isdir(inner) else directory


def _read(directory: str, reads: Sequence[str]) -> tuple[dict[str, bytes], list[str], list[MigrationNote]]:
    """Contents of the known files, names of the others, and notes about unreadable ones."""
    old: dict[str, bytes] = {}
    unreadable: list[MigrationNote] = []
    others: list[str] = []
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise click.UsageError(f"{directory}: {error.strerror}") from error
    for name in names:
        if name not in reads:
            others.append(readable(os.fsencode(name)))
            continue
        try:
            old[name] = _content(os.path.join(directory, name))
        except OSError as error:
            why = f"cannot be read: {error.strerror}; skipped"
            unreadable.append(MigrationNote(ChangeKind.CHECK, name, 0, name, why))
    return old, others, unreadable


def _content(path: str) -> bytes:
    """Content of a regular file. Raises OSError for pipes and devices, without waiting for them."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(0, "not a regular file")
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise OSError(0, f"larger than {LARGEST} bytes")
    return content


def _write(files: Iterable[NewFile], output: str, directory: str, force: bool) -> None:
    """Write all files, or none if one exists. Raises UsageError if the output is the old directory."""
    targets = [(os.path.join(output, file.path), file.content) for file in files]
    for path, _ in targets:
        if os.path.realpath(os.path.dirname(path)) == os.path.realpath(directory):
            raise click.UsageError(f"{path} would be in the old control directory; choose another --output")
        if not force and os.path.lexists(path):
            raise click.UsageError(f"{path} exists; nothing was written. Use --force, or another --output")
    try:
        for path, content in targets:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            new = f"{path}.{os.getpid()}.new"
            with open(new, "xb") as file:
                file.write(content)
            os.replace(new, path)
    except OSError as error:
        raise click.FileError(error.filename or output, error.strerror) from error


def _as_json(origin: str, directory: str, output: str, found: Migration) -> dict[str, object]:
    return {
        "origin": origin,
        "directory": readable(os.fsencode(directory)),
        "output": readable(os.fsencode(output)),
        "needs_a_person": found.needs_a_person,
        "files": [{"path": f.path, "bytes": len(f.content), "purpose": f.purpose} for f in found.files],
        "differences": [
            {"kind": d.kind.value, "file": d.path, "line": d.line, "subject": d.subject, "text": d.text}
            for d in found.differences
        ],
    }


def _print(found: Migration, output: str, dry_run: bool) -> None:
    """Print the report as a table with decisions for a person first, then the files and a summary."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    table = Table(box=None, pad_edge=False)
    for head in ("result", "file", "setting", "meaning"):
        table.add_column(head, overflow="fold")
    for difference in sorted(found.differences, key=lambda d: _ORDER.index(d.kind)):
        where = f"{difference.path}:{difference.line}" if difference.line else difference.path
        cells = (_WORDS[difference.kind], where, difference.subject, difference.text)
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    console.print()
    for file in found.files:
        line = f"{'would write' if dry_run else 'wrote'} {os.path.join(output, file.path)}: {file.purpose}"
        console.print(Text(readable(os.fsencode(line))), soft_wrap=True)
    count = Counter(difference.kind for difference in found.differences)
    console.print(Text(", ".join(f"{count[kind]} {_WORDS[kind]}" for kind in _ORDER)))
