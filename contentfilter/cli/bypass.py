"""``contentfilter bypass``, ``drain`` and ``resume``: break-glass orders to the running daemon.

Exit statuses: 0 in force in every worker and saved; 1 not, or not fully (it says why); 2 wrong usage.
"""

import json
import os
import sys
from typing import NoReturn

import click
import msgspec

from contentfilter.bus import messages, sockets
from contentfilter.cli.common import print_rows, printable, span, when
from contentfilter.config.load import read_settings
from contentfilter.model import OriginKind, Scanner
from contentfilter.policy.overrides import SCANNERS, Bypass

WAIT = 30.0  # seconds; the daemon itself waits up to 15 for its workers and the disk

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
reason_option = click.option("--reason", default="", help="Reason, shown in the log and by status.")


@click.group(invoke_without_command=True)
@as_json_option
@click.pass_context
def bypass(ctx: click.Context, as_json: bool) -> None:
    """Bypass a scanner for a limited time: its mail passes, marked unchecked.

    For the night when clamd is down and mail must flow. Without a command: list the active bypasses. Everything is
    recorded in audit.jsonl in the state directory. Each bypass ends by itself.
    """
    if ctx.invoked_subcommand is None:
        _list(ctx.obj, as_json)


def _command(scanner: Scanner) -> click.Command:
    """Sub-command ``contentfilter bypass SCANNER``."""

    @bypass.command(scanner.value, help=_HELP[scanner])
    @click.option(
        "--origin",
        "origins",
        multiple=True,
        type=click.Choice([kind.value for kind in OriginKind]),
        help="Only mail of this origin; may be repeated. Default: all mail.",
    )
    @click.option("--for", "seconds", required=True, callback=span, metavar="TIME", help="1m to 7d: 30m, 12h, 3d.")
    @click.option("--reason", required=True, help="Reason, logged with each message that passes.")
    @as_json_option
    @click.pass_obj
    def command(config_path: str, origins: tuple[str, ...], seconds: float, reason: str, as_json: bool) -> None:
        _check(seconds, reason, needed=True)
        kinds = tuple(map(OriginKind, origins))
        reply = _order(config_path, messages.AskBypass(scanner, seconds, reason, kinds, _claim()))
        new = next((b for b in reply.bypasses if b.scanner is scanner), None)
        text = _described(new) if new else f"{scanner.value} is in use again already"
        _answer(reply, as_json, text)

    return command


_HELP = {
    Scanner.SIGNATURES: "Bypass the lists of signatures and of loader types.",
    Scanner.CLAMD: "Bypass clamd: no virus is found.",
    Scanner.SPAMD: "Bypass spamd: no spam is found.",
}


def _described(order: Bypass) -> str:
    mail = f"mail of {', '.join(kind.value for kind in order.origins)} origin" if order.origins else "all mail"
    return f"{order.scanner.value} is bypassed for {mail} until {when(order.until)}: passes unchecked"


_COMMANDS = tuple(map(_command, SCANNERS))


@bypass.command("list")
@as_json_option
@click.pass_obj
def list_(config_path: str, as_json: bool) -> None:
    """List active bypasses and a drain: who ordered each, why, and until when."""
    _list(config_path, as_json)


@bypass.command()
@click.argument("scanner", type=click.Choice([*(scanner.value for scanner in SCANNERS), "all"]))
@as_json_option
@click.pass_obj
def end(config_path: str, scanner: str, as_json: bool) -> None:
    """End the bypass of SCANNER before its time. Status 1: there was none."""
    which = None if scanner == "all" else Scanner(scanner)
    reply = _order(config_path, messages.AskBypassEnd(which, _claim()))
    _answer(reply, as_json, "every scanner is in use again" if which is None else f"{scanner} is in use again")


@click.command()
@click.option("--for", "seconds", callback=lambda c, p, v: v and span(c, p, v), metavar="TIME", help="1m to 7d.")
@reason_option
@as_json_option
@click.pass_obj
def drain(config_path: str, seconds: float | None, reason: str, as_json: bool) -> None:
    """Finish the messages in progress and accept no new ones.

    Hooks wait, with their message, until mail is accepted again or their budget in queue.conf is over; nothing is
    refused permanently. Without --for it lasts until `contentfilter resume` or a restart of the daemon.
    """
    _check(seconds, reason)
    reply = _order(config_path, messages.AskDrain(seconds, reason, _claim()))
    until = reply.drain.until if reply.drain else None
    text = f"no mail is accepted until {when(until) if until else 'contentfilter resume'}"
    _answer(reply, as_json, f"{text}; messages in progress: {reply.in_flight}")


@click.command()
@as_json_option
@click.pass_obj
def resume(config_path: str, as_json: bool) -> None:
    """Accept mail again, after `contentfilter drain`. Status 1: nothing was drained."""
    _answer(_order(config_path, messages.AskResume(_claim())), as_json, "mail is accepted again")


def _check(seconds: float | None, reason: str, *, needed: bool = False) -> None:
    """Report wrong usage before the daemon is asked."""
    if why := Bypass.objection(seconds, reason):
        raise click.UsageError(why)
    if needed and not reason.strip():
        raise click.UsageError("a bypass needs a reason")


def _claim() -> str:
    """User behind sudo; the daemon records it as a claim."""
    return os.environ.get("SUDO_USER", "")


def _list(config_path: str, as_json: bool) -> None:
    status = _ask(config_path, messages.AskStatus())
    assert isinstance(status, messages.Status)  # noqa: S101 - the daemon answers this question with nothing else
    if as_json:
        facts = {"bypasses": status.bypasses, "drain": status.drain, "problem": status.orders_problem}
        click.echo(json.dumps(msgspec.to_builtins(facts), indent=2))
        return
    rows = [
        (b.scanner.value, ",".join(kind.value for kind in b.origins) or "all mail", when(b.until), b.by, b.reason)
        for b in status.bypasses
    ]
    if (order := status.drain) is not None:
        until = when(order.until) if order.until is not None else "resume"
        rows.append(("drained", "all mail", until, order.by, order.reason))
    if rows:
        print_rows(("what", "origins", "until", "by", "reason"), rows)
    else:
        click.echo("nothing is bypassed", err=True)
    if status.orders_problem:
        click.echo(f"contentfilter: {printable(status.orders_problem)}", err=True)


def _answer(reply: messages.Ordered, as_json: bool, text: str) -> None:
    click.echo(json.dumps(msgspec.to_builtins(reply)) if as_json else text)
    for problem in reply.problems:
        click.echo(f"contentfilter: {printable(problem)}", err=True)
    sys.exit(1 if reply.problems else 0)


def _order(config_path: str, question: messages.Question) -> messages.Ordered:
    """Send an order to the daemon. Ends the program with status 1 when it is refused or not answered."""
    reply = _ask(config_path, question)
    assert isinstance(reply, messages.Ordered)  # noqa: S101 - see above
    return reply


def _ask(config_path: str, question: messages.Question) -> messages.Reply:
    settings, _ = read_settings(config_path)  # with problems in it, too: the daemon runs on an older one
    path = f"{settings.service.run}/control.sock"
    reply = sockets.ask(settings.service.run, question, WAIT)
    if isinstance(reply, messages.Refused):
        _fail(reply.why)
    if reply is None and os.path.exists(path) and not os.access(path, os.R_OK | os.W_OK):
        _fail(f"{path}: you may not ask the daemon; try again as root")
    if reply is None:
        _fail(f"no daemon answers at {path}; start it first: systemctl start contentfilter")
    return reply


def _fail(why: str) -> NoReturn:
    click.echo(f"contentfilter: {printable(why)}", err=True)
    sys.exit(1)
