"""``contentfilter showctl``: H-Sphere's parameters in the format of qmail-showctl, and the size of the tables.

One line each: ``name: (Default.) value`` for an unset parameter, otherwise ``name: value``. ``?`` replaces unprintable
characters.
"""

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

import click

from contentfilter.config.controls import LISTS, PARAMETERS, Controls, read_controls, shown_value
from contentfilter.config.load import load_settings
from contentfilter.errors import Problem
from contentfilter.model import readable
from contentfilter.scanners.signatures.rules import (
    Mode,
    default_loadertypes,
    default_signatures,
    parse_loadertypes,
    parse_signatures,
)
from contentfilter.tables.files import load_tables
from contentfilter.tables.rows import TABLES, Rows


@dataclass(frozen=True, slots=True)
class Shown:
    """One line. ``place`` is empty for a default; ``value`` is that of a parameter, or a number of rows."""

    name: str
    value: bool | int | str
    place: str
    text: str


@click.command()
@click.option("-v", "--verbose", is_flag=True, help="Also print where each value is set, and what it does.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def showctl(config_path: str, verbose: bool, as_json: bool) -> None:
    """Print H-Sphere's parameters in the format of qmail-showctl."""
    settings = load_settings(config_path)
    directory = settings.service.control
    controls, problems = asyncio.run(read_controls(directory))
    rows, more = asyncio.run(load_tables(directory))
    lines = [*_parameters(controls), *_tables(rows), *_lists(controls, directory, settings.signatures.mode)]
    if as_json:
        shown = {line.name: {"value": line.value, "default": not line.place, "place": line.place} for line in lines}
        click.echo(json.dumps({"directory": directory, "controls": shown}, indent=2))
        return
    helps = {parameter.name: parameter.help for parameter in PARAMETERS}
    for line in lines:
        text = f"{line.name}: {'' if line.place else '(Default.) '}{line.text}".rstrip()
        click.echo(readable(text.encode()))
        if verbose and line.place:
            click.echo(f"    {readable(os.fsencode(line.place))}")
        if verbose and line.name in helps:
            click.echo(f"    {helps[line.name]}")
    _count(problems + more)


def _parameters(controls: Controls) -> Iterator[Shown]:
    for parameter in PARAMETERS:
        value = controls.values[parameter.name]
        yield Shown(parameter.name, value, controls.places[parameter.name], shown_value(value))


def _tables(rows: Rows) -> Iterator[Shown]:
    for name, table, source in zip(TABLES, (rows.clamav, rows.spamd), rows.sources, strict=False):
        there = source.size >= 0
        text = _many(len(table), "row") if there else "no file; no recipients"
        yield Shown(name, len(table), source.path if there else "", text)


def _lists(controls: Controls, directory: str, mode: Mode) -> Iterator[Shown]:
    texts = (controls.badsignatures, controls.badloadertypes)
    parsers = (parse_signatures, parse_loadertypes)
    defaults = (default_signatures, default_loadertypes)
    for name, text, parse, default in zip(LISTS, texts, parsers, defaults, strict=True):
        path = os.path.join(directory, name)
        rules = default() if text is None else parse(text, path, mode)[0]
        built_in = ", built in" if text is None else ""
        yield Shown(name, len(rules.rules), "" if text is None else path, _many(len(rules.rules), "rule") + built_in)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _count(problems: tuple[Problem, ...]) -> None:
    if problems:
        click.echo(
            f"contentfilter: {_many(len(problems), 'problem')} in these files; run: contentfilter check", err=True
        )
