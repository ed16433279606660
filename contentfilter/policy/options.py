"""Options of a table row: actions and scores in place of the configuration's. Pure: bytes in, values out.

In clamavclients ``virus=``, in spamdclients ``spam=``, ``score=`` and ``reject_score=``. An action is one of
``mark``, ``remove``, ``reject`` and ``move:ADDRESS``. ``score`` is the number of spamd's points from which mail is
spam for these recipients, or one of H-Sphere's levels by name (domain-spec 2.4); ``reject_score`` the one from which
it is refused whatever the action, 0 for never. A value is checked once, when the table is loaded.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from contentfilter.model import readable
from contentfilter.policy.addresses import parse_key

VIRUS_OPTIONS = (b"virus",)
SPAM_OPTIONS = (b"spam", b"score", b"reject_score")
OPTIONS = {"clamavclients": VIRUS_OPTIONS, "spamdclients": SPAM_OPTIONS}
"""Names of the options of each table."""
ALL_OPTIONS = VIRUS_OPTIONS + SPAM_OPTIONS
LEVELS = {b"very-aggressive": 2, b"aggressive": 4, b"default": 5, b"normal": 7, b"relaxed": 10, b"permissive": 14}
MAX_SCORE = 10_000

_ACTIONS = (b"mark", b"remove", b"reject")
_NUMBER = re.compile(rb"[0-9]{1,5}(?:\.[0-9]{1,12})?")


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a recipient's rows. Empty or None: as configured."""

    virus: str = ""
    virus_to: bytes = b""  # the address that ``move`` delivers to
    spam: str = ""
    spam_to: bytes = b""
    score: float | None = None
    reject_score: float | None = None


DEFAULTS = Options()


def parse_option(name: bytes, value: bytes) -> tuple[bytes, str]:
    """The canonical value, or what is wrong with it: one of the two is empty."""
    folded = value.lower()
    if name in (b"virus", b"spam"):
        if folded in _ACTIONS:
            return folded, ""
        if not folded.startswith(b"move:"):
            return b"", "expected mark, remove, reject or move:ADDRESS"
        key, wrong = parse_key(value[5:])
        if wrong or key.startswith((b"@", b".")) or b"@" not in key:
            return b"", "move: needs the address of a mailbox"
        return b"move:" + value[5:], ""
    if name == b"score" and folded in LEVELS:
        return b"%d" % LEVELS[folded], ""
    if name not in SPAM_OPTIONS:
        return b"", "unknown option"
    number = float(value) if _NUMBER.fullmatch(value) else -1.0
    if number > MAX_SCORE or number < 0 or (number == 0 and name == b"score"):
        levels = f" or one of {', '.join(map(readable, LEVELS))}" if name == b"score" else ""
        return b"", f"expected a number of points up to {MAX_SCORE}{levels}"
    return f"{number:.8g}".encode(), ""


def format_options(values: Mapping[bytes, bytes]) -> bytes:
    """The options of a row in their canonical form; ``values`` are canonical, too."""
    return b" ".join([name + b"=" + values[name] for name in ALL_OPTIONS if name in values])


@lru_cache(4096)  # parsed once for each text, not for each message: the rows of a table have few different ones
def read_options(clamav: bytes, spamd: bytes) -> Options:
    """The options of a recipient's two rows from their canonical form. Anything else is ignored."""
    if not (clamav or spamd):
        return DEFAULTS
    words = _words(clamav)
    virus, virus_to = _action(words.get(b"virus", b""))
    words = _words(spamd)
    spam, spam_to = _action(words.get(b"spam", b""))
    return Options(virus, virus_to, spam, spam_to, _number(words.get(b"score")), _number(words.get(b"reject_score")))


def _words(text: bytes) -> dict[bytes, bytes]:
    pairs = (word.partition(b"=") for word in text.split())
    return {name: value for name, _, value in pairs}


def _action(value: bytes) -> tuple[str, bytes]:
    name, _, address = value.partition(b":")
    return (readable(name), address) if name in _ACTIONS or (name == b"move" and address) else ("", b"")


def _number(value: bytes | None) -> float | None:
    return float(value) if value is not None and _NUMBER.fullmatch(value) else None
