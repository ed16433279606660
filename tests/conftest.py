"""Fixtures that several directories share: the real daemons, started once per test process."""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from lab.browser import Browser
from lab.clamd import Clamd
from lab.daemon import Daemon
from lab.spamd import Spamd
from lab.trivial_daemon import Gate, trivial_daemon

# How long an example takes says something about this machine's other jobs, and nothing about the code.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


def pytest_configure() -> None:
    """Started in the background, the tests ignore Ctrl-C, and so would every program that they interrupt."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """``-n auto``: half as many again as there are processors, for most tests wait for a daemon much of their time."""
    processors = len(os.sched_getaffinity(0))
    return processors + (processors + 1) // 2


@pytest.fixture(scope="session")
def lab_directory() -> Iterator[Path]:
    """Where daemons under other users live: pytest's own directories are closed to them, and too long for sockets."""
    directory = Path(tempfile.mkdtemp(prefix="cf-"))
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def clamd(lab_directory: Path) -> Iterator[Clamd]:
    """A real clamd with the lab's signatures. Do not stop it: take a Clamd of your own for that."""
    with Clamd(lab_directory / "clamd") as clamd:
        yield clamd


@pytest.fixture(scope="session")
def spamd(lab_directory: Path) -> Iterator[Spamd]:
    """A real spamd with two children. Do not stop it: take a Spamd of your own for that."""
    with Spamd(lab_directory / "spamd") as spamd:
        yield spamd


@pytest.fixture(scope="module")
def started_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def browser(started_browser: Browser) -> Browser:
    """A headless Chromium on an empty page, as it comes: light, and of a desk's width."""
    started_browser.open("about:blank")
    started_browser.look()
    started_browser.requests.clear()
    started_browser.console.clear()
    return started_browser


@pytest.fixture
def daemon() -> Callable[..., Daemon]:
    """Makes a daemon without scanners (not started) that does as each message says: lab/trivial.py."""
    return trivial_daemon


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """Where a message in such a daemon waits until the test opens."""
    made = Gate(tmp_path)
    yield made
    made.close()
