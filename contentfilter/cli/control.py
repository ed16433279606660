"""``contentfilter reload``, and requests of all commands to the running daemon.

The settings are read only for the path of its control socket.
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

RELOAD_WAIT = 120.0  # seconds; a database may be slow


@click.command()
@click.option(
    "--restart", is_flag=True, help="Also replace every worker, starting each new one before its predecessor ends."
)
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
@click.pass_obj
def reload(config_path: str, restart: bool, as_json: bool) -> None:
    """Reload the configuration. An invalid one changes nothing."""
    reply = ask(config_path, messages.AskReload(restart), RELOAD_WAIT)
    assert isinstance(reply, messages.Done)  # noqa: S101 - see above
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(reply)))
    else:
        for problem in reply.problems:
            click.echo(problem, err=True)
        click.echo(f"configuration {reply.generation} is in force" + ("" if reply.ok else "; the new one was rejected"))
    sys.exit(0 if reply.ok and not reply.problems else 1)


def ask(config_path: str, question: messages.Question, seconds: float) -> messages.Reply:
    """The daemon's answer. Exits with status 1 and a remedy if there is none."""
    settings, problems = read_settings(config_path)  # used even if invalid: the daemon may run with an older one
    run = settings.service.run
    reply = sockets.ask(run, question, seconds)
    if reply is None:
        unreachable(run, "control", problems)
    if isinstance(reply, messages.Refused):
        click.echo(f"contentfilter: {reply.why}", err=True)
        sys.exit(1)
    return reply


def find_feed(config_path: str) -> str:
    """Run directory of a daemon with an event feed. Exits with status 1 if there is none."""
    settings, problems = read_settings(config_path)
    run = settings.service.run
    if sockets.trouble_at(sockets.addresses(run)["events"].removeprefix("ipc://")):
        unreachable(run, "events", problems)
    return run


def unreachable(run: str, name: str, problems: Sequence[Problem]) -> NoReturn:
    """Report that no daemon answers at that socket, and exit with status 1.

    ``problems``: of the settings, which may be the reason for a wrong path.
    """
    for problem in problems:
        click.echo(f"contentfilter: {problem}", err=True)
    path = sockets.addresses(run)[name].removeprefix("ipc://")
    remedy = "start it with `systemctl start contentfilter`; `contentfilter doctor` finds other causes"
    if error := sockets.trouble_at(path):
        if error == errno.EACCES:
            remedy = "run this as root, or as a member of the daemon's group"
        click.echo(f"contentfilter: no daemon answers at {path}: {os.strerror(error)}", err=True)
    else:
        click.echo(f"contentfilter: the daemon at {path} does not answer in time", err=True)
        remedy = "`systemctl restart contentfilter` is safe at any time: hooks keep their mail until it is back"
    click.echo(f"contentfilter: {remedy}", err=True)
    sys.exit(1)
