"""The units fit the daemon, systemd understands them, and the daemon works in their sandbox."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lab.hook
import pytest
from install import sandbox
from lab.daemon import Daemon
from lab.offer import Offer, offer
from style.tree import ROOT

from contentfilter.admin import install as ops
from contentfilter.admin.install_items import STATE, USER, InstallItem, System
from contentfilter.model import Action
from contentfilter.settings import Settings
from contentfilter.supervisor import supervisor

NOBODY = 65534
SYSTEMD = ROOT / "etc" / "systemd"
SERVICE, SOCKET = SYSTEMD / "contentfilter.service", SYSTEMD / "contentfilter.socket"


def value(unit: Path, key: str) -> str:
    """Value of a key that occurs once in ``unit``."""
    (found,) = sandbox.values(unit, key)
    return found


def test_the_socket_is_the_one_that_settings_and_hook_name() -> None:
    listen = Settings().listen
    assert value(SOCKET, "ListenSequentialPacket") == listen.socket
    assert (value(SOCKET, "SocketMode"), value(SOCKET, "Backlog")) == (listen.mode, str(listen.backlog))
    assert value(SOCKET, "FileDescriptorName") == supervisor.SOCKET_NAME
    assert f"socket {listen.socket}\n" in (ROOT / "etc" / "queue.conf").read_text()


def test_the_service_waits_longer_than_the_daemon_drains() -> None:
    service = Settings().service
    assert float(value(SERVICE, "TimeoutStopSec")) > service.drain + supervisor.DRAIN_GRACE
    assert float(value(SERVICE, "WatchdogSec")) > service.stuck_after


def test_directories_and_user_are_the_same_everywhere() -> None:
    service = Settings().service
    assert (value(SERVICE, "User"), value(SERVICE, "Group")) == (USER, USER)
    assert f"/var/lib/{value(SERVICE, 'StateDirectory')}" == service.state == STATE
    assert f"/run/{value(SERVICE, 'RuntimeDirectory')}" == service.run == ops.RUN
    assert f"/etc/{value(SERVICE, 'ConfigurationDirectory')}" == ops.CONFIG
    assert f"d {ops.RUN} 0755 {USER} {USER} -" in (ROOT / "etc/tmpfiles.d/contentfilter.conf").read_text()
    assert re.search(
        rf'^u {USER} - "[^"]+" {STATE}$', (ROOT / "etc/sysusers.d/contentfilter.conf").read_text(), re.MULTILINE
    )


def test_stopping_the_daemon_leaves_the_socket_in_its_directory() -> None:
    assert value(SERVICE, "RuntimeDirectoryPreserve") == "yes"


def test_peers_keep_their_uids() -> None:
    assert sandbox.values(SERVICE, "PrivateUsers") == []  # SO_PEERCRED would say nobody for everyone


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """The units as they are installed, with a command that exists."""
    package = ops.Package(Path(shutil.which("true") or "/bin/true"), ROOT / "etc", ROOT)
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    written = []
    for item in ops.wanted(package, System(tmp_path), "/var/qmail"):
        if isinstance(item, InstallItem) and item.path.startswith(ops.UNITS):
            written.append(tmp_path / os.path.basename(item.path))
            written[-1].write_bytes(item.content)
    assert len(written) == 2
    return written


analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (package systemd)")


@analyze
def test_systemd_finds_nothing_wrong(units: list[Path]) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@analyze
def test_the_exposure_of_the_service_stays_low(units: list[Path]) -> None:
    service = next(unit for unit in units if unit.suffix == ".service")
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=15", str(service)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-200:]


@analyze
@pytest.mark.skipif(platform.machine() != "x86_64" or not sandbox.HEADER.exists(), reason="x86-64 with libc6-dev only")
@pytest.mark.skipif(
    tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (6, 3), reason="PR_SET_MDWE: Linux 6.3"
)
def test_the_daemon_works_under_the_filters_of_its_unit(tmp_path: Path) -> None:
    launcher = tmp_path / "launch.py"
    words = [sys.executable, "-P", "-m", "contentfilter", "--config"]
    launcher.write_text(
        f"import os, sys\nsys.path.insert(0, {str(Path(sandbox.__file__).parent)!r})\n"
        f"from pathlib import Path\nimport sandbox\nsandbox.enter(Path({str(SERVICE)!r}))\n"
        f"os.execv({sys.executable!r}, [*{words!r}, sys.argv[1], 'serve', '--allow-root'])\n"
    )
    settings = {"clamd": {"backends": []}, "spamd": {"backends": []}, "signatures": {"thread_above": 1000}}
    daemon = Daemon(settings, command=(sys.executable, str(launcher)))
    conf = daemon.directory / "queue.conf"
    conf.write_text(f"socket {daemon.socket}\n")
    program = lab.hook.build(tmp_path)
    daemon.configure(settings | {"canary": {"enabled": True, "hook": str(program), "conf": str(conf)}})
    (daemon.directory / "control" / "options").write_text("clamglobal 1\nchksignature 1\nchkloadertype 1\n")
    with daemon:
        for size in (10, 100_000):  # in the event loop, and in a thread
            answer = offer(daemon.socket, b"Subject: test\n\n" + b"text\n" * size)
            assert answer.action is Action.QUEUE
        (sung,) = daemon.wait_for("canary.done")  # the hook starts, and finds its way, in there as well
        assert sung["results"] == {
            "clean": "passed", "eicar": "skipped", "gtube": "skipped", "signature": "caught"
        }  # fmt: skip
        (worker, *_) = daemon.workers()
        status = Path(f"/proc/{worker}/status").read_text()
        assert "Seccomp:\t2" in status
        if os.getuid() == 0:  # a user outside [origin]: the receiver works in there as well
            daemon.directory.chmod(0o711)
            os.seteuid(NOBODY)
            try:
                stranger = Offer(daemon.socket)
            finally:
                os.seteuid(0)
            with stranger:
                assert (answer := stranger.send().answer()) is not None
                assert answer.action is Action.QUEUE
            (receiver,) = (record["child"] for record in daemon.log("receiver.start"))
            assert os.getpriority(os.PRIO_PROCESS, receiver) > 0
            scores = [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (daemon.pid, worker, receiver)]
            assert scores == sorted(set(scores)), "without memory the kernel ends a receiver first, the supervisor last"
        daemon.reload()
        daemon.wait_for("worker.reload", 2)
        assert offer(daemon.socket).action is Action.QUEUE
