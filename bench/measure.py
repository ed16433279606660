"""Measured runs of alternatives by a driver, in interleaved rounds."""

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of the programs that are compared."""

    label: str
    command: tuple[str, ...]  # the driver with its options; count and concurrency are added
    target: tuple[str, ...]  # the arguments after the options
    count: int


Run = dict[str, Any]
Runs = dict[str, list[Run]]
"""By alternative, one run for each round."""


def compile_drivers(directory: Path) -> tuple[str, str]:
    """Compile qqbench and scanbench, and return their paths."""
    paths = []
    for name in ("qqbench", "scanbench"):
        path = directory / name
        subprocess.run(["cc", "-O2", "-pthread", "-o", path, HERE / f"{name}.c"], check=True)
        paths.append(str(path))
    return paths[0], paths[1]


def measure(one: Alternative, concurrency: int, directory: Path) -> Run:
    """Run once, and return the driver's JSON line."""
    result = directory / "result.json"
    result.unlink(missing_ok=True)
    middle = ["-c", str(concurrency), "-n", str(one.count), "-l", one.label, "-j", str(result)]
    environ = {"PATH": os.environ["PATH"]}
    subprocess.run([*one.command, *middle, *one.target], check=True, stdout=subprocess.DEVNULL, env=environ)
    run: Run = json.loads(result.read_text())
    return run


def interleaved(
    found: Sequence[Alternative], concurrency: int, rounds: int, directory: Path, done: Callable[[], None]
) -> Runs:
    """Run each alternative once per round, in rotated order, because shared machines drift."""
    runs: Runs = {one.label: [] for one in found}
    for number in range(rounds):
        turn = number % len(found)
        for one in (*found[turn:], *found[:turn]):
            runs[one.label].append(measure(one, concurrency, directory))
            done()
    return runs


def of(runs: Sequence[Run], key: str) -> list[float]:
    return [run[key] for run in runs]
