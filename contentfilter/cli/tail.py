"""``contentfilter tail``: what happens to mail, as it happens, from the daemon's event feed.

One line for each event, bounded, without anything that could drive a terminal. It follows the daemon across restarts
and says so on standard error. Exit statuses: 0 it was ended (Ctrl-C, a closed pipe) or --count is reached; 1 no daemon
answers at the start; 2 wrong usage.
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
from contentfilter.cli.common import address_pattern, glob, printable
from contentfilter.cli.control import find_feed
from contentfilter.config.keys import read_secret, sound
from contentfilter.deadline import Deadline
from contentfilter.model import Action, OriginKind
from contentfilter.verdict.record import MailDetail

LINE_MAX = 400  # characters of a line for people
PART_MAX = 70  # of an address or a rule in it
VALUE_MAX = 1_100  # of an address or another value in a line of JSON
ITEMS_MAX = 100  # of a list in it
PATIENCE = 3600.0  # seconds; only then it is looked around without a reason

Match = Callable[[Event], bool]


@click.command()
@click.option(
    "--decision",
    "decisions",
    multiple=True,
    type=click.Choice([action.value for action in Action]),
    help="What was done.",
)
@click.option(
    "--origin",
    "origins",
    multiple=True,
    type=click.Choice([kind.value for kind in OriginKind]),
    help="Who handed it in.",
)
@click.option(
    "--sender", metavar="ADDRESS", help='The envelope sender; @domain, a part, or with * and ?; "<>": bounces.'
)
@click.option("--recipient", metavar="ADDRESS", help="One of the recipients, in the same ways.")
@click.option("--rule", metavar="RULE", help="The rule that decided, or a part of it; * and ? are wild.")
@click.option("--remote", metavar="IP", help="The client's address; * and ? are wild.")
@click.option("--id", "incident", metavar="INCIDENT", help="The incident, or the beginning of one.")
@click.option("--event", "events", multiple=True, metavar="NAME", help="mail.done, mail.report …; * and ? are wild.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many.")
@click.option("--connect", metavar="tcp://HOST:PORT", help="Another machine's daemon; with --server-key and --key.")
@click.option("--server-key", metavar="KEY", help="Its public key.")
@click.option("--key", metavar="FILE", type=click.Path(), help="Our secret key, made by contentfilter events-key.")
@click.option("-v", "--verbose", is_flag=True, help="With the story: each step, and why.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object in a line.")
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
    """Print what happens to mail, as it happens.

    Conditions must all hold; one that is repeated holds in any of its forms. Ctrl-C ends it. What happened before:
    contentfilter why.
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to complain at the end


def _remote(connect: str | None, server_key: str | None, key: str | None) -> Remote | None:
    """The daemon on another machine, where one is named. Raises UsageError and ConfigError."""
    if not (connect or server_key or key):
        return None
    if not (connect and server_key and key):
        raise click.UsageError("--connect, --server-key and --key go together")
    if not connect.startswith("tcp://") or not sound(server_key.encode()):
        raise click.UsageError("--connect takes tcp://host:port, and --server-key a key of 40 characters")
    return Remote(connect, server_key.encode(), read_secret(key))


def _wanted(feed: Feed, match: Match, count: int | None) -> Iterator[Event]:
    """What matches, until the reader goes away. Raises BrokenPipeError then."""
    gone = 0.0
    while count is None or count > 0:
        happened = feed.next(Deadline.after(PATIENCE))
        if happened is None:
            if _closed(sys.stdout.fileno()):
                raise BrokenPipeError
        elif happened is Link.DOWN:
            gone = gone or time.time()
            click.echo("contentfilter: the daemon is gone; waiting for the next one", err=True)
        elif happened is Link.REFUSED:
            text = "refused: our public key is not in the daemon's list, or --server-key is not the daemon's"
            click.echo(f"contentfilter: {text}", err=True)
            sys.exit(1)
        elif happened is Link.UP:
            if gone:
                since = f"{time.time() - gone:.0f} s; for what was missed: contentfilter why --since {_local(gone)}"
                click.echo(f"contentfilter: the daemon is back after {since}", err=True)
            gone = 0.0
        elif isinstance(happened, Event) and match(happened):
            count = None if count is None else count - 1
            yield happened


def _closed(fd: int) -> bool:
    """Whether nobody reads what is written there."""
    look = select.poll()
    look.register(fd, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in look.poll(0))


def _local(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(at))


# Which


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
    """Whether an event is wanted. An event without a field that is asked for is not."""
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
    yield from account_of(event).more_recipients


def account_of(event: Event) -> MailDetail:
    try:
        return msgspec.json.decode(event.account, type=MailDetail) if event.account else MailDetail()
    except msgspec.MsgspecError:
        return MailDetail()


# How


def as_text(event: Event, at: float, verbose: bool) -> Iterator[str]:
    """Lines for people."""
    yield told(event, at)
    if verbose:
        account = account_of(event)
        width = max((len(stage) for stage, _ in account.story), default=0)
        for stage, text in account.story:
            yield cut(f"    {stage:<{width}}  {text}", LINE_MAX)
        if account.text:
            yield cut(f"    {'SMTP text':<{width}}  {account.text}", LINE_MAX)


def told(event: Event, at: float) -> str:
    """One line: the time, what was done, who, to whom, why, how long it took, the incident."""
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
    spent = f"{ms:.0f} ms" if isinstance(ms, (int, float)) else "-"
    what = f"{fields['decision']!s:<6} {fields.get('origin')!s:<13} {sender} -> {to}"
    return cut(f"{clock} {what}  {rule}  {spent}  [{fields.get('id', '-')}]", LINE_MAX)


def cut(text: str, limit: int) -> str:
    """Printable, and no longer than ``limit``."""
    text = printable(text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."


def as_json_line(event: Event, at: float, verbose: bool) -> Iterator[str]:
    """ASCII in one line; long values lose their end."""
    line: dict[str, Any] = {"time": round(at, 3), "event": event.name, **_bounded(event.fields)}
    if verbose:
        account = account_of(event)
        more = {"story": account.story, "text": account.text, "message_id": account.message_id}
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
