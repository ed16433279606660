"""Owners of SpamAssassin preferences: who has some, from the list control/spamprefs or from SpamAssassin's own table.

An owner is a mailbox, ``user@domain``, or a domain, ``@domain``, whose preferences its other mailboxes share. spamd is
asked once for each owner among a message's recipients, so this must be known before. What the preferences are is
spamd's business.
"""

from collections.abc import Sequence

from contentfilter.errors import ConfigError, Problem
from contentfilter.files import ProblemCollector
from contentfilter.model import readable
from contentfilter.policy.addresses import EVERYBODY, EXEMPT, PLAIN_KEYS, parse_key
from contentfilter.tables.rows import Table, parse_table, short

PREFS = "spamprefs"
"""The list's name in the control directory."""

_EVERYBODYS = frozenset({b"@global", b"$global"})
_DOMAINS = (b"@~", b"%@", b"%")  # how panels write the preferences of a domain, beside @domain
_MAX_SIZE = 256 << 20  # bytes of all names


def parse_owners(text: bytes, path: str) -> tuple[Table, tuple[Problem, ...]]:
    """The owners in a list of one per line, with comments as in the tables, and what is wrong with it."""
    table, problems = parse_table(text, path, ())
    return table, (*problems, *only_owners(table, path))


def only_owners(table: Table, path: str) -> tuple[Problem, ...]:
    """Remove from ``table`` the keys that are no owners, and report them."""
    report = ProblemCollector(path)
    for key in [key for key, value in table.items() if value == EXEMPT or key == EVERYBODY or key.startswith(b".")]:
        sign = "!" if table.pop(key) == EXEMPT else ""
        report.add(0, f"{sign}{readable(key)}: an owner is user@domain or @domain. The line is skipped")
    return report.problems()


class OwnerBuilder:
    """The user names of SpamAssassin's table become owners: ``add`` batches, then take ``keys`` and ``report``."""

    def __init__(self) -> None:
        self.keys: dict[bytes, None] = {}
        self.report = ProblemCollector("preferences in the database")
        self._size = 0

    def begin(self, columns: Sequence[tuple[str, int]]) -> None:
        """Raises ConfigError for anything but a single column."""
        if len(columns) != 1:
            raise self._bad(f"expected one column, the user name, not {len(columns)}")

    def add(self, batch: Sequence[Sequence[bytes | None]]) -> None:
        """Take some names more. Raises ConfigError when it is too much."""
        names = [row[0].lower() for row in batch if row[0]]
        self._size += sum(map(len, names))
        if self._size > _MAX_SIZE:
            raise self._bad(f"more than {_MAX_SIZE} bytes of user names")
        text = b"\n".join((*names, b""))
        if PLAIN_KEYS.fullmatch(text):
            self.keys |= dict.fromkeys(text.split(b"\n")[:-1])
            return
        for name in names:
            self._add(name)

    def _add(self, name: bytes) -> None:
        if name in _EVERYBODYS:
            return
        sign = next((sign for sign in _DOMAINS if name.startswith(sign)), b"")
        key, wrong = parse_key(b"@" + name.removeprefix(sign) if sign else name)
        if not wrong and (key == EVERYBODY or key.startswith(b".") or not (sign or b"@" in name)):
            wrong = "neither an address nor a domain"
        if wrong:
            self.report.add(0, f"{short(name)}: {wrong}; nobody's preferences", warning=True)
        else:
            self.keys[key] = None

    def _bad(self, text: str) -> ConfigError:
        return ConfigError((Problem(self.report.path, 0, text),))
