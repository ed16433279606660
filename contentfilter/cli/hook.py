"""``contentfilter hook``: install the compiled hook in a qmail, remove it, show its state."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from contentfilter.admin import qmail as ops
from contentfilter.admin.qmail import DIALECTS, InstallStep
from contentfilter.errors import RefusedError
from contentfilter.qmail import DEFAULT_CONF, QmailPaths, packaged_hook

_EXIT_CONF = 78


def finish(steps: list[InstallStep], warnings: list[str], *, nothing: str, dry_run: bool, as_json: bool) -> None:
    if not dry_run:
        ops.carry_out(steps)
    texts = [step.text for step in steps]
    if as_json:
        click.echo(json.dumps({"changed": bool(steps) and not dry_run, "steps": texts, "warnings": warnings}))
        return
    for text in texts or [nothing]:
        click.echo(f"would {text}" if dry_run and texts else text)
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)


class Refusable(click.Command):
    """A sub-command whose refusals are one clear line and status 1."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (RefusedError, OSError) as error:
            raise click.ClickException(str(error)) from None


def common(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("--binary", metavar="FILE", help="The compiled hook, if not the one of this package."),
        click.option("--conf", default=DEFAULT_CONF, show_default=True, type=click.Path(path_type=Path)),
        click.option("--qmail", default="/var/qmail", show_default=True, type=click.Path(path_type=Path)),
    ):
        command = option(command)
    return command


@click.group()
def hook() -> None:
    """Install the hook in a qmail, remove it, show its state."""


@hook.command(cls=Refusable)
@common
@click.option("--dialect", type=click.Choice(DIALECTS), default="auto", show_default=True, help="For a new queue.conf.")
@click.option("--force", is_flag=True, help="Take a new qmail-queue for the original although an old one is kept.")
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
def install(
    qmail: Path, conf: Path, binary: str | None, dialect: str, *, force: bool, dry_run: bool, as_json: bool
) -> None:
    """Put the hook into DIR/bin; the original becomes qmail-queue.real."""
    steps, warnings = ops.plan_install(QmailPaths(qmail), conf, dialect, packaged_hook(binary), force=force)
    finish(steps, warnings, nothing="already installed", dry_run=dry_run, as_json=as_json)


@hook.command(cls=Refusable)
@common
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
def uninstall(qmail: Path, conf: Path, binary: str | None, *, dry_run: bool, as_json: bool) -> None:
    """Give the original qmail-queue its name back, and remove what install wrote."""
    del binary
    steps, warnings = ops.plan_uninstall(QmailPaths(qmail), conf)
    finish(steps, warnings, nothing="not installed", dry_run=dry_run, as_json=as_json)


@hook.command(cls=Refusable)
@common
@click.pass_context
def status(ctx: click.Context, qmail: Path, conf: Path, binary: str | None, *, as_json: bool) -> None:
    """Show what stands in DIR/bin, and what is wrong with it (status 1; 78 when queue.conf is)."""
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
