"""docs/architecture.md: its table of dependencies, its paths and its definitions are those of the source."""

import ast
import re
from collections.abc import Iterator

import pytest
from style.test_imports import ROOMS
from style.tree import PACKAGE, ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its first two lines."""
    section = re.split(r"^## ", PAGE.partition(f"\n## {heading}\n")[2], flags=re.MULTILINE)[0]
    lines = [line.strip("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")] for line in lines[2:]]


def located(path: str) -> list[str]:
    """The same path from the root of the repository, as far as it exists: outside the package or inside."""
    return [str(base / path) for base in (ROOT, PACKAGE) if (base / path).exists()]


def defined(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[str]:
    """Each name that a file defines at its top, and those of its classes as ``Class.name``."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from defined(node, f"{node.name}.")
        if isinstance(node, ast.Assign):
            yield from (prefix + target.id for target in node.targets if isinstance(target, ast.Name))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield prefix + node.target.id


def test_the_table_of_dependencies_is_the_one_that_is_enforced() -> None:
    assert {folder: " ".join(names.split(", ")) for folder, names in rows("Allowed dependencies")} == ROOMS
    assert [folder for folder, _ in rows("Allowed dependencies")] == list(ROOMS)


def test_every_folder_is_described() -> None:
    named = {cell.strip("`/").removesuffix(".py") for cell, _ in rows("Folders")}
    assert named == {*ROOMS, "top level (ground)"} - {"ground"}


def test_every_path_exists() -> None:
    paths = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+(?:/|\.py|\.c|\.toml|\.json))`", PAGE))
    assert len(paths) > 50
    assert [path for path in sorted(paths) if not located(path)] == []


@pytest.mark.parametrize("row", rows("Find it in a minute"), ids=lambda row: row[2].strip("`"))
def test_every_definition_is_where_the_page_says(row: list[str]) -> None:
    _, path, name = (cell.strip("`") for cell in row)
    (file,) = located(path)
    with open(file) as source:
        text = source.read()
    if path.endswith(".c"):
        assert re.search(rf"^(?!\s).*\b{name}\(", text, flags=re.MULTILINE), f"{path} has no {name}"
    else:
        assert name in set(defined(ast.parse(text))), f"{path} has no {name}"
