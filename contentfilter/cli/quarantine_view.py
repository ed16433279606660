"""Output of ``contentfilter quarantine``: rows and details for people, JSON for programs.

Text from senders is printed as ASCII, except the raw message where it is requested.
"""

import json
import re
import sys

import click

from contentfilter.cli.common import print_rows, when
from contentfilter.model import readable
from contentfilter.store.sidecar import Sidecar, plain

SHOWN = 20
"""Maximum number of recipients in ``show``; ``--json`` has all of them."""


def print_entries(entries: list[Sidecar], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([plain(entry) for entry in entries]))
        return
    print_rows(("Incident", "Kept", "From", "Withheld from", "Rule", "Bytes", "State"), map(_row, entries))


def _row(entry: Sidecar) -> tuple[str, ...]:
    withheld = entry.withheld
    to = readable(withheld[0]) if withheld else "-"
    more = f" +{len(withheld) - 1}" if len(withheld) > 1 else ""
    rule = entry.damaged or entry.rule or "-"
    state = "damaged" if entry.damaged else "released" if entry.released else "kept"
    sender = readable(entry.sender) or "<>"
    return entry.incident, when(entry.time), sender, to + more, rule, str(entry.size), state


def story(entry: Sidecar) -> list[tuple[str, str]]:
    lines = [
        ("incident", entry.incident),
        ("kept", when(entry.time)),
        ("from", f"<{readable(entry.sender)}>"),
        ("to", _named(entry.recipients)),
        ("withheld", _named(entry.withheld)),
        ("origin", " ".join(filter(None, (entry.origin, entry.remote, entry.user)))),
        ("message", f"{entry.size} bytes, sha256 {entry.sha256}"),
        ("message-id", entry.message_id),
        ("subject", entry.subject),
        ("rule", entry.rule),
        ("damaged", entry.damaged),
    ]
    for scan in entry.scans:
        words = (scan.scanner, scan.status, scan.name, scan.cause, scan.detail, scan.backend, f"{scan.ms:g} ms")
        lines.append(("scan", " ".join(filter(None, words))))
    lines += [("version", f"{name} {version}") for name, version in entry.versions.items()]
    lines += [("released", release) for release in releases(entry)]
    return [(name, value) for name, value in lines if value]


def releases(entry: Sidecar) -> list[str]:
    """One line for each release: time, user and recipients."""
    found = []
    for done in entry.released:
        more = f" and {len(done.to) - SHOWN} more" if len(done.to) > SHOWN else ""
        found.append(f"{when(done.time)} by {done.by} to {', '.join(done.to[:SHOWN])}{more}")
    return found


def _named(addresses: tuple[bytes, ...]) -> str:
    more = len(addresses) - SHOWN
    return ", ".join(map(readable, addresses[:SHOWN])) + (f" and {more} more" if more > 0 else "")


def print_message(data: bytes) -> None:
    """Exact bytes into a file or pipe; on a terminal without control characters."""
    if sys.stdout.isatty():
        data = re.sub(rb"[^\n\t -~]", b"?", data)
    click.echo(data, nl=False)
