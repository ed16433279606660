"""Files that are wrong: at the start they end the daemon with the file's name, later the old ones stay in force."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e.mails import VIRUS
from e2e.trouble import Load
from lab.daemon import PACKAGE, Daemon
from lab.hook import until

TOLD = 82
ONE = b"virus-only@mixed.example"
LONG = "/" + "x" * 120

Break = Callable[[Daemon], str]
"""Spoils one thing and returns what the error must name."""


def settings(section: str, key: str, value: object) -> Break:
    def spoil(daemon: Daemon) -> str:
        daemon.configure({section: {key: value}})
        return f"{daemon.config}:"

    return spoil


def text(content: bytes) -> Break:
    def spoil(daemon: Daemon) -> str:
        daemon.config.write_bytes(content)
        return str(daemon.config)

    return spoil


def control(name: str, kind: str) -> Break:
    """A control file that cannot be read: a directory, a link to itself, a pipe."""

    def spoil(daemon: Daemon) -> str:
        path = daemon.directory / "control" / name
        path.unlink(missing_ok=True)
        {"directory": path.mkdir, "loop": lambda: path.symlink_to(path), "pipe": lambda: os.mkfifo(path)}[kind]()
        return str(path)

    return spoil


def mend(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink()


def place(name: str, kind: str) -> Break:
    """A directory of the daemon's that is missing, a file, or not writable even for root."""

    def spoil(daemon: Daemon) -> str:
        path = {"missing": daemon.directory / "nowhere", "file": daemon.config, "read-only": Path("/proc")}[kind]
        daemon.configure({"service": {name: str(path)}})
        return str(path)

    return spoil


def occupied(daemon: Daemon) -> str:
    Path(daemon.socket).write_text("no socket")
    return daemon.socket


WRONG = {  # what spoils it, and the exit status at the start; 1: only the start looks at it
    "string for a number": (settings("service", "workers", "many"), 78),
    "number for a string": (settings("listen", "socket", 7), 78),
    "list for a number": (settings("service", "budget", [1]), 78),
    "string for a list": (settings("clamd", "backends", "unix:/x"), 78),
    "out of range": (settings("clamd", "concurrency", 0), 78),
    "no backend": (settings("clamd", "backends", ["/run/clamd"]), 78),
    "unknown key": (settings("clamd", "bakcends", []), 78),
    "long socket": (settings("listen", "socket", LONG), 78),
    "long run": (settings("service", "run", LONG), 78),
    "relative state": (settings("service", "state", "state"), 78),
    "no TOML": (text(b"[service\n"), 78),
    "no UTF-8": (text(b'[service]\nstate = "\xff"\n'), 78),
    "binary": (text(bytes(range(256)) * 10), 78),
    "no file": (lambda daemon: (daemon.config.unlink(), str(daemon.config))[1], 78),
    "options is a directory": (control("options", "directory"), 78),
    "table is a directory": (control("clamavclients", "directory"), 78),
    "table is a loop": (control("spamdclients", "loop"), 78),
    "list is a pipe": (control("badsignatures", "pipe"), 78),
    "state missing": (place("state", "missing"), 78),
    "state is a file": (place("state", "file"), 78),
    "state read-only": (place("state", "read-only"), 78),
    "run missing": (place("run", "missing"), 1),
    "run is a file": (place("run", "file"), 1),
    "run read-only": (place("run", "read-only"), 1),
    "socket is a file": (occupied, 1),
}


AT_THE_START = (
    "string for a number",
    "long socket",
    "no TOML",
    "no file",
    "options is a directory",
    "table is a loop",
    "list is a pipe",
    *(name for name in WRONG if name.startswith(("state", "run", "socket"))),
)


@pytest.mark.parametrize("name", AT_THE_START)
def test_what_is_wrong_at_the_start_ends_it_with_one_clear_line(name: str) -> None:
    spoil, status = WRONG[name]
    daemon = Daemon()
    try:
        named = spoil(daemon)
        daemon.start(wait=False)
        assert daemon.wait_exit() == status
        said = [line["text"] for line in daemon.log("text")]
        assert said
        assert all(line.startswith("contentfilter: ") for line in said), said
        assert named in said[0]
        assert daemon.log("worker.start") == []
    finally:
        daemon.clean()


def test_a_user_who_may_not_read_or_write_sees_the_reason() -> None:
    """As another user than root, where the tests may become one."""
    another = "setpriv --reuid=nobody --regid=nogroup --clear-groups"
    python = f"{another} {sys.executable} -P -m contentfilter"
    if os.geteuid() or os.system(f"PYTHONPATH={PACKAGE} {python} --version >/dev/null 2>&1"):
        pytest.skip("needs root, setpriv, and a place that others can reach")
    script = f'exec {python} --config "$0" serve'
    for spoiled, status in (("control/options", 78), ("state", 78), (".", 1), ("contentfilter.toml", 78)):
        daemon = Daemon(command=["sh", "-c", script])
        try:
            (daemon.directory / "control" / "options").write_text("chksignature 1\n")
            for path in (daemon.directory, *daemon.directory.rglob("*")):
                shutil.chown(path, "nobody")
            path = daemon.directory / spoiled
            shutil.chown(path, "root")
            path.chmod(0o711 if path.is_dir() else 0o600)
            daemon.start(wait=False)
            assert daemon.wait_exit() == status, spoiled
            said = daemon.log("text")[-1]["text"]
            assert str(path.resolve()) in said
            assert "ermission denied" in said
        finally:
            daemon.clean()


BAD_LINES = {
    "options": "chksignature maybe\nskipcachk 9\n= 7\nsamsgsize -5\n\0\xff\nspamdchildren 0\nchkloadertype 1\n",
    "clamavclients": "@protected.example\nno address at all\n@@\n!\n\0@x.example\n"
    + "y" * 3000
    + "@z.example\nok@mixed.example\n",
    "badsignatures": "TVqQAAMAAAAE\n!!! no base64 !!!\n\0\n" + "T" * 5000 + "\n",
    "badloadertypes": "\n\n   \n\xff\n",
}


def test_bad_lines_are_skipped_and_reported_and_the_rest_holds(make_system, clamd) -> None:
    system = make_system(clamd=clamd, controls=BAD_LINES)
    problems = system.daemon.log("service.problem")
    assert all(line["line"] > 0 and line["text"] for line in problems)
    seen = {Path(line["path"]).name for line in problems}
    assert {"options", "clamavclients", "badsignatures"} <= seen
    assert system.deliver(VIRUS, b"ok@mixed.example").status == TOLD
    assert system.deliver(VIRUS, b"x@protected.example").status == TOLD
    assert b"virus=skipped" in system.deliver(VIRUS, b"x@z.example").only.message


def test_a_reload_of_anything_wrong_leaves_the_old_in_force_and_mail_flowing(make_system, clamd) -> None:
    system = make_system(clamd=clamd, settings={"tables": {"refresh": 3600.0}})
    daemon = system.daemon
    good = daemon.config.read_text()
    tables = (daemon.directory / "control" / "clamavclients").read_text()
    failures = 0
    with Load(system, senders=1) as load:
        for name, (spoil, status) in WRONG.items():
            if status != 78:
                continue  # what is opened once, at the start
            named = spoil(daemon)
            daemon.reload()
            failures += 1
            assert daemon.wait_for("service.reload-failed", failures)[-1]["generation"] == 1, name
            assert any(named in f"{p['path']}:{p['line']}" for p in daemon.log("service.problem")), name
            assert system.deliver(VIRUS, ONE).status == TOLD, name
            daemon.write_config(good)
            if named.startswith(str(daemon.directory / "control")):
                mend(Path(named))
                (daemon.directory / "control" / "clamavclients").write_text(tables)
        (daemon.directory / "control" / "clamavclients").write_text("nobody@protected.example\n")
        daemon.reload()
        daemon.wait_for("worker.reload")
        until(lambda: system.deliver(VIRUS, ONE).status == 0, "the mended configuration never came into force")
        load.more(2)
    load.nothing_went_wrong()
    assert daemon.log("worker.died") == []
