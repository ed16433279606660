"""Line and branch coverage of the Python package and of the C hook.

    measure_coverage.py [TEST ...]     run these tests (all by default), then print and save the report

Every Python process that a test starts is measured (coverage.py), and every hook that it runs (gcov; see
tests/lab/hook.py), except those ended by SIGKILL. A failing test does not end the run: its name is printed above the
tables, and the exit status is pytest's. build/coverage/report.txt has the output.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "build" / "coverage"
PYTHON, HOOK = PLACE / "python", PLACE / "hook"


@dataclass(slots=True)
class Count:
    """Lines and branches reached, and their totals. ``missing``: line numbers."""

    lines: int = 0
    of_lines: int = 0
    branches: int = 0
    of_branches: int = 0
    missing: list[int] = field(default_factory=list)

    def add(self, other: "Count") -> None:
        self.lines += other.lines
        self.of_lines += other.of_lines
        self.branches += other.branches
        self.of_branches += other.of_branches


def run_tests(tests: Sequence[str]) -> tuple[int, list[str]]:
    """Run pytest; returns its exit status and its last lines."""
    shutil.rmtree(PLACE, ignore_errors=True)
    for directory in (PYTHON, HOOK):
        directory.mkdir(parents=True)
        directory.chmod(0o1777)  # some tests run the daemon as another user
    environ = os.environ | {
        "CONTENTFILTER_GCOV": str(HOOK),
        "PYTHONSAFEPATH": "1",  # use the installed package, not the one in this directory
    }
    words = [sys.executable, "-m", "coverage", "run", "-m", "pytest", "-q", "-n", "auto", *tests]
    with (PLACE / "tests.txt").open("wb") as output:
        status = subprocess.run(words, cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT).returncode
    output = (PLACE / "tests.txt").read_text(errors="replace").splitlines()
    return status, [line for line in output if line.startswith(("FAILED", "ERROR"))] + output[-1:]


def python_counts() -> dict[str, Count]:
    """Counts of the Python package, by path from the root of the repository."""
    coverage = [sys.executable, "-m", "coverage"]
    subprocess.run([*coverage, "combine", "--quiet"], cwd=ROOT, check=True)
    subprocess.run([*coverage, "json", "--quiet", "-o", PLACE / "python.json"], cwd=ROOT, check=True)
    files = json.loads((PLACE / "python.json").read_text())["files"]
    return {name: _python_count(about) for name, about in files.items()}


def _python_count(about: dict) -> Count:
    sums = about["summary"]
    return Count(
        sums["covered_lines"],
        sums["num_statements"],
        sums["covered_branches"],
        sums["num_branches"],
        about["missing_lines"],
    )


def hook_counts() -> dict[str, Count]:
    """Counts of the hook, by file. It is built several times, with different time limits; the results are merged."""
    lines: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    branches: dict[str, dict[tuple[int, int], int]] = defaultdict(lambda: defaultdict(int))
    for data in sorted(HOOK.glob("*.gcda")):
        words = ["gcov", "--json-format", "--branch-probabilities", "--stdout", data]
        result = subprocess.run(words, cwd=HOOK, capture_output=True)
        if result.returncode:  # the hook was killed while it wrote its counters
            continue
        for document in filter(None, result.stdout.splitlines()):
            for about in json.loads(document)["files"]:
                name = os.path.relpath(about["file"], ROOT)
                if not name.startswith("queue_hook"):
                    continue
                for line in about["lines"]:
                    number = line["line_number"]
                    lines[name][number] += line["count"]
                    for which, branch in enumerate(line["branches"]):
                        branches[name][number, which] += branch["count"]
    return {
        name: Count(
            sum(map(bool, found.values())),
            len(found),
            sum(map(bool, branches[name].values())),
            len(branches[name]),
            sorted(number for number, count in found.items() if not count),
        )
        for name, found in sorted(lines.items())
    }


def ranges(numbers: Sequence[int]) -> str:
    """Line numbers in the form ``1-3, 7``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def rows(counts: dict[str, Count], title: str) -> Iterator[str]:
    """A table of groups with their total, then each file with the lines not reached."""
    groups: dict[str, Count] = defaultdict(Count)
    for name, count in counts.items():
        groups[str(Path(name).parent)].add(count)
        groups["all of it"].add(count)
    groups["all of it"] = groups.pop("all of it", Count())  # last
    yield from ("", f"| {title} | lines | of | % | branches | of | % |", "|---|---:|---:|---:|---:|---:|---:|")
    for name, count in groups.items():
        yield (
            f"| {name} | "
            + " | ".join(
                f"{part} | {whole} | {100 * part / whole if whole else 100:.1f}"
                for part, whole in ((count.lines, count.of_lines), (count.branches, count.of_branches))
            )
            + " |"
        )
    yield ""
    for name, count in sorted(counts.items(), key=lambda each: each[1].lines / (each[1].of_lines or 1)):
        if count.missing:
            yield f"{100 * count.lines / count.of_lines:5.1f} %  {name}: {ranges(count.missing)}"


def main() -> int:
    status, summary = run_tests(sys.argv[1:])
    report = [*summary, *rows(python_counts(), "Python"), *rows(hook_counts(), "hook")]
    text = "\n".join(report) + "\n"
    (PLACE / "report.txt").write_text(text)
    print(text, end="")
    return status


if __name__ == "__main__":
    sys.exit(main())
