"""``contentfilter check`` and ``showctl``: everything that serve reads, each problem at its place."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from contentfilter.cli.main import cli

GOOD = """
[listen]
socket = "{0}/run/queue.sock"
[service]
control = "{0}/control"
state = "{0}/state"
run = "{0}/run"
[origin]
smtp_users = ["0"]
bounce_users = ["root"]
"""


@pytest.fixture
def place(tmp_path):
    for name in ("control", "state", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "contentfilter.toml").write_text(GOOD.format(tmp_path))
    return tmp_path


@pytest.fixture
def run(place):
    def run(*arguments, status=0):
        result = CliRunner().invoke(cli, ["--config", str(place / "contentfilter.toml"), *arguments])
        assert result.exit_code == status, result.output
        return result.stdout.splitlines()

    return run


@pytest.fixture
def check(run, place):
    def check(*arguments, status=0):
        return run("check", "--queue-conf", str(place / "queue.conf"), *arguments, status=status)

    return check


def test_a_good_configuration_is_one_line(check):
    assert check("--strict") == [
        "0 errors, 0 warnings; read: 0 parameters set, 0 clamavclients rows, 0 spamdclients rows"
    ]


def test_problems_of_all_files_are_reported_together_with_file_and_line(check, place):
    with open(place / "contentfilter.toml", "a") as settings:
        settings.write("[clamd]\ntiemout = 5\n")
    control = place / "control"
    (control / "options").write_bytes(b"chkloadertype 1\nclamglobal yes\n")
    (control / "clamavclients").write_bytes(b"a@x.example\n*@x.example\na@x.example\n")
    (control / "spamdclients").write_bytes(b"bad line\n")
    (control / "badsignatures").write_bytes(b"TVqQAAMAA ok\n===\n")
    (control / "badloadertypes").write_bytes(b"# all out\n")
    *lines, summary = check(status=78)
    found = {line.split(": ")[0] + " " + os.path.relpath(line.split(": ")[1], place) for line in lines}
    assert found == {
        "error contentfilter.toml:12",
        "error control/options:2",
        "error control/clamavclients:2",
        "warning control/clamavclients:3",
        "error control/spamdclients:1",
        "error control/badsignatures:2",
        "warning control/badloadertypes",
    }
    assert summary.startswith("6 errors, 2 warnings")


@pytest.mark.parametrize("name", ["clamavclients", "spamdclients", "options", "badsignatures", "clamglobal"])
def test_a_file_that_cannot_be_read_is_an_error_whichever_it_is(check, place, name):
    (place / "control" / name).mkdir()
    *_, line, summary = check(status=78)
    assert line.startswith(f"error: {place}/control/{name}: ")
    assert summary.startswith("1 error, ")


def test_warnings_alone_are_good_unless_strict(check, place):
    (place / "control" / "options").write_bytes(b"urlscnt 5\n")
    assert check()[-1].startswith("0 errors, 1 warning; read:")
    check("--strict", status=1)


def test_json_has_the_same(check, place):
    (place / "control" / "clamavclients").write_bytes(b"a@x.example\n@@\n")
    report = json.loads("\n".join(check("--json", status=78)))
    assert report["ok"] is False
    assert [(os.path.basename(e["path"]), e["line"]) for e in report["errors"]] == [("clamavclients", 2)]
    assert report["counts"]["clamavclients rows"] == 1
    assert "owners of preferences" not in report["counts"]


def test_owners_of_preferences_are_counted_and_a_bad_one_is_named(check, place):
    (place / "control" / "spamprefs").write_bytes(b"a@x.example\n@y.example\n")
    assert "2 owners of preferences" in check()[-1]
    (place / "control" / "spamprefs").write_bytes(b"a@x.example\n*\n")
    assert "spamprefs: *: an owner is user@domain or @domain" in check(status=78)[0]


def test_users_that_do_not_exist_are_warnings(check, place):
    with open(place / "contentfilter.toml", "a") as settings:
        settings.write("auth_variables = []\n[log]\n[spamd]\nbackends = []\n")
    text = (place / "contentfilter.toml").read_text().replace('"root"', '"nobody-has-this-name"')
    (place / "contentfilter.toml").write_text(text)
    (line, _) = check()
    assert "no such user on this system: 'nobody-has-this-name'" in line


@pytest.mark.parametrize("name", ["state", "run"])
def test_directories_are_looked_at(check, place, name):
    (place / name).rmdir()
    assert [f"warning: {place}/{name}" in line for line in check()] == [True, False]
    (place / name).write_bytes(b"")
    assert "not a directory" in check(status=78)[0]


def test_a_file_where_the_socket_goes_is_an_error(check, place):
    (place / "run" / "queue.sock").write_bytes(b"")
    assert "exists, but is not a socket" in check(status=78)[0]


def test_a_queue_conf_that_cannot_be_read_is_an_error(check, place):
    (place / "queue.conf").symlink_to("queue.conf")
    assert "the hook would defer all mail" in check(status=78)[0]


def test_check_changes_nothing(check, place):
    before = sorted(str(path) for path in place.rglob("*"))
    check()
    assert sorted(str(path) for path in place.rglob("*")) == before


def test_showctl_prints_the_form_of_qmail_showctl(run, place):
    control = place / "control"
    (control / "options").write_bytes(b"skipcachk: 2\nsysfacility LOG_LOCAL3\n")
    (control / "clamglobal").write_bytes(b"1\n")
    (control / "clamavclients").write_bytes(b"a@x.example\nb@x.example\n")
    (control / "badsignatures").write_bytes(b"TVqQAAMAA\n")
    lines = run("showctl")
    assert lines[:4] == ["clamglobal: 1", "spamglobal: (Default.) 0", "skipcachk: 2", "skipsachk: (Default.) 0"]
    assert "xoriginatingip: (Default.) 1" in lines
    assert "sysfacility: LOG_LOCAL3" in lines
    assert "clamavclients: 2 rows" in lines
    assert "spamdclients: (Default.) no file; no recipients" in lines
    assert "badsignatures: 1 rule" in lines
    assert any(line.startswith("badloadertypes: (Default.) ") and line.endswith("built in") for line in lines)
    assert len(lines) == 15 + 2 + 2


def test_showctl_says_where_values_are_set_and_shows_unprintables_as_question_marks(run, place):
    strange = place / "contr\x01l"
    (place / "control").rename(strange)
    text = (place / "contentfilter.toml").read_text().replace("/control", "/contr\\u0001l")
    (place / "contentfilter.toml").write_text(text)
    (strange / "databytes").write_bytes(b"100\n")
    lines = run("showctl", "--verbose")
    assert lines[lines.index("databytes: 100") + 1] == f"    {place}/contr?l/databytes:1"
    shown = json.loads("\n".join(run("showctl", "--json")))["controls"]
    assert shown["databytes"] == {"value": 100, "default": False, "place": f"{strange}/databytes:1"}
    assert shown["clamglobal"] == {"value": False, "default": True, "place": ""}


@pytest.mark.parametrize("command", [("check",), ("showctl",), ("clients", "list")])
def test_the_commands_run_as_processes_and_refuse_a_missing_settings_file(place, command):
    missing = str(place / "missing.toml")
    done = subprocess.run(
        [sys.executable, "-m", "contentfilter", "--config", missing, *command],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 78
    assert f"{missing}: there is no such file" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
