"""``contentfilter failures``: the failure table in force, and the setting behind each entry.

Asks the running daemon, which may use an older configuration than the file has, and reports the difference. Without a
daemon, or with ``--file``, it prints the table of the file.
Exit statuses: 0 printed; 1 the daemon uses a table that differs from the file; 2 wrong usage; 78 bad configuration.
"""

import json
import sys
import textwrap
from typing import Any

import click

from contentfilter.bus import messages, sockets
from contentfilter.config.load import read_settings
from contentfilter.errors import Cause, ConfigError, Problem
from contentfilter.model import OriginKind, Scanner
from contentfilter.policy.failure import MEANINGS, FailureEntry, FailureKey, FailureTable, failure_table
from contentfilter.settings import FailureSettings

WAIT = 5.0  # seconds
WIDTH = 80  # of the explanations


@click.command()
@click.option("--scanner", type=click.Choice([s.value for s in Scanner]), help="Only this scanner.")
@click.option("--cause", type=click.Choice([c.value for c in Cause]), help="Only this cause.")
@click.option("--origin", type=click.Choice([o.value for o in OriginKind]), help="Only this origin.")
@click.option("--file", "only_file", is_flag=True, help="Use the configuration file; do not ask the daemon.")
@click.option("-v", "--verbose", is_flag=True, help="Also explain each cause.")
@click.option("--json", "as_json", is_flag=True, help="Print all entries as JSON.")
@click.pass_obj
def failures(
    config_path: str,
    scanner: str | None,
    cause: str | None,
    origin: str | None,
    only_file: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Show what each failure of a scanner does to mail: defer it, or pass it unchecked.

    An asterisk marks a value that is not the default. The last column names the settings that decide.
    """
    settings, problems = read_settings(config_path)
    wrong = tuple(problem for problem in problems if not problem.warning)
    running = None if only_file else _running(settings.service.run)
    if running is None and wrong:
        raise ConfigError(wrong)
    table = failure_table(running.failure if running else settings.failure)
    current = running is None or (not wrong and table == failure_table(settings.failure))
    shown = [key for key in table if _chosen(key, scanner, cause, origin)]
    if as_json:
        click.echo(json.dumps(_facts(table, shown, running, current), indent=2))
    else:
        if shown:
            _print(table, shown)
        else:
            click.echo("this scanner never fails with this cause", err=True)
        if verbose:
            _explain([cause for cause in Cause if any(key[1] is cause for key in shown)])
        _comment(settings.failure, running, wrong, only_file, settings.service.run)
    sys.exit(0 if current else 1)


def _running(run: str) -> messages.Failures | None:
    """The daemon's table; None if no daemon answers."""
    reply = sockets.ask(run, messages.AskFailures(), WAIT)
    if isinstance(reply, messages.Refused):
        raise click.ClickException(f"{reply.why}; --file prints the table of the configuration file")
    return reply if isinstance(reply, messages.Failures) else None


def _chosen(key: FailureKey, scanner: str | None, cause: str | None, origin: str | None) -> bool:
    """True if the entry was requested and can occur."""
    wanted = zip(key, (scanner, cause, origin), strict=True)
    return key[0] in MEANINGS[key[1]].scanners and all(name in (None, part.value) for part, name in wanted)


def _print(table: FailureTable, shown: list[FailureKey]) -> None:
    """Aligned text, which fits into 80 columns as long as few rules are set."""
    normal = failure_table(FailureSettings())
    origins = [origin for origin in OriginKind if any(key[2] is origin for key in shown)]
    rows = [("scanner", "cause", *(origin.value for origin in origins), "set by")]
    for scanner, cause in dict.fromkeys(key[:2] for key in shown):
        entries = {origin: table[scanner, cause, origin] for origin in origins}
        marked = (
            entry.action + ("*" if entry.action != normal[scanner, cause, origin].action else "")
            for origin, entry in entries.items()
        )
        rows.append((scanner.value, cause.value, *marked, _sources(tuple(entries.values()))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    click.echo("\nSet by keys and rules of [failure]; bounces always pass. * is not the default.")


def _sources(entries: tuple[FailureEntry, ...]) -> str:
    """Settings behind one row. The fixed rule for bounces is mentioned once, below the table."""
    names = dict.fromkeys(entry.source for entry in entries if not entry.fixed)
    names = names or dict.fromkeys(entry.source for entry in entries)
    return ", ".join(name.removeprefix("[failure] ").replace("[[failure.rule]]", "rule") for name in names)


def _explain(causes: list[Cause]) -> None:
    click.echo()
    for cause in causes:
        text = f"{cause.value:<11}{MEANINGS[cause].text}"
        click.echo(textwrap.fill(text, WIDTH, subsequent_indent=" " * 11))


def _comment(
    written: FailureSettings, running: messages.Failures | None, wrong: tuple[Problem, ...], only_file: bool, run: str
) -> None:
    """Notes about the source of the table, on standard error."""
    if running is None:
        if not only_file:
            click.echo(f"no daemon answers at {run}/control.sock; this is the table of the file", err=True)
        return
    for problem in wrong:
        click.echo(f"not in force: {problem}", err=True)
    if wrong:
        click.echo(f"the daemon continues with configuration {running.generation}, shown above", err=True)
        return
    there, here = failure_table(written), failure_table(running.failure)
    differing = [key for key in there if there[key].action != here[key].action]
    for scanner, cause, origin in differing[:20]:
        entry = there[scanner, cause, origin]
        name = f"{scanner.value}, {cause.value}, {origin.value}"
        click.echo(f"not in force: {name}: the file says {entry.action} ({entry.source})", err=True)
    if len(differing) > 20:
        click.echo(f"not in force: {len(differing) - 20} more entries", err=True)
    if there != here:
        remedy = "the file has changed since; run: contentfilter reload"
        click.echo(f"the daemon uses configuration {running.generation}, shown above; {remedy}", err=True)


def _facts(
    table: FailureTable, shown: list[FailureKey], running: messages.Failures | None, current: bool
) -> dict[str, Any]:
    normal = failure_table(FailureSettings())
    return {
        "source": "daemon" if running else "file",
        "generation": running.generation if running else None,
        "current": current,
        "cells": [_fact(key, table[key], normal[key]) for key in shown],
    }


def _fact(key: FailureKey, entry: FailureEntry, normal: FailureEntry) -> dict[str, Any]:
    scanner, cause, origin = (part.value for part in key)
    return {
        "scanner": scanner,
        "cause": cause,
        "origin": origin,
        "action": entry.action,
        "default": normal.action,
        "set_by": entry.source,
        "fixed": entry.fixed,
    }
