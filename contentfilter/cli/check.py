"""``contentfilter check``: validate everything that serve and the hook would read, and say where it is wrong.

Errors are what would stop the daemon, turn mail away or leave a line out; warnings are what works, but perhaps not as
meant. Nothing is changed. Exit statuses: 0 no errors; 1 warnings, with ``--strict``; 78 errors.
"""

import asyncio
import json
import os
import stat
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import click

from contentfilter.cli.progress import progress
from contentfilter.config.controls import Controls, read_controls
from contentfilter.config.load import read_settings
from contentfilter.config.runtime import unusable
from contentfilter.doors.origin import resolve
from contentfilter.errors import ConfigError, Problem, RefusedError
from contentfilter.qmail import DEFAULT_CONF, packaged_hook, read_conf
from contentfilter.scanners.signatures.rules import Rules, parse_loadertypes, parse_signatures
from contentfilter.settings import Settings
from contentfilter.tables.keeper import read_source
from contentfilter.tables.rows import Rows

EX_CONFIG = 78


@dataclass(slots=True)
class CheckResults:
    """What was read, and what is wrong with it."""

    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, path: str, text: str, *, warning: bool = False) -> None:
        self.problems.append(Problem(path, 0, text, warning))

    def of(self, *, warning: bool) -> list[Problem]:
        return [problem for problem in self.problems if problem.warning is warning]


@click.command()
@click.option("--strict", is_flag=True, help="Status 1 when there are warnings.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--queue-conf",
    metavar="FILE",
    envvar="CONTENTFILTER_QUEUE_CONF",
    default=DEFAULT_CONF,
    show_default=True,
    help="The hook's configuration.",
)
@click.pass_context
def check(ctx: click.Context, strict: bool, as_json: bool, queue_conf: str) -> None:
    """Validate everything that serve would read."""
    with progress("reading everything"):
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


async def examine(config_path: str, queue_conf: str) -> CheckResults:
    """Read everything; what cannot be read is a problem like any other."""
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
        _lists(controls, control, findings)
    except ConfigError as e:
        findings.problems += e.problems
    try:
        rows, problems = await read_source(settings) or (Rows(), ())
        findings.problems += problems
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
        findings.add(path, f"[origin] there is no user {name!r} here", warning=True)


def _places(settings: Settings, findings: CheckResults) -> None:
    """The directories of the daemon, as far as the present user can tell."""
    service = settings.service
    sockets = os.path.dirname(settings.listen.socket)
    password = settings.mariadb.password_file
    if password and os.path.exists(password) and os.stat(password).st_mode & 0o007:
        findings.add(password, "[mariadb] password_file: everybody here can read it; chmod 600", warning=True)
    if os.path.isdir(service.control) and not os.access(service.control, os.R_OK | os.X_OK):
        findings.add(service.control, "[service] control: not readable for this user")
    for path, use in dict.fromkeys(((service.state, "[service] state"), (service.run, "[service] run"))):
        _writable(path, use, findings)
    if sockets != service.run:
        _writable(sockets, "[listen] socket", findings)
    if os.path.lexists(settings.listen.socket) and not stat.S_ISSOCK(os.lstat(settings.listen.socket).st_mode):
        findings.add(settings.listen.socket, "[listen] socket: something else than a socket is in its place")


def _writable(path: str, use: str, findings: CheckResults) -> None:
    if not os.path.lexists(path):
        findings.add(path, f"{use}: no such directory; the systemd unit makes it, otherwise: mkdir", warning=True)
    elif not os.path.isdir(path):
        findings.add(path, f"{use}: not a directory")
    elif not os.access(path, os.W_OK | os.X_OK):
        findings.add(path, f"{use}: not writable for this user; is it for the daemon's?", warning=True)


def _lists(controls: Controls, directory: str, findings: CheckResults) -> None:
    for name, text, parse in (
        ("badsignatures", controls.badsignatures, parse_signatures),
        ("badloadertypes", controls.badloadertypes, parse_loadertypes),
    ):
        if text is None:
            continue
        rules: Rules
        rules, problems = parse(text, os.path.join(directory, name))
        findings.problems += problems
        findings.counts[f"{name} rules"] = len(rules.rules)
        if not rules.rules:
            findings.add(os.path.join(directory, name), "no rules: nothing will be found by it", warning=True)


def _queue_conf(path: str, settings: Settings, findings: CheckResults) -> None:
    """The hook's own reading of it, where the hook is to be found."""
    try:
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        return  # means the built-in values
    except OSError as e:
        findings.add(path, f"cannot read it: {e.strerror}; the hook would defer all mail")
        return
    try:
        conf = read_conf(packaged_hook(None), Path(path))
    except (RefusedError, OSError, subprocess.SubprocessError) as e:
        findings.add(path, f"not examined: {e}", warning=True)
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
