"""``contentfilter explain``: what would happen to a message for these recipients from this origin, and why.

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
from contentfilter.verdict.record import context_trace, fields, make_record
from contentfilter.verdict.reply import answer
from contentfilter.wire import hook
from contentfilter.worker.build import PipelineBundle

INCIDENT = "explain"
ADDRESS_MAX = 1002  # qmail-queue's limit


@click.command()
@click.option("--sender", default="", metavar="ADDRESS", help="Envelope sender; none: as of a bounce.")
@click.option("--recipient", "recipients", multiple=True, required=True, metavar="ADDRESS", help="May be repeated.")
@click.option(
    "--origin",
    type=click.Choice([kind.value for kind in OriginKind]),
    help="Where the message comes from. Without it: an SMTP client with the variables given by --env.",
)
@click.option("--env", "variables", multiple=True, metavar="NAME=VALUE", help="A variable of the SMTP session.")
@click.option("--json", "as_json", is_flag=True, help="Print the story as JSON.")
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
    """Say what would happen to the message in FILE (- is standard input), and why.

    Exit status: 0 it would be queued or dropped, 1 it would be refused or deferred, 78 bad configuration.
    """
    data = file.read()
    environ = dict(_variable(text) for text in variables)
    envelope = Envelope(_address(sender), tuple(_address(r) for r in recipients))
    case = asyncio.run(_examine(config_path, data, envelope, origin, environ))
    reply = answer(case)
    lines = context_trace(case)
    if as_json:
        facts = fields(make_record(case, 0, 0.0)) | {"story": lines, "text": reply.text}
        click.echo(json.dumps(facts, indent=2))
    else:
        print_story((*lines, *_answer(reply)))
    sys.exit(0 if case.decision.action in (Action.QUEUE, Action.DROP) else 1)


async def _examine(
    config_path: str, data: bytes, envelope: Envelope, origin: str | None, environ: dict[bytes, bytes]
) -> MessageContext:
    workbench = await PipelineBundle.open(config_path)
    async with aclosing(workbench):
        settings = workbench.pipeline.settings
        message = message_of(data)
        try:
            deadline = Deadline.after(settings.service.budget)
            return await workbench.pipeline.examine(
                INCIDENT, envelope, message, _origin(origin, environ, settings), deadline
            )
        finally:
            message.close()


def _origin(name: str | None, environ: dict[bytes, bytes], settings: Settings) -> Origin:
    """What ``--origin`` says, or what the daemon would make of an SMTP client with these variables."""
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


def _answer(reply: hook.Answer) -> Iterator[tuple[str, str]]:
    """What the client is told, and the first lines that each submission gets in front."""
    if reply.text:
        yield "SMTP text", reply.text
    for number, submission in enumerate(reply.submissions, 1):
        head = submission.prepend[:2000].decode("utf-8", "replace").rstrip("\n").split("\n")
        for text in head[:12]:
            yield f"header {number}", text
