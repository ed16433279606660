"""Commands that save something and then tell the daemon: what they say when it takes no orders from them."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from lab.daemon import toml

from contentfilter.bus import messages, sockets
from contentfilter.cli.main import cli

WHY = "only root and the daemon's user may do that, not uid 7"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings for a daemon that refuses everything."""
    for name in ("state", "control", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "control" / "clamavclients").write_text("@protected.example\n")
    path = tmp_path / "contentfilter.toml"
    path.write_text(toml({"service": {name: str(tmp_path / name) for name in ("state", "control", "run")}}))
    monkeypatch.setattr(sockets, "ask", lambda *_: messages.Refused(WHY))
    return path


def run(config: Path, *words: str) -> Result:
    return CliRunner().invoke(cli, ["--config", str(config), *words])


def test_accept_says_that_it_is_noted_but_not_in_force(config: Path) -> None:
    checksum = json.loads(run(config, "clients", "diff", "--json").output)["checksum"]
    done = run(config, "clients", "accept", checksum)
    assert done.exit_code == 1
    assert f"accepted, but not in force yet: {WHY}" in done.output


@pytest.mark.parametrize(
    "words",
    [
        ("bypass", "clamd", "--for", "1h", "--reason", "r"),
        ("bypass", "end", "all"),
        ("bypass", "list"),
        ("drain",),
        ("resume",),
        ("allow", "add", "Sig.1", "--for", "1h", "--reason", "r"),
        ("allow", "remove", "Sig.1"),
        ("allow", "list"),
    ],
)
def test_an_order_that_is_refused_says_why(config: Path, words: tuple[str, ...]) -> None:
    done = run(config, *words)
    assert (done.exit_code, done.output) == (1, f"contentfilter: {WHY}\n")
    assert not list((config.parent / "state").iterdir())


def test_a_refused_user_sees_a_refusal_and_not_that_no_daemon_runs(config: Path, monkeypatch: Any) -> None:
    (config.parent / "run" / "control.sock").touch()
    monkeypatch.setattr(sockets, "ask", lambda *_: None)
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "try again as root" in run(config, "resume").output


def test_a_daemon_that_starts_during_the_write_gets_the_order(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def ask(_run: str, question: messages.Question, _seconds: float) -> messages.Reply | None:
        given.append(type(question).__name__)
        if len(given) == 1:
            return None
        if isinstance(question, messages.AskAllow):
            return messages.Ordered((), None)
        return messages.Status("", 1, "ready", 1, 1.0, "", 0, 0, (), ())

    monkeypatch.setattr(sockets, "ask", ask)
    done = run(config, "allow", "add", "Sig.1", "--for", "1h", "--reason", "r")
    assert (done.exit_code, given) == (0, ["AskAllow", "AskStatus", "AskAllow"])
    assert "in force in every worker" in done.output
