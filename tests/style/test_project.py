"""The repository describes itself correctly: versions, commands, links, sizes, and no trace of one machine."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from style.tree import PACKAGE, ROOT, relative, text_files

import contentfilter
from contentfilter.cli.main import COMMANDS, cli

MARKDOWN = [path for path in text_files() if path.suffix == ".md"]

# Longer than 400 lines, each with its reason.
LONG: dict[str, str] = {}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False)


# Version and packaging


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert contentfilter.__version__ == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


installed = pytest.mark.skipif(
    Path(contentfilter.__file__).is_relative_to(PACKAGE), reason="runs from the source tree, not installed"
)


@installed
def test_the_installed_package_is_this_version() -> None:
    assert importlib.metadata.version("contentfilter") == contentfilter.__version__


@installed
def test_the_wheel_brings_package_hook_and_samples() -> None:
    prefix = Path(sys.prefix)
    assert os.access(prefix / "bin" / "contentfilter-queue", os.X_OK)
    assert os.access(prefix / "bin" / "contentfilter", os.X_OK)
    package = Path(contentfilter.__file__).parent
    for source in (*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.html")):
        assert (package / source.relative_to(PACKAGE)).read_bytes() == source.read_bytes(), relative(source)
    for sample in filter(Path.is_file, (ROOT / "etc").rglob("*")):
        manual = sample.parent.name == "man"
        name = f"man/man8/{sample.name}" if manual else f"contentfilter/{sample.relative_to(ROOT / 'etc')}"
        copy = prefix / "share" / name
        assert copy.read_bytes() == sample.read_bytes(), relative(sample)


@installed
def test_the_hook_is_static() -> None:
    hook = Path(sys.prefix, "bin", "contentfilter-queue")
    # A program header of type 3 (PT_INTERP) names a dynamic loader; a static program has none.
    image = hook.read_bytes()
    assert image[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian program"
    table = int.from_bytes(image[32:40], "little")
    size, count = int.from_bytes(image[54:56], "little"), int.from_bytes(image[56:58], "little")
    types = [int.from_bytes(image[table + i * size :][:4], "little") for i in range(count)]
    assert 1 in types
    assert 3 not in types


def test_the_build_compiles_every_source_of_the_hook() -> None:
    build = (ROOT / "queue_hook" / "meson.build").read_text()
    listed = set(re.findall(r"'(\w+\.[ch])'", build))
    assert listed == {path.name for path in (ROOT / "queue_hook").glob("*.[ch]")}


# The command line


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    done = CliRunner().invoke(cli, [name, "--help"], prog_name="contentfilter")
    assert done.exit_code == 0, done.output[-300:]
    assert done.stdout.startswith("Usage: contentfilter " + name)
    assert done.stderr == ""


def test_help_loads_nothing_that_it_does_not_need() -> None:
    done = run("-X", "importtime", "-m", "contentfilter", "--help")
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "click" in loaded
    assert loaded & {"aiofiles", "aiomysql", "asyncio", "clamd", "msgspec", "rich", "structlog", "zmq"} == set()


LOGGER = "from contentfilter.log import make_logger; make_logger('json', 'info')"
LARGE = {"aiomysql", "click", "clamd", "multiprocessing", "prometheus_client", "rich", "uvicorn", "wsgiref"}


@pytest.mark.parametrize(
    ("modules", "loads"),
    [
        ("contentfilter.worker.application, contentfilter.worker.main", set()),
        ("contentfilter.receiver.main", set()),
        ("contentfilter.bus.publisher", set()),
        ("contentfilter.cli.serve", {"click", "prometheus_client", "wsgiref"}),
        ("contentfilter.cli.status", {"click"}),
    ],
)
def test_a_process_loads_no_large_library_that_it_does_not_use(modules: str, loads: set[str]) -> None:
    """Each costs 50 to 200 ms at every start, and memory in every process."""
    done = run("-P", "-c", f"import {modules}, sys; {LOGGER}; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert LARGE & set(done.stdout.split()) == loads


def test_a_mistyped_command_is_answered_with_the_nearest() -> None:
    done = run("-m", "contentfilter", "explian")
    assert done.returncode == 2
    assert "did you mean 'explain'" in done.stderr


# Files


def test_no_trace_of_one_machine() -> None:
    # Put together here, so that this file does not match itself.
    places = "|".join(("/work", "/home/[a-z]", "/root", "/tmp/c" + "f", "/tmp/b" + "are"))
    hosts = r"[\w.-]+\.(?:debian|pypi|pythonhosted|npmjs)\." + "org"
    trace = re.compile(rf"(?<![\w.])(?:{places})/|(?:https?://|\b){hosts}")
    wrong = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if trace.search(line)
    ]
    assert wrong == []


def test_text_files_are_tidy() -> None:
    wrong = []
    for path in text_files():
        data = path.read_bytes()
        if path.suffix == ".eml" or "corpus" in path.parts:
            continue  # messages are as they came
        if data and not data.endswith(b"\n"):
            wrong.append(f"{relative(path)}: no newline at the end")
        if re.search(rb"[ \t\r]$", data, re.MULTILINE):
            wrong.append(f"{relative(path)}: a line ends in white space")
    assert wrong == []


def test_no_file_grows_too_long() -> None:
    lengths = {
        relative(path): len(path.read_text().splitlines())
        for path in text_files()
        if path.suffix in {".py", ".c", ".h"} and relative(path).startswith(("contentfilter/", "queue_hook/"))
    }
    assert {path: lines for path, lines in lengths.items() if lines > 400 and path not in LONG} == {}
    assert [path for path in LONG if lengths.get(path, 0) <= 400] == [], "no longer exceptions"


def test_scripts_are_executable() -> None:
    scripts = [path for path in text_files() if path.suffix == ".sh" or path.parent.name == ".ci"]
    assert scripts
    assert [relative(path) for path in scripts if not os.access(path, os.X_OK)] == []


# Documents


def prose(path: Path) -> str:
    """The text without its code: what may hold links."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`|^ {4,}.*$", "", text, flags=re.MULTILINE)


def code(path: Path) -> Iterator[str]:
    """Text in back quotes or in a block: what a reader may type."""
    text = path.read_text()
    for block in re.findall(r"^```.*?\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        yield from block.splitlines()
    yield from re.findall(r"^ {4,}(\S.*)$", text, flags=re.MULTILINE)
    yield from re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def anchors(path: Path) -> set[str]:
    """The names that headings get in a rendered page."""
    headings = re.findall(r"^#+ +(.+?)\s*$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", MARKDOWN, ids=relative)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("path", MARKDOWN, ids=relative)
def test_documents_name_only_what_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):.* ## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for line in code(path):
        if command := re.match(r"(?:\$ |# )?make ([a-z]+)", line):
            assert command[1] in targets, line
        if command := re.match(r"(?:\$ |# )?(?:\S*/)?contentfilter (?:--config \S+ )?([a-z]+)(?: |$)", line):
            assert command[1] in COMMANDS, line
