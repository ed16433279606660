"""Parser of ``contentfilter.toml``: strict, and it reports all problems of the file, each with its line.

A missing file at the default place means the built-in defaults; anywhere else it is an error. What can only be
seen from several values together (a heartbeat slower than the patience for it) is a problem too.
"""

import difflib
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from typing import Any, get_args

import msgspec
from msgspec import inspect

from contentfilter.config import DEFAULT_PATH
from contentfilter.config.keys import listens
from contentfilter.endpoint import Address, parse_listen
from contentfilter.errors import ConfigError, Problem
from contentfilter.files import read_file
from contentfilter.policy.failure import complaints
from contentfilter.policy.options import SPAM_OPTIONS, VIRUS_OPTIONS
from contentfilter.settings import MariaDbSettings, Settings, SpamdSettings

MAX_SIZE = 1 << 20
MAX_ROWS = 100  # of an array of tables
MAX_SOCKET_PATH = 107  # sockaddr_un holds 108 bytes with the NUL
SMTP_PATIENCE = 300.0  # seconds that clients wait in practice after the final dot, RFC 5321 4.5.3.2.6 says 600

Where = dict[tuple[str, ...], int]
"""Path of a section or key -> its line. Rows of an array of tables are counted: ("failure", "rule", "1", "cause")."""


def load_settings(path: str, *, must_exist: bool | None = None) -> Settings:
    """The settings of the file. Raises ConfigError with all problems that forbid to use it.

    ``must_exist``: None lets only the default file be missing.
    """
    settings, problems = read_settings(path, must_exist=must_exist)
    errors = tuple(problem for problem in problems if not problem.warning)
    if errors:
        raise ConfigError(errors)
    return settings


def read_settings(path: str, *, must_exist: bool | None = None) -> tuple[Settings, tuple[Problem, ...]]:
    """As :func:`load_settings`, but returns all problems, warnings too; what was wrong has its default."""
    if must_exist is None:
        must_exist = path != DEFAULT_PATH
    try:
        data, state = read_file(path, MAX_SIZE)
    except ConfigError as e:
        return Settings(), e.problems
    if state.size < 0:
        return Settings(), (Problem(path, 0, "there is no such file"),) if must_exist else ()
    try:
        text = data.decode("utf-8")
        document = tomllib.loads(text)
    except UnicodeDecodeError as e:
        return Settings(), (Problem(path, data.count(b"\n", 0, e.start) + 1, "not UTF-8"),)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        return Settings(), (_syntax_error(path, text, str(e)),)
    reader = _Reader(path, _lines(text))
    settings = reader.settings(document)
    reader.cross_check(settings)
    return settings, tuple(sorted(reader.problems, key=lambda problem: problem.line))


def _syntax_error(path: str, text: str, said: str) -> Problem:
    place = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", said)
    if place is None:
        return Problem(path, 0, f"not TOML: {said}")
    line = int(place[1] or text.rstrip("\n").count("\n") + 1)
    column = f", column {place[2]}" if place[2] else ", at the end of the file"
    return Problem(path, line, f"not TOML: {said[: place.start()]}{column}")


class _Reader:
    """Turns the parsed document into Settings and collects what is wrong with it."""

    def __init__(self, path: str, where: Where) -> None:
        self.problems: list[Problem] = []
        self._path = path
        self._where = where

    def _note(self, key: tuple[str, ...], text: str, *, warning: bool = False) -> None:
        line = next((self._where[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self._where), 0)
        self.problems.append(Problem(self._path, line, text, warning))

    def settings(self, document: dict[str, Any]) -> Settings:
        sections = {}
        known = {field.name: field.type for field in msgspec.structs.fields(Settings)}
        for name, values in document.items():
            if name not in known:
                kind = "section" if isinstance(values, dict) else "key"
                owners = [f"[{s}]" for s, t in known.items() if name in t.__struct_fields__]
                hint = f"; it belongs into {' or '.join(owners)}" if owners else _did_you_mean(name, known)
                self._note((name,), f"unknown {kind} {name!r}{hint}")
            elif not isinstance(values, dict):
                self._note((name,), f"{name!r} is a section; write [{name}] on a line of its own")
            else:
                sections[name] = known[name](**self._section((name,), f"[{name}]", known[name], values))
        return Settings(**sections)

    def _section(
        self, section: tuple[str, ...], shown: str, struct: type[msgspec.Struct], values: dict[str, Any]
    ) -> dict[str, Any]:
        """The values that are right; the others are noted. ``shown``: the section as the file names it."""
        good = {}
        known = {field.name: field.type for field in msgspec.structs.fields(struct)}
        for key, value in values.items():
            if key not in known:
                self._note((*section, key), f"unknown key {key!r} in {shown}{_did_you_mean(key, known)}")
                continue
            row = _row_type(known[key])
            if row is not None and isinstance(value, list) and all(isinstance(each, dict) for each in value):
                good[key] = self._rows((*section, key), row, value)
                continue
            try:
                good[key] = msgspec.convert(value, known[key])
                wrong = isinstance(value, float) and not math.isfinite(value)
            except msgspec.ValidationError:
                wrong = True
            if wrong:
                expected = _in_words(inspect.type_info(known[key]))
                self._note((*section, key), f"{shown} {key}: expected {expected}, got {_shown(value)}")
                good.pop(key, None)
        return good

    def _rows(
        self, section: tuple[str, ...], struct: type[msgspec.Struct], rows: list[dict[str, Any]]
    ) -> tuple[msgspec.Struct, ...]:
        """An array of tables; none of it when something is wrong in a row."""
        shown = f"[[{'.'.join(section)}]]"
        if len(rows) > MAX_ROWS:
            self._note(section, f"{shown}: {len(rows)} of them; at most {MAX_ROWS} are read")
            return ()
        found = []
        for number, values in enumerate(rows, 1):
            place = (*section, str(number))
            good = self._section(place, shown, struct, values)
            missing = [f.name for f in msgspec.structs.fields(struct) if f.required and f.name not in values]
            for name in missing:
                self._note(place, f"{shown} {name}: it is missing")
            if not missing and len(good) == len(values):
                found.append(struct(**good))
        return tuple(found) if len(found) == len(rows) else ()

    def cross_check(self, settings: Settings) -> None:
        """Check values against each other, and limits that types cannot express."""
        service = settings.service
        if service.heartbeat * 2 > service.stuck_after:
            self._note(
                ("service", "stuck_after"),
                f"[service] stuck_after: {service.stuck_after:g} s is less than two heartbeats of "
                f"{service.heartbeat:g} s; healthy workers would be replaced",
            )
        if service.budget > SMTP_PATIENCE:
            text = f"[service] budget: {service.budget:g} s; many SMTP clients give up after {SMTP_PATIENCE:g} s"
            self._note(("service", "budget"), text, warning=True)
        for name, scanner in (("clamd", settings.clamd), ("spamd", settings.spamd)):
            if scanner.connect_timeout > scanner.timeout:
                text = f"[{name}] connect_timeout: longer than the whole time-out of {scanner.timeout:g} s"
                self._note((name, "connect_timeout"), text, warning=True)
            if scanner.timeout >= service.budget:
                text = f"[{name}] timeout: [service] budget ends everything after {service.budget:g} s"
                self._note((name, "timeout"), text, warning=True)
            self._backends(name, scanner.backends)
        for section, key, path in (
            ("listen", "socket", settings.listen.socket),
            ("service", "run", f"{service.run}/control.sock"),
            ("service", "state", service.state),
            ("service", "control", service.control),
            ("canary", "conf", settings.canary.conf),
            ("canary", "hook", settings.canary.hook or "/"),
        ):
            self._absolute(section, key, path, socket=section == "listen" or key == "run")
        try:
            parse_listen(settings.http.listen)
        except ValueError as e:
            self._note(("http", "listen"), f"[http] listen: {e}")
        try:
            listens(settings.events.listen)
        except ValueError as e:
            self._note(("events", "listen"), f"[events] listen: {e}")
        for section, keys, value in (
            ("spamd", ("tls_ca", "tls_cert", "tls_key"), settings.spamd),
            ("events", ("key", "clients"), settings.events),
        ):
            for key in keys:
                if path := getattr(value, key):
                    self._absolute(section, key, path, socket=False)
        self._tls(settings.spamd)
        self._mariadb(settings.mariadb)
        for wrong in complaints(settings.failure):
            text = f"[[failure.rule]] {wrong.number}: {wrong.text}"
            self._note(("failure", "rule", str(wrong.number)), text, warning=wrong.warning)
        extension = settings.tables.extension
        if not re.fullmatch(r"[!#-/=?^_{-~]?", extension) or extension == ".":
            text = f'[tables] extension: {extension!r} cannot separate an extension; usual are "-" and "+"'
            self._note(("tables", "extension"), text)
        tag = settings.spamd.subject_tag
        if not tag.isprintable() or len(tag) > 100:
            self._note(("spamd", "subject_tag"), "[spamd] subject_tag: at most 100 printable characters")

    def _tls(self, spamd: SpamdSettings) -> None:
        if spamd.tls_key and not spamd.tls_cert:
            self._note(("spamd", "tls_key"), "[spamd] tls_key: a key needs its certificate, tls_cert")
        if not spamd.tls_name.isascii() or not spamd.tls_name.isprintable() or spamd.tls_name.startswith("."):
            self._note(("spamd", "tls_name"), "[spamd] tls_name: expected a host name")
        secure = any(backend.startswith("tls:") for backend in spamd.backends)
        for key in ("tls_ca", "tls_cert", "tls_name"):
            if getattr(spamd, key) and not secure:
                text = f"[spamd] {key}: has no effect; no backend is tls:host:port"
                self._note(("spamd", key), text, warning=True)

    def _mariadb(self, db: MariaDbSettings) -> None:
        for key, options in (("clamav_columns", VIRUS_OPTIONS), ("spamd_columns", SPAM_OPTIONS)):
            known = ["address", "exempt", *(option.decode("ascii") for option in options)]
            meanings = [entry.partition("=")[0] for entry in getattr(db, key)]
            if not {"address"} <= set(meanings) <= set(known) or len(set(meanings)) < len(meanings):
                text = f"expected {', '.join(known)}, each at most once as NAME or NAME=column, address always"
                self._note(("mariadb", key), f"[mariadb] {key}: {text}")
        for key, path in (("socket", db.socket), ("password_file", db.password_file)):
            if path:
                self._absolute("mariadb", key, path, socket=key == "socket")
        if db.socket and db.tls != "off":
            self._note(("mariadb", "tls"), "[mariadb] tls: over a Unix socket there is none; leave it off")
        if not db.socket and db.tls == "off" and db.host not in ("localhost", "127.0.0.1", "::1"):
            text = f"[mariadb] tls: off; anybody between this machine and {db.host} can change who is protected"
            self._note(("mariadb", "host"), text, warning=True)

    def _backends(self, section: str, backends: tuple[str, ...]) -> None:
        for backend in backends:
            try:
                if Address.parse(backend).tls and section == "clamd":
                    text = "clamd speaks no TLS; use tcp: in a private network or a tunnel (docs/fleet.md)"
                    self._note((section, "backends"), f"[clamd] backends: {backend!r}: {text}")
            except ValueError as e:
                self._note((section, "backends"), f"[{section}] backends: {e}")
        if len(set(backends)) < len(backends):
            self._note((section, "backends"), f"[{section}] backends: an address is repeated", warning=True)

    def _absolute(self, section: str, key: str, path: str, *, socket: bool) -> None:
        if not path.startswith("/") or "\0" in path:
            self._note((section, key), f"[{section}] {key}: expected an absolute path, got {_shown(path)}")
        elif socket and len(path.encode()) > MAX_SOCKET_PATH:
            text = f"[{section}] {key}: {path} has {len(path.encode())} bytes; a socket's path has at most"
            self._note((section, key), f"{text} {MAX_SOCKET_PATH}")


def _did_you_mean(name: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _row_type(field: Any) -> type[msgspec.Struct] | None:
    """The Struct of which a field holds a list, if it does."""
    kinds = get_args(field)
    return kinds[0] if kinds and isinstance(kinds[0], type) and issubclass(kinds[0], msgspec.Struct) else None


def _in_words(kind: inspect.Type) -> str:
    """Describe the values that a field takes."""
    match kind:
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return "a whole number" + _range(kind)
        case inspect.FloatType():
            return "a number" + _range(kind)
        case inspect.LiteralType():
            return "one of " + ", ".join(f'"{value}"' for value in kind.values)
        case inspect.UnionType(types=(inspect.LiteralType() as one, inspect.VarTupleType())):
            return f"{_in_words(one)}, or a list of them"
        case inspect.VarTupleType(item_type=inspect.StructType()):
            return "a list of tables"
        case inspect.VarTupleType():
            return f"a list of {_in_words(kind.item_type).removeprefix('a ')}s"
        case inspect.StrType(pattern="^0[0-7]{3}$"):
            return 'a file mode as a string, such as "0660"'
        case inspect.StrType(max_length=int(most)):
            return f"a string of at most {most} character" + ("" if most == 1 else "s")
    return "a string"


def _range(kind: inspect.IntType | inspect.FloatType) -> str:
    low = kind.ge if kind.ge is not None else kind.gt
    high = kind.le if kind.le is not None else kind.lt
    words = []
    if low is not None:
        words.append(f"{'>' if kind.ge is None else '>='} {low:g}")
    if high is not None:
        words.append(f"{'<' if kind.le is None else '<='} {high:g}")
    return " " + " and ".join(words) if words else ""


def _shown(value: object) -> str:
    """A value of the file, for a message."""
    text = repr(value)
    match value:
        case bool():
            return str(value).lower()
        case str():
            text = 'a string "' + value.encode("unicode_escape").decode("ascii") + '"'
        case list():
            text = "a list " + text
        case dict():
            return "a section"
    return text if len(text) <= 80 else text[:77] + "..."


_HEADER = re.compile(r"[ \t]*\[(\[?)([^\[\]\n]*)\]\]?")
_KEY = re.compile(
    r"[ \t]*((?:[\w-]+|\"[^\"\n]*\"|'[^'\n]*')(?:[ \t]*\.[ \t]*(?:[\w-]+|\"[^\"\n]*\"|'[^'\n]*'))*)[ \t]*="
)
_PART = re.compile(r"[\w-]+|\"[^\"]*\"|'[^']*'")
_TOKEN = re.compile(
    r'#[^\n]*|"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|[\[\]{}\n]|[^#"\'\[\]{}\n]+',
    re.DOTALL,
)


def _lines(text: str) -> Where:
    """The line of each section and key. The text is known to be TOML, so this need not be strict."""
    where: Where = {}
    rows: Counter[tuple[str, ...]] = Counter()
    section: tuple[str, ...] = ()
    for start, line in _statements(text):
        if header := _HEADER.match(text, start):
            section = _parts(header[2])
            where.setdefault(section, line)
            if header[1]:
                rows[section] += 1
                section = (*section, str(rows[section]))
                where[section] = line
        elif key := _KEY.match(text, start):
            path = (*section, *_parts(key[1]))
            for n in range(len(section) + 1, len(path) + 1):
                where.setdefault(path[:n], line)
    return where


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in _PART.findall(dotted))


def _statements(text: str) -> Iterator[tuple[int, int]]:
    """Offset and line of each statement: strings and brackets hold several lines together."""
    start, line, depth, begun = 0, 1, 0, 1
    for token in _TOKEN.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        line += token[0].count("\n")
        if token[0] == "\n" and depth == 0:
            yield start, begun
            start, begun = token.end(), line
    yield start, begun
