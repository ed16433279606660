"""docs/faults.md: every fault names a test that exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\|.*\| `([a-z0-9_/]+\.py)` `(test_\w+)` \|$")


def test_every_fault_names_a_test_that_exists() -> None:
    rows = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.startswith("|")]
    faults = [row for row in rows if not row.startswith(("| component", "|---"))]
    assert len(faults) > 50
    for row in faults:
        found = ROW.match(row)
        assert found, f"no test: {row}"
        path, name = found.groups()
        tree = ast.parse((ROOT / "tests" / path).read_text())
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert name in names, f"{path} has no {name}"
