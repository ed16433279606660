"""``contentfilter allow``: let one signature pass for a limited time, for example after a bad signature update.

Exit statuses: 0 in force in every worker and saved, or saved for the next start of the daemon; 1 not, or not fully
(it says why), or no such entry to remove.
"""

import getpass
import json
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import NoReturn

import click
import msgspec

from contentfilter.bus import messages, sockets
from contentfilter.cli.common import become_owner, print_rows, printable, span, when
from contentfilter.config.load import load_settings
from contentfilter.model import readable
from contentfilter.policy.overrides import REASON_MAX, AllowEntry
from contentfilter.settings import ServiceSettings
from contentfilter.store.overrides import ALLOW_FILE, change_allowed, read_allowed

WAIT = 30.0  # seconds; the daemon itself waits up to 15 for its workers and the disk
_NAME = re.compile(r"[!-~]{1,200}")


@click.group()
def allow() -> None:
    """Let signatures pass for a limited time, each with owner, reason and end."""


@allow.command()
@click.argument("signature")
@click.option("--for", "seconds", required=True, callback=span, metavar="TIME", help="How long: 30m, 12h, 3d.")
@click.option("--reason", required=True, help="Reason, logged with each message that passes.")
@click.option("--owner", default="", help="Owner of the exception. Default: you.")
@click.pass_obj
def add(config_path: str, signature: str, seconds: float, reason: str, owner: str) -> None:
    """Let SIGNATURE pass, by the name that the log shows. A second time changes reason and end."""
    if not _NAME.fullmatch(signature):
        raise click.BadParameter("a signature's name is one printable word", param_hint="SIGNATURE")
    if seconds > AllowEntry.LONGEST:
        raise click.BadParameter(AllowEntry.LIMITS, param_hint="--for")
    now = time.time()
    owner = owner or os.environ.get("SUDO_USER", "") or getpass.getuser()
    owner, reason = (readable(text.encode("utf-8", "replace"))[:REASON_MAX] for text in (owner, reason))
    new = AllowEntry(signature=signature, by=owner, reason=reason, since=now, until=now + seconds)
    order = messages.AskAllow(signature, seconds, reason, owner)
    _order(config_path, order, lambda old: (*(e for e in old if not e.same(signature)), new))
    click.echo(f"{signature} passes until {when(new.until)}")


@allow.command()
@click.argument("signature")
@click.pass_obj
def remove(config_path: str, signature: str) -> None:
    """Block SIGNATURE again."""
    order = messages.AskAllowEnd(signature, os.environ.get("SUDO_USER", ""))
    _order(config_path, order, partial(_without, signature))
    click.echo(f"{signature} is blocked again")


@allow.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def list_(config_path: str, as_json: bool) -> None:
    """List the signatures that pass, with end, owner and reason."""
    service = load_settings(config_path).service
    status = _ask(service, messages.AskStatus())
    now = time.time()
    entries = status.allowed if isinstance(status, messages.Status) else read_allowed(service.state)
    found = sorted((e for e in entries if e.active(now)), key=attrgetter("until"))
    if isinstance(status, messages.Status) and ALLOW_FILE in status.orders_problem:
        read_allowed(service.state)  # raises ConfigError while the file is damaged
        _fail((status.orders_problem,))
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(found), indent=2))
        return
    rows = ((e.signature, when(e.until), e.by, e.reason) for e in found)
    print_rows(("signature", "until", "owner", "reason"), rows)


def _without(signature: str, entries: tuple[AllowEntry, ...]) -> tuple[AllowEntry, ...]:
    now = time.time()
    if not any(entry.same(signature) and entry.active(now) for entry in entries):
        _fail((f"{signature} is not on the list",))
    return tuple(entry for entry in entries if not entry.same(signature))


def _ask(service: ServiceSettings, question: messages.Question) -> messages.Reply | None:
    """The daemon's reply; None if no daemon runs. Exits with 1 if one runs that does not answer."""
    reply = sockets.ask(service.run, question, WAIT)
    if reply is None and not sockets.trouble_at(f"{service.run}/control.sock"):
        _fail(("the daemon does not answer; nothing is certain: see contentfilter allow list",))
    if isinstance(reply, messages.Refused):
        _fail((reply.why,))
    return reply


def _order(
    config_path: str, order: messages.Question, change: Callable[[tuple[AllowEntry, ...]], tuple[AllowEntry, ...]]
) -> None:
    """Give the order to the running daemon; without one, ``change`` the stored entries. Exits with 1 on failure."""
    service = load_settings(config_path).service
    reply = _ask(service, order)
    if reply is None:
        become_owner(Path(service.state))
        try:
            change_allowed(service.state, change, time.time())
        except OSError as error:
            _fail((f"{service.state}: cannot save it: {error.strerror}",))
        status = _ask(service, messages.AskStatus())  # it may have read the file before the change
        if isinstance(status, messages.Status) and not _holds(order, status.allowed):
            reply = _ask(service, order)
    if reply is None:
        click.echo("no daemon answers; it holds from its next start", err=True)
    elif isinstance(reply, messages.Ordered) and reply.problems:
        _fail(reply.problems)
    else:
        click.echo("in force in every worker", err=True)


def _holds(order: messages.Question, allowed: tuple[AllowEntry, ...]) -> bool:
    """Return True if a removal has nothing left to remove. An addition is always sent: reason and end may differ."""
    return isinstance(order, messages.AskAllowEnd) and not any(entry.same(order.signature) for entry in allowed)


def _fail(problems: tuple[str, ...]) -> NoReturn:
    for problem in problems:
        click.echo(f"contentfilter: {printable(problem)}", err=True)
    sys.exit(1)
