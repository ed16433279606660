"""Who may look and who may change: real clients under other users ask a real daemon."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab.daemon import PACKAGE, WAIT, Daemon
from lab.offer import offer

from contentfilter.bus import messages, sockets

NOBODY = 65_534
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture
def running(daemon: Callable[..., Daemon]) -> Iterator[Daemon]:
    """Its directory is open to its group, as systemd's RuntimeDirectoryMode=0750 leaves it."""
    with daemon({"service": {"workers": 1}}) as running:
        running.directory.chmod(0o750)
        yield running


CLIENT = """
import importlib, os, sys
from contentfilter.cli.main import cli
group, user, config, *words = sys.argv[1:]
for name in ("status", "top", "tail", "control", "bypass"):  # while the interpreter's files can be read
    importlib.import_module("contentfilter.cli." + name)
import getpass, rich.console, rich.live, rich.text, zmq.utils.monitor
os.setgroups([])
os.setgid(int(group))
os.setuid(int(user))
cli(["--config", config, *words], prog_name="contentfilter")
"""


def client(running: Daemon, group: int, *words: str, config: Path | None = None) -> list[str]:
    """The real command in a process that has become another user, in one group only."""
    return [sys.executable, "-P", "-c", CLIENT, str(group), str(NOBODY), str(config or running.config), *words]


def called(running: Daemon, group: int, *words: str, config: Path | None = None) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    whole = client(running, group, *words, config=config)
    return subprocess.run(whole, env=environ, capture_output=True, text=True, timeout=60, check=False)


def ours(running: Daemon) -> int:
    return running.directory.stat().st_gid


def test_a_member_of_the_group_may_look(running: Daemon) -> None:
    done = called(running, ours(running), "status", "--json")
    assert json.loads(done.stdout)["pid"] == running.pid, done.stderr
    assert running.log("control.refused") == []


def test_a_member_of_the_group_may_follow_the_events(running: Daemon) -> None:
    environ = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    words = client(running, ours(running), "tail", "--count", "1", "--json")
    with subprocess.Popen(words, env=environ, stdout=subprocess.PIPE) as process:
        while process.poll() is None:
            assert offer(running.socket)
        assert process.stdout is not None
        assert json.loads(process.stdout.read())["event"] == "mail.done"


CHANGES = {
    "AskReload": ["reload", "--restart"],
    "AskBypass": ["bypass", "clamd", "--for", "30m", "--reason", "x"],
    "AskBypassEnd": ["bypass", "end", "all"],
    "AskDrain": ["drain"],
    "AskResume": ["resume"],
    "AskAllow": ["allow", "add", "Some.Signature", "--for", "1h", "--reason", "x"],
    "AskAllowEnd": ["allow", "remove", "Some.Signature"],
}


def test_every_question_that_changes_something_is_tried_here() -> None:
    assert set(CHANGES) == {question.__name__ for question in messages.CHANGES}


def test_a_member_of_the_group_changes_nothing(running: Daemon) -> None:
    before = running.workers()
    for count, (question, words) in enumerate(CHANGES.items(), 1):
        done = called(running, ours(running), *words)
        assert (done.returncode, done.stdout) == (1, ""), words
        assert f"only root and the daemon's user may do that, not uid {NOBODY}" in done.stderr
        line = running.wait_for("control.refused", count)[-1]
        assert (line["uid"], line["question"], line["level"]) == (NOBODY, question, "warning")
    reply = sockets.ask(str(running.directory), messages.AskStatus(), WAIT)
    assert isinstance(reply, messages.Status)
    assert (reply.generation, reply.state, reply.bypasses) == (1, "ready", ())
    assert running.workers() == before


def test_who_is_not_in_the_group_is_told_so(running: Daemon) -> None:
    with tempfile.TemporaryDirectory(prefix="cf-", dir="/tmp") as name:
        config = Path(name, "contentfilter.toml")
        config.write_text(running.config.read_text())
        config.parent.chmod(0o755)
        for words in (["status"], ["tail"], ["top", "--once"], ["reload"]):
            done = called(running, NOBODY, *words, config=config)
            assert (done.returncode, done.stdout) == (1, ""), words
            assert "Permission denied" in done.stderr
            assert "daemon's group" in done.stderr


def test_a_configuration_that_cannot_be_read_is_told_with_the_socket_that_nobody_serves(running: Daemon) -> None:
    done = called(running, NOBODY, "status")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{running.config}: cannot read it: Permission denied" in done.stderr


def test_root_may_change(running: Daemon) -> None:
    reply: Any = sockets.ask(str(running.directory), messages.AskReload(), WAIT)
    assert (type(reply), reply.ok) == (messages.Done, True)
