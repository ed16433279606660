"""``contentfilter status`` and ``contentfilter reload``: questions to the running daemon.

They read the settings only to learn where its control socket is.
"""

import json
import sys

import click
import msgspec

from contentfilter.config.load import read_settings
from contentfilter.service import bus, frames
from contentfilter.tables.keeper import State

WAIT = 5.0  # seconds
RELOAD_WAIT = 120.0  # a database may take its time


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The whole answer as JSON.")
@click.pass_obj
def status(config_path: str, as_json: bool) -> None:
    """Say what the daemon does right now."""
    reply = _ask(config_path, frames.AskStatus(), WAIT)
    assert isinstance(reply, frames.Status)  # noqa: S101 - the daemon answers this question with nothing else
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(reply)))
        return
    click.echo(f"{reply.state}, configuration {reply.generation}, up {reply.uptime:.0f} s, {reply.socket}")
    for worker in sorted(reply.workers, key=lambda w: (w.slot, w.pid)):
        click.echo(
            f"worker {worker.slot} pid {worker.pid} {worker.state}, configuration {worker.generation}, "
            f"{worker.open} in flight, {worker.counters.get('answered', 0)} answered, "
            f"last heard {worker.silent:.1f} s ago"
        )
    if reply.not_recorded:
        click.echo(f"{reply.not_recorded} messages are not in the journal; the log says why (journal.failed)")
    if reply.tables is not None:
        click.echo(_tables(reply.tables))
    for problem in reply.problems:
        click.echo(f"not in force: {problem}")


def _tables(state: State) -> str:
    if not state.loaded:
        return f"no recipient tables, mail that needs them is deferred: {state.trouble}"
    rows = f"{state.clamav_rows} rows in clamavclients, {state.spamd_rows} in spamdclients, from {state.source}"
    stale = f"NOT CURRENT since {state.age:.0f} s: {state.trouble}"
    return f"{rows}, {stale if state.trouble else f'seen current {state.age:.0f} s ago'}"


@click.command()
@click.option("--restart", is_flag=True, help="Also replace every worker, each new one before its old one goes.")
@click.option("--json", "as_json", is_flag=True, help="The answer as JSON.")
@click.pass_obj
def reload(config_path: str, restart: bool, as_json: bool) -> None:
    """Read the configuration again. A bad one changes nothing."""
    reply = _ask(config_path, frames.AskReload(restart), RELOAD_WAIT)
    assert isinstance(reply, frames.Done)  # noqa: S101 - see above
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(reply)))
    else:
        for problem in reply.problems:
            click.echo(problem, err=True)
        click.echo(f"configuration {reply.generation} is in force" + ("" if reply.ok else "; the new one was refused"))
    sys.exit(0 if reply.ok and not reply.problems else 1)


def _ask(config_path: str, question: frames.Question, seconds: float) -> frames.Reply:
    settings, _ = read_settings(config_path)  # with problems in it, too: the daemon may run on an older one
    run = settings.service.run
    reply = bus.ask(run, question, seconds)
    if reply is None:
        click.echo(f"contentfilter: no daemon answers at {run}/control.sock", err=True)
        sys.exit(1)
    if isinstance(reply, frames.Refused):
        click.echo(f"contentfilter: {reply.why}", err=True)
        sys.exit(1)
    return reply
