"""``contentfilter check``: validate all files that serve and the hook read, with file and line of each problem.

An error would stop the daemon, defer mail or skip a line; a warning is something that works, but perhaps not as
intended. Nothing is changed. Exit statuses: 0 no errors; 1 warnings, with ``--strict``; 78 errors.
"""

import asyncio
import json
import os
import stat
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import click

from contentfilter.cli.common import queue_conf_option
from contentfilter.cli.progress import progress
from contentfilter.config.controls import Controls, read_controls
from contentfilter.config.load import read_settings
from contentfilter.config.runtime import unusable
from contentfilter.doors.origin import resolve
from contentfilter.errors import ConfigError, Problem, RefusedError
from contentfilter.qmail import packaged_hook, read_conf
from contentfilter.scanners.signatures.rules import Rules, parse_loadertypes, parse_signatures
from contentfilter.settings import Settings
from contentfilter.tables.keeper import read_source
from contentfilter.tables.rows import Rows

EX_CONFIG = 78


@dataclass(slots=True)
class CheckResults:
    """Counts of what was read, and the problems in it."""

    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, path: str | Path, text: str, *, warning: bool = False) -> None:
        self.problems.append(Problem(str(path), 0, text, warning))

    def of(self, *, warning: bool) -> list[Problem]:
        return [problem for problem in self.problems if problem.warning is warning]


@click.command()
@click.option("--strict", is_flag=True, help="Exit with status 1 if there are warnings.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@queue_conf_option
@click.pass_context
def check(ctx: click.Context, strict: bool, as_json: bool, queue_conf: Path) -> None:
    """Validate all configuration files that the daemon and the hook read."""
    with progress("reading the configuration"):
        findings = asyncio.run(examine(ctx.obj, queue_conf))
    errors, warnings = findings.of(warning=False), findings.of(warning=True)
    if as_json:
        report = {
            "ok": not errors,
            "errors": [_as_json(problem) for problem in errors],
            "warnings": [_as_json(problem) for problem in warnings],
            "counts": findings.counts,
        }
        click.echo(json.dumps(report, indent=2))
    else:
        for problem in findings.problems:
            click.echo(f"{'warning' if problem.warning else 'error'}: {problem}")
        click.echo(_summary(findings))
    ctx.exit(EX_CONFIG if errors else 1 if strict and warnings else 0)


async def examine(config_path: str, queue_conf: Path) -> CheckResults:
    """Read all files; one that cannot be read is reported as a problem."""
    findings = CheckResults()
    settings, problems = read_settings(config_path)
    findings.problems += problems
    _origin(settings, config_path, findings)
    _places(settings, findings)
    findings.problems += unusable(settings)
    control = settings.service.control
    try:
        controls, problems = await read_controls(control)
        findings.problems += problems
        findings.counts["parameters set"] = sum(1 for place in controls.places.values() if place)
        _lists(controls, settings, findings)
    except ConfigError as e:
        findings.problems += e.problems
    try:
        rows, problems = await read_source(settings) or (Rows(), ())
        findings.problems += (*rows.damage, *problems)
        findings.counts |= {"clamavclients rows": len(rows.clamav), "spamdclients rows": len(rows.spamd)}
        if rows.prefs:
            findings.counts["owners of preferences"] = len(rows.prefs)
    except ConfigError as e:
        findings.problems += e.problems
    _queue_conf(queue_conf, settings, findings)
    return findings


def _origin(settings: Settings, path: str, findings: CheckResults) -> None:
    _, unknown = resolve(settings.origin)
    for name in unknown:
        findings.add(path, f"[origin] no such user on this system: {name!r}", warning=True)


def _places(settings: Settings, findings: CheckResults) -> None:
    """Directories of the daemon, as far as the present user can examine them."""
    service = settings.service
    sockets = os.path.dirname(settings.listen.socket)
    password = settings.mariadb.password_file
    if password and os.path.exists(password) and os.stat(password).st_mode & 0o007:
        findings.add(password, "[mariadb] password_file: readable for every user; chmod 600", warning=True)
    if os.path.isdir(service.control) and not os.access(service.control, os.R_OK | os.X_OK):
        findings.add(service.control, "[service] control: not readable for this user")
    for path, use in dict.fromkeys(((service.state, "[service] state"), (service.run, "[service] run"))):
        _writable(path, use, findings)
    if sockets != service.run:
        _writable(sockets, "[listen] socket", findings)
    if os.path.lexists(settings.listen.socket) and not stat.S_ISSOCK(os.lstat(settings.listen.socket).st_mode):
        findings.add(settings.listen.socket, "[listen] socket: exists, but is not a socket")


def _writable(path: str, use: str, findings: CheckResults) -> None:
    if not os.path.lexists(path):
        findings.add(path, f"{use}: no such directory; the systemd unit creates it, otherwise: mkdir", warning=True)
    elif not os.path.isdir(path):
        findings.add(path, f"{use}: not a directory")
    elif not os.access(path, os.W_OK | os.X_OK):
        findings.add(path, f"{use}: not writable for this user; check that it is for the daemon's user", warning=True)


def _lists(controls: Controls, settings: Settings, findings: CheckResults) -> None:
    for name, text, parse in (
        ("badsignatures", controls.badsignatures, parse_signatures),
        ("badloadertypes", controls.badloadertypes, parse_loadertypes),
    ):
        if text is None:
            continue
        rules: Rules
        path = os.path.join(settings.service.control, name)
        rules, problems = parse(text, path, settings.signatures.mode)
        findings.problems += problems
        findings.counts[f"{name} rules"] = len(rules.rules)
        if not rules.rules:
            findings.add(path, "no rules: it will detect nothing", warning=True)


def _queue_conf(path: Path, settings: Settings, findings: CheckResults) -> None:
    """Validation by the hook itself, where the hook is found."""
    try:
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        return  # the built-in values apply
    except OSError as e:
        findings.add(path, f"cannot be read: {e.strerror}; the hook would defer all mail")
        return
    try:
        conf = read_conf(packaged_hook(None), path)
    except (RefusedError, OSError, subprocess.SubprocessError) as e:
        findings.add(path, f"not checked: {e}", warning=True)
        return
    if conf.problem:
        findings.add(path, f"{conf.problem}; the hook would defer all mail")
        return
    socket = conf.values.get("socket", settings.listen.socket)
    if socket != settings.listen.socket:
        findings.add(path, f"socket {socket}, but [listen] socket is {settings.listen.socket}")


def _as_json(problem: Problem) -> dict[str, str | int]:
    return {"path": problem.path, "line": problem.line, "text": problem.text}


def _summary(findings: CheckResults) -> str:
    errors, warnings = len(findings.of(warning=False)), len(findings.of(warning=True))
    read = ", ".join(f"{count} {what}" for what, count in findings.counts.items())
    return f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}; read: {read or 'nothing'}"
