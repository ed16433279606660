"""``contentfilter install`` and ``uninstall``: server set-up around the package, one step per line.

Exit statuses: 0 done, or nothing to do; 1 refused or failed, with the reason.
"""

import os
import sys
from pathlib import Path

import click

from contentfilter.admin import install as ops
from contentfilter.admin.install_items import System
from contentfilter.admin.qmail import InstallStep, carry_out
from contentfilter.cli.hook import Refusable, report_steps
from contentfilter.config import DEFAULT_PATH
from contentfilter.errors import RefusedError

_prefix = click.option(
    "--prefix",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("/"),
    help="Directory to use in place of /, for tests: no command is run, no owner is changed.",
)
_dry_run = click.option("--dry-run", is_flag=True, help="Only print the steps.")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.command(cls=Refusable)
@_prefix
@click.option("--qmail", metavar="DIR", default="/var/qmail", show_default=True, help="Home directory of qmail.")
@click.option("--command", metavar="FILE", help="The installed contentfilter, if not the one of this package.")
@click.option("--start", is_flag=True, help="Also start the daemon, now and at every boot.")
@_dry_run
@_json
@click.pass_obj
def install(
    config_path: str, prefix: Path, qmail: str, command: str | None, *, start: bool, dry_run: bool, as_json: bool
) -> None:
    """Set up the server: user, directories, configuration, units, manual pages.

    Existing files are not changed. qmail is not touched; the last step is `contentfilter hook install`.
    """
    if config_path != DEFAULT_PATH:
        raise RefusedError(f"the configuration is installed as {DEFAULT_PATH}; omit --config")
    system = System(prefix.absolute())
    _need_root(system, dry_run=dry_run)
    package = ops.Package.find(command)
    problem = ops.unreachable([package.command, Path(sys.executable)])
    if problem and system.real:
        raise RefusedError(f"{problem}; install contentfilter into /opt, with a Python that all users can run")
    plan = ops.plan_install(package, system, qmail)
    if not dry_run:
        carry_out(plan.steps)
    if problem:
        plan.warnings.append(problem)
    starting = [ops.start_step(system)] if start and system.systemd else []
    report_steps(plan.steps + starting, plan.warnings, nothing="already installed", dry_run=dry_run, as_json=as_json)
    if not dry_run:
        _carry_on(starting)
    if not as_json:
        click.echo(_what_next(package, system, started=bool(starting)))


@click.command(cls=Refusable)
@_prefix
@click.option(
    "--purge", is_flag=True, help="Also remove the configuration, the quarantine, all other state, and the user."
)
@_dry_run
@_json
def uninstall(prefix: Path, *, purge: bool, dry_run: bool, as_json: bool) -> None:
    """Remove what install made. Configuration, state and the user stay unless --purge is given."""
    system = System(prefix.absolute())
    _need_root(system, dry_run=dry_run)
    plan = ops.plan_uninstall(system, purge=purge)
    if not dry_run:
        _carry_on(plan.steps)
    report_steps(plan.steps, plan.warnings, nothing="nothing to remove", dry_run=dry_run, as_json=as_json)


def _carry_on(steps: list[InstallStep]) -> None:
    """Carry out the steps up to the first that fails; the same command continues from there."""
    for step in steps:
        try:
            step.do()
        except OSError as error:
            raise RefusedError(
                f"{step.text}: {error}; the steps before it are done. Correct it and repeat the command"
            ) from None


def _need_root(system: System, *, dry_run: bool) -> None:
    if system.real and os.geteuid() != 0 and not dry_run:
        raise RefusedError(
            f"you are uid {os.geteuid()}, and only root may change users, units, and files in /etc and /usr/local; "
            f"--dry-run prints the steps"
        )


def _what_next(package: ops.Package, system: System, *, started: bool) -> str:
    if system.systemd:
        start = f"  systemctl {'restart' if started else 'enable --now'} {ops.SOCKET} {ops.SERVICE}\n"
        return _NEXT.format(start="" if started else start)
    script = package.text("daemontools/run").decode()
    note = "\nThis system does not run systemd: no units were installed. A run script for daemontools, runit or s6:\n\n"
    return _NEXT.format(start="  start the daemon under your supervisor, see below\n") + note + script


_NEXT = """
Next:
  contentfilter clients add @example.com    choose whose mail is checked
  contentfilter check                       validate the configuration
{start}  contentfilter hook install                from here on, all mail passes through the filter
See docs/install.md and contentfilter(8)."""
