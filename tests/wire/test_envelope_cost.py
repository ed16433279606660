"""The memory that a message takes for its envelope: bounded, and not more than is charged for it."""

import subprocess
import sys
from pathlib import Path

import pytest
from lab.envelopes import envelope

from contentfilter.errors import EnvelopeError
from contentfilter.model import RECIPIENTS_MAX
from contentfilter.wire.envelope import SURPLUS_KEPT, memory_cost, parse

PROGRAM = Path(__file__).parents[1] / "lab" / "envelopes.py"
SLACK = 32 << 20  # bytes: threads, modules that are imported late


@pytest.mark.parametrize(
    ("kind", "mib", "tables", "action", "bound"),
    [
        ("empty", 1, "none", "reject", 8),
        ("empty", 16, "none", "reject", 8),
        ("empty", 127, "none", "reject", 8),
        ("short", 16, "none", "queue", 32),
        ("short", 16, "own", "drop", None),
        ("long", 16, "none", "queue", 32),
        ("long", 16, "own", "drop", None),
        ("long", 127, "none", "queue", 150),
        ("long", 127, "own", "drop", None),
    ],
)
def test_memory_for_an_envelope_is_bounded_and_no_more_than_charged(
    kind: str, mib: int, tables: str, action: str, bound: int | None
) -> None:
    words = [sys.executable, "-P", str(PROGRAM), kind, str(mib), tables]
    said = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, timeout=300).stdout.split()
    size, peak = int(said[0]), int(said[1])
    assert said[2] == action
    assert peak + size <= memory_cost(size) + SLACK
    if bound is not None:
        assert peak <= (bound << 20) + SLACK


@pytest.mark.parametrize("limit", [1, 100, SURPLUS_KEPT, 5000, RECIPIENTS_MAX])
def test_recipients_above_the_limit_are_counted_and_not_kept(limit: int) -> None:
    block = b"Fs\0" + b"".join(b"T%d\0" % number for number in range(limit + 2000)) + b"\0"
    found = parse(block, limit)
    assert found.count == limit + 2000
    assert len(found.recipients) <= max(limit, 2 * SURPLUS_KEPT)
    assert found.recipients[:2] == (b"0", b"1")
    exact = parse(b"Fs\0" + b"T\0" * limit + b"\0", limit)
    assert (len(exact.recipients), exact.surplus) == (limit, 0)


@pytest.mark.parametrize("tail", [b"T", b"X", b"T" + b"x" * 1002, b"T" + b"x" * 70_000])
@pytest.mark.parametrize("body", [b"T\0" * 40_000, b"Q\0" * 40_000, b"Tx\0Q\0" * 20_000, b"T\0" * 200_000])
def test_a_large_envelope_without_its_end_is_refused(body: bytes, tail: bytes) -> None:
    with pytest.raises(EnvelopeError):
        parse(b"Fs\0" + body + tail)


def test_records_across_the_borders_of_a_window_are_whole() -> None:
    for shift in range(1100):
        recipients = [b"a" * (shift % 1003)] + [b"b" * 1002, b"c", b""] * 70
        block = b"F" + b"s" * (shift % 997) + b"\0" + b"".join(b"T" + each + b"\0" for each in recipients) + b"\0"
        assert parse(block).recipients == tuple(recipients)


def test_the_lab_makes_what_it_says() -> None:
    assert parse(envelope("empty", 1)).count > RECIPIENTS_MAX
    assert len(parse(envelope("short", 16)).recipients) == RECIPIENTS_MAX
    assert len(parse(envelope("long", 1)).recipients) > 1000
