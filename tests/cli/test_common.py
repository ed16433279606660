"""Patterns and times as people write them."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contentfilter.cli.common import address_pattern, glob

LETTERS = st.text("ab*?.[", max_size=12)


@given(LETTERS, st.text("ab.[", max_size=12))
def test_a_pattern_means_what_it_means_everywhere(pattern: str, text: str) -> None:
    parts = {"*": ".*", "?": "."}
    expected = re.fullmatch("".join(parts.get(c, re.escape(c)) for c in pattern), text, re.DOTALL)
    assert glob(pattern, text) == bool(expected)


def test_case_does_not_matter() -> None:
    assert glob("*@EXAMPLE.*", "joe@example.ORG")


def test_a_pattern_with_many_stars_takes_no_time() -> None:
    began = time.monotonic()
    assert not glob("*a" * 40 + "b", "a" * 1000)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("written", "found", "not_found"),
    [
        ("joe@example.org", "joe@example.org", "big.joe@example.org"),
        ("<joe@example.org>", "joe@example.org", "joe@example.org.uk"),
        ("@example.org", "joe@example.org", "joe@sub.example.org"),
        ("example", "joe@example.org", "joe@elsewhere.org"),
        ("*@*.org", "joe@example.org", "joe@example.net"),
        ("<>", "", "joe@example.org"),
    ],
)
def test_addresses_are_looked_for_as_they_are_written(written: str, found: str, not_found: str) -> None:
    assert glob(address_pattern(written), found)
    assert not glob(address_pattern(written), not_found)
