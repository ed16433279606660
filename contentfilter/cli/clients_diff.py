"""``contentfilter clients diff`` and ``accept``: compare the source of the tables with the tables in force.

The daemon refuses a table that lost most of its rows. ``diff`` shows what would change, and a checksum of the present
rows; ``accept`` confirms exactly these.
"""

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import click

from contentfilter.bus import messages, sockets
from contentfilter.cli.progress import progress
from contentfilter.config.load import load_settings
from contentfilter.errors import ConfigError, Problem
from contentfilter.model import readable
from contentfilter.settings import Settings
from contentfilter.tables import shrink
from contentfilter.tables.keeper import read_source
from contentfilter.tables.rows import TABLES, Rows, row_text
from contentfilter.tables.snapshot import FILE, Snapshot

SAMPLES = 10  # rows shown of each kind
WAIT = 120.0  # seconds for the daemon to load them


@dataclass(frozen=True, slots=True)
class RowDifference:
    """Difference of one table: numbers of rows, and samples."""

    in_force: int
    now: int
    added: int
    removed: int
    changed: int
    samples: tuple[str, ...]  # as rows are written, after + (added), - (removed) or ~ (changed)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def diff(config_path: str, as_json: bool) -> None:
    """Compare the tables in force with their source. Status 1: they differ."""
    settings = load_settings(config_path)
    old, new = _in_force(settings), _now(settings)
    tables = {
        name: _difference(*pair)
        for name, pair in zip(TABLES, ((old.clamav, new.clamav), (old.spamd, new.spamd)), strict=True)
    }
    name = shrink.checksum(new)
    before = (len(old.clamav), len(old.spamd))
    less = shrink.shrunk(before, (len(new.clamav), len(new.spamd)), settings.tables)
    differs = any(d.added or d.removed or d.changed for d in tables.values())
    if as_json:
        facts = {"checksum": name, "refused": less, "tables": {key: asdict(d) for key, d in tables.items()}}
        click.echo(json.dumps(facts, indent=2))
    else:
        for key, d in tables.items():
            counts = f"{d.removed:,} removed, {d.added:,} added, {d.changed:,} changed"
            click.echo(f"{key}: {d.in_force:,} rows in force, {d.now:,} now: {counts}")
            for sample in d.samples:
                click.echo(f"    {sample}")
        if less:
            click.echo(f"{less}. If this is intended: contentfilter clients accept {name}")
    sys.exit(1 if differs else 0)


@click.command()
@click.argument("checksum")
@click.pass_obj
def accept(config_path: str, checksum: str) -> None:
    """Activate the tables with this CHECKSUM (from diff), although they lost most of their rows."""
    settings = load_settings(config_path)
    name = shrink.checksum(_now(settings))
    if name != checksum.lower():
        click.echo(
            f"contentfilter: the checksum of the tables is not {checksum}; run contentfilter clients diff again",
            err=True,
        )
        sys.exit(1)
    state = settings.service.state
    try:
        shrink.accept(state, name)
    except OSError as e:
        raise ConfigError((Problem(state, 0, f"cannot write to it: {e.strerror}"),)) from e
    reply = sockets.ask(settings.service.run, messages.AskReload(), WAIT)
    if isinstance(reply, messages.Refused):
        click.echo(f"contentfilter: accepted, but not in force yet: {reply.why}", err=True)
        click.echo("the daemon loads them when it next reads the tables ([tables] refresh)", err=True)
        sys.exit(1)
    if not isinstance(reply, messages.Done):
        click.echo("accepted; no daemon answers, so they are loaded when it starts")
        return
    for problem in reply.problems:
        click.echo(problem, err=True)
    click.echo(f"accepted; configuration {reply.generation} is in force")
    sys.exit(1 if reply.problems else 0)


def _in_force(settings: Settings) -> Rows:
    """Tables in force; empty if there is no snapshot yet."""
    path = os.path.join(settings.service.state, FILE)
    if not os.path.lexists(path):
        return Rows()
    snapshot = Snapshot.open(path)
    try:
        return snapshot.rows()
    finally:
        snapshot.close()


def _now(settings: Settings) -> Rows:
    with progress("reading the tables"):
        found = asyncio.run(read_source(settings))
    return found[0] if found else Rows()  # None only if a previous state is given


def _difference(old: Mapping[bytes, bytes], new: Mapping[bytes, bytes]) -> RowDifference:
    added = sorted(new.keys() - old.keys())
    removed = sorted(old.keys() - new.keys())
    changed = sorted(key for key, value in new.items() if old.get(key, value) != value)
    samples = [f"- {readable(row_text(key, old[key]))}" for key in removed[:SAMPLES]]
    samples += [f"+ {readable(row_text(key, new[key]))}" for key in added[:SAMPLES]]
    samples += [
        f"~ {readable(row_text(key, old[key]))} -> {readable(row_text(key, new[key]))}" for key in changed[:SAMPLES]
    ]
    return RowDifference(len(old), len(new), len(added), len(removed), len(changed), tuple(samples))
