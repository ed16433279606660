"""Targets: contents of files. Tables, controls, rule lists, settings, the quarantine's sidecars, queue.conf."""

import json
import os
import re

import msgspec
from fuzz.hook_library import hook_parsers

from contentfilter.config.controls import PARAMETERS, _Taken
from contentfilter.config.load import read_settings
from contentfilter.errors import Problem, QuarantineError
from contentfilter.policy.options import read_options
from contentfilter.scanners.signatures.engine import Engine, parse_loadertypes, parse_signatures
from contentfilter.store import sidecar as sidecar_format
from contentfilter.tables.owners import parse_owners
from contentfilter.tables.rows import TABLES, parse_table, row_text


def readable_problems(problems: tuple[Problem, ...]) -> None:
    """Texts for a log or a terminal: one line each, bounded."""
    for problem in problems:
        assert problem.text.isprintable(), problem.text[:200]
        assert len(problem.text) < 2000


def table(data: bytes) -> None:
    """Rows that were read are written and read again, without a complaint."""
    for name in TABLES:
        rows, problems = parse_table(data, name)
        readable_problems(problems)
        text = b"".join(row_text(key, value) + b"\n" for key, value in rows.items())
        again, complaints = parse_table(text, name)
        assert again == rows
        assert not complaints
        for value in rows.values():
            read_options(value, value)
    owners, problems = parse_owners(data, "spamprefs")
    readable_problems(problems)
    assert all(b"@" in owner for owner in owners)


def controls(data: bytes) -> None:
    """control/options: every value within its limits, whatever the file contains."""
    taken = _Taken()
    readable_problems(taken.options("options", data))
    for parameter in PARAMETERS:
        value = taken.values[parameter.name]
        assert type(value) is type(parameter.default)
        assert isinstance(value, str) or parameter.smallest <= value <= parameter.largest


def rules(data: bytes) -> None:
    """badsignatures and badloadertypes: rules that compile and scan."""
    signatures, first = parse_signatures(data, "badsignatures")
    loaders, second = parse_loadertypes(data, "badloadertypes")
    readable_problems(first + second)
    for mode in ("mime", "compatible"):
        Engine(signatures, loaders, mode).scan(b"Content-Transfer-Encoding: base64\n\n" + data)


def toml(data: bytes) -> None:
    """contentfilter.toml: problems with a line, never an exception; what has no problem can be used."""
    fd = os.memfd_create("contentfilter.toml")
    try:
        os.write(fd, data)
        settings, problems = read_settings(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    readable_problems(problems)
    msgspec.to_builtins(settings)


def sidecar(data: bytes) -> None:
    """One that is damaged or forged is refused; any other is shown and searched without a surprise."""
    found = re.search(rb'"incident": ?"([A-Za-z0-9][A-Za-z0-9_-]{0,63})"', data)
    incident = found[1].decode("ascii") if found else "a"
    try:
        read = sidecar_format.parse(incident, data)
    except QuarantineError as error:
        if not str(error).startswith(incident):
            raise
        return
    assert sidecar_format.valid_incident(incident) or not read.incident
    assert len(read.withheld) == len(read.withheld_from)
    assert sidecar_format.parse(incident, msgspec.json.encode(read)) == read
    json.dumps(sidecar_format.plain(read))
    assert sidecar_format.Search(incident=incident).matches(read)
    sidecar_format.Search("a", "*b?[", "c*", "d", "e").matches(read)


def queue_conf(data: bytes) -> None:
    """The hook's configuration: in force and the same when printed and read again, or refused with its line."""
    text = data.replace(b"\0", b"")[:16384]
    status, said = hook_parsers().conf(text)
    if status:
        assert status == 55
        assert re.match(r"queue\.conf:[0-9]+: ", said)
        return
    lines = "".join(line + "\n" for line in said.split("\n") if not line.endswith("queue "))
    assert hook_parsers().conf(lines.encode("utf-8", "surrogateescape")) == (0, said)
