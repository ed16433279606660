"""``contentfilter failures``: the table as it is in force, and what made it so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from lab.daemon import Daemon, toml

from contentfilter.cli.main import cli
from contentfilter.errors import Cause
from contentfilter.model import OriginKind, Scanner
from contentfilter.policy.failure import MEANINGS, failure_table
from contentfilter.settings import FailureSettings, FaultRule

RULE = """
[[failure.rule]]
scanner = "clamd"
cause = ["down", "timeout"]
origin = "authenticated"
action = "pass"
"""
FAILURE = FailureSettings(
    rule=(FaultRule(action="pass", scanner="clamd", cause=("down", "timeout"), origin="authenticated"),)
)
Run = Callable[..., Result]


def call(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["--config", str(config), "failures", *arguments])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A file, and nobody who follows it."""
    path = tmp_path / "contentfilter.toml"
    path.write_text(f'[service]\nrun = "{tmp_path}"\n{RULE}')
    return path


@pytest.fixture
def daemon() -> Any:
    with Daemon({"service": {"workers": 1}, "clamd": {"backends": []}, "spamd": {"backends": []}}) as daemon:
        yield daemon


def cells(result: Result) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(c["scanner"], c["cause"], c["origin"]): c for c in json.loads(result.stdout)["cells"]}


def test_json_has_every_cell_that_can_happen(config: Path) -> None:
    found = cells(call(config, "--json"))
    table, normal = failure_table(FAILURE), failure_table(FailureSettings())
    expected = {
        (scanner.value, cause.value, origin.value): {
            "scanner": scanner.value,
            "cause": cause.value,
            "origin": origin.value,
            "action": cell.action,
            "default": normal[scanner, cause, origin].action,
            "set_by": cell.source,
            "fixed": cell.fixed,
        }
        for (scanner, cause, origin), cell in table.items()
        if scanner in MEANINGS[cause].scanners
    }
    assert found == expected
    assert found["clamd", "down", "authenticated"]["set_by"] == "[[failure.rule]] 1"


def test_the_table_in_print_says_the_same_and_marks_what_is_not_the_default(config: Path) -> None:
    result = call(config)
    head, *rows = [line.split() for line in result.stdout.partition("\n\n")[0].splitlines()]
    assert head == ["scanner", "cause", *(origin.value for origin in OriginKind), "set", "by"]
    table, normal = failure_table(FAILURE), failure_table(FailureSettings())
    for scanner, cause, *actions in (row[:7] for row in rows):
        for origin, shown in zip(OriginKind, actions, strict=True):
            key = (Scanner(scanner), Cause(cause), origin)
            star = "*" if table[key].action != normal[key].action else ""
            assert shown == table[key].action + star, key
    assert len(rows) == sum(len(meaning.scanners) for meaning in MEANINGS.values())
    assert [row[7:] for row in rows if row[:2] == ["clamd", "down"]] == [["clamd,", "rule", "1"]]
    assert max(map(len, result.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--scanner", "spamd", "--origin", "bounce"], {("spamd", "bounce")}),
        (
            ["--cause", "limits", "--origin", "local"],
            {("clamd", "local"), ("signatures", "local"), ("loadertypes", "local")},
        ),
    ],
)
def test_parts_of_it_can_be_asked_for(config: Path, options: list[str], expected: set[tuple[str, str]]) -> None:
    assert {(scanner, origin) for scanner, _, origin in cells(call(config, "--json", *options))} == expected


def test_what_cannot_happen_is_said(config: Path) -> None:
    result = call(config, "--scanner", "signatures", "--cause", "down")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "never fails with this cause" in result.stderr


def test_each_cause_is_explained(config: Path) -> None:
    printed = " ".join(call(config, "-v").stdout.split())
    assert all(f"{cause.value} {meaning.text}" in printed for cause, meaning in MEANINGS.items())


def test_without_a_daemon_it_is_the_file_and_says_so(config: Path) -> None:
    result = call(config)
    assert result.exit_code == 0
    assert "no daemon answers" in result.stderr
    assert call(config, "--file").stderr == ""
    assert json.loads(call(config, "--json").stdout)["source"] == "file"


def test_a_bad_file_without_a_daemon_is_a_configuration_error_with_its_line(config: Path) -> None:
    config.write_text(config.read_text().replace('"down"', '"donw"'))
    for options in ([], ["--file"], ["--json"]):
        result = call(config, *options)
        assert (result.exit_code, result.stdout) == (78, "")
        assert f"{config}:6: [[failure.rule]] cause: expected one of" in result.stderr


def test_a_running_daemon_is_asked_and_a_newer_file_is_printed(daemon: Daemon) -> None:
    same = call(daemon.config)
    assert (same.exit_code, same.stderr) == (0, "")
    daemon.write_config(toml(daemon._settings) + RULE)
    newer = call(daemon.config)
    assert newer.exit_code == 1
    assert newer.stdout == same.stdout, "still the table that is in force"
    assert "not in force: clamd, down, authenticated: the file says pass ([[failure.rule]] 1)" in newer.stderr
    assert "run: contentfilter reload" in newer.stderr
    assert json.loads(call(daemon.config, "--json").stdout)["current"] is False
    assert "pass*" in call(daemon.config, "--file").stdout
    daemon.reload()
    daemon.wait_for("service.reload")
    after = call(daemon.config)
    assert (after.exit_code, after.stderr) == (0, "")
    assert "pass*" in after.stdout


def test_a_daemon_that_goes_on_with_the_old_file_is_printed_with_what_is_wrong(daemon: Daemon) -> None:
    daemon.write_config(toml(daemon._settings) + RULE.replace('"pass"', '"drop"'))
    result = call(daemon.config)
    assert result.exit_code == 1
    assert "[[failure.rule]] action: expected one of" in result.stderr
    assert "the daemon continues with configuration 1" in result.stderr
    assert "pass*" not in result.stdout
