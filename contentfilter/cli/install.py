"""``contentfilter install`` and ``uninstall``: the server around the package, told step by step.

Exit statuses: 0 done, or nothing to do; 1 refused or failed, with the reason.
"""

import json
import os
import sys
from pathlib import Path

import click

from contentfilter.admin import install as ops
from contentfilter.admin.install_items import System
from contentfilter.admin.qmail import InstallStep, carry_out
from contentfilter.cli.hook import Refusable
from contentfilter.config import DEFAULT_PATH
from contentfilter.errors import RefusedError

_prefix = click.option(
    "--prefix",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("/"),
    help="A directory in place of /, for tests: no command is run, nothing changes its owner.",
)
_dry_run = click.option("--dry-run", is_flag=True, help="Say what would be done.")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.command(cls=Refusable)
@_prefix
@click.option("--qmail", metavar="DIR", default="/var/qmail", show_default=True, help="qmail's home.")
@click.option("--command", metavar="FILE", help="The installed contentfilter, if not the one of this package.")
@click.option("--start", is_flag=True, help="Also start the daemon, now and at every boot.")
@_dry_run
@_json
@click.pass_obj
def install(
    config_path: str, prefix: Path, qmail: str, command: str | None, *, start: bool, dry_run: bool, as_json: bool
) -> None:
    """Set the server up: user, directories, configuration, units, manual pages.

    Nothing that exists is changed. qmail is left alone; `contentfilter hook install` comes last.
    """
    if config_path != DEFAULT_PATH:
        raise RefusedError(f"the configuration is installed as {DEFAULT_PATH}; leave --config out")
    system = System(prefix.absolute())
    _need_root(system, dry_run=dry_run)
    package = ops.Package.find(command)
    trouble = ops.unreachable([package.command, Path(sys.executable)])
    if trouble and system.real:
        raise RefusedError(f"{trouble}; install contentfilter into /opt, with a Python that everybody may use")
    plan = ops.plan_install(package, system, qmail)
    if not dry_run:
        carry_out(plan.steps)
    if trouble:
        plan.warnings.append(trouble)
    starting = [ops.start_step(system)] if start and system.systemd else []
    _tell(ops.Plan(plan.steps + starting, plan.warnings), "already installed", dry_run=dry_run, as_json=as_json)
    if not dry_run:
        _do(starting)
    if not as_json:
        click.echo(_what_next(package, system, started=bool(starting)))


@click.command(cls=Refusable)
@_prefix
@click.option("--purge", is_flag=True, help="Also remove configuration, quarantine and all other state, and the user.")
@_dry_run
@_json
def uninstall(prefix: Path, *, purge: bool, dry_run: bool, as_json: bool) -> None:
    """Undo what install did. Configuration, state and the user stay, unless --purge."""
    system = System(prefix.absolute())
    _need_root(system, dry_run=dry_run)
    plan = ops.plan_uninstall(system, purge=purge)
    if not dry_run:
        for step in plan.steps:
            try:
                step.do()
            except OSError as error:
                raise RefusedError(
                    f"{step.text}: {error}; what came before is done: correct it and call again"
                ) from None
    _tell(plan, "nothing to remove", dry_run=dry_run, as_json=as_json)


def _do(steps: list[InstallStep]) -> None:
    """One after the other, up to the first that fails; calling again goes on from there."""
    for step in steps:
        try:
            step.do()
        except OSError as error:
            raise RefusedError(f"{step.text}: {error}; what came before is done. Correct it and call again") from None


def _need_root(system: System, *, dry_run: bool) -> None:
    if system.real and os.geteuid() != 0 and not dry_run:
        raise RefusedError(
            f"you are uid {os.geteuid()}, and only root may change users, units, and files in /etc and /usr/local; "
            f"--dry-run says what would be done"
        )


def _tell(plan: ops.Plan, nothing: str, *, dry_run: bool, as_json: bool) -> None:
    texts = [step.text for step in plan.steps]
    if as_json:
        changed = bool(texts) and not dry_run
        click.echo(json.dumps({"changed": changed, "steps": texts, "warnings": plan.warnings}))
        return
    for text in texts or [nothing]:
        click.echo(f"would {text}" if dry_run and texts else text)
    for warning in plan.warnings:
        click.echo(f"warning: {warning}", err=True)


def _what_next(package: ops.Package, system: System, *, started: bool) -> str:
    run = package.text("daemontools/run").decode()
    if system.systemd:
        start = f"  systemctl {'restart' if started else 'enable --now'} {ops.SOCKET} {ops.SERVICE}\n"
        return _NEXT.format(start="" if started else start)
    aside = "\nNo systemd here: no units were installed. A run script for daemontools, runit or s6:\n\n"
    return _NEXT.format(start="  start the daemon under your supervisor, see below\n") + aside + run


_NEXT = """
Next:
  contentfilter clients add @example.com    who is checked
  contentfilter check                       is everything readable?
{start}  contentfilter hook install                all mail goes through it from here on
docs/install.md and contentfilter(8) tell more."""
