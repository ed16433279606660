"""H-Sphere's parameters from qmail's control directory (domain-spec 2.1, 2.3, 6.1, 6.2).

``control/NAME`` beats a line in ``control/options``, which beats the default. In options a line is
``name value``, ``name=value`` or ``name: value``; ``#`` starts a comment, at the start of a line or after a blank; the
last line of a name wins. A file of its own holds the value in its first line; blanks behind it are cut.
Numbers are read as qmail reads them: digits count up to the first other character. A value that is no number is an
error: a reload is refused, and a start uses the value that would hold without it. What only looks odd is a warning.
"""

import difflib
import os
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

from contentfilter.errors import ConfigError, Problem
from contentfilter.files import FileAccess, ProblemCollector, first_line, plain_text
from contentfilter.model import readable

SIZE_MAX = 1 << 20
OPTIONS = "options"
EXPIRED = ("badurls", "urlscnt")

LISTS = ("badsignatures", "badloadertypes")

_COMMENT = re.compile(rb"(?:^|[ \t])#")
_OPTION = re.compile(rb"([A-Za-z0-9_.-]+)(?:[ \t]*[=:][ \t]*|[ \t]+|\Z)(.*)", re.DOTALL)
_DIGITS = re.compile(rb"[0-9]+")
_FACILITY = re.compile(rb"LOG_LOCAL[0-7]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One of H-Sphere's parameters: its default and what a value may be."""

    name: str
    default: Any
    largest: int = 2**63 - 1
    smallest: int = 0
    help: str = ""


PARAMETERS = (
    Parameter("clamglobal", False, 1, help="virus check for all mail, whatever clamavclients says"),
    Parameter("spamglobal", False, 1, help="spam check for all mail, whatever spamdclients says"),
    Parameter("skipcachk", 0, 2, help="no virus check for: 1 authenticated clients, 2 those and relays"),
    Parameter("skipsachk", 0, 2, help="no spam check for: 1 authenticated clients, 2 those and relays"),
    Parameter("samsgsize", 0, help="largest message for spamd, in bytes; 0: only the safety cap"),
    Parameter("sanetcheck", False, 1, help="spamd's network tests (a matter of how spamd is started)"),
    Parameter("spamdchildren", 10, 10_000, 1, "concurrent requests to spamd"),
    Parameter("chksignature", False, 1, help="base64 signatures of Windows programs"),
    Parameter("chkloadertype", False, 1, help="base64 loader types"),
    Parameter("xoriginatingip", True, 1, help="adds X-Originating-IP"),
    Parameter("xenveloptoheader", False, 1, help="adds X-Envelope-To where one recipient travels alone"),
    Parameter("databytes", 0, help="largest message, in bytes; 0: no limit"),
    Parameter("maxrecipients", 0, help="recipients of one message; 0: no limit"),
    Parameter("smtplog", 0, 2, help="the log tells the story of: 0 no message, 1 those not simply delivered, 2 all"),
    Parameter("sysfacility", "", help="facility of a log in syslog, LOG_LOCAL0 to LOG_LOCAL7; empty: LOG_MAIL"),
)
_BY_NAME = {parameter.name: parameter for parameter in PARAMETERS}


@dataclass(frozen=True, slots=True)
class Controls:
    """All parameters with their values in force, and where each was set (``""``: the default)."""

    values: dict[str, Any]
    places: dict[str, str]
    badsignatures: bytes | None = None  # the file's text; None where there is no file
    badloadertypes: bytes | None = None


async def read_controls(directory: str, files: FileAccess | None = None) -> tuple[Controls, tuple[Problem, ...]]:
    """The parameters in ``directory`` and what is odd there. Raises ConfigError for files that cannot be read."""
    files = files or FileAccess()
    taken = _Taken()
    problems: list[Problem] = []
    unreadable: list[Problem] = []

    async def content(name: str) -> tuple[str, bytes | None]:
        path = os.path.join(directory, name)
        try:
            data, state = await files.read(path, SIZE_MAX)
        except ConfigError as e:
            unreadable.extend(e.problems)
            return path, None
        report = ProblemCollector(path)
        try:
            text = plain_text(data, report)
        except ConfigError as e:
            unreadable.extend(e.problems)
            return path, None
        if name != OPTIONS:  # which other programs read, too
            problems.extend(report.problems())
        return path, text if state.size >= 0 else None

    if not await files.run(directory, partial(os.path.isdir, directory)):
        problems.append(Problem(directory, 0, "no such directory: all parameters have their defaults", warning=True))
    path, data = await content(OPTIONS)
    problems += taken.options(path, data or b"")
    for name in (*_BY_NAME, *EXPIRED):
        path, data = await content(name)
        if data is not None:
            report = ProblemCollector(path)
            taken.value(name, first_line(data), path, 1, report)
            problems += report.problems()
    lists = {name: (await content(name))[1] for name in LISTS}
    if unreadable:
        raise ConfigError(tuple(dict.fromkeys(unreadable)))  # one that does not answer is an error for all after it
    return Controls(taken.values, taken.places, **lists), tuple(problems)


class _Taken:
    """The values in force so far, and where they were set."""

    def __init__(self) -> None:
        self.values = {parameter.name: parameter.default for parameter in PARAMETERS}
        self.places = dict.fromkeys(self.values, "")

    def options(self, path: str, data: bytes) -> tuple[Problem, ...]:
        """Take the lines of control/options that are ours; the rest belongs to other programs."""
        report = ProblemCollector(path)
        for number, line in enumerate(data.split(b"\n"), 1):
            text = _COMMENT.split(line, maxsplit=1)[0].strip(b" \t\r")
            if not text:
                continue
            match = _OPTION.fullmatch(text)
            if match is None:
                report.add(number, f"{_shown(text)} is not of the form: name value", warning=True)
                continue
            name = readable(match[1]).lower()
            if name in self.values or name in EXPIRED:
                self.value(name, match[2], path, number, report)
            elif near := difflib.get_close_matches(name[:40], _BY_NAME, n=1, cutoff=0.85):
                report.add(number, f"unknown parameter {_shown(match[1])}; did you mean {near[0]!r}?", warning=True)
        return report.problems()

    def value(self, name: str, raw: bytes, path: str, line: int, report: ProblemCollector) -> None:
        """Put a value in force, or report it."""
        if name in EXPIRED:
            report.add(line, f"{name} has expired: its receiver is gone. It does nothing", warning=True)
            return
        parameter, raw = _BY_NAME[name], raw.strip(b" \t")
        if not raw and not isinstance(parameter.default, str):
            report.add(line, f"{name}: without a value, which changes nothing", warning=True)
            return
        if isinstance(parameter.default, str):
            if raw and not _FACILITY.fullmatch(raw):
                report.add(line, f"{name}: {_shown(raw)} is not LOG_LOCAL0 to LOG_LOCAL7; the value is not used")
                return
            self.values[name] = raw.decode("ascii")
        else:
            digits = _DIGITS.match(raw)
            number = int(digits[0]) if digits and len(digits[0]) < 19 else -1
            if not parameter.smallest <= number <= parameter.largest:
                allowed = f" from {parameter.smallest} to {parameter.largest}" if parameter.largest < 2**63 - 1 else ""
                report.add(line, f"{name}: {_shown(raw)} is not a number{allowed}; the value is not used")
                return
            if digits and digits.end() < len(raw):
                report.add(line, f"{name}: {_shown(raw)} is read as {number}, as qmail does", warning=True)
            self.values[name] = bool(number) if isinstance(parameter.default, bool) else number
        self.places[name] = f"{path}:{line}"


def shown_value(value: int | str) -> str:
    """A value as in a control file: booleans are 0 and 1."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def _shown(raw: bytes) -> str:
    return repr(readable(raw[:40]) + ("..." if len(raw) > 40 else ""))
