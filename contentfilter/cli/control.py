"""``contentfilter reload``, and how commands ask the running daemon.

The settings are read only to learn where its control socket is.
"""

import errno
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click
import msgspec

from contentfilter.bus import messages, sockets
from contentfilter.config.load import read_settings
from contentfilter.errors import Problem

RELOAD_WAIT = 120.0  # a database may take its time


@click.command()
@click.option("--restart", is_flag=True, help="Also replace every worker, each new one before its old one goes.")
@click.option("--json", "as_json", is_flag=True, help="The answer as JSON.")
@click.pass_obj
def reload(config_path: str, restart: bool, as_json: bool) -> None:
    """Read the configuration again. A bad one changes nothing."""
    reply = ask(config_path, messages.AskReload(restart), RELOAD_WAIT)
    assert isinstance(reply, messages.Done)  # noqa: S101 - see above
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(reply)))
    else:
        for problem in reply.problems:
            click.echo(problem, err=True)
        click.echo(f"configuration {reply.generation} is in force" + ("" if reply.ok else "; the new one was refused"))
    sys.exit(0 if reply.ok and not reply.problems else 1)


def ask(config_path: str, question: messages.Question, seconds: float) -> messages.Reply:
    """The daemon's answer. Ends the program with status 1, and says what to do, when there is none."""
    settings, problems = read_settings(config_path)  # with problems in it, too: the daemon may run on an older one
    run = settings.service.run
    reply = sockets.ask(run, question, seconds)
    if reply is None:
        unreachable(run, "control", problems)
    if isinstance(reply, messages.Refused):
        click.echo(f"contentfilter: {reply.why}", err=True)
        sys.exit(1)
    return reply


def find_feed(config_path: str) -> str:
    """The run directory of a daemon that has an event feed. Ends the program with status 1 when there is none."""
    settings, problems = read_settings(config_path)
    run = settings.service.run
    if sockets.trouble_at(sockets.addresses(run)["events"].removeprefix("ipc://")):
        unreachable(run, "events", problems)
    return run


def unreachable(run: str, name: str, problems: Sequence[Problem]) -> NoReturn:
    """Nobody answers at that socket: say what is known, and end the program with status 1.

    ``problems``: of the settings, which may be why another place was looked at.
    """
    for problem in problems:
        click.echo(f"contentfilter: {problem}", err=True)
    path = sockets.addresses(run)[name].removeprefix("ipc://")
    remedy = "start it with `systemctl start contentfilter`; `contentfilter doctor` says what else is wrong"
    if trouble := sockets.trouble_at(path):
        if trouble == errno.EACCES:
            remedy = "ask as root, or as a member of the daemon's group"
        click.echo(f"contentfilter: no daemon answers at {path}: {os.strerror(trouble)}", err=True)
    else:
        click.echo(f"contentfilter: the daemon at {path} does not answer in time", err=True)
        remedy = "`systemctl restart contentfilter` is safe at any moment: hooks keep their mail meanwhile"
    click.echo(f"contentfilter: {remedy}", err=True)
    sys.exit(1)
