"""The command itself: ``contentfilter serve`` with its real application, and the questions to it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lab.daemon import WAIT, Daemon
from lab.offer import MESSAGE, offer

from contentfilter.model import Action


def command(running: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    _, environ = running.command()
    argv = [sys.executable, "-P", "-m", "contentfilter", "--config", str(running.config), *words]
    return subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=WAIT, check=False)


def test_a_message_that_nobody_wants_checked_is_queued_with_one_line_in_the_log() -> None:
    with Daemon() as running:
        answer = offer(running.socket, MESSAGE)
        assert answer.action is Action.QUEUE
        assert [s.envelope for s in answer.submissions] == [None]
        line = running.wait_for("mail.done")[0]
        assert (line["decision"], line["size"], line["recipients"]) == (
            "queue",
            len(MESSAGE),
            ["recipient@example.net"],
        )
        assert len(line["id"]) == 16


def test_status_and_reload_answer_from_the_running_daemon() -> None:
    with Daemon() as running:
        seen: dict[str, Any] = json.loads(command(running, "status", "--json").stdout)
        assert (seen["state"], seen["generation"], len(seen["workers"])) == ("ready", 1, 2)
        plain = command(running, "status")
        assert ", ready, configuration 1, up " in plain.stdout
        assert "worker 0 pid" in plain.stdout
        done = command(running, "reload")
        assert (done.returncode, done.stdout) == (0, "configuration 2 is in force\n")
        text = running.config.read_text()
        running.write_config(text.replace("workers = 2", "wrokers = 2"))
        refused = command(running, "reload", "--json")
        reply = json.loads(refused.stdout)
        assert (refused.returncode, reply["ok"], reply["generation"]) == (1, False, 2)
        assert "wrokers" in reply["problems"][0]
        assert "not in force: " in command(running, "status").stdout


def test_without_a_daemon_they_say_so() -> None:
    quiet = Daemon()
    try:
        for words in (["status"], ["reload"]):
            done = command(quiet, *words)
            assert done.returncode == 1
            assert "no daemon answers" in done.stderr
    finally:
        quiet.clean()


def test_the_options_override_the_file(tmp_path: Path) -> None:
    running = Daemon(options=["--workers", "1", "--socket", str(tmp_path / "o")])
    with running:
        assert len(running.workers()) == 1
        assert offer(str(tmp_path / "o")).action is Action.QUEUE


@pytest.mark.parametrize(
    ("text", "told"),
    [("[service]\nwrokers = 2\n", "workers"), ("[service\n", ":1"), ("[service]\nworkers = 'x'\n", ":2")],
)
def test_a_bad_file_ends_with_78_and_tells_where(text: str, told: str) -> None:
    running = Daemon()
    running.write_config(text)
    try:
        running.start(wait=False)
        assert running.wait_exit() == 78
        said = running.log("text")[0]["text"]
        assert str(running.config) in said
        assert told in said
    finally:
        running.clean()
