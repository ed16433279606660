"""Nothing that the daemon writes can be read by others, and it gives up what it does not need."""

import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.mails import PLAIN, with_program
from lab.daemon import PACKAGE, Daemon
from lab.hook import until

NOBODY = b"a@elsewhere.example"
OPEN = {"queue.sock"}  # every sender of mail must reach it


def readable_by_others(directory: Path) -> list[str]:
    """Below ``directory``, by the modes of files alone: what group or others may do anything with."""
    found = []
    for path in directory.rglob("*"):
        about = path.lstat()
        if stat.S_IMODE(about.st_mode) & 0o077 and not stat.S_ISLNK(about.st_mode):
            found.append(path.name)
    return found


def test_only_the_hooks_socket_is_open_to_others(make_system) -> None:
    before = os.umask(0)  # the daemon must not rely on what it inherits
    try:
        system = make_system(
            controls={"options": "clamglobal 1\nchksignature 1\n"},
            settings={"signatures": {"action": "remove"}, "journal": {"enabled": True}},
        )
    finally:
        os.umask(before)
    assert system.deliver(with_program(), NOBODY).status == 0
    assert system.deliver(PLAIN, NOBODY).status == 0
    ask = [sys.executable, "-m", "contentfilter", "--config", str(system.daemon.config)]
    order = [*ask, "bypass", "signatures", "--for", "5m", "--reason", "a test"]
    subprocess.run(order, check=True, cwd=PACKAGE, capture_output=True)
    system.daemon.wait_for("bypass.begin")
    state = Path(system.directory, "state")
    system.daemon.stop()
    names = {path.name for path in state.rglob("*")}
    assert {"release.key", "journal.sqlite", "bypass.json", "audit.jsonl", "quarantine", "entries"} <= names
    assert readable_by_others(state) == []


def test_sockets_of_the_daemon_are_closed_to_others(make_system) -> None:
    system = make_system()
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in Path(system.directory).iterdir()
        if stat.S_ISSOCK(path.stat().st_mode) and path.name != "notify.sock"  # the test's own
    }
    assert modes.keys() > OPEN
    assert {name for name, mode in modes.items() if mode & 0o007} == OPEN


def test_workers_and_supervisor_gave_up_what_they_do_not_need(make_system) -> None:
    daemon = make_system().daemon
    for pid in (daemon.pid, *daemon.workers()):
        process = Path("/proc", str(pid))
        assert "NoNewPrivs:\t1\n" in (process / "status").read_text()
        limits = (process / "limits").read_text()
        assert [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core file")] == [["0", "0"]]
        assert "Umask:\t0077\n" in (process / "status").read_text()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
def test_another_process_of_the_same_user_cannot_look_into_the_daemon() -> None:
    """As root without capabilities, on both sides: to the kernel that is one user like any other."""
    same = ["setpriv", "--bounding-set", "-all"]

    def look(pid: int) -> str:
        look = subprocess.run([*same, "cat", f"/proc/{pid}/maps"], capture_output=True, text=True, check=False)
        return look.stderr or "seen"

    with subprocess.Popen([*same, "cat"], stdin=subprocess.PIPE) as ordinary:
        until(lambda: look(ordinary.pid) == "seen", "an ordinary process can be looked into")
    words = [*same, sys.executable, "-P", "-m", "contentfilter", "--config"]
    with Daemon(command=["sh", "-c", f'exec {shlex.join(words)} "$0" serve --allow-root']) as daemon:
        said = [look(pid) for pid in (daemon.pid, *daemon.workers())]
        assert len(said) == 3
        assert all("ermission denied" in text for text in said), said


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_serve_refuses_root_and_says_what_to_do(tmp_path: Path) -> None:
    daemon = Daemon(directory=tmp_path)
    words, environ = daemon.command()
    words.remove("--allow-root")
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 77
    assert "contentfilter install" in done.stderr
    assert "--allow-root" in done.stderr
    assert not (tmp_path / "queue.sock").exists()
