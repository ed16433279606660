"""``contentfilter migrate`` on written directories: statuses, files, and what it refuses to do."""

import asyncio
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from contentfilter.admin.migration import CONTROL
from contentfilter.cli import migrate as module
from contentfilter.cli.main import cli
from contentfilter.config.controls import read_controls
from contentfilter.config.load import load_settings
from contentfilter.tables.files import load_tables


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["migrate", *map(str, arguments)])


@pytest.fixture
def simscan(tmp_path: Path) -> Path:
    """A simscan of one row: everything carries over."""
    control = tmp_path / "qmail" / "control"
    control.mkdir(parents=True)
    (control / "simcontrol").write_text(":clam=yes,spam=yes,spam_hits=9.5,attach=.exe\n")
    (control / "rcpthosts").write_text("example.com\n")
    return control


@pytest.fixture
def hsphere(tmp_path: Path) -> Path:
    control = tmp_path / "hsphere"
    control.mkdir()
    (control / "options").write_text("skipsachk 2\nspamglobal 1\nclamglobal 1\n")
    return control


@pytest.mark.parametrize("name", ["simscan", "hsphere"])
def test_all_carried_over_is_status_0_and_writes_what_it_lists(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    old = request.getfixturevalue(name)
    result = run(name, old, "--output", tmp_path / "new", "--json")
    assert result.exit_code == 0, result.output
    listed = {file["path"]: file["bytes"] for file in json.loads(result.stdout)["files"]}
    written = {
        str(p.relative_to(tmp_path / "new")): p.stat().st_size for p in (tmp_path / "new").rglob("*") if p.is_file()
    }
    assert listed == written
    assert {"contentfilter.toml", "queue.conf", "control/options", "control/clamavclients"} <= set(written)


@pytest.mark.parametrize("name", ["simscan", "hsphere"])
def test_what_is_written_is_what_the_daemon_reads(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    old, new = request.getfixturevalue(name), tmp_path / "new"
    (old / "me").write_text("mail.example.com \n")
    if name == "hsphere":
        (old / "clamavclients").write_text("Joe@Example.com\n!ann@example.com\n")
        (old / "options").write_text(
            "skipsachk 2\nspamglobal 1\nsamsgsize 1000\nspamdchildren 20\nsysfacility LOG_LOCAL3\n"
        )
        (old / "badsignatures").write_text("TVqQAAMAA\n")
    run(name, old, "--output", new)
    settings = load_settings(str(new / "contentfilter.toml"))
    controls, problems = asyncio.run(read_controls(str(new / "control")))
    tables, more = asyncio.run(load_tables(str(new / "control")))
    assert (problems, more) == ((), ())
    assert settings.service.control == CONTROL
    assert tables.default_domain == b"mail.example.com"
    taken = {key: value for key, value in controls.values.items() if controls.places[key]}
    if name == "hsphere":
        assert taken == {
            "skipsachk": 2, "spamglobal": True, "samsgsize": 1000, "spamdchildren": 20, "sysfacility": "LOG_LOCAL3",
        }  # fmt: skip
        assert dict(tables.clamav) == {b"joe@example.com": b"", b"ann@example.com": b"!"}
        assert b"TVqQAAMAA" in (controls.badsignatures or b"")
    else:
        assert taken == {"skipsachk": 2, "samsgsize": 249_999}
        assert dict(tables.clamav) == dict(tables.spamd) == {b"*": b""}
        assert settings.spamd.reject_score == 9.5


def test_what_needs_a_person_is_status_1_and_comes_first(simscan: Path, tmp_path: Path) -> None:
    (simscan / "simcontrol").write_text(":clam=yes\nexample.com:regex=x\n")
    result = run("simscan", simscan, "--output", tmp_path / "new")
    assert result.exit_code == 1
    assert "not supported" in result.stdout.splitlines()[1]
    assert "simcontrol:2" in result.stdout.splitlines()[1]


def test_the_report_gives_file_and_line(hsphere: Path, tmp_path: Path) -> None:
    (hsphere / "options").write_text("# x\nspamglobal 1\nclamglobl 1\n")
    report = json.loads(run("hsphere", hsphere, "--output", tmp_path / "new", "--json").stdout)
    (difference,) = (d for d in report["differences"] if d["subject"] == "clamglobl 1")
    assert (difference["kind"], difference["file"], difference["line"]) == ("check", "options", 3)
    assert report["needs_a_person"] is True


def test_qmails_home_serves_as_well(simscan: Path, tmp_path: Path) -> None:
    assert run("simscan", simscan.parent, "--output", tmp_path / "new").exit_code == 0


def test_a_dry_run_writes_nothing_and_says_the_same(simscan: Path, tmp_path: Path) -> None:
    dry = run("simscan", simscan, "--output", tmp_path / "new", "--dry-run")
    assert not (tmp_path / "new").exists()
    wet = run("simscan", simscan, "--output", tmp_path / "new")
    assert dry.stdout.replace("would write", "wrote") == wet.stdout


def test_existing_files_stay_unless_forced(simscan: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    (new / "queue.conf").write_text("mine\n")
    result = run("simscan", simscan, "--output", new)
    assert result.exit_code == 2
    assert "queue.conf exists" in result.stderr
    assert [p.name for p in new.iterdir()] == ["queue.conf"]  # nothing else was written either
    assert (new / "queue.conf").read_text() == "mine\n"
    assert run("simscan", simscan, "--output", new, "--force").exit_code == 0
    assert (new / "queue.conf").read_text() != "mine\n"
    assert not list(new.rglob("*.new"))


def test_a_dangling_link_counts_as_existing(simscan: Path, tmp_path: Path) -> None:
    (tmp_path / "queue.conf").symlink_to(tmp_path / "elsewhere")
    assert run("simscan", simscan, "--output", tmp_path).exit_code == 2
    assert not (tmp_path / "elsewhere").exists()


def test_the_old_controls_are_never_written_to(simscan: Path) -> None:
    before = sorted(p.name for p in simscan.iterdir())
    result = run("simscan", simscan, "--output", simscan.parent, "--force")
    assert result.exit_code == 2
    assert "old control directory" in result.stderr
    assert sorted(p.name for p in simscan.iterdir()) == before


@pytest.mark.parametrize("arguments", [("simscan",), ("qmail-scanner", "."), ("hsphere", "/no/such/directory")])
def test_wrong_usage_is_status_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_a_file_is_not_a_directory(simscan: Path) -> None:
    assert run("simscan", simscan / "simcontrol").exit_code == 2


def test_an_empty_directory_needs_a_person_and_gives_no_files(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for origin in ("hsphere", "simscan"):
        result = run(origin, tmp_path / "old", "--output", tmp_path / "new")
        assert result.exit_code == 1
        assert "not here" in result.stdout
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["directory", "pipe", "loop"])
def test_what_cannot_be_read_is_named_and_does_not_block(kind: str, hsphere: Path, tmp_path: Path) -> None:
    odd = hsphere / "clamavclients"
    {"directory": odd.mkdir, "pipe": lambda: os.mkfifo(odd), "loop": lambda: odd.symlink_to(odd)}[kind]()
    report = json.loads(run("hsphere", hsphere, "--output", tmp_path / "new", "--json").stdout)
    assert next(d["text"] for d in report["differences"] if d["file"] == "clamavclients").startswith("cannot be read: ")


def test_a_file_that_is_too_large_is_named(hsphere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 100)
    (hsphere / "clamavclients").write_text("a@example.com\n" * 20)
    report = json.loads(run("hsphere", hsphere, "--output", tmp_path / "new", "--json").stdout)
    assert any("larger than 100 bytes" in d["text"] for d in report["differences"])


def test_a_report_shows_hostile_text_as_text(hsphere: Path, tmp_path: Path) -> None:
    (hsphere / "options").write_bytes(b"[red]x[/red] 1\n\x1b[2Jclear 1\nnot[bold 2\n")
    (hsphere / os.fsdecode(b"odd\xff\x1b[name")).write_text("x")
    result = run("hsphere", hsphere, "--output", tmp_path / "new")
    assert result.exit_code == 1
    assert "[red]x[/red] 1" in result.stdout
    assert "\x1b" not in result.stdout
    assert "odd??[name" in result.stdout


def test_an_output_that_cannot_be_made_is_a_clear_error(simscan: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("simscan", simscan, "--output", tmp_path / "file" / "new")
    assert result.exit_code == 1
    assert "Not a directory" in result.stderr
