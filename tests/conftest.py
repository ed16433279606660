"""Fixtures shared by several directories: the real daemons, started once per test process."""

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from lab import compiler, lifeline, watchdog
from lab.browser import Browser
from lab.clamd import Clamd
from lab.daemon import Daemon
from lab.spamd import Spamd
from lab.trivial_daemon import Gate, trivial_daemon

# The time of an example depends on the other jobs of this machine, not on the code.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


def pytest_configure(config: pytest.Config) -> None:
    """Set up the signals, and the directory that all processes of this run share.

    Tests started in the background ignore SIGINT, and every program that they start would inherit that. SIGTERM ends a
    run as Ctrl-C does: fixtures stop their daemons and remove their directories.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):  # the first process, not one that xdist started
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        directory = tempfile.mkdtemp(prefix="cf-programs-")
        os.chmod(directory, 0o755)  # programs run as other users, too
        os.environ[compiler.SHARED] = directory
        config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
    lifeline.start()
    fd, os.environ[watchdog.REPORT] = tempfile.mkstemp(prefix="cf-loops-")
    os.close(fd)
    os.chmod(os.environ[watchdog.REPORT], 0o666)  # daemons of other users, too
    watchdog.install(watchdog.held.append)
    config.add_cleanup(lambda: Path(os.environ[watchdog.REPORT]).unlink(missing_ok=True))
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:  # what a shell or a build service left open is not for the programs under test
            with suppress(OSError):
                os.set_inheritable(int(name), False)


def pytest_xdist_auto_num_workers() -> int:
    """Number of processes for ``-n auto``: two per processor, because most tests wait for a daemon much of the time."""
    return 2 * len(os.sched_getaffinity(0))


def pytest_collection_finish() -> None:
    """The tests themselves stay: collections during a test need not visit them, as in a worker."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def loops_are_never_held() -> Iterator[None]:
    """No callback of an event loop, in this process or in a daemon, uses more CPU time than LIMIT (lab/watchdog.py)."""
    path = Path(os.environ[watchdog.REPORT])
    yield
    found = [*watchdog.held, *path.read_text().splitlines()]
    watchdog.held.clear()
    os.truncate(path, 0)
    assert found == []


@pytest.fixture(scope="session")
def lab_directory() -> Iterator[Path]:
    """Directory for daemons of other users: pytest's directories are closed to them, and too long for sockets."""
    directory = Path(tempfile.mkdtemp(prefix="cf-"))
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def clamd(lab_directory: Path) -> Iterator[Clamd]:
    """Shared clamd with the lab's signatures. Do not stop it; start another Clamd for that."""
    with Clamd(lab_directory / "clamd") as clamd:
        yield clamd


@pytest.fixture(scope="session")
def spamd(lab_directory: Path) -> Iterator[Spamd]:
    """Shared spamd with two children. Do not stop it; start another Spamd for that."""
    with Spamd(lab_directory / "spamd") as spamd:
        yield spamd


@pytest.fixture(scope="module")
def started_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def browser(started_browser: Browser) -> Browser:
    """Headless Chromium on an empty page, in light mode and with the width of a desktop."""
    started_browser.open("about:blank")
    started_browser.look()
    started_browser.requests.clear()
    started_browser.console.clear()
    return started_browser


@pytest.fixture
def daemon() -> Callable[..., Daemon]:
    """Factory of daemons without scanners (not started) that do what each message requests: lab/trivial.py."""
    return trivial_daemon


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """Gate at which a message in such a daemon waits until the test opens it."""
    made = Gate(tmp_path)
    yield made
    made.close()
