"""``contentfilter why``: explain what happened to a message, from the journal.

Reads the journal file directly, so it works while the daemon is stopped. Times are local, with their offset from UTC.
Exit statuses: 0 found; 1 nothing found, or no journal; 2 wrong usage; 78 bad configuration.
"""

import json
import re
import sys
import time
from base64 import b32hexdecode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from contentfilter.cli.common import (
    address_pattern,
    become_owner,
    duration,
    moment,
    print_rows,
    print_story,
    recipient_option,
    remote_option,
    sender_option,
    when,
)
from contentfilter.cli.quarantine_view import releases
from contentfilter.config.load import read_settings
from contentfilter.errors import JournalError, QuarantineError
from contentfilter.model import Action
from contentfilter.settings import Settings
from contentfilter.store.journal import Journal, Mail, Query, journal_path, outcome_of
from contentfilter.store.quarantine import Quarantine
from contentfilter.store.sidecar import Sidecar

YOUNG = 3.0  # seconds within which the journal may not have an incident yet
AGAIN = 0.1  # seconds between two attempts
_WHOLE = re.compile(r"(?<![0-9a-z])[0-9a-z]{16}(?![0-9a-z])", re.ASCII)  # doors/queue.py: new_incident
_PREFIX = re.compile(r"[0-9a-z]{1,16}", re.ASCII)


@click.command()
@click.argument("text", nargs=-1, metavar="[INCIDENT]")
@sender_option
@recipient_option
@click.option("--message-id", metavar="ID", help="Message-ID, or a part of it.")
@click.option("--signature", metavar="NAME", help="Detected name, or the rule that decided; * and ? are wildcards.")
@click.option("--decision", type=click.Choice([action.value for action in Action]), help="Decision about the message.")
@remote_option
@click.option("--since", metavar="WHEN", callback=moment, help="Received since: 30m, 2h, 3d or a date.")
@click.option("--until", metavar="WHEN", callback=moment, help="Received before.")
@click.option(
    "--limit",
    type=click.IntRange(1, 100_000),
    default=50,
    show_default=True,
    help="Maximum number of messages, newest first.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def why(config_path: str, /, text: tuple[str, ...], limit: int, as_json: bool, **wanted: Any) -> None:
    """Explain what happened to a message.

    INCIDENT is an incident ID or the beginning of one; a pasted SMTP reply, header or log line works, too. Without it,
    the options select messages; a single match is shown in full. Without any, the latest messages are listed.
    """
    asked = {name: value for name, value in wanted.items() if value is not None}
    if text and asked:
        raise click.UsageError("use either an incident ID or conditions such as --sender, --recipient, --since")
    query = None if text else _query(asked)
    incidents = _incidents(" ".join(text)) if text else ()
    settings, _ = read_settings(config_path)
    become_owner(Path(settings.service.state))
    queries = [query] if query is not None else [Query((("incident", f"{each}*"),)) for each in incidents]
    try:
        found = _found(journal_path(settings), queries, limit + 1, incidents)
    except JournalError as error:
        click.echo(f"contentfilter: {error}", err=True)
        sys.exit(1)
    _print(found[:limit], settings, as_json, alone=bool(text))
    if len(found) > limit:
        click.echo(f"more than {limit} messages match; raise --limit to see them", err=True)
    if text and len(found) > len(incidents):
        click.echo(f"several incident IDs begin with {incidents[0]}", err=True)
        sys.exit(2)
    if not found:
        click.echo("no message in the journal matches", err=True)
        sys.exit(1)


def _incidents(text: str) -> tuple[str, ...]:
    """Incident IDs in a pasted text, preferably those in brackets; or the beginning of one. Raises UsageError."""
    found = _WHOLE.findall(text.lower())
    bracketed = [incident for incident in found if f"[{incident}]" in text.lower()]
    if found:
        return tuple(dict.fromkeys(bracketed or found))
    if _PREFIX.fullmatch(text.lower()):
        return (text.lower(),)
    raise click.UsageError("no incident ID found: sixteen letters and digits, or the first of them")


def _found(path: Path, queries: list[Query], limit: int, incidents: tuple[str, ...]) -> list[Mail]:
    """Messages in the journal; read again while an incident is recent. Raises JournalError."""
    while True:
        recent = any(map(_recent, incidents))
        try:
            with Journal.reading(path) as journal:
                found = [mail for query in queries for mail in journal.find(query, limit)]
        except JournalError:
            if not recent:
                raise
            found = []
        if found or not recent:
            return found
        time.sleep(AGAIN)


def _recent(incident: str) -> bool:
    """True if the journal may not have the incident yet: it is written shortly after the answer."""
    if _WHOLE.fullmatch(incident) is None:
        return False
    try:
        number = int.from_bytes(b32hexdecode(incident, casefold=True), "big")
    except ValueError:
        return False
    return 0 <= time.time() - (number >> 35) / 1000 < YOUNG


def _query(asked: dict[str, Any]) -> Query:
    words = []
    for name, value in asked.items():
        kind = name.replace("_", "-")
        if name in ("sender", "recipient", "message_id"):
            words.append((kind, address_pattern(value)))
        elif name not in ("since", "until"):
            words.append((kind, value))
    return Query(tuple(words), since=asked.get("since", 0.0), until=asked.get("until", float("inf")))


def _print(found: list[Mail], settings: Settings, as_json: bool, *, alone: bool) -> None:
    quarantine = Quarantine.of(settings)
    if as_json:
        shown: Any = [_plain(mail) | {"quarantine": _plain_kept(mail, quarantine)} for mail in found]
        click.echo(json.dumps(shown[0] if alone and len(shown) == 1 else shown, indent=2))
    elif len(found) == 1:
        print_story((*_lines(found[0]), *_kept(found[0], quarantine)))
    elif found:
        print_rows(("Incident", "Time", "From", "To", "Decision", "Rule"), map(_row, found))


def _lines(mail: Mail) -> Iterator[tuple[str, str]]:
    """Facts about the message, then the trace of its decision."""
    fields = mail.fields
    yield "incident", mail.incident
    yield "time", f"{when(mail.time)}, decided after {duration(fields.get('ms', 0))}"
    if client := " ".join(filter(None, (fields.get("remote"), fields.get("user")))):
        yield "client", client
    if mail.account.message_id:
        yield "message-id", mail.account.message_id
    if fields.get("attempt"):
        yield "attempt", f"{fields['attempt']} earlier attempt(s), each with an incident ID of its own"
    yield from mail.account.story
    if mail.account.text:
        yield "SMTP text", mail.account.text
    if mail.report is not None:
        yield "report", outcome_of(mail.report)


def _kept(mail: Mail, quarantine: Quarantine) -> Iterator[tuple[str, str]]:
    """State of the copy in the quarantine, from its sidecar, because the journal does not have it."""
    if not mail.fields.get("quarantined"):
        return
    entry = _entry(mail, quarantine)
    if isinstance(entry, str):
        yield "quarantine", entry
    elif not entry.released:
        yield "quarantine", "kept, not released"
    else:
        yield from (("released", release) for release in releases(entry))


def _plain_kept(mail: Mail, quarantine: Quarantine) -> dict[str, Any] | None:
    """The same for ``--json``; None if nothing was kept."""
    if not mail.fields.get("quarantined"):
        return None
    entry = _entry(mail, quarantine)
    if isinstance(entry, str):
        return {"kept": False, "why": entry, "released": []}
    released = [{"time": when(done.time), "by": done.by, "to": done.to} for done in entry.released]
    return {"kept": True, "why": "", "released": released}


def _entry(mail: Mail, quarantine: Quarantine) -> Sidecar | str:
    """The entry, or the reason why there is none."""
    try:
        return quarantine.get(mail.incident)
    except QuarantineError as error:
        return f"{error}; it may have expired or been deleted, and may have been released before"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _row(mail: Mail) -> tuple[str, ...]:
    fields = mail.fields
    recipients, count = fields.get("recipients") or ["-"], fields.get("recipient_count", 0)
    to = recipients[0] + (f" +{count - 1}" if count > 1 else "")
    decision, rule = fields.get("decision") or "-", fields.get("rule") or "-"
    return mail.incident, when(mail.time), fields.get("sender") or "<>", to, decision, rule


def _plain(mail: Mail) -> dict[str, Any]:
    """Everything in the journal, for ``--json``."""
    more = mail.account.more_recipients
    recipients = [*mail.fields.get("recipients", ()), *more]
    facts = {"time": when(mail.time), "message_id": mail.account.message_id, "recipients": recipients}
    return mail.fields | facts | {"story": mail.account.story, "text": mail.account.text, "report": mail.report}
