"""``contentfilter tail``: follow decisions about mail, from the event feed of the daemon.

One line per event, bounded, without control characters. It follows the daemon across restarts, with a note on standard
error. Exit statuses: 0 ended (Ctrl-C, a closed pipe) or --count reached; 1 no daemon answers at the start; 2 wrong
usage.
"""

import json
import math
import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import click
import msgspec

from contentfilter.bus.feed import Feed, Link, Remote
from contentfilter.bus.messages import Event
from contentfilter.cli.common import (
    address_pattern,
    duration,
    glob,
    printable,
    recipient_option,
    remote_option,
    sender_option,
)
from contentfilter.cli.control import find_feed
from contentfilter.config.keys import read_secret, sound
from contentfilter.deadline import Deadline
from contentfilter.model import Action, OriginKind
from contentfilter.verdict.record import MailDetail

LINE_MAX = 400  # characters of a line for people
PART_MAX = 70  # of an address or a rule in it
VALUE_MAX = 1_100  # of an address or another value in a line of JSON
ITEMS_MAX = 100  # of a list in it
PATIENCE = 3600.0  # seconds after which it checks the reader without an event

Match = Callable[[Event], bool]


@click.command()
@click.option(
    "--decision",
    "decisions",
    multiple=True,
    type=click.Choice([action.value for action in Action]),
    help="Decision about the message.",
)
@click.option(
    "--origin",
    "origins",
    multiple=True,
    type=click.Choice([kind.value for kind in OriginKind]),
    help="Origin of the message.",
)
@sender_option
@recipient_option
@click.option("--rule", metavar="RULE", help="Rule that decided, or a part of it; * and ? are wildcards.")
@remote_option
@click.option("--id", "incident", metavar="INCIDENT", help="Incident ID, or the beginning of one.")
@click.option(
    "--event",
    "events",
    multiple=True,
    metavar="NAME",
    help="Name such as mail.done or mail.report; * and ? are wildcards.",
)
@click.option("--count", type=click.IntRange(min=1), help="End after this number of events.")
@click.option(
    "--connect", metavar="tcp://HOST:PORT", help="Daemon on another machine; requires --server-key and --key."
)
@click.option("--server-key", metavar="KEY", help="Public key of that daemon.")
@click.option("--key", metavar="FILE", type=click.Path(), help="Own secret key, created by contentfilter events-key.")
@click.option("-v", "--verbose", is_flag=True, help="Also print the trace: each step and its reason.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
@click.pass_obj
def tail(
    config_path: str,
    /,
    *,
    count: int | None,
    verbose: bool,
    as_json: bool,
    connect: str | None,
    server_key: str | None,
    key: str | None,
    **wanted: Any,
) -> None:
    """Follow decisions about mail as they are made.

    An event must match all conditions; of a repeated condition, one is enough. Ctrl-C ends it. For earlier messages
    use contentfilter why.
    """
    remote = _remote(connect, server_key, key)
    run = "" if remote else find_feed(config_path)
    shown = as_json_line if as_json else as_text
    try:
        with Feed(run, remote=remote) as feed:
            feed.watch(sys.stdout.fileno(), reading=False)
            for event in _wanted(feed, matching(**wanted), count):
                for line in shown(event, time.time(), verbose):
                    click.echo(line)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # no error when Python flushes it at exit


def _remote(connect: str | None, server_key: str | None, key: str | None) -> Remote | None:
    """Daemon on another machine, if one is named. Raises UsageError and ConfigError."""
    if not (connect or server_key or key):
        return None
    if not (connect and server_key and key):
        raise click.UsageError("--connect, --server-key and --key must be used together")
    if not connect.startswith("tcp://") or not sound(server_key.encode()):
        raise click.UsageError("--connect takes tcp://host:port, and --server-key a key of 40 characters")
    return Remote(connect, server_key.encode(), read_secret(key))


def _wanted(feed: Feed, match: Match, count: int | None) -> Iterator[Event]:
    """Matching events. Raises BrokenPipeError when the reader has closed its end."""
    gone = 0.0
    while count is None or count > 0:
        item = feed.next(Deadline.after(PATIENCE))
        if item is None:
            if _closed(sys.stdout.fileno()):
                raise BrokenPipeError
        elif item is Link.DOWN:
            gone = gone or time.time()
            click.echo("contentfilter: the event feed has stopped; waiting for it to start", err=True)
        elif item is Link.REFUSED:
            text = "refused: our public key is not in the daemon's list, or --server-key is not the daemon's"
            click.echo(f"contentfilter: {text}", err=True)
            sys.exit(1)
        elif item is Link.UP:
            if gone:
                since = f"{time.time() - gone:.0f} s; for missed messages: contentfilter why --since {_local(gone)}"
                click.echo(f"contentfilter: the event feed is back after {since}", err=True)
            gone = 0.0
        elif isinstance(item, Event) and match(item):
            count = None if count is None else count - 1
            yield item


def _closed(fd: int) -> bool:
    """True if the reading end is closed."""
    look = select.poll()
    look.register(fd, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in look.poll(0))


def _local(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(at))


# Conditions


def matching(
    *,
    decisions: tuple[str, ...] = (),
    origins: tuple[str, ...] = (),
    sender: str | None = None,
    recipient: str | None = None,
    rule: str | None = None,
    remote: str | None = None,
    incident: str | None = None,
    events: tuple[str, ...] = (),
) -> Match:
    """Predicate of the conditions. An event without a requested field does not match."""
    tests: list[Match] = []

    def text(name: str, pattern: str) -> Match:
        return lambda event: name in event.fields and glob(pattern, str(event.fields[name]))

    if events:
        tests.append(lambda event: any(glob(pattern, event.name) for pattern in events))
    if decisions:
        tests.append(lambda event: event.fields.get("decision") in decisions)
    if origins:
        tests.append(lambda event: event.fields.get("origin") in origins)
    if sender is not None:
        tests.append(text("sender", address_pattern(sender)))
    if recipient is not None:
        pattern = address_pattern(recipient)
        tests.append(lambda event: any(glob(pattern, address) for address in recipients_of(event)))
    if rule is not None:
        tests.append(text("rule", rule if "*" in rule or "?" in rule else f"*{rule}*"))
    if remote is not None:
        tests.append(text("remote", remote))
    if incident is not None:
        tests.append(text("id", incident.strip("[] ") + "*"))
    return lambda event: all(test(event) for test in tests)


def recipients_of(event: Event) -> Iterable[str]:
    shown = event.fields.get("recipients")
    yield from (str(each) for each in shown) if isinstance(shown, (list, tuple)) else ()
    yield from detail_of(event).more_recipients


def detail_of(event: Event) -> MailDetail:
    try:
        return msgspec.json.decode(event.account, type=MailDetail) if event.account else MailDetail()
    except msgspec.MsgspecError:
        return MailDetail()


# Output


def as_text(event: Event, at: float, verbose: bool) -> Iterator[str]:
    """Lines for people."""
    yield summary(event, at)
    if verbose:
        detail = detail_of(event)
        width = max((len(stage) for stage, _ in detail.story), default=0)
        for stage, text in detail.story:
            yield cut(f"    {stage:<{width}}  {text}", LINE_MAX)
        if detail.text:
            yield cut(f"    {'SMTP text':<{width}}  {detail.text}", LINE_MAX)


def summary(event: Event, at: float) -> str:
    """One line: time, decision, origin, sender, recipient, rule, duration, incident ID."""
    fields = event.fields
    clock = time.strftime("%H:%M:%S", time.localtime(at))
    if event.name != "mail.done" or "decision" not in fields:
        rest = " ".join(f"{name}={value}" for name, value in fields.items())
        return cut(f"{clock} {event.name} {rest}", LINE_MAX)
    recipients, count = list(recipients_of(event)), fields.get("recipient_count", 0)
    to = cut(recipients[0], PART_MAX) if recipients else "-"
    to += f" +{count - 1}" if isinstance(count, int) and count > 1 else ""
    sender, rule = cut(str(fields.get("sender") or "<>"), PART_MAX), cut(str(fields.get("rule") or "-"), PART_MAX)
    ms = fields.get("ms")
    spent = duration(ms) if isinstance(ms, (int, float)) else "-"
    what = f"{fields['decision']!s:<6} {fields.get('origin')!s:<13} {sender} -> {to}"
    return cut(f"{clock} {what}  {rule}  {spent}  [{fields.get('id', '-')}]", LINE_MAX)


def cut(text: str, limit: int) -> str:
    """Printable text of at most ``limit`` characters."""
    text = printable(text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."


def as_json_line(event: Event, at: float, verbose: bool) -> Iterator[str]:
    """One line of ASCII; long values are truncated."""
    line: dict[str, Any] = {"time": round(at, 3), "event": event.name, **_bounded(event.fields)}
    if verbose:
        detail = detail_of(event)
        more = {"story": detail.story, "text": detail.text, "message_id": detail.message_id}
        line |= _bounded(more)
    yield json.dumps(line).replace("\x7f", "\\u007f")


def _bounded(value: Any) -> Any:
    if isinstance(value, str):
        return value[:VALUE_MAX]
    if isinstance(value, dict):
        return {str(name)[:VALUE_MAX]: _bounded(each) for name, each in list(value.items())[:ITEMS_MAX]}
    if isinstance(value, (list, tuple)):
        return [_bounded(each) for each in value[:ITEMS_MAX]]
    sound = value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
    return value if sound else repr(value)[:VALUE_MAX]
