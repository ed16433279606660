"""tools/prepare.sh: what a person who is not root, or who has everything, gets to see."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from style.tree import ROOT


def prepare(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", ROOT / "tools" / "prepare.sh", *arguments],
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """A PATH where nothing is, and we are not root."""
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    for name in ("cat", "apt-get"):
        if found := shutil.which(name):
            (tmp_path / name).symlink_to(found)
    return str(tmp_path)


def test_who_has_everything_hears_nothing() -> None:
    done = prepare("packages", "setup")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_ordinary_user_reads_what_to_install(bare: str) -> None:
    done = prepare("packages", "setup", PATH=bare)
    assert done.returncode == 1
    assert "missing packages: gcc musl-tools" in done.stderr
    assert "apt-get install --no-install-recommends gcc musl-tools" in done.stderr


def test_a_test_needs_more_than_a_demo_and_a_demo_more_than_the_setup() -> None:
    table = (ROOT / "tools" / "prepare.sh").read_text().partition("<<'END'\n")[2].partition("\nEND")[0]
    wanted = {purpose: {row.split()[0] for row in table.splitlines() if purpose in row.split()[2:]} for purpose in
              ("setup", "demo", "bench", "test")}  # fmt: skip
    assert set() < wanted["setup"] < wanted["demo"] <= wanted["bench"] <= wanted["test"]


def test_an_interpreter_that_cannot_do_it_is_refused(bare: str) -> None:
    assert prepare("python", PYTHON="/bin/false").returncode == 1
    done = prepare("packages", "setup", PATH=bare, PYTHON="/bin/false")
    assert done.returncode == 1
    assert "python3-venv" in done.stderr
    assert "3.11" in done.stderr


def test_an_interpreter_that_can_is_chosen() -> None:
    done = prepare("python")
    assert (done.returncode, done.stdout) == (0, sys.executable + "\n")


def test_a_wrong_word_prints_the_usage() -> None:
    done = prepare("nonsense")
    assert done.returncode == 2
    assert "prepare.sh packages PURPOSE" in done.stderr
