"""``contentfilter explain``: the story of a message without a running daemon, and without any effect."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from e2e import mails
from lab.clamd import Clamd
from lab.daemon import toml
from lab.spamd import Spamd

from contentfilter.cli.main import cli

CONTROLS = {
    "options": "chksignature 1\nskipcachk 2\n",
    "clamavclients": "@protected.example\n",
    "spamdclients": "user@protected.example\n",
}


class Client:
    """Runs the command on one configuration."""

    def __init__(self, directory: Path, clamd: str, spamd: str) -> None:
        self.directory = directory
        control, state = directory / "control", directory / "state"
        for path in (control, state):
            path.mkdir()
        for name, text in CONTROLS.items():
            (control / name).write_text(text)
        self.config = directory / "contentfilter.toml"
        self.config.write_text(
            toml(
                {
                    "service": {"control": str(control), "state": str(state)},
                    "origin": {"smtp_users": ["12345"]},
                    "clamd": {"backends": [clamd]},
                    "spamd": {"backends": [spamd]},
                }
            )
        )

    def __call__(self, message: bytes, *options: str, to: str = "user@protected.example") -> Result:
        path = self.directory / "message.eml"
        path.write_bytes(message)
        words = ["--config", str(self.config), "explain", "--recipient", to, *options, str(path)]
        return CliRunner().invoke(cli, words, catch_exceptions=False)

    def json(self, message: bytes, *options: str, **more: str) -> dict[str, object]:
        found: dict[str, object] = json.loads(self(message, "--json", *options, **more).stdout)
        return found


@pytest.fixture
def ask(tmp_path: Path, clamd: Clamd, spamd: Spamd) -> Client:
    return Client(tmp_path, clamd.backend, spamd.backend)


def test_a_refusal_says_which_row_scanner_and_rule(ask: Client) -> None:
    result = ask(mails.VIRUS, "--sender", "a@example.net")
    assert result.exit_code == 1
    assert "from <a@example.net>, 1 recipient(s)" in result.stdout
    assert "virus check yes (@protected.example in clamavclients)" in result.stdout
    assert "found Eicar-Test-Signature.UNOFFICIAL" in result.stdout
    assert "spamd        not asked: the decision was certain before" in result.stdout
    assert "reject: the message is refused permanently; rule: clamd: Eicar-Test-Signature" in result.stdout
    assert "SMTP text    message contains a virus" in result.stdout


def test_mail_that_passes_shows_its_headers_and_status_0(ask: Client) -> None:
    result = ask(mails.PLAIN)
    assert result.exit_code == 0
    assert "X-ContentFilter: explain; virus=clean; spam=clean" in result.stdout


def test_a_forged_field_is_shown_with_its_new_name(ask: Client) -> None:
    result = ask(b"X-Virus-Status: Clean\n" + mails.PLAIN)
    assert "(X-Virus-Status becomes X-Received-X-Virus-Status)" in result.stdout


def test_an_unprotected_recipient_needs_no_scanner(tmp_path: Path) -> None:
    nobody = "unix:/nonexistent/socket"
    result = Client(tmp_path, nobody, nobody)(mails.VIRUS, to="user@elsewhere.example")
    assert result.exit_code == 0
    assert "clamd        not asked: no row in clamavclients" in result.stdout


def test_a_scanner_that_is_down_is_reported(tmp_path: Path) -> None:
    nobody = "unix:/nonexistent/socket"
    result = Client(tmp_path, nobody, nobody)(mails.PLAIN)
    assert result.exit_code == 1
    assert "unchecked, down" in result.stdout
    assert "defer: the client is asked to try again later" in result.stdout


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ((), "stranger"),
        (("--env", "RELAYCLIENT="), "relay"),
        (("--env", "SMTPAUTHUSER=anna"), "authenticated"),
        (("--origin", "local"), "local"),
        (("--origin", "bounce"), "bounce"),
    ],
    ids=["stranger", "relay", "authenticated", "local", "bounce"],
)
def test_the_origin_decides_who_is_skipped(ask: Client, options: tuple[str, ...], kind: str) -> None:
    found = ask.json(mails.VIRUS, *options)
    assert found["origin"] == kind
    expected = {"relay": "queue", "authenticated": "queue", "bounce": "drop"}.get(kind, "reject")
    assert found["decision"] == expected


def test_json_has_the_record_the_story_and_the_text(ask: Client) -> None:
    found = ask.json(mails.VIRUS)
    assert found["rule"] == "clamd: Eicar-Test-Signature.UNOFFICIAL"
    assert "[explain] (#5.7.1)" in str(found["text"])
    stages = [stage for stage, _ in found["story"]]  # type: ignore[attr-defined]
    assert stages == ["message", "origin", "recipients", "signatures", "loadertypes", "clamd", "spamd", "decision"]


def test_nothing_is_left_behind(ask: Client) -> None:
    ask(mails.VIRUS, "--origin", "bounce")
    assert list((ask.directory / "state").rglob("*")) == []


@pytest.mark.parametrize(
    ("words", "status", "part"),
    [
        (["explain", "--recipient", "u@x", "/nonexistent"], 2, "/nonexistent"),
        (["explain", "/dev/null"], 2, "--recipient"),
        (["explain", "--recipient", "u@x", "--env", "NOEQUALS", "/dev/null"], 2, "NAME=VALUE"),
        (["explain", "--recipient", "u" * 1003, "/dev/null"], 2, "1002"),
        (["--config", "/nonexistent.toml", "explain", "--recipient", "u@x", "/dev/null"], 78, "/nonexistent.toml"),
    ],
    ids=["no file", "no recipient", "bad variable", "long address", "no configuration"],
)
def test_wrong_use_is_reported_clearly(words: list[str], status: int, part: str) -> None:
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == status, result.output
    assert part in result.output


def test_an_empty_message_and_a_message_of_nuls(ask: Client) -> None:
    assert ask(b"", to="x@elsewhere.example").exit_code == 0
    assert ask(b"\0" * 100_000).exit_code == 0
