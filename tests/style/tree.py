"""The repository as the style tests see it: its files, and the package's syntax trees."""

import ast
import functools
import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "contentfilter"

# Made by commands, never committed (.gitignore).
GENERATED = {".git", ".venv", ".stamps", "build", "dist", "__pycache__", "out", ".hypothesis"}


@functools.cache
def text_files() -> tuple[Path, ...]:
    """Every text file that a clone holds. Works without git too: from an unpacked archive."""
    found = []
    for directory, names, files in os.walk(ROOT):
        names[:] = sorted(n for n in names if n not in GENERATED and not n.endswith(("_cache", ".egg-info")))
        for name in sorted(files):
            path = Path(directory, name)
            if not path.is_symlink() and b"\0" not in path.read_bytes()[:8192]:
                found.append(path)
    return tuple(found)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@dataclass(frozen=True, slots=True)
class Module:
    name: str  # dotted, without "contentfilter."; "" is the package itself
    path: Path
    tree: ast.Module

    def at(self, node: ast.AST) -> str:
        return f"{relative(self.path)}:{getattr(node, 'lineno', 0)}"


@functools.cache
def modules() -> dict[str, Module]:
    """Every module of the package, by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path, ast.parse(path.read_bytes(), str(path)))
    return found
