"""The manual pages tell of everything that there is."""

import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest
from style.tree import ROOT

from contentfilter.cli.main import COMMANDS, EX_CONFIG, cli
from contentfilter.settings import Settings

MAN = ROOT / "etc" / "man"
COMMAND_PAGE = (MAN / "contentfilter.8").read_text()
HOOK_PAGE = (MAN / "contentfilter-queue.8").read_text()


def toml_page() -> str:
    """As the build makes it."""
    page: str = runpy.run_path(str(ROOT / "tools" / "toml_page.py"))["page"](
        (ROOT / "etc" / "contentfilter.toml").read_text()
    )
    return page


def commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{path} {name}".strip(), command
        if isinstance(command, click.Group):
            yield from commands(command, name)


def section(page: str, command: str) -> str:
    """The entry of one command, up to the next one."""
    found = re.search(rf"^\.It Cm {command}(?: .*)?\n((?:(?!\.It|\.El).*\n)*)", page, re.MULTILINE)
    assert found, f"contentfilter(8) has no entry for {command}"
    return found[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_manual_names_every_command_with_its_options(name: str) -> None:
    entry = section(COMMAND_PAGE, name)
    known = set(re.findall(r"(?:Fl|\|) -([a-z-]+)", entry))
    wanted: set[str] = set()
    for path, command in commands(cli):  # type: ignore[arg-type]
        if path.split()[0] == name:
            wanted |= {
                option.removeprefix("--") for p in command.params for option in p.opts if option.startswith("--")
            }
            assert path.split()[-1] in entry, f"contentfilter(8) does not name: {path}"
    wanted -= {"json"}  # said once for all commands
    assert known - {"json"} == wanted


def test_the_manual_knows_no_other_command() -> None:
    before_signals = COMMAND_PAGE.partition(".Sh SIGNALS")[0]
    assert set(re.findall(r"^\.It Cm ([a-z-]+)", before_signals, re.MULTILINE)) == set(COMMANDS)


def test_statuses_are_those_of_the_program() -> None:
    statuses = COMMAND_PAGE.partition(".Sh EXIT STATUS")[2].partition(".El")[0]
    assert re.findall(r"^\.It (\d+)", statuses, re.MULTILINE) == ["0", "1", "2", "70", str(EX_CONFIG)]


def test_every_setting_is_in_its_page_with_its_default() -> None:
    page = toml_page()
    parts = dict(zip(*[iter(re.split(r"^\.Ss \\&\[(\w+)\]\\&\n", page, flags=re.MULTILINE)[1:])] * 2, strict=True))
    for struct in msgspec.structs.fields(Settings):
        for key in msgspec.structs.fields(struct.type):
            tables = f".It Ic \\&[[{struct.name}.{key.name}]]\\&\n"
            shown = f".It Ic {key.name} No = " in parts[struct.name] or tables in parts[struct.name]
            assert shown, f"[{struct.name}] {key.name}"
    assert set(parts) == {field.name for field in msgspec.structs.fields(Settings)}
    assert ".It Ic budget No = 240.0\nTime limit for one message, all steps together." in page


def test_every_line_of_queue_conf_is_in_the_page_of_the_hook_with_its_value() -> None:
    sample = (ROOT / "etc" / "queue.conf").read_text()
    lines = dict(re.findall(r"^#?([a-z]+) (\S+)$", sample, re.MULTILINE))
    told = dict(re.findall(r"^\.It Ic (\w+) (?:Pa|Cm|No|Ar) (\S+)$", HOOK_PAGE, re.MULTILINE))
    assert told == lines | {"environ": "NAME"}


def test_the_hook_s_statuses_are_those_of_its_protocol() -> None:
    table = (ROOT / "docs" / "hook-protocol.md").read_text().partition("| Status | When |")[2].partition("\n\n")[0]
    documented = set(re.findall(r"\d+", " ".join(row.split("|")[1] for row in table.splitlines() if row)))
    assert documented <= set(re.findall(r"\b\d+\b", HOOK_PAGE.partition(".Sh EXIT STATUS")[2]))


@pytest.fixture(params=["contentfilter.8", "contentfilter-queue.8", "contentfilter.toml.5"])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    path.write_text(toml_page() if request.param.endswith("5") else (MAN / request.param).read_text())
    return path


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="needs mandoc")
def test_mandoc_has_no_warning(page: Path) -> None:
    done = subprocess.run(["mandoc", "-Tlint", "-Wwarning", page], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
def test_groff_has_no_warning(page: Path) -> None:
    done = subprocess.run(["groff", "-mdoc", "-ww", "-z", page], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
