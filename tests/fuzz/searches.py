"""Searches without atheris: wrappings that readers open, ordinary mail, and the most expensive message.

Each function prints what it tried and returns what it found wrong. ``make fuzz`` runs them with these counts.
"""

import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType

from lab import programs
from lab.calibration import work_unit
from lab.hostile import SHAPES
from lab.innocent import innocent_messages
from lab.readers import readers
from lab.wrappings import wrappings

from contentfilter.errors import BackendError
from contentfilter.scanners.signatures.engine import Engine, default_loadertypes, default_signatures

BOTH = Engine(default_signatures(), default_loadertypes())
WRAPPINGS = INNOCENT = 20_000
LARGEST = 200_000  # bytes of a message in the search for cost
PRICE = 2.0  # CPU seconds for a megabyte, at most
UNIT = 0.03  # CPU seconds of a work unit on the machine for which PRICE is meant
PIECES = (
    b"\n",
    b"\r",
    b"\n\n",
    b"\r\n\r\n",
    b"=",
    b"Q=",
    b"!",
    b"--",
    b"--a\n",
    b"--b\n",
    b"--c\n",
    b"--\n",
    b'Content-Type: multipart/mixed; boundary="a"\n',
    b'Content-Type: multipart/x; boundary=b; boundary="c"\n',
    b"Content-Type: message/rfc822\n",
    b"Content-Transfer-Encoding: base64\n",
    b"Content-Transfer-Encoding: base64 quoted-printable\n",
    b"begin 644 x\n",
    b"begin-base64 644 x\n",
    b"=ybegin line=128 size=1 name=x\n",
    b"(This file must be converted with BinHex 4.0)\n:",
    b"M" + b"!" * 60 + b"\n",
    b"TVqQAAMA\n",
    b"TVqQ" * 100 + b"\n",
    b"MZ\0",
    b"\nMZ" + b"\0" * 70,
    b"A" * 76 + b"\n",
    b"=4D=5A",
    b"\x90",
    b"X: y\n",
    b" folded\n",
    b"a line of text\n",
)


def search_wrappings(seed: int, count: int = WRAPPINGS) -> list[str]:
    """Ask all readers about each wrapping; report those that a reader opens and the engine does not find."""
    made = programs.made()
    opened: Counter[str] = Counter()
    detections: Counter[str] = Counter()
    missed: list[str] = []
    with readers() as all_of_them:
        for wrapping in wrappings(made, seed, count):
            who = [
                n for n, read in all_of_them.items() if any(f.startswith(made[:256]) for f in read(wrapping.message))
            ]
            detected = BOTH.scan(wrapping.message) is not None
            for trick in wrapping.tricks:
                opened[trick] += bool(who)
                detections[trick] += bool(who) and detected
            if who and not detected:
                missed.append(f"{wrapping.tricks} opened by {who}")
    print("trick                            opened    found")
    for trick in sorted(opened):
        print(f"{trick:30} {opened[trick]:8} {detections[trick]:8}")
    return missed


def search_innocent(seed: int, count: int = INNOCENT) -> list[str]:
    """Scan ordinary mail; report alarms and limits."""
    alarms = []
    for name, message in innocent_messages(seed, count):
        try:
            found = BOTH.scan(message)
        except BackendError as error:
            alarms.append(f"{name}: {error}")
        else:
            alarms += [f"{name}: {found}"] if found else []
    print(f"{count} messages, {len(alarms)} alarms")
    return alarms


def cost(message: bytes) -> float:
    """CPU seconds for a megabyte, on the machine for which PRICE is meant."""
    unit = work_unit()
    started = time.thread_time()
    with contextlib.suppress(BackendError):
        BOTH.scan(message)
    return (time.thread_time() - started) / len(message) * 1e6 * UNIT / unit


def search_cost(seed: int, seconds: float = 60.0) -> list[str]:
    """Climb towards expensive messages: repeat, join and change the best so far."""
    rng = random.Random(seed)
    pool = [(cost(make(LARGEST)), make(LARGEST)) for make in SHAPES.values()]
    until = time.monotonic() + seconds
    tried = 0
    while time.monotonic() < until:
        tried += 1
        message = changed(rng, rng.choice(pool)[1], rng.choice(pool)[1])
        price = cost(message)
        if len(pool) < 40 or price > min(pool)[0]:
            pool = sorted([*pool, (price, message)], reverse=True)[:40]
    price, message = max(pool)
    print(f"{tried} messages; the most expensive: {price:.2f} CPU s for a megabyte, begins with {message[:200]!r}")
    return [f"{price:.2f} s for a megabyte: {message[:200]!r}"] if price > PRICE else []


def changed(rng: random.Random, one: bytes, other: bytes) -> bytes:
    """A message made of pieces of two others and of PIECES, repeated up to the size."""
    parts = []
    for _ in range(rng.randrange(1, 5)):
        kind = rng.randrange(4)
        if kind == 0:
            unit = b"".join(rng.choices(PIECES, k=rng.randrange(1, 6)))
            parts.append(unit * rng.choice((1, 3, 100, 5000)))
        else:
            source = one if kind == 1 else other
            at = rng.randrange(len(source))
            parts.append(source[at : at + rng.choice((20, 200, 2000, 50_000))] * rng.choice((1, 1, 10, 1000)))
    head = rng.choice((b"", one[: rng.randrange(1, 300)], b"".join(rng.choices(PIECES, k=3))))
    message = head + b"".join(parts) + b"\n"
    return (message * (LARGEST // len(message) + 1))[:LARGEST]


SEARCHES: Mapping[str, Callable[[int], list[str]]] = MappingProxyType(
    {"wrappings": search_wrappings, "innocent": search_innocent, "cost": search_cost}
)
