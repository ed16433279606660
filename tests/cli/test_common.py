"""Shared by commands: patterns, durations, closed pipes."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contentfilter.cli.common import address_pattern, duration, glob, latency

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


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0.0 ms"),
        (4.7, "4.7 ms"),
        (9.96, "10 ms"),
        (236.1, "236 ms"),
        (999.9, "1.0 s"),
        (1240, "1.2 s"),
        (65_900, "66 s"),
        (118_000, "118 s"),
        (720_000, "12 min"),
    ],
)
def test_durations_are_in_the_unit_that_a_person_reads(ms: float, text: str) -> None:
    assert duration(ms) == text


def test_latency_names_its_two_figures() -> None:
    assert latency(236.1, 65_900) == "median 236 ms, 95th percentile 66 s"


@pytest.mark.parametrize("words", [["--help"], ["failures", "--file"], ["showctl"], ["install", "--dry-run"]])
def test_a_closed_pipe_is_no_error_message(words: list[str], tmp_path: Path) -> None:
    """As in ``contentfilter ... | head``."""
    config = tmp_path / "contentfilter.toml"
    config.write_text(f'[service]\ncontrol = "{tmp_path}"\nrun = "{tmp_path}"\n')
    if words[0] == "install":
        words = [*words, "--prefix", str(tmp_path), "--command", "/bin/true"]
    else:
        words = ["--config", str(config), *words]
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-P", "-m", "contentfilter", *words]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr
    assert "Exception ignored" not in done.stderr
