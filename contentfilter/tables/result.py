"""Result rows of a database become a table: strictly, and with a problem for each row that is skipped.

Values come as the bytes that the server sent, and columns go by their names: ``address``, ``exempt`` and the options
of the table. A row that is not plain costs microseconds; a batch of plain ones, as most are, next to nothing.
"""

from collections.abc import Sequence
from functools import lru_cache

from contentfilter.errors import ConfigError, Problem
from contentfilter.files import ProblemCollector
from contentfilter.model import readable
from contentfilter.policy.addresses import EXEMPT, MAX_KEY, PLAIN_KEYS, parse_key
from contentfilter.policy.options import OPTIONS, format_options, parse_option
from contentfilter.tables.files import MAX_SIZE
from contentfilter.tables.rows import Table, damaged, short

# Types of result columns, from the protocol.
_TEXT = frozenset({15, 247, 249, 250, 251, 252, 253, 254})
_NUMBERS = frozenset({0, 1, 2, 3, 4, 5, 8, 9, 246})
_NULL = 6  # a constant NULL in a query of the administrator's own
_KINDS = {
    "address": ("text", _TEXT),
    "exempt": ("a number, 0 or 1", _NUMBERS),
    "virus": ("text", _TEXT),
    "spam": ("text", _TEXT),
    "score": ("a number or text", _NUMBERS | _TEXT),
    "reject_score": ("a number or text", _NUMBERS | _TEXT),
}

Columns = Sequence[bytes | None]


class Builder:
    """``begin`` with the columns, ``add`` the rows, then take ``table``, ``report`` and ``damage``."""

    def __init__(self, name: str) -> None:
        """``name``: of the table."""
        self.table: Table = {}
        self.report = ProblemCollector(f"{name} in the database")
        self._names = OPTIONS[name]
        self._size = self._skipped = 0
        self._order: list[int] = []  # the place in a row of each of the table's columns, -1 where there is none
        self._value = lru_cache(4096)(self._options)

    def begin(self, columns: Sequence[tuple[str, int]]) -> None:
        """``columns``: name and type of each. Raises ConfigError for what cannot be a table."""
        names = [name.lower() for name, _ in columns]
        known = ["address", "exempt", *map(readable, self._names)]
        for name, (_, kind) in zip(names, columns, strict=True):
            if name not in known:
                raise self._bad(f"unknown column {name!r}; known are {', '.join(known)}")
            expected, types = _KINDS[name]
            if kind not in types and kind != _NULL:
                raise self._bad(f"column {name!r} is of the wrong type; expected {expected}")
        if "address" not in names or len(set(names)) < len(names):
            raise self._bad("there must be a column 'address', and none twice")
        self._order = [names.index(name) if name in names else -1 for name in known]

    def add(self, batch: Sequence[Columns]) -> None:
        """Take some rows more. Raises ConfigError when it is too much."""
        first = self._order[0]
        others = [place for place in self._order[1:] if place >= 0]
        keys = [row[first] or b"" for row in batch]
        self._size += sum(map(len, keys))
        if self._size > MAX_SIZE:
            raise self._bad(f"more than {MAX_SIZE} bytes of addresses")
        if not any(row[at] not in (None, b"0", b"") for at in others for row in batch):
            text = b"\n".join(keys).lower()
            plain = dict.fromkeys(text.split(b"\n"), b"")
            sound = len(plain) == len(batch) and self.table.keys().isdisjoint(plain)  # no line end inside, none twice
            if sound and max(map(len, plain)) <= MAX_KEY and PLAIN_KEYS.fullmatch(text + b"\n"):
                self.table |= plain
                return
        for row in batch:
            self._add(row)

    def damage(self) -> tuple[Problem, ...]:
        """One problem if most rows were skipped; see :func:`read_table`."""
        text = damaged(self._skipped, len(self.table))
        return (Problem(self.report.path, 0, f"{text} The first: {self.report.problems()[0].text}"),) if text else ()

    def _add(self, row: Columns) -> None:
        address, exempt, *options = [row[place] if place >= 0 else None for place in self._order]
        if address is None:
            self.report.add(0, "a row whose address is NULL is skipped")
            self._skipped += 1
            return
        marked = address.startswith(EXEMPT)
        key, wrong = parse_key(address.removeprefix(EXEMPT))
        if wrong:
            self.report.add(0, f"{short(address)}: {wrong}. The row is skipped")
            self._skipped += 1
            return
        small = sum(len(option) for option in (exempt, *options) if option) <= 2 * MAX_KEY  # fit for the cache
        value, problems = (self._value if small else self._options)(exempt, *options)
        for text in problems:
            self.report.add(0, f"{short(address)}: {text}")
        value = EXEMPT if marked else value
        before = self.table.setdefault(key, value)
        if before != value:
            self.report.add(0, f"{short(address)} is there more than once, with different meanings", warning=True)
            if before == EXEMPT:  # better protected once too often
                self.table[key] = value

    def _bad(self, text: str) -> ConfigError:
        return ConfigError((Problem(self.report.path, 0, text),))

    def _options(self, exempt: bytes | None, *values: bytes | None) -> tuple[bytes, tuple[str, ...]]:
        """The row's value, and what is wrong with it."""
        if exempt == b"1":
            return EXEMPT, ()
        problems = []
        if exempt not in (None, b"0"):
            problems.append(f"exempt is {short(exempt)}; expected 0 or 1. The row is in force as if it were 0")
        good = {}
        for name, value in zip(self._names, values, strict=True):
            if not value:
                continue
            text, wrong = parse_option(name, value)
            if wrong:
                problems.append(f"{readable(name)} is {short(value)}; {wrong}. The row is in force without it")
            else:
                good[name] = text
        return format_options(good), tuple(problems)
