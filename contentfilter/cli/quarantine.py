"""``contentfilter quarantine``: list, release and delete quarantined mail.

Run as root, it switches to the owner of the quarantine first, so that the daemon can use the files that it writes.
Tables and a progress bar on a terminal; otherwise plain lines with tabs, or ``--json``.
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
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from contentfilter.cli.common import become_owner, moment
from contentfilter.cli.progress import Progress, progress
from contentfilter.cli.quarantine_view import SHOWN, print_entries, print_message, story
from contentfilter.config.load import load_settings
from contentfilter.deadline import Deadline
from contentfilter.errors import QuarantineError
from contentfilter.model import readable
from contentfilter.policy.overrides import utc
from contentfilter.settings import Settings
from contentfilter.store.overrides import audit
from contentfilter.store.quarantine import Quarantine
from contentfilter.store.release import Releaser, load_secret
from contentfilter.store.sidecar import Search, Sidecar, plain
from contentfilter.verdict.headers import HEADER_LIMIT, header_block

SUBMISSION = 300.0
"""Seconds for one qmail-queue."""

_DEFAULT_QUEUE = "/var/qmail/bin/qmail-queue.real"


class _Group(click.Group):
    """Group that reports QuarantineError and OSError as one line, with exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (QuarantineError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise
            click.echo(f"contentfilter: {error}", err=True)
            ctx.exit(1)


_FILTERS = (
    click.option("--sender", metavar="PATTERN", help="Part of the sender, or a pattern with * and ?."),
    click.option("--recipient", metavar="PATTERN", help="Part of a recipient's address."),
    click.option("--signature", metavar="NAME", help="Detected name, complete or with * and ?."),
    click.option("--message-id", metavar="PATTERN", help="Part of the Message-ID."),
    click.option("--subject", metavar="PATTERN", help="Part of the subject."),
    click.option("--since", metavar="WHEN", callback=moment, help="Kept since: 30m, 2h, 3d or a date."),
    click.option("--until", metavar="WHEN", callback=moment, help="Kept before."),
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_yes = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
_reason = click.option("--reason", metavar="TEXT", default="", help="Reason, for the audit trail (audit.jsonl).")
_dry_run = click.option("--dry-run", is_flag=True, help="Only print what would be done.")


def _filters(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator that adds the search options and passes them as ``search``."""

    @functools.wraps(command)
    def with_search(*args: Any, **options: Any) -> None:
        names = ("sender", "recipient", "signature", "message_id", "subject", "since", "until")
        asked = {name: options.pop(name) for name in names}
        search = Search(**{name: value for name, value in asked.items() if value is not None})
        command(*args, search=search, **options)

    return functools.reduce(lambda decorated, option: option(decorated), reversed(_FILTERS), with_search)


@dataclass(frozen=True, slots=True)
class Context:
    """Shared by all commands of this group."""

    settings: Settings
    quarantine: Quarantine
    by: str  # the user who runs the command

    def audit(self, action: str, entry: Sidecar, text: str, reason: str, **more: Any) -> str:
        """Add ``action`` to the audit trail; returns ``text``. Raises QuarantineError: it is done, but not audited."""
        withheld = [readable(address) for address in entry.withheld[:SHOWN]]
        event = {
            "time": utc(time.time()),
            "event": f"quarantine.{action}",
            "id": entry.incident,
            "by": self.by,
            "reason": _shown(reason),
            "sender": readable(entry.sender),
            "withheld": withheld,
            "rule": entry.rule,
            "released": len(entry.released),
        } | {name: list(map(_shown, values[:SHOWN])) for name, values in more.items()}
        try:
            audit(self.settings.service.state, (event,))
        except OSError as error:
            raise QuarantineError(f"{entry.incident}: {text}, but not audited: {error}") from None
        return text


def _context(config_path: str) -> Context:
    settings = load_settings(config_path)
    asking = os.environ.get("SUDO_USER", "") if os.getuid() == 0 else ""
    try:
        by = asking or pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        by = str(os.getuid())
    become_owner(Path(settings.service.state))
    return Context(settings, Quarantine.of(settings), by)


@click.group(cls=_Group)
def quarantine() -> None:
    """List, show, search, release, delete and expire quarantined mail."""


@quarantine.command("list")
@click.option(
    "--limit", type=click.IntRange(1), default=50, show_default=True, help="Maximum number of entries, newest first."
)
@_json
@click.pass_obj
def list_(config_path: str, limit: int, as_json: bool) -> None:
    """List the newest entries."""
    entries = _context(config_path).quarantine.entries()
    print_entries([entry for entry, _ in zip(entries, range(limit), strict=False)], as_json)


@quarantine.command()
@click.argument("incident", default="")
@_filters
@_json
@click.pass_obj
def search(config_path: str, incident: str, search: Search, as_json: bool) -> None:
    """List all matching entries; INCIDENT is a prefix. Exit status 1 if there is none."""
    context = _context(config_path)
    with progress("searching the quarantine"):
        found = list(context.quarantine.entries(_with(search, incident=incident)))
    print_entries(found, as_json)
    if not found:
        sys.exit(1)


@quarantine.command()
@click.argument("incident")
@click.option("--message", "part", flag_value="message", help="Print only the original message.")
@click.option("--headers", "part", flag_value="headers", help="Print only its header.")
@_json
@click.pass_obj
def show(config_path: str, incident: str, part: str | None, as_json: bool) -> None:
    """Show one entry. A unique prefix of the incident ID is enough."""
    quarantine = _context(config_path).quarantine
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
@click.option("--to", metavar="ADDRESS", multiple=True, help="Recipient, in place of those from whom it was withheld.")
@click.option(
    "--forward",
    metavar="ADDRESS",
    multiple=True,
    help="Address to which a recipient forwards: the copy to exactly these passes the filter once.",
)
@click.option("--again", is_flag=True, help="Also release entries that were released before.")
@click.option("--queue", metavar="PATH", help="The real qmail-queue.  [default: `queue` in queue.conf]")
@_reason
@_dry_run
@_yes
@_json
@click.pass_obj
def release(
    config_path: str,
    incidents: tuple[str, ...],
    search: Search,
    to: tuple[str, ...],
    forward: tuple[str, ...],
    again: bool,
    queue: str | None,
    reason: str,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Deliver messages through the real qmail-queue, with their original envelope, bypassing the filter."""
    context = _context(config_path)
    chosen = _choose(context.quarantine, incidents, _with(search, unreleased=not again))
    if dry_run:
        print_entries(chosen, as_json)
        return
    if len(chosen) > 1 and not yes:
        click.confirm(f"Release {len(chosen)} messages?", abort=True, err=True)
    program = Path(queue) if queue else real_queue(_queue_conf())
    releaser = Releaser(context.quarantine, program, load_secret(Path(context.settings.service.state)), context.by)
    addresses = (_bytes(to), again, _bytes(forward))

    def one(entry: Sidecar) -> str:
        done = asyncio.run(releaser.release(entry.incident, Deadline.after(SUBMISSION), *addresses))
        text = f"released to {', '.join(done.to)}"
        return context.audit("release", entry, text, reason=reason, to=done.to, forward=forward)

    _each(chosen, one, "released", as_json)


@quarantine.command()
@click.argument("incidents", nargs=-1)
@_filters
@_reason
@_dry_run
@_yes
@_json
@click.pass_obj
def delete(
    config_path: str,
    incidents: tuple[str, ...],
    search: Search,
    reason: str,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete entries permanently."""
    context = _context(config_path)
    chosen = _choose(context.quarantine, incidents, search)
    if dry_run:
        print_entries(chosen, as_json)
        return
    if len(chosen) > 1 and not yes:
        click.confirm(f"Delete {len(chosen)} messages permanently?", abort=True, err=True)

    def one(entry: Sidecar) -> str:
        context.quarantine.delete(entry.incident)
        return context.audit("delete", entry, "deleted", reason=reason)

    _each(chosen, one, "deleted", as_json)


@quarantine.command()
@_dry_run
@_json
@click.pass_obj
def expire(config_path: str, dry_run: bool, as_json: bool) -> None:
    """Apply retention time and quota now."""
    context = _context(config_path)
    with progress("expiring"):
        result = context.quarantine.expire(dry_run=dry_run)
    if as_json:
        click.echo(json.dumps({"entries": result.entries, "stray": result.stray, "used": result.used}))
        return
    for incident in result.entries:
        click.echo(incident)
    verb = "would be removed" if dry_run else "removed"
    click.echo(f"{len(result.entries)} entries and {result.stray} orphaned files {verb}, {result.used} bytes in use")


def _bytes(addresses: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(address.encode("utf-8", "surrogateescape") for address in addresses)


def _shown(text: str) -> str:
    return readable(text.encode("utf-8", "replace")[:300])


def real_queue(conf: Path) -> Path:
    """``queue`` in queue.conf, or the default of the hook. Raises OSError, except for a missing file."""
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
    """Entries to work on, oldest first. Raises UsageError unless either incident IDs or conditions are given."""
    asked = _with(search, unreleased=False) != Search()
    if asked == bool(incidents):
        raise click.UsageError("use either incident IDs or conditions such as --signature, --sender, --since")
    if incidents:
        return [quarantine.find(incident) for incident in dict.fromkeys(incidents)]
    with progress("searching the quarantine"):
        found = [entry for entry in quarantine.entries(search) if not entry.damaged][::-1]
    if not found:
        raise QuarantineError("no entry in the quarantine matches")
    return found


def _each(chosen: list[Sidecar], act: Callable[[Sidecar], str], verb: str, as_json: bool) -> None:
    """Process all entries and print each result. Exits with status 1 if one failed."""
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
