"""Commands that print for other programs: spamd's options, and the completion of shells."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from contentfilter.cli.main import COMMANDS, cli
from contentfilter.cli.spamd_options import as_options


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "control").mkdir()
    path = tmp_path / "contentfilter.toml"
    path.write_text(f'[service]\ncontrol = "{tmp_path}/control"\n')
    return path


def spamd_options(config: Path, *more: str) -> str:
    done = CliRunner().invoke(cli, ["--config", str(config), "spamd-options", *more])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", "--max-children 10 --local\n"),
        ("spamdchildren 25\nsanetcheck 1\n", "--max-children 25 --nolocal\n"),
        ("sanetcheck 0\n", "--max-children 10 --local\n"),
    ],
)
def test_spamd_s_options_follow_the_control_files(config: Path, options: str, expected: str) -> None:
    (config.parent / "control" / "options").write_text(options)
    assert spamd_options(config) == expected


def test_the_drop_in_replaces_the_command_and_wins_over_debian_s_options(config: Path) -> None:
    (config.parent / "control" / "spamdchildren").write_text("7\n")
    lines = [line for line in spamd_options(config, "--systemd").splitlines() if not line.startswith("#")]
    assert lines == [
        "[Service]",
        "ExecStart=",
        "ExecStart=/usr/sbin/spamd --pidfile=/run/spamd.pid $OPTIONS --max-children 7 --local",
    ]


def test_spamd_takes_the_last_of_two_options_and_nolocal() -> None:
    program = shutil.which("spamd", path="/usr/sbin:/usr/bin:/sbin:/bin")
    if program is None:
        pytest.skip("needs spamd")
    source = Path(program).read_text(errors="replace")
    # Getopt::Long: "!" makes --nolocal, a scalar keeps the last value.
    assert re.search(r"'local!'\s*=>\s*\\\$opt", source)
    assert re.search(r"'max-children\|m=i'\s*=>\s*\\\$opt", source)
    assert as_options(3, network=True) == "--max-children 3 --nolocal"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_one_of_its_shell(shell: str) -> None:
    done = CliRunner().invoke(cli, ["completion", shell])
    assert done.exit_code == 0
    assert f"_CONTENTFILTER_COMPLETE={shell}_complete" in done.stdout
    if shutil.which(shell):
        check = subprocess.run([shell, "-n"], input=done.stdout, capture_output=True, text=True, check=False)
        assert (check.returncode, check.stderr) == (0, "")


def complete(*words: str) -> list[str]:
    """Completions that bash would offer for the last word."""
    environ = {"_CONTENTFILTER_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(("contentfilter", *words))}
    environ["COMP_CWORD"] = str(len(words))
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "contentfilter"],
        env={"PYTHONPATH": ":".join(sys.path), **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    if len(words) == 1:
        loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        assert not loaded & {"asyncio", "msgspec", "zmq"}, "completing a command's name loads the commands"
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


def test_commands_sub_commands_and_options_are_completed() -> None:
    assert complete("spam") == ["spamd-options"]
    assert set(complete("")) >= set(COMMANDS)
    assert complete("hook", "unin") == ["uninstall"]
    assert complete("uninstall", "--pu") == ["--purge"]


def test_completing_behind_nonsense_offers_nothing() -> None:
    assert complete("nonsense", "x") == []
