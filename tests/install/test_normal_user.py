"""``make demo`` for a user who is not root: clamd, spamd and the daemon start without root's rights."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.process import MissingProgramError, find_program
from style.tree import ROOT

import contentfilter

AS_NOBODY = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]


@pytest.fixture
def home() -> Iterator[Path]:
    """A home directory that any user may write to; short, because sockets are below it."""
    directory = Path(tempfile.mkdtemp(prefix="cf-"))
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def usable(command: list[str]) -> bool:
    """True if this user's Python starts another one, has our packages, and can read the clone."""
    script = "import subprocess, sys, contentfilter, msgspec, rich, zmq; open(sys.argv[1]).close()"
    script += "; subprocess.run([sys.executable, '-c', ''], check=True)"
    words = [*command, "-P", "-c", script, str(ROOT / "bench" / "demo.py")]
    return subprocess.run(words, env=environ("/"), cwd="/", capture_output=True, check=False).returncode == 0


def environ(home: str) -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LC_ALL")}
    packages = str(Path(contentfilter.__file__).parents[1])
    return found | {"HOME": home, "TMPDIR": home, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": packages}


@pytest.fixture
def python() -> list[str]:
    """The command line of a Python without root's rights: ours, or the system's of the same version."""
    try:
        find_program("clamd", "clamav-daemon")
        find_program("spamd", "spamd")
    except MissingProgramError as error:
        pytest.skip(str(error))
    if os.geteuid():
        return [sys.executable]
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv (package util-linux) is not installed")
    for program in (sys.executable, "/usr/bin/python{}.{}".format(*sys.version_info)):
        if os.path.exists(program) and usable([*AS_NOBODY, program]):
            return [*AS_NOBODY, program]
    pytest.skip("other users can run no Python of this version, or cannot read the clone")


def test_the_demo_works_for_a_normal_user(python: list[str], home: Path) -> None:
    command = [*python, "-P", str(ROOT / "bench" / "demo.py")]
    done = subprocess.run(
        command,
        cwd=home,
        env=environ(str(home)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "GTUBE" in done.stdout
    assert list(home.iterdir()) == [], "the demo leaves nothing behind"
