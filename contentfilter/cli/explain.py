"""``contentfilter explain``: the decision about a message for given recipients and origin, and its reasons.

Reads the same configuration, tables and lists as the daemon and asks the same scanners, but needs no running
daemon and changes nothing: nothing is queued, kept or logged.
"""

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import click

from contentfilter.cli.common import print_story
from contentfilter.deadline import Deadline
from contentfilter.doors.message import message_of
from contentfilter.doors.origin import classify, resolve
from contentfilter.model import Action, Envelope, Origin, OriginKind
from contentfilter.settings import Settings
from contentfilter.verdict.context import MessageContext
from contentfilter.verdict.disposition import Disposition
from contentfilter.verdict.record import context_trace, fields, make_record
from contentfilter.verdict.reply import make_disposition
from contentfilter.worker.build import PipelineBundle

INCIDENT = "explain"
ADDRESS_MAX = 1002  # qmail-queue's limit
LINES_SHOWN = 12  # of the header of each delivery
LINE_SHOWN = 2000  # bytes of a line


@click.command()
@click.option("--sender", default="", metavar="ADDRESS", help="Envelope sender. Default: empty, as in a bounce.")
@click.option(
    "--recipient",
    "recipients",
    multiple=True,
    required=True,
    metavar="ADDRESS",
    help="Envelope recipient; may be repeated.",
)
@click.option(
    "--origin",
    type=click.Choice([kind.value for kind in OriginKind]),
    help="Origin of the message. Default: an SMTP client with the variables given by --env.",
)
@click.option("--env", "variables", multiple=True, metavar="NAME=VALUE", help="A variable of the SMTP session.")
@click.option("--json", "as_json", is_flag=True, help="Print the trace as JSON.")
@click.argument("file", type=click.File("rb"))
@click.pass_obj
def explain(
    config_path: str,
    sender: str,
    recipients: tuple[str, ...],
    origin: str | None,
    variables: tuple[str, ...],
    as_json: bool,
    file: Any,
) -> None:
    """Explain what would happen to the message in FILE (- for standard input), and why.

    Exit status: 0 if it would be queued or dropped, 1 if refused or deferred, 78 for a bad configuration.
    """
    data = file.read()
    environ = dict(_variable(text) for text in variables)
    envelope = Envelope(_address(sender), tuple(_address(r) for r in recipients))
    context, disposition = asyncio.run(_examine(config_path, data, envelope, origin, environ))
    lines = context_trace(context)
    if as_json:
        facts = fields(make_record(context, 0, 0.0)) | {"story": lines, "text": disposition.text}
        click.echo(json.dumps(facts, indent=2))
    else:
        print_story((*lines, *_result(disposition)))
    sys.exit(0 if disposition.action in (Action.QUEUE, Action.DROP) else 1)


async def _examine(
    config_path: str, data: bytes, envelope: Envelope, origin: str | None, environ: dict[bytes, bytes]
) -> tuple[MessageContext, Disposition]:
    bundle = await PipelineBundle.open(config_path)
    async with aclosing(bundle):
        settings = bundle.pipeline.settings
        message = message_of(data)
        try:
            deadline = Deadline.after(settings.service.budget)
            facts = (envelope, message, _origin(origin, environ, settings), deadline)
            context = await bundle.pipeline.examine(INCIDENT, *facts)
            return context, make_disposition(context)
        finally:
            message.close()


def _origin(name: str | None, environ: dict[bytes, bytes], settings: Settings) -> Origin:
    """The origin of ``--origin``, or the one that the daemon finds for an SMTP client with these variables."""
    rules = resolve(settings.origin)[0]
    uid = min(rules.smtp_uids, default=os.getuid())
    if name is None:
        believed = replace(rules, smtp_uids=rules.smtp_uids | {uid}, bounce_uids=rules.bounce_uids - {uid})
        return classify(uid, os.getpid(), environ, believed)
    return Origin(OriginKind(name), uid, remote_ip=environ.get(b"TCPREMOTEIP", b""))


def _variable(text: str) -> tuple[bytes, bytes]:
    name, equals, value = text.encode("utf-8", "surrogateescape").partition(b"=")
    if not name or not equals:
        raise click.BadParameter(f"{text!r} is not of the form NAME=VALUE", param_hint="--env")
    return name, value


def _address(text: str) -> bytes:
    address = text.encode("utf-8", "surrogateescape")
    if len(address) > ADDRESS_MAX or b"\0" in address:
        raise click.BadParameter(f"an address has at most {ADDRESS_MAX} bytes and no NUL", param_hint="ADDRESS")
    return address


def _result(disposition: Disposition) -> Iterator[tuple[str, str]]:
    """The reply to the client, and the header fields that each delivery adds, renames or replaces."""
    if disposition.text:
        yield "SMTP text", disposition.text
    for number, delivery in enumerate(disposition.deliveries, 1):
        added = b"".join([each.field for each in delivery.added]).splitlines()
        lines = [line[:LINE_SHOWN] for line in added]
        lines += [b"(" + change.old.strip() + b" becomes " + change.new.strip() + b")" for change in delivery.changes]
        for line in lines[:LINES_SHOWN]:
            yield f"header {number}", line.decode("utf-8", "replace")
