"""``contentfilter clients`` as an administrator uses it: through the whole command line."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from contentfilter.cli.main import cli


@pytest.fixture
def control(tmp_path):
    directory = tmp_path / "control"
    directory.mkdir()
    (tmp_path / "contentfilter.toml").write_text(f'[service]\ncontrol = "{directory}"\n')
    return directory


@pytest.fixture
def run(control, tmp_path):
    def run(*arguments, text=None, status=0):
        command = ["--config", str(tmp_path / "contentfilter.toml"), "clients", *arguments]
        result = CliRunner().invoke(cli, command, input=text)
        assert result.exit_code == status, result.output
        return result

    return run


def table(control, name="clamavclients"):
    return (control / name).read_bytes()


def test_add_writes_both_tables_or_the_one_named(run, control):
    out = run("add", "U@X.example", "x.example").stdout
    assert out == "clamavclients: 2 added\nspamdclients: 2 added\n"
    assert table(control) == table(control, "spamdclients") == b"u@x.example\n@x.example\n"
    run("add", "--table", "spamd", "--exempt", "boss@x.example")
    assert table(control, "spamdclients").endswith(b"!boss@x.example\n")
    assert b"boss" not in table(control)


def test_adding_what_is_there_changes_nothing(run, control):
    run("add", "u@x.example")
    before = (control / "clamavclients").stat()
    assert run("add", "U@x.example").stdout == "clamavclients: nothing to change\nspamdclients: nothing to change\n"
    assert (control / "clamavclients").stat().st_ino == before.st_ino


def test_exempting_a_row_that_is_there_turns_it(run, control):
    run("add", "u@x.example")
    assert "1 changed" in run("add", "!u@x.example").stdout
    assert table(control) == b"!u@x.example\n"


def test_remove_says_by_its_status_whether_there_was_something(run, control):
    (control / "clamavclients").write_bytes(b"# mine\nA@x.example # first\n!b@x.example\n")
    assert "1 removed" in run("remove", "a@X.example").stdout
    run("remove", "a@x.example", status=1)
    assert table(control) == b"# mine\n!b@x.example\n"


@pytest.mark.parametrize("command", ["add", "remove"])
@pytest.mark.parametrize("bad", ["a@b@c", "*@x.example", "", "a b@x.example"])
def test_a_bad_address_is_wrong_usage_and_changes_nothing(run, control, command, bad):
    assert "Error" in run(command, "good@x.example", bad, status=2).output
    assert os.listdir(control) == []


@pytest.mark.parametrize(
    ("words", "row"),
    [
        (("--table", "clamav", "Bob@x.example", "virus=MOVE:B@x.example"), b"bob@x.example virus=move:B@x.example\n"),
        (("--table", "clamav", "a@x.example", "virus=mark", "@b\u00fccher.example"),
         b"a@x.example virus=mark\n@xn--bcher-kva.example\n"),
        (("--table", "clamav", "mailto=x@x.example"), b"mailto=x@x.example\n"),
    ],
)  # fmt: skip
def test_options_follow_their_key(run, control, words, row):
    run("add", *words)
    assert (control / "clamavclients").read_bytes() == row


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("virus=mark",), "an option follows its key"),
        (("a@x.example", "virus=mark"), "virus"),
        (("--table", "clamav", "a@x.example", "spam=mark"), "belongs into spamdclients"),
        (("--table", "clamav", "a@x.example", "virus=delete"), "expected mark"),
        (("--table", "clamav", "--exempt", "a@x.example", "virus=mark"), "no options"),
        (("--table", "clamav", "a@x.example", "vrius=mark@x.example", "b:c@x.example"), "cannot be in an address"),
        (("mailto:a@x.example",), "mailto"),
        (("a@x\u200b.example",), "U+200B"),
        (("a@x.example,",), "not a domain"),
        (("a@x.example b@x.example",), "name=value"),
        (("#a@x.example",), "not a row"),
    ],
)
def test_a_row_that_cannot_be_is_wrong_usage_with_the_reason(run, control, words, says):
    assert says in run("add", *words, status=2).output
    assert not (control / "clamavclients").exists()


@pytest.mark.parametrize("arguments", [("add", "u@x.example"), ("add", "--json", "u@x.example"), ("import", "-")])
def test_a_dry_run_writes_nothing(run, control, arguments):
    out = run(*arguments, "--dry-run", text="u@x.example\n").stdout
    assert "would be 1 added" in out or json.loads(out)["dry_run"]
    assert not (control / "clamavclients").exists()


def test_list_prints_rows_that_import_reads_back(run, control):
    (control / "clamavclients").write_bytes(b"# c\nB@x.example\n!@y.example\n*\n")
    out = run("list", "--table", "clamav").stdout
    assert out == "b@x.example\n!@y.example\n*\n"
    run("import", "--table", "spamd", "-", text=out)
    assert table(control, "spamdclients").decode() == out
    assert run("list", "EXAMPLE").stdout.splitlines() == [
        "Table\tRow",
        "clamavclients\tb@x.example",
        "clamavclients\t!@y.example",
        "spamdclients\tb@x.example",
        "spamdclients\t!@y.example",
    ]
    assert json.loads(run("list", "--json", "y.ex").stdout)["spamdclients"] == [
        {"key": "@y.example", "exempt": True, "options": ""}
    ]
    run("list", "nothing-like-it", status=1)


def test_list_reports_bad_lines_beside_the_rows(run, control):
    (control / "clamavclients").write_bytes(b"good@x.example\nbad line\n")
    result = run("list", "--table", "clamav")
    assert result.stdout == "good@x.example\n"
    assert f"error: {control}/clamavclients:2:" in result.stderr


def test_lookup_says_which_row_decides_and_why_the_others_do_not(run, control, tmp_path):
    with open(tmp_path / "contentfilter.toml", "a") as settings:
        settings.write('[tables]\nextension = "-"\n')
    (control / "clamavclients").write_bytes(b"user@mail.x.example\n!.x.example\n*\n")
    lines = run("lookup", "User-List@Mail.x.example", "--table", "clamav").stdout.splitlines()
    assert lines == [
        "clamavclients: yes, by user@mail.x.example (address without extension)",
        "    user-list@mail.x.example: no row",
        "    user@mail.x.example: check",
        "    @mail.x.example: no row",
        "    .x.example: exempt, but a more specific row has decided",
        "    .example: no row",
        "    *: check, but a more specific row has decided",
    ]
    answer = json.loads(run("lookup", "--json", "other@mail.x.example", status=1).stdout)
    assert answer["tables"]["clamavclients"]["answer"] == "exempt"
    assert answer["tables"]["clamavclients"]["key"] == ".x.example"
    assert answer["tables"]["spamdclients"]["answer"] == "no"


def test_lookup_of_a_name_without_domain_uses_the_one_that_qmail_adds(run, control):
    (control / "me").write_bytes(b"mx.example\n")
    (control / "spamdclients").write_bytes(b"postmaster@mx.example\n")
    assert "yes, by postmaster@mx.example" in run("lookup", "postmaster").stdout


def test_lookup_mentions_the_global_switch(run, control):
    (control / "clamglobal").write_bytes(b"1\n")
    assert "clamglobal is 1" in run("lookup", "u@x.example", status=1).stdout


def test_import_is_all_or_nothing_and_names_every_bad_line(run, control):
    text = "good@x.example\nbad line\nalso@good.example\n*@x.example\n"
    result = run("import", "-", text=text, status=1)
    assert [line.split(":")[2] for line in result.stderr.splitlines() if line.startswith("error")] == ["2", "4"]
    assert "nothing is imported" in result.stderr
    assert os.listdir(control) == []


@pytest.mark.parametrize(
    "text",
    [
        "a@x.example\n!b@x.example\n",
        "a@x.example\r\n!b@x.example\r\n",
        "email\na@x.example\n!b@x.example\n",
        "Name,E-Mail,Quota\nAnn,A@x.example,5\n,!b@x.example,\n",
        'a@x.example,"Ann, the first"\n!b@x.example,\n',
        "id;address\n1;a@x.example\n2;!b@x.example\n",
        "\ufeffemail,name\na@x.example,Ann\n!b@x.example,Bob",
    ],
)
def test_import_reads_a_list_and_simple_csv(run, control, tmp_path, text):
    path = tmp_path / "clients.csv"
    path.write_text(text, newline="")
    run("import", "--table", "clamav", str(path))
    assert table(control) == b"a@x.example\n!b@x.example\n"


def test_a_bad_cell_has_the_line_of_the_csv_file(run, tmp_path):
    path = tmp_path / "clients.csv"
    path.write_text('name,email\n"Ann, A.",a@x.example\nBob,b x\n')
    assert f"error: {path}:3:" in run("import", str(path), status=1).stderr


def test_import_with_replace_leaves_only_what_is_in_the_file(run, control):
    (control / "clamavclients").write_bytes(b"# mine\nold@x.example\nkept@x.example # note\n")
    out = run("import", "--replace", "--table", "clamav", "-", text="new@x.example\nkept@x.example\n").stdout
    assert out == "clamavclients: 1 added, 1 removed\n"
    assert table(control) == b"# mine\nkept@x.example # note\nnew@x.example\n"


def test_an_empty_import_never_replaces_anything(run, control):
    (control / "clamavclients").write_bytes(b"old@x.example\n")
    run("import", "--replace", "-", text="# nothing\n", status=1)
    assert table(control) == b"old@x.example\n"


def test_a_control_directory_that_is_not_there_is_a_configuration_error(run, control):
    control.rmdir()
    assert "no such directory" in run("add", "u@x.example", status=78).stderr


def test_a_table_that_cannot_be_read_is_a_configuration_error(run, control):
    (control / "spamdclients").mkdir()
    for command in (("list",), ("lookup", "u@x.example"), ("add", "u@x.example")):
        assert "spamdclients" in run(*command, status=78).stderr


def test_commands_at_the_same_time_lose_nothing(control, tmp_path):
    config = str(tmp_path / "contentfilter.toml")
    commands = [
        subprocess.Popen(
            [sys.executable, "-m", "contentfilter", "--config", config, "clients", "add", f"u{number}@x.example"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for number in range(6)
    ]
    for command in commands:
        _, error = command.communicate(timeout=100)
        assert command.returncode == 0, error
    for name in ("clamavclients", "spamdclients"):
        assert sorted(table(control, name).split()) == [b"u%d@x.example" % number for number in range(6)]
