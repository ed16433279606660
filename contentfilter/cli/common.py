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
qmail_option = click.option(
    "--qmail",
    metavar="DIR",
    default="/var/qmail",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Home directory of qmail.",
)
binary_option = click.option("--binary", metavar="FILE", help="The compiled hook, if not the one of this package.")
sender_option = click.option(
    "--sender",
    metavar="ADDRESS",
    help='Envelope sender: an address, @domain, a part, or a pattern with * and ?; "<>" for bounces.',
)
recipient_option = click.option("--recipient", metavar="ADDRESS", help="A recipient, in the same forms.")
remote_option = click.option("--remote", metavar="IP", help="IP address of the client; * and ? are wildcards.")

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def moment(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Option callback: seconds since the epoch of an age (``30m``, ``2h``, ``3d``) or of an ISO 8601 date and time."""
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
    """Option callback: seconds of a duration such as ``30m``, ``12h``, ``3d``."""
    match = re.fullmatch(r"([0-9]{1,6})([smhdw])", value, re.ASCII)
    if match is None or int(match[1]) == 0:
        raise click.BadParameter(f"{value!r} is not a duration (30m, 12h, 3d)", ctx, param)
    return float(int(match[1]) * _UNITS[match[2]])


def when(at: float) -> str:
    """Local time with its offset."""
    return datetime.fromtimestamp(at).astimezone().isoformat(timespec="seconds")


def print_rows(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Print rows below a header: as a table on a terminal, otherwise as lines with tabs. Nothing without rows."""
    rows = list(rows)
    if not rows:
        return
    if not sys.stdout.isatty():
        for row in (head, *rows):
            click.echo("\t".join(map(printable, row)))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=None)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # Text: markup from senders has no effect
    Console().print(table)


def print_story(lines: Iterable[tuple[str, str]]) -> None:
    """Print one step per line: its stage and its text."""
    shown = tuple(lines)
    width = max((len(stage) for stage, _ in shown), default=0)
    for stage, text in shown:
        click.echo(printable(f"{stage:<{width}}  {text}"))


def latency(p50: float, p95: float) -> str:
    """Median and 95th percentile, given in milliseconds."""
    return f"median {duration(p50)}, 95th percentile {duration(p95)}"


def duration(ms: float) -> str:
    """Milliseconds in the unit that a person reads: ``4.7 ms``, ``236 ms``, ``1.2 s``, ``66 s``, ``12 min``."""
    seconds = ms / 1000
    if seconds < 0.9995:
        return f"{ms:.1f} ms" if ms < 9.95 else f"{ms:.0f} ms"
    if seconds < 119.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"


def printable(text: str) -> str:
    """Text with ``?`` for terminal control characters and line ends."""
    return "".join(c if c.isprintable() else "?" for c in text)


def address_pattern(pattern: str) -> str:
    """Glob pattern for an address: a whole one matches exactly, a domain or a part anywhere."""
    plain = pattern.strip("<> ")
    if "*" in plain or "?" in plain or not plain:
        return plain
    if plain.startswith("@"):
        return "*" + plain
    return plain if "@" in plain else f"*{plain}*"


def glob(pattern: str, text: str) -> bool:
    """Match ``text`` against a pattern with ``*`` and ``?``, ignoring case.

    Backtracks to the last ``*`` only, so the time is bounded by the product of the lengths.
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
    """Switch from root to the owner of ``directory``: new files are the daemon's, and links cannot mislead root."""
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
