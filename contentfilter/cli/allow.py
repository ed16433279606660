"""``contentfilter allow``: let one signature pass for a while, for a bad update at 3 a.m. Live at once.

Exit statuses: 0 done and live; 1 saved, but the daemon did not take it (it says why), or nothing there to remove.
"""

import getpass
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import msgspec

from contentfilter.bus import messages, sockets
from contentfilter.cli.common import become_owner, print_rows, span, when
from contentfilter.config.load import load_settings
from contentfilter.model import readable
from contentfilter.policy.tolerance import UNOFFICIAL, AllowEntry
from contentfilter.store.allow import change_allowed, read_allowed

RELOAD_WAIT = 60.0
LONGEST = 366 * 86_400
_NAME = re.compile(r"[!-~]{1,200}")


@click.group()
def allow() -> None:
    """Signatures that pass for a while, each with owner, reason and end."""


@allow.command()
@click.argument("signature")
@click.option("--for", "seconds", required=True, callback=span, metavar="TIME", help="How long: 30m, 12h, 3d.")
@click.option("--reason", required=True, help="Why; it stands in the log of each message that passes.")
@click.option("--owner", default="", help="Who wants it; you, if not given.")
@click.pass_obj
def add(config_path: str, signature: str, seconds: float, reason: str, owner: str) -> None:
    """Let SIGNATURE pass, by the name that the log shows. A second time changes reason and end."""
    if not _NAME.fullmatch(signature):
        raise click.BadParameter("a signature's name is one printable word", param_hint="SIGNATURE")
    if seconds > LONGEST:
        raise click.BadParameter("more than a year", param_hint="--for")
    now = time.time()
    owner = owner or os.environ.get("SUDO_USER", "") or getpass.getuser()
    texts = [readable(text.encode("utf-8", "replace"))[:200] for text in (owner, reason)]
    new = AllowEntry(signature, texts[0], texts[1], now, now + seconds)
    _change(config_path, lambda old: (*(a for a in old if not _same(a, signature)), new), now)
    click.echo(f"{signature} passes until {when(new.expires)}")
    _go_live(config_path)


@allow.command()
@click.argument("signature")
@click.pass_obj
def remove(config_path: str, signature: str) -> None:
    """Let SIGNATURE be found again."""
    now = time.time()
    if not any(_same(a, signature) for a in read_allowed(_state(config_path)) if a.expires > now):
        click.echo(f"contentfilter: {signature} is not on the list", err=True)
        sys.exit(1)
    _change(config_path, lambda old: tuple(a for a in old if not _same(a, signature)), now)
    click.echo(f"{signature} is found again")
    _go_live(config_path)


@allow.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def list_(config_path: str, as_json: bool) -> None:
    """What passes now, who wanted it and until when."""
    now = time.time()
    found = sorted((a for a in read_allowed(_state(config_path)) if a.expires > now), key=lambda a: a.expires)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(found), indent=2))
        return
    rows = ((a.signature, when(a.expires), a.owner, a.reason) for a in found)
    print_rows(("signature", "until", "owner", "reason"), rows)


def _same(allowance: AllowEntry, signature: str) -> bool:
    return allowance.signature.removesuffix(UNOFFICIAL) == signature.removesuffix(UNOFFICIAL)


def _state(config_path: str) -> str:
    return load_settings(config_path).service.state


def _change(config_path: str, change: Callable[[tuple[AllowEntry, ...]], tuple[AllowEntry, ...]], now: float) -> None:
    state = _state(config_path)
    become_owner(Path(state))
    try:
        change_allowed(state, change, now)
    except OSError as error:
        click.echo(f"contentfilter: {state}: cannot save it: {error.strerror}", err=True)
        sys.exit(1)


def _go_live(config_path: str) -> None:
    """The running daemon takes it now; one that does not run takes it when it starts."""
    reply = sockets.ask(load_settings(config_path).service.run, messages.AskReload(), RELOAD_WAIT)
    if reply is None:
        click.echo("no daemon answers; it holds from its next start", err=True)
    elif isinstance(reply, messages.Refused):
        click.echo(f"contentfilter: saved, but not live yet: {reply.why}", err=True)
        click.echo("the daemon takes it with its next look at the tables ([tables] refresh)", err=True)
        sys.exit(1)
    elif isinstance(reply, messages.Done) and not reply.ok:
        for problem in reply.problems:
            click.echo(f"contentfilter: {problem}", err=True)
        click.echo("saved, but not live: the daemon refuses the configuration", err=True)
        sys.exit(1)
