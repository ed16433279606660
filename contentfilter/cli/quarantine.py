"""``contentfilter quarantine``: look at what is kept, hand it out, remove it.

Run as root it becomes the owner of the quarantine first, so that the daemon can use whatever it writes.
Tables and a progress bar on a terminal; plain lines with tabs, or ``--json``, for everything else.
Exit statuses: 0 done; 1 nothing found, or something failed; 2 wrong usage; 78 bad configuration.
"""

import asyncio
import errno
import functools
import json
import os
import pwd
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from contentfilter.cli.common import become_owner, moment
from contentfilter.cli.progress import Progress, progress
from contentfilter.cli.quarantine_view import print_entries, print_message, story
from contentfilter.config.load import load_settings
from contentfilter.deadline import Deadline
from contentfilter.errors import QuarantineError
from contentfilter.settings import Settings
from contentfilter.store.quarantine import Quarantine
from contentfilter.store.release import Releaser, load_secret
from contentfilter.store.sidecar import Search, Sidecar, plain
from contentfilter.verdict.headers import HEADER_LIMIT, header_block

SUBMISSION = 300.0
"""Seconds for one qmail-queue."""

_DEFAULT_QUEUE = "/var/qmail/bin/qmail-queue.real"


class _Group(click.Group):
    """Faults of the quarantine and the disk become one line and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (QuarantineError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise
            click.echo(f"contentfilter: {error}", err=True)
            ctx.exit(1)


_FILTERS = (
    click.option("--sender", metavar="PATTERN", help="Part of the sender; * and ? for whole patterns."),
    click.option("--recipient", metavar="PATTERN", help="Part of a recipient's address."),
    click.option("--signature", metavar="NAME", help="The name that hit, whole or with * and ?."),
    click.option("--message-id", metavar="PATTERN", help="Part of the Message-ID."),
    click.option("--subject", metavar="PATTERN", help="Part of the subject."),
    click.option("--since", metavar="WHEN", callback=moment, help="Kept since: 30m, 2h, 3d or a date."),
    click.option("--until", metavar="WHEN", callback=moment, help="Kept before."),
)
_json = click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
_yes = click.option("--yes", is_flag=True, help="Do not ask.")
_dry_run = click.option("--dry-run", is_flag=True, help="Only say what would be done.")


def _filters(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a search; the command gets them as ``search``."""

    @functools.wraps(command)
    def with_search(*args: Any, **options: Any) -> None:
        names = ("sender", "recipient", "signature", "message_id", "subject", "since", "until")
        asked = {name: options.pop(name) for name in names}
        search = Search(**{name: value for name, value in asked.items() if value is not None})
        command(*args, search=search, **options)

    return functools.reduce(lambda decorated, option: option(decorated), reversed(_FILTERS), with_search)


@dataclass(frozen=True, slots=True)
class Desk:
    """What every command needs."""

    settings: Settings
    quarantine: Quarantine
    by: str  # who is asking


def _desk(config_path: str) -> Desk:
    settings = load_settings(config_path)
    asking = os.environ.get("SUDO_USER", "") if os.getuid() == 0 else ""
    try:
        by = asking or pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        by = str(os.getuid())
    become_owner(Path(settings.service.state))
    return Desk(settings, Quarantine.of(settings), by)


@click.group(cls=_Group)
def quarantine() -> None:
    """List, show, search, release, delete and expire what is kept."""


@quarantine.command("list")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many, newest first.")
@_json
@click.pass_obj
def list_(config_path: str, limit: int, as_json: bool) -> None:
    """The newest entries."""
    entries = _desk(config_path).quarantine.entries()
    print_entries([entry for entry, _ in zip(entries, range(limit), strict=False)], as_json)


@quarantine.command()
@click.argument("incident", default="")
@_filters
@_json
@click.pass_obj
def search(config_path: str, incident: str, search: Search, as_json: bool) -> None:
    """All entries that match; INCIDENT is a prefix. Exit status 1 when there is none."""
    desk = _desk(config_path)
    with progress("searching the quarantine"):
        found = list(desk.quarantine.entries(_with(search, incident=incident)))
    print_entries(found, as_json)
    if not found:
        sys.exit(1)


@quarantine.command()
@click.argument("incident")
@click.option("--message", "part", flag_value="message", help="The message as it came, and nothing else.")
@click.option("--headers", "part", flag_value="headers", help="Its header, and nothing else.")
@_json
@click.pass_obj
def show(config_path: str, incident: str, part: str | None, as_json: bool) -> None:
    """One entry. A unique prefix of the incident is enough."""
    quarantine = _desk(config_path).quarantine
    entry = quarantine.find(incident)
    if part is not None:
        with quarantine.message(entry.incident) as file:
            print_message(header_block(file.read(HEADER_LIMIT)) if part == "headers" else file.read())
    elif as_json:
        click.echo(json.dumps(plain(entry), indent=2))
    else:
        for name, value in story(entry):
            click.echo(f"{name:<11} {value}")


@quarantine.command()
@click.argument("incidents", nargs=-1)
@_filters
@click.option("--to", metavar="ADDRESS", multiple=True, help="To these instead of those from whom it was withheld.")
@click.option("--again", is_flag=True, help="Also what was released before.")
@click.option("--queue", metavar="PATH", help="The real qmail-queue.  [default: `queue` in queue.conf]")
@_dry_run
@_yes
@_json
@click.pass_obj
def release(
    config_path: str,
    incidents: tuple[str, ...],
    search: Search,
    to: tuple[str, ...],
    again: bool,
    queue: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Hand messages to the real qmail-queue, with their own envelope, past the filter."""
    desk = _desk(config_path)
    chosen = _choose(desk.quarantine, incidents, _with(search, unreleased=not again))
    if dry_run:
        print_entries(chosen, as_json)
        return
    if len(chosen) > 1 and not yes:
        click.confirm(f"Release {len(chosen)} messages?", abort=True, err=True)
    program = Path(queue) if queue else real_queue(_queue_conf())
    releaser = Releaser(desk.quarantine, program, load_secret(Path(desk.settings.service.state)), desk.by)
    addresses = tuple(address.encode("utf-8", "surrogateescape") for address in to)

    def one(entry: Sidecar) -> str:
        done = asyncio.run(releaser.release(entry.incident, Deadline.after(SUBMISSION), addresses, again))
        return f"released to {', '.join(done.to)}"

    _each(chosen, one, "released", as_json)


@quarantine.command()
@click.argument("incidents", nargs=-1)
@_filters
@_dry_run
@_yes
@_json
@click.pass_obj
def delete(
    config_path: str, incidents: tuple[str, ...], search: Search, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Remove entries for good."""
    quarantine = _desk(config_path).quarantine
    chosen = _choose(quarantine, incidents, search)
    if dry_run:
        print_entries(chosen, as_json)
        return
    if len(chosen) > 1 and not yes:
        click.confirm(f"Delete {len(chosen)} messages for good?", abort=True, err=True)

    def one(entry: Sidecar) -> str:
        quarantine.delete(entry.incident)
        return "deleted"

    _each(chosen, one, "deleted", as_json)


@quarantine.command()
@_dry_run
@_json
@click.pass_obj
def expire(config_path: str, dry_run: bool, as_json: bool) -> None:
    """Apply retention and quota now."""
    desk = _desk(config_path)
    with progress("expiring"):
        result = desk.quarantine.expire(dry_run=dry_run)
    if as_json:
        click.echo(json.dumps({"entries": result.entries, "stray": result.stray, "used": result.used}))
        return
    for incident in result.entries:
        click.echo(incident)
    verb = "would be removed" if dry_run else "removed"
    click.echo(f"{len(result.entries)} entries and {result.stray} stray files {verb}, {result.used} bytes in use")


def real_queue(conf: Path) -> Path:
    """What ``queue`` in queue.conf names, or the hook's own default. Raises OSError, but not for a missing file."""
    try:
        text = conf.read_text("utf-8", "surrogateescape")
    except FileNotFoundError:
        text = ""
    values = [line.split(None, 1)[1].strip() for line in text.splitlines() if re.match(r"[ \t]*queue[ \t]+\S", line)]
    return Path(values[-1] if values else _DEFAULT_QUEUE)


def _queue_conf() -> Path:
    return Path(os.environ.get("CONTENTFILTER_QUEUE_CONF", "/etc/contentfilter/queue.conf"))


def _with(search: Search, **changes: Any) -> Search:
    return replace(search, **changes)


def _choose(quarantine: Quarantine, incidents: tuple[str, ...], search: Search) -> list[Sidecar]:
    """The entries that a command shall work on, oldest first; by incident or by search, never all by accident."""
    asked = _with(search, unreleased=False) != Search()
    if asked == bool(incidents):
        raise click.UsageError("name incidents, or say by --signature, --sender, --since … which entries are meant")
    if incidents:
        return [quarantine.find(incident) for incident in dict.fromkeys(incidents)]
    with progress("searching the quarantine"):
        found = [entry for entry in quarantine.entries(search) if not entry.damaged][::-1]
    if not found:
        raise QuarantineError("nothing in the quarantine matches")
    return found


def _each(chosen: list[Sidecar], act: Callable[[Sidecar], str], verb: str, as_json: bool) -> None:
    """Do it for all of them; say what became of each; exit with 1 when one failed."""
    results = []
    failed = 0
    with progress(verb, len(chosen)) if len(chosen) > 1 else nullcontext(Progress(verb)) as bar:
        quiet = as_json or (bar.drawn and sys.stdout.isatty())
        for entry in chosen:
            try:
                text, ok = act(entry), True
            except (QuarantineError, OSError) as error:
                text, ok = str(error), False
                failed += 1
            results.append({"incident": entry.incident, "ok": ok, "text": text})
            if not ok:
                bar.say(text if text.startswith(entry.incident) else f"{entry.incident}: {text}")
            elif not quiet:
                click.echo(f"{entry.incident}\t{text}")
            bar.step()
    if as_json:
        click.echo(json.dumps(results))
    elif len(chosen) > 1:
        click.echo(f"{len(chosen) - failed} {verb}, {failed} failed")
    if failed:
        sys.exit(1)
