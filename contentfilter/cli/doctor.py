"""``contentfilter doctor``: check this server and suggest a remedy for each fault.

Exit statuses: 0 no errors, warnings allowed; 1 errors; 78 the settings themselves are wrong. It ends within ten
seconds, even when a daemon or a file system hangs.
"""

import asyncio
import json
from dataclasses import asdict
from pathlib import Path

import click

from contentfilter.admin import doctor as ops
from contentfilter.admin.diagnostic import Diagnostic, Level, examine, run
from contentfilter.admin.doctor_scanners import CLAMD_CONF
from contentfilter.bus import messages, sockets
from contentfilter.cli.common import binary_option, printable, qmail_option, queue_conf_option
from contentfilter.config.controls import Controls, read_controls
from contentfilter.config.load import load_settings
from contentfilter.config.runtime import worker_count
from contentfilter.deadline import Deadline
from contentfilter.doors.origin import resolve
from contentfilter.errors import ConfigError, Problem, RefusedError
from contentfilter.qmail import QmailPaths, packaged_hook
from contentfilter.settings import Settings

QUESTION = 2.5  # seconds for the daemon and the control directory
PROBES = 6.0  # seconds for everything else


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@qmail_option
@queue_conf_option
@binary_option
@click.option(
    "--clamd-conf",
    metavar="FILE",
    default=CLAMD_CONF,
    show_default=True,
    type=click.Path(path_type=Path),
    help="Configuration file of clamd, for its limits.",
)
@click.option(
    "--freshclam-conf", metavar="FILE", hidden=True, expose_value=False, help="Accepted for compatibility; no effect."
)
@click.pass_context
def doctor(
    ctx: click.Context,
    qmail: Path,
    queue_conf: Path,
    binary: str | None,
    clamd_conf: Path,
    *,
    as_json: bool,
) -> None:
    """Check this server and suggest a remedy for each fault."""
    settings = load_settings(ctx.obj)
    daemon, children = _state(settings)
    try:
        hook: Path | None = packaged_hook(binary)
    except RefusedError as error:
        if binary is not None:
            raise click.BadParameter(str(error), ctx, param_hint="--binary") from None
        hook = None
    site = ops.Site(
        settings=settings,
        workers=daemon.wanted if daemon else worker_count(settings),
        children=children,
        unknown_users=resolve(settings.origin)[1],
        daemon=daemon,
        paths=QmailPaths(qmail),
        queue_conf=queue_conf,
        hook=hook,
        clamd_conf=clamd_conf,
    )
    findings = examine(ops.probes(site), Deadline.after(PROBES))
    errors = sum(finding.level is Level.ERROR for finding in findings)
    if as_json:
        shown = [asdict(finding) | {"level": finding.level.value} for finding in findings]
        click.echo(json.dumps({"ok": not errors, "findings": shown}, indent=2))
    else:
        _print(findings, errors)
    ctx.exit(1 if errors else 0)


def _state(settings: Settings) -> tuple[ops.Daemon | None, int]:
    """State of the running daemon, and spamdchildren. Raises ConfigError."""

    def controls() -> Controls:
        return asyncio.run(read_controls(settings.service.control))[0]

    def status() -> messages.Reply | None:
        return sockets.ask(settings.service.run, messages.AskStatus(), QUESTION - 0.5)

    results = run({"status": status, "controls": controls}, Deadline.after(QUESTION))
    read, reported = results["controls"], results["status"]
    if isinstance(read, ConfigError):
        raise read
    if not isinstance(read, Controls):
        raise ConfigError((Problem(settings.service.control, 0, f"cannot be read in time: {read!r}"),))
    return _daemon(reported) if isinstance(reported, messages.Status) else None, read.values["spamdchildren"]


def _daemon(status: messages.Status) -> ops.Daemon:
    ready = tuple(worker.pid for worker in status.workers if worker.state == "ready")
    return ops.Daemon(status.pid, status.state, status.socket, status.wanted, ready, status.problems, status.tables)


def _print(findings: tuple[Diagnostic, ...], errors: int) -> None:
    """One line for each diagnostic, with its remedy below it."""
    for finding in findings:
        click.echo(printable(f"{finding.level.value + ':':9}{finding.topic}: {finding.what}"))
        if finding.remedy:
            click.echo(printable(f"{'':9}-> {finding.remedy}"))
    warnings = sum(finding.level is Level.WARNING for finding in findings)
    click.echo(f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}")
