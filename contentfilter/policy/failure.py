"""Failure table: the action for a scanner's fault, for each scanner, cause and origin.

A fault never refuses a message permanently. It defers it, or lets it pass marked *unchecked*. Bounces
from qmail-send always pass: a deferral would make qmail-send retry for ever (domain-spec 1.3).

Theory. The table is filled in layers, and later layers overwrite earlier ones: the keys of ``[failure]``, then its
rules, those that name fewer columns first, then the fixed rules. So the most specific one wins. Rules that name the
same number of columns must not disagree; :func:`complaints` finds those that do, and those without effect.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from types import MappingProxyType

from contentfilter.errors import Cause
from contentfilter.model import OriginKind, Scanner
from contentfilter.settings import FailureSettings, FaultAction, FaultRule, Settings

FailureKey = tuple[Scanner, Cause, OriginKind]


@dataclass(frozen=True, slots=True)
class FailureEntry:
    """The action for a fault, and its source: a key or a rule of ``[failure]``, or a fixed rule."""

    action: FaultAction
    source: str
    fixed: bool = False  # no setting changes it


FailureTable = Mapping[FailureKey, FailureEntry]


@dataclass(frozen=True, slots=True)
class Meaning:
    """Meaning of a cause, and the scanners that can give it."""

    text: str
    scanners: tuple[Scanner, ...]


_DAEMONS = (Scanner.CLAMD, Scanner.SPAMD)

MEANINGS: Mapping[Cause, Meaning] = MappingProxyType(
    {
        Cause.DOWN: Meaning(
            "connection refused or not permitted, closed without a byte (killed, restarted, overloaded), or spamd "
            "reports that something it needs is missing",
            _DAEMONS,
        ),
        Cause.TIMEOUT: Meaning(
            "no complete response within its time limit, or it reports a timeout of its own", tuple(Scanner)
        ),
        Cause.BUSY: Meaning(
            "its listen queue remained full, it asks for a retry, or a message would wait too long for a slot",
            _DAEMONS,
        ),
        Cause.TOO_BIG: Meaning(
            "the message is above max_size in [clamd], or above clamd's StreamMaxLength", (Scanner.CLAMD,)
        ),
        Cause.LIMITS: Meaning(
            "clamd stopped at a limit of its own (Heuristics.Limits.*), or the signatures at one of theirs; "
            "the message was not scanned completely",
            (Scanner.CLAMD, Scanner.SIGNATURES, Scanner.LOADERTYPES),
        ),
        Cause.BAD_REPLY: Meaning("a response that is truncated, malformed, or reports an internal error", _DAEMONS),
        Cause.RELOADING: Meaning(
            "clamd reports that it is loading its database; if it does not respond meanwhile, that is a timeout",
            (Scanner.CLAMD,),
        ),
        Cause.MEMORY: Meaning("it reports that it has not enough memory for this message", _DAEMONS),
        Cause.POISON: Meaning("the message killed two workers and is not scanned any further", tuple(Scanner)),
        Cause.BYPASSED: Meaning("an administrator has bypassed the scanner for a limited time", tuple(Scanner)),
    }
)


def failure_action(scanner: Scanner, cause: Cause, origin: OriginKind, settings: Settings) -> FaultAction:
    """The action of one entry under these settings."""
    return failure_table(settings.failure)[scanner, cause, origin].action


@lru_cache(8)  # one configuration at a time; a few more while a reload goes on
def failure_table(failure: FailureSettings) -> FailureTable:
    """The whole table."""
    entries: dict[FailureKey, FailureEntry] = {}
    for layer in _layers(failure):
        entries.update(dict.fromkeys(layer.covered(), layer.entry))
    return MappingProxyType(entries)


def named(number: int) -> str:
    """The name of a rule: by its position in the file, from 1."""
    return f"[[failure.rule]] {number}"


@dataclass(frozen=True, slots=True)
class _Layer:
    """Entries that are written together. An empty column means all its values."""

    entry: FailureEntry
    scanners: tuple[Scanner, ...] = ()
    causes: tuple[Cause, ...] = ()
    origins: tuple[OriginKind, ...] = ()

    def specificity(self) -> int:
        """Number of columns that it names."""
        return sum(map(bool, (self.scanners, self.causes, self.origins)))

    def covered(self) -> Iterator[FailureKey]:
        return product(self.scanners or Scanner, self.causes or Cause, self.origins or OriginKind)


_FIXED = (
    _Layer(FailureEntry("pass", "bounces always pass", fixed=True), origins=(OriginKind.BOUNCE,)),
    _Layer(FailureEntry("pass", "what is bypassed passes", fixed=True), causes=(Cause.BYPASSED,)),
)


def _layers(failure: FailureSettings) -> tuple[_Layer, ...]:
    """All layers, the weakest first."""
    return (
        _Layer(_key("signatures", failure.signatures), scanners=(Scanner.SIGNATURES, Scanner.LOADERTYPES)),
        _Layer(_key("clamd", failure.clamd), scanners=(Scanner.CLAMD,)),
        _Layer(_key("spamd", failure.spamd), scanners=(Scanner.SPAMD,)),
        _Layer(_key("too_big", failure.too_big), causes=(Cause.TOO_BIG,)),
        _Layer(_key("limits", failure.limits), causes=(Cause.LIMITS,)),
        _Layer(_key("poison", failure.poison), causes=(Cause.POISON,)),
        *sorted(_rules(failure), key=_Layer.specificity),
        *_FIXED,
    )


def _key(name: str, action: FaultAction) -> FailureEntry:
    return FailureEntry(action, f"[failure] {name}")


def _rules(failure: FailureSettings) -> tuple[_Layer, ...]:
    return tuple(_layer(number, rule) for number, rule in enumerate(failure.rule, 1))


def _layer(number: int, rule: FaultRule) -> _Layer:
    scanner, cause, origin = (
        (column,) if isinstance(column, str) else column for column in (rule.scanner, rule.cause, rule.origin)
    )
    return _Layer(
        FailureEntry(rule.action, named(number)),
        tuple(map(Scanner, scanner)),
        tuple(map(Cause, cause)),
        tuple(map(OriginKind, origin)),
    )


# ---------------------------------------------------------------- faults of the rules


@dataclass(frozen=True, slots=True)
class Complaint:
    """A faulty rule, by number. ``warning``: it can be used, but perhaps is not as meant."""

    number: int
    text: str
    warning: bool = False


def complaints(failure: FailureSettings) -> Iterator[Complaint]:
    """Rules that contradict each other or a fixed rule, and rules without effect."""
    rules = _rules(failure)
    table = failure_table(failure)
    for number, rule in enumerate(rules, 1):
        if not rule.specificity():
            yield Complaint(number, "names no scanner, no cause and no origin; it needs one of them at least")
            continue
        if OriginKind.BOUNCE in rule.origins and rule.entry.action == "defer":
            yield Complaint(number, "bounces always pass: qmail-send would offer a deferred one for ever")
            continue
        if (wrong := _contradiction(rules, number)) is not None:
            yield wrong
            continue
        decided = [table[key].source for key in rule.covered() if _gives(key)]
        if not decided:
            yield Complaint(number, "does nothing: none of these scanners ever gives one of these causes", True)
        elif named(number) not in decided:
            by = ", ".join(dict.fromkeys(decided))
            yield Complaint(number, f"does nothing: what it covers is decided by {by}", True)


def _contradiction(rules: tuple[_Layer, ...], number: int) -> Complaint | None:
    """A conflict with an earlier rule: as many columns, a common entry, another action."""
    rule = rules[number - 1]
    keys = set(rule.covered())
    for place, other in enumerate(rules[: number - 1], 1):
        if other.specificity() != rule.specificity() or other.entry.action == rule.entry.action:
            continue
        if both := [key for key in other.covered() if key in keys and key[2] is not OriginKind.BOUNCE]:
            scanner, cause, origin = both[0]
            common = f"{scanner.value}, {cause.value}, {origin.value}"
            return Complaint(
                number,
                f"contradicts {named(place)}, which names as many columns: which holds for {common}? "
                "Name more in the one that shall win",
            )
    return None


def _gives(key: FailureKey) -> bool:
    return key[0] in MEANINGS[key[1]].scanners
