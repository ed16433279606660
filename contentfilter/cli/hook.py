"""``contentfilter hook``: install the compiled hook into qmail, remove it, show its state."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from contentfilter.admin import qmail as ops
from contentfilter.admin.qmail import DIALECTS, InstallStep
from contentfilter.cli.common import binary_option, qmail_option
from contentfilter.errors import RefusedError
from contentfilter.qmail import DEFAULT_CONF, QmailPaths, packaged_hook

_EXIT_CONF = 78


def report_steps(steps: list[InstallStep], warnings: list[str], *, nothing: str, dry_run: bool, as_json: bool) -> None:
    """Print the steps, or ``nothing`` where there are none, and the warnings."""
    texts = [step.text for step in steps]
    if as_json:
        click.echo(json.dumps({"changed": bool(steps) and not dry_run, "steps": texts, "warnings": warnings}))
        return
    for text in texts or [nothing]:
        click.echo(f"would {text}" if dry_run and texts else text)
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)


class Refusable(click.Command):
    """Sub-command that reports RefusedError and OSError as one line, with exit status 1."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # click ends quietly
        except (RefusedError, OSError) as error:
            raise click.ClickException(str(error)) from None


def common(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        binary_option,
        click.option(
            "--conf",
            metavar="FILE",
            default=DEFAULT_CONF,
            show_default=True,
            type=click.Path(path_type=Path),
            help="Configuration file of the hook.",
        ),
        qmail_option,
    ):
        command = option(command)
    return command


@click.group()
def hook() -> None:
    """Install the hook into qmail, remove it, show its state."""


@hook.command(cls=Refusable)
@common
@click.option(
    "--dialect", type=click.Choice(DIALECTS), default="auto", show_default=True, help="Dialect for a new queue.conf."
)
@click.option("--force", is_flag=True, help="Make the present qmail-queue the original although an older one is kept.")
@click.option("--dry-run", is_flag=True, help="Only print the steps.")
def install(
    qmail: Path, conf: Path, binary: str | None, dialect: str, *, force: bool, dry_run: bool, as_json: bool
) -> None:
    """Install the hook as DIR/bin/qmail-queue; the original becomes qmail-queue.real."""
    steps, warnings = ops.plan_install(QmailPaths(qmail), conf, dialect, packaged_hook(binary), force=force)
    if not dry_run:
        ops.carry_out(steps)
    report_steps(steps, warnings, nothing="already installed", dry_run=dry_run, as_json=as_json)


@hook.command(cls=Refusable)
@common
@click.option("--dry-run", is_flag=True, help="Only print the steps.")
def uninstall(qmail: Path, conf: Path, binary: str | None, *, dry_run: bool, as_json: bool) -> None:
    """Rename the original qmail-queue back, and remove the queue.conf that install wrote."""
    del binary
    steps, warnings = ops.plan_uninstall(QmailPaths(qmail), conf)
    if not dry_run:
        ops.carry_out(steps)
    report_steps(steps, warnings, nothing="not installed", dry_run=dry_run, as_json=as_json)


@hook.command(cls=Refusable)
@common
@click.pass_context
def status(ctx: click.Context, qmail: Path, conf: Path, binary: str | None, *, as_json: bool) -> None:
    """Show the state of the hook in DIR/bin. Status 1: there is a problem; 78: queue.conf is invalid."""
    try:
        packaged: Path | None = packaged_hook(binary)
    except RefusedError:
        if binary is not None:
            raise
        packaged = None
    state = ops.examine(QmailPaths(qmail), conf, packaged)
    if as_json:
        click.echo(json.dumps(asdict(state)))
    else:
        for name, value in asdict(state).items():
            if name != "problems":
                shown = {True: "yes", False: "no", None: "-"}.get(value, value)
                click.echo(f"{name.replace('_', ' ') + ':':18}{shown}")
        for problem in state.problems:
            click.echo(f"problem: {problem}", err=True)
    if state.problems:
        broken_conf = state.installed and state.target is None
        ctx.exit(_EXIT_CONF if broken_conf else 1)
