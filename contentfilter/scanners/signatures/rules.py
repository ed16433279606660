"""Rule lists: parser of badsignatures and badloadertypes, and the compilation of rules to bit patterns.

One rule per line: ``PATTERN`` or ``PATTERN description``. ``#`` starts a comment, at the start of a line or after
white space. A pattern is written in base64 letters; in badsignatures ``*`` matches any one letter. An invalid line is
reported once, with its number, and skipped. No file is read here.
"""

import string
from dataclasses import dataclass
from typing import Literal

from contentfilter.errors import Problem
from contentfilter.model import Scanner, readable
from contentfilter.scanners.signatures import compatible, lists

Mode = Literal["mime", "compatible"]

LETTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
SHORTEST = 4
LONGEST = 80  # letters; only 60 decoded bytes are compared
LIBRARY = b"32.dll"  # end of the names that loader types match: user32.dll, KERNEL32.DLL ...
_PRINTABLE = frozenset(range(32, 127))


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a list: the pattern as written and its description."""

    pattern: str
    description: str


@dataclass(frozen=True, slots=True)
class Rules:
    """One list, in the order of its lines, without duplicates."""

    scanner: Scanner
    rules: tuple[Rule, ...]


def parse_signatures(text: bytes, path: str, mode: Mode = "mime") -> tuple[Rules, tuple[Problem, ...]]:
    """Parse control/badsignatures. Returns the rules and the problems, which name ``path``."""
    return _parse(text, path, Scanner.SIGNATURES, LETTERS + "*", compatible.SIGNATURE_LETTERS if mode != "mime" else 0)


def parse_loadertypes(text: bytes, path: str, mode: Mode = "mime") -> tuple[Rules, tuple[Problem, ...]]:
    """Parse control/badloadertypes. Returns the rules and the problems, which name ``path``."""
    return _parse(text, path, Scanner.LOADERTYPES, LETTERS, compatible.LOADER_LETTERS if mode != "mime" else 0)


def default_signatures() -> Rules:
    """Return the built-in list of signatures."""
    return Rules(Scanner.SIGNATURES, tuple(Rule(*row) for row in lists.SIGNATURES))


def default_loadertypes() -> Rules:
    """Return the built-in list of loader types."""
    return Rules(Scanner.LOADERTYPES, tuple(Rule(*row) for row in lists.LOADERTYPES))


def _parse(text: bytes, path: str, scanner: Scanner, letters: str, key: int) -> tuple[Rules, tuple[Problem, ...]]:
    rules: dict[str, Rule] = {}
    problems: list[Problem] = []
    for number, line in enumerate(text.split(b"\n"), 1):
        words = readable(line.replace(b"\t", b" ").rstrip(b"\r")).split()
        if not words or words[0].startswith("#"):
            continue
        pattern = words[0]
        end = next((at for at, word in enumerate(words) if word.startswith("#")), len(words))
        error = _error(pattern, letters, key)
        if error:
            problems.append(Problem(path, number, f"{pattern[:LONGEST]!r}: {error}; the line is skipped"))
        elif pattern in rules:
            repeated = f"{pattern!r} is listed twice; the second line is skipped"
            problems.append(Problem(path, number, repeated, warning=True))
        else:
            rules[pattern] = Rule(pattern, " ".join(words[1:end]))
    return Rules(scanner, tuple(rules.values())), tuple(problems)


def _error(pattern: str, letters: str, key: int) -> str:
    """Return the reason why a pattern is invalid, or "". ``key``: letters that compatible mode compares, else 0."""
    strange = next((c for c in pattern if c not in letters), "")
    if strange:
        return f"{strange!r} is not a base64 letter"
    if len(pattern) < SHORTEST:
        return f"shorter than {SHORTEST} letters"
    if len(pattern) > LONGEST:
        return f"longer than {LONGEST} letters"
    if len(pattern.replace("*", "")) < SHORTEST:
        return f"fewer than {SHORTEST} letters that are not *"
    if key and (len(pattern) < key or "*" in pattern[:key]):
        return f"never matches in compatible mode, which compares the first {key} letters literally"
    return ""


def _bits(pattern: str) -> tuple[int, int]:
    """Return value and mask of a pattern, 6 bits per letter."""
    value = mask = 0
    for letter in pattern:
        fixed = letter != "*"
        value = value << 6 | (LETTERS.index(letter) if fixed else 0)
        mask = mask << 6 | (63 if fixed else 0)
    return value, mask


@dataclass(frozen=True, slots=True)
class Signature:
    """Compiled rule of badsignatures: the bits that the first ``size`` decoded bytes must have."""

    rule: Rule
    prefix: bytes  # the complete bytes before the first free bit: a quick test
    value: int
    mask: int
    size: int
    text: bool  # the prefix is printable: harmless text could start with it
    base64: bool  # the prefix is itself base64: content that was encoded twice

    @classmethod
    def compile(cls, rule: Rule) -> "Signature":
        """Compute the bits of a rule."""
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
        """True if decoded content starts with the signature.

        ``head``: its first bytes, at least ``size`` unless the content is shorter.
        """
        first = head[: self.size].ljust(self.size, b"\0")
        return len(head) >= len(self.prefix) and int.from_bytes(first, "big") & self.mask == self.value


@dataclass(frozen=True, slots=True)
class Fragment:
    """Compiled rule of badloadertypes, for one of the bit offsets at which its first letter can start."""

    rule: Rule
    lead: int  # bits of the pattern that belong to the byte before ``whole``
    whole: bytes
    tail: int  # bits of the pattern that belong to the byte after it
    value: int
    library: bool  # a substring of 32.dll, in any case

    @classmethod
    def compile(cls, rule: Rule) -> "tuple[Fragment, ...]":
        """Return a fragment per offset. Loader types are parts of names, so printable fragments are preferred."""
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
        """True if all bits of the pattern match around ``at``, the position of ``whole`` in ``block``."""
        before = block[at - 1] if at else 0
        after = block[at + len(self.whole) : at + len(self.whole) + 1] or b"\0"
        found = int.from_bytes(bytes((before,)) + self.whole + after, "big") >> 8 - self.tail
        return found & (1 << self.lead + 8 * len(self.whole) + self.tail) - 1 == self.value
