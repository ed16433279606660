#!/usr/bin/env python3
"""Write a seeded clamd database of realistic size.

With a handful of signatures clamd needs a third of its usual time, which exaggerates the cost of everything else.
usage: make_signatures.py OUTDIR [--seed 4649]

60,000 body patterns (four in ten with wildcards, for eight kinds of files), 5,000 logical signatures and 400,000 file
hashes. None of them matches the corpus. The same seed gives the same bytes.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

PATTERNS, LOGICAL, HASHES = 60_000, 5_000, 400_000
SEED = 4649  # not that of the corpus, whose random bytes would be found
TARGETS = 8  # kinds of files: any, programs, OLE2, HTML, mail, graphics, ELF, text


def pattern(source: random.Random) -> str:
    """A hexadecimal pattern of 12 to 48 bytes, some with a gap."""
    text = source.randbytes(source.randint(12, 48)).hex()
    if source.random() < 0.4:
        middle = len(text) // 4 * 2
        text = text[:middle] + source.choice(("??", "*", "{2-16}", "??" * 4)) + text[middle:]
    return text


def patterns(source: random.Random) -> Iterator[str]:
    for number in range(PATTERNS):
        yield f"Bench.Pattern-{number}:{source.randrange(TARGETS)}:*:{pattern(source)}"


def logical(source: random.Random) -> Iterator[str]:
    for number in range(LOGICAL):
        yield f"Bench.Logical-{number};Target:{source.randrange(TARGETS)};(0&1);{pattern(source)};{pattern(source)}"


def hashes(source: random.Random) -> Iterator[str]:
    for number in range(HASHES):
        yield f"{source.randbytes(16).hex()}:{source.randint(512, 4_000_000)}:Bench.Hash-{number}"


def make_database(seed: int = SEED) -> dict[str, str]:
    """File names and their content."""
    source = random.Random(seed)
    kinds = {"bench.ndb": patterns, "bench.ldb": logical, "bench.hdb": hashes}
    return {name: "\n".join(lines(source)) + "\n" for name, lines in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args()
    given.outdir.mkdir(parents=True, exist_ok=True)
    for name, text in make_database(given.seed).items():
        (given.outdir / name).write_text(text)


if __name__ == "__main__":
    main()
