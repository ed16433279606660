"""Shared by several commands: options, times as people write and read them, tables, and dropping root's privileges."""

import os
import pwd
import re
import sys
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import click

from contentfilter.qmail import DEFAULT_CONF

queue_conf_option = click.option(
    "--queue-conf",
    metavar="FILE",
    envvar="CONTENTFILTER_QUEUE_CONF",
    default=DEFAULT_CONF,
    show_default=True,
    type=click.Path(path_type=Path),
    help="Configuration file of the hook.",
)

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def moment(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """``30m``, ``2h``, ``3d`` ago, or a date and time (ISO 8601, local where no zone is given)."""
    if value is None:
        return None
    if ago := re.fullmatch(r"([0-9]{1,9})([smhdw])", value, re.ASCII):
        return time.time() - int(ago[1]) * _UNITS[ago[2]]
    try:
        return datetime.fromisoformat(value).timestamp()
    except (ValueError, OverflowError):
        wanted = "an age (30m, 2h, 3d) nor a date (2026-08-01, 2026-08-01T09:00)"
        raise click.BadParameter(f"{value!r} is neither {wanted}", ctx, param) from None


def span(ctx: click.Context, param: click.Parameter, value: str) -> float:
    """``30m``, ``12h``, ``3d`` in seconds."""
    match = re.fullmatch(r"([0-9]{1,6})([smhdw])", value, re.ASCII)
    if match is None or int(match[1]) == 0:
        raise click.BadParameter(f"{value!r} is no length of time (30m, 12h, 3d)", ctx, param)
    return float(int(match[1]) * _UNITS[match[2]])


def when(at: float) -> str:
    """Local time with its offset."""
    return datetime.fromtimestamp(at).astimezone().isoformat(timespec="seconds")


def print_rows(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """A table on a terminal, plain lines with tabs for everything else."""
    if not sys.stdout.isatty():
        for row in rows:
            click.echo("\t".join(map(printable, row)))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=None)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # Text: nothing that a sender wrote is markup
    Console().print(table)


def print_story(lines: Iterable[tuple[str, str]]) -> None:
    """One step in a line: its stage, and what happened."""
    shown = tuple(lines)
    width = max((len(stage) for stage, _ in shown), default=0)
    for stage, text in shown:
        click.echo(printable(f"{stage:<{width}}  {text}"))


def printable(text: str) -> str:
    """Nothing that could drive a terminal, or begin another line."""
    return "".join(c if c.isprintable() else "?" for c in text)


def address_pattern(pattern: str) -> str:
    """A whole address is looked up; a domain, a part or a pattern is searched for."""
    plain = pattern.strip("<> ")
    if "*" in plain or "?" in plain or not plain:
        return plain
    if plain.startswith("@"):
        return "*" + plain
    return plain if "@" in plain else f"*{plain}*"


def glob(pattern: str, text: str) -> bool:
    """Whether ``*`` and ``?`` in the pattern can stand for what is in the text; case does not matter.

    Goes back to the last ``*`` only, so the time is bounded by the product of the lengths.
    """
    pattern, text = pattern.lower(), text.lower()
    at = here = 0
    star, resume = -1, 0
    while here < len(text):
        if at < len(pattern) and pattern[at] == "*":
            star, resume = at, here
            at += 1
        elif at < len(pattern) and pattern[at] in ("?", text[here]):
            at, here = at + 1, here + 1
        elif star >= 0:
            resume += 1
            at, here = star + 1, resume
        else:
            return False
    return not pattern[at:].strip("*")


def become_owner(directory: Path) -> None:
    """Root gives its rights up: no file appears that the daemon cannot read, no link leads root astray."""
    try:
        status = directory.stat()
    except FileNotFoundError:
        return
    if os.geteuid() or not status.st_uid:
        return
    try:
        os.initgroups(pwd.getpwuid(status.st_uid).pw_name, status.st_gid)
    except KeyError:
        os.setgroups([])
    os.setgid(status.st_gid)
    os.setuid(status.st_uid)
