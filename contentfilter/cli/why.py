"""``contentfilter why``: what happened to a message, and why, out of the journal.

Reads the file itself, so it works while the daemon is stopped. Times are local ones with their offset.
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

from contentfilter.cli.common import address_pattern, become_owner, moment, print_rows, print_story, when
from contentfilter.cli.quarantine_view import releases
from contentfilter.config.load import read_settings
from contentfilter.errors import JournalError, QuarantineError
from contentfilter.model import Action
from contentfilter.settings import Settings
from contentfilter.store.journal import Journal, Mail, Query, journal_path, outcome_of
from contentfilter.store.quarantine import Quarantine
from contentfilter.store.sidecar import Sidecar

YOUNG = 3.0  # seconds
AGAIN = 0.1  # seconds between two looks
_WHOLE = re.compile(r"(?<![0-9a-z])[0-9a-z]{16}(?![0-9a-z])", re.ASCII)  # doors/queue.py: new_incident
_PREFIX = re.compile(r"[0-9a-z]{1,16}", re.ASCII)


@click.command()
@click.argument("text", nargs=-1, metavar="[INCIDENT]")
@click.option(
    "--sender", metavar="ADDRESS", help='The envelope sender; @domain, a part, or with * and ?; "<>": bounces.'
)
@click.option("--recipient", metavar="ADDRESS", help="One of the recipients, in the same ways.")
@click.option("--message-id", metavar="ID", help="The Message-ID, or a part of it.")
@click.option("--signature", metavar="NAME", help="What was found, or the rule that decided; * and ? are wild.")
@click.option("--decision", type=click.Choice([action.value for action in Action]), help="What was done.")
@click.option("--remote", metavar="IP", help="The client's address; * and ? are wild.")
@click.option("--since", metavar="WHEN", callback=moment, help="Came in since: 30m, 2h, 3d or a date.")
@click.option("--until", metavar="WHEN", callback=moment, help="Came in before.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="Newest first.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
@click.pass_obj
def why(config_path: str, /, text: tuple[str, ...], limit: int, as_json: bool, **wanted: Any) -> None:
    """Say what happened to a message, and why.

    INCIDENT is its identifier or the beginning of one; a pasted SMTP reply, header or log line will do too. Without
    it, the options search; one match is told in full. Without anything, the latest messages are listed.
    """
    asked = {name: value for name, value in wanted.items() if value is not None}
    if text and asked:
        raise click.UsageError("name an incident, or say by --sender, --recipient, --since … what is meant; not both")
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
        click.echo(f"there are more than {limit}; --limit shows them", err=True)
    if text and len(found) > len(incidents):
        click.echo(f"several incidents begin with {incidents[0]}", err=True)
        sys.exit(2)
    if not found:
        click.echo("nothing in the journal matches", err=True)
        sys.exit(1)


def _incidents(text: str) -> tuple[str, ...]:
    """The identifiers in a pasted text, those in brackets if there are such; or the beginning of one."""
    found = _WHOLE.findall(text.lower())
    bracketed = [incident for incident in found if f"[{incident}]" in text.lower()]
    if found:
        return tuple(dict.fromkeys(bracketed or found))
    if _PREFIX.fullmatch(text.lower()):
        return (text.lower(),)
    raise click.UsageError("there is no incident in that: sixteen letters and digits, or the first of them")


def _found(path: Path, queries: list[Query], limit: int, incidents: tuple[str, ...]) -> list[Mail]:
    """What the journal has; it is asked again while an incident is young. Raises JournalError."""
    while True:
        waits = any(map(_young, incidents))
        try:
            with Journal.reading(path) as journal:
                found = [mail for query in queries for mail in journal.find(query, limit)]
        except JournalError:
            if not waits:
                raise
            found = []
        if found or not waits:
            return found
        time.sleep(AGAIN)


def _young(incident: str) -> bool:
    """Whether the journal may not have it yet: it is written a moment after the answer."""
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
        print_story((*_told(found[0]), *_kept(found[0], quarantine)))
    elif found:
        print_rows(("Incident", "Time", "From", "To", "Decision", "Rule"), map(_row, found))


def _told(mail: Mail) -> Iterator[tuple[str, str]]:
    """What is known beside the story, and the story."""
    fields = mail.fields
    yield "incident", mail.incident
    yield "time", f"{when(mail.time)}, decided within {fields.get('ms', 0):g} ms"
    if client := " ".join(filter(None, (fields.get("remote"), fields.get("user")))):
        yield "client", client
    if mail.account.message_id:
        yield "message-id", mail.account.message_id
    if fields.get("attempt"):
        yield "attempt", f"offered before, {fields['attempt']} time(s), each under another incident"
    yield from mail.account.story
    if mail.account.text:
        yield "SMTP text", mail.account.text
    if mail.report is not None:
        yield "report", outcome_of(mail.report)


def _kept(mail: Mail, quarantine: Quarantine) -> Iterator[tuple[str, str]]:
    """What became of the copy in the quarantine: its sidecar knows, not the journal."""
    if not mail.fields.get("quarantined"):
        return
    entry = _entry(mail, quarantine)
    if isinstance(entry, str):
        yield "quarantine", entry
    elif not entry.released:
        yield "quarantine", "still kept; nobody has released it"
    else:
        yield from (("released", release) for release in releases(entry))


def _plain_kept(mail: Mail, quarantine: Quarantine) -> dict[str, Any] | None:
    """The same for ``--json``; None where nothing was kept."""
    if not mail.fields.get("quarantined"):
        return None
    entry = _entry(mail, quarantine)
    if isinstance(entry, str):
        return {"kept": False, "why": entry, "released": []}
    told = [{"time": when(done.time), "by": done.by, "to": done.to} for done in entry.released]
    return {"kept": True, "why": "", "released": told}


def _entry(mail: Mail, quarantine: Quarantine) -> Sidecar | str:
    """The entry, or why there is none to be had."""
    try:
        return quarantine.get(mail.incident)
    except QuarantineError as error:
        return f"{error}; expired or removed, perhaps. Whether it was released is not known"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _row(mail: Mail) -> tuple[str, ...]:
    fields = mail.fields
    recipients, count = fields.get("recipients") or ["-"], fields.get("recipient_count", 0)
    to = recipients[0] + (f" +{count - 1}" if count > 1 else "")
    decision, rule = fields.get("decision") or "-", fields.get("rule") or "-"
    return mail.incident, when(mail.time), fields.get("sender") or "<>", to, decision, rule


def _plain(mail: Mail) -> dict[str, Any]:
    """All that the journal has, for ``--json``."""
    more = mail.account.more_recipients
    recipients = [*mail.fields.get("recipients", ()), *more]
    facts = {"time": when(mail.time), "message_id": mail.account.message_id, "recipients": recipients}
    return mail.fields | facts | {"story": mail.account.story, "text": mail.account.text, "report": mail.report}
