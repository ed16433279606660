"""Rule lists: the text of badsignatures and badloadertypes becomes frozen rules, and rules become bit patterns.

One rule per line: ``PATTERN`` or ``PATTERN description``. ``#`` starts a comment, at the start of a line or after
white space. A pattern is written in base64 letters; in badsignatures ``*`` stands for any one letter. A line that
cannot be a rule is reported once, with its place, and skipped. Nothing here reads a file.
"""

import string
from dataclasses import dataclass

from contentfilter.errors import Problem
from contentfilter.model import Scanner, readable
from contentfilter.scanners.signatures import lists

LETTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
SHORTEST = 4
LONGEST = 80  # letters; 60 bytes are all that is looked at
LIBRARY = b"32.dll"  # what the loader types are about: user32.dll, KERNEL32.DLL ...
_PRINTABLE = frozenset(range(32, 127))


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a list: the pattern as written and what it stands for."""

    pattern: str
    description: str


@dataclass(frozen=True, slots=True)
class Rules:
    """One list, in the order of its lines, each pattern once."""

    scanner: Scanner
    rules: tuple[Rule, ...]


def parse_signatures(text: bytes, path: str) -> tuple[Rules, tuple[Problem, ...]]:
    """The rules of control/badsignatures and what is wrong with it; ``path`` is only for the problems."""
    return _parse(text, path, Scanner.SIGNATURES, LETTERS + "*")


def parse_loadertypes(text: bytes, path: str) -> tuple[Rules, tuple[Problem, ...]]:
    """The rules of control/badloadertypes and what is wrong with it."""
    return _parse(text, path, Scanner.LOADERTYPES, LETTERS)


def default_signatures() -> Rules:
    return Rules(Scanner.SIGNATURES, tuple(Rule(*row) for row in lists.SIGNATURES))


def default_loadertypes() -> Rules:
    return Rules(Scanner.LOADERTYPES, tuple(Rule(*row) for row in lists.LOADERTYPES))


def _parse(text: bytes, path: str, scanner: Scanner, letters: str) -> tuple[Rules, tuple[Problem, ...]]:
    rules: dict[str, Rule] = {}
    problems: list[Problem] = []
    for number, line in enumerate(text.split(b"\n"), 1):
        words = readable(line.replace(b"\t", b" ").rstrip(b"\r")).split()
        if not words or words[0].startswith("#"):
            continue
        pattern = words[0]
        end = next((at for at, word in enumerate(words) if word.startswith("#")), len(words))
        wrong = _wrong(pattern, letters)
        if wrong:
            problems.append(Problem(path, number, f"{pattern[:LONGEST]!r}: {wrong}; the line is skipped"))
        elif pattern in rules:
            again = f"{pattern!r} stands here twice; the second line is skipped"
            problems.append(Problem(path, number, again, warning=True))
        else:
            rules[pattern] = Rule(pattern, " ".join(words[1:end]))
    return Rules(scanner, tuple(rules.values())), tuple(problems)


def _wrong(pattern: str, letters: str) -> str:
    strange = next((c for c in pattern if c not in letters), "")
    if strange:
        return f"{strange!r} is not a base64 letter"
    if len(pattern) < SHORTEST:
        return f"shorter than {SHORTEST} letters"
    if len(pattern) > LONGEST:
        return f"longer than {LONGEST} letters"
    if len(pattern.replace("*", "")) < SHORTEST:
        return f"fewer than {SHORTEST} letters that are not *"
    return ""


def _bits(pattern: str) -> tuple[int, int]:
    """Value and mask of the pattern's 6 bits per letter."""
    value = mask = 0
    for letter in pattern:
        fixed = letter != "*"
        value = value << 6 | (LETTERS.index(letter) if fixed else 0)
        mask = mask << 6 | (63 if fixed else 0)
    return value, mask


@dataclass(frozen=True, slots=True)
class Signature:
    """A badsignatures rule, compiled: the bits that the first ``size`` decoded bytes must have."""

    rule: Rule
    prefix: bytes  # the whole bytes before the first free bit: a quick first test
    value: int
    mask: int
    size: int
    text: bool  # the prefix is printable: innocent text could begin so
    base64: bool  # ... and is itself base64: the start of something encoded once more

    @classmethod
    def compile(cls, rule: Rule) -> "Signature":
        value, mask = _bits(rule.pattern)
        bits = 6 * len(rule.pattern)
        size = (bits + 7) // 8
        value <<= 8 * size - bits
        mask <<= 8 * size - bits
        fixed = mask.to_bytes(size, "big")
        whole = next((at for at, byte in enumerate(fixed) if byte != 255), size)
        prefix = value.to_bytes(size, "big")[:whole]
        return cls(
            rule,
            prefix,
            value,
            mask,
            size,
            text=bool(prefix) and _PRINTABLE.issuperset(prefix),
            base64=bool(prefix) and all(chr(byte) in LETTERS for byte in prefix),
        )

    def matches(self, head: bytes) -> bool:
        """``head`` is the start of decoded content, at least ``size`` bytes unless the content is shorter."""
        first = head[: self.size].ljust(self.size, b"\0")
        return len(head) >= len(self.prefix) and int.from_bytes(first, "big") & self.mask == self.value


@dataclass(frozen=True, slots=True)
class Fragment:
    """A badloadertypes rule, compiled for one of the places in a byte where its first letter can start."""

    rule: Rule
    lead: int  # bits of the pattern that belong to the byte before ``whole``
    whole: bytes
    tail: int  # bits that belong to the byte after it
    value: int
    library: bool  # a piece of 32.dll, in some spelling

    @classmethod
    def compile(cls, rule: Rule) -> "tuple[Fragment, ...]":
        """The readings of a pattern. Loader types are pieces of names, so the printable ones, if any, are meant."""
        value, _ = _bits(rule.pattern)
        bits = 6 * len(rule.pattern)
        readings = []
        for lead in (0, 2, 4, 6):
            size, tail = divmod(bits - lead, 8)
            whole = (value >> tail & (1 << 8 * size) - 1).to_bytes(size, "big")
            library = size >= 3 and whole.lower() in LIBRARY
            readings.append(cls(rule, lead, whole, tail, value, library))
        return (
            tuple(r for r in readings if r.library)
            or tuple(r for r in readings if _PRINTABLE.issuperset(r.whole))
            or tuple(readings)
        )

    def matches(self, block: bytes, at: int) -> bool:
        """Whether all bits of the pattern stand around ``at``, where ``whole`` was found in ``block``."""
        before = block[at - 1] if at else 0
        after = block[at + len(self.whole) : at + len(self.whole) + 1] or b"\0"
        found = int.from_bytes(bytes((before,)) + self.whole + after, "big") >> 8 - self.tail
        return found & (1 << self.lead + 8 * len(self.whole) + self.tail) - 1 == self.value
