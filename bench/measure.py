"""One measured run: what is run, the driver that runs it, and its result. Then rounds of them, interleaved."""

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
    """One thing that is measured."""

    label: str
    command: tuple[str, ...]  # the driver with its options; count and concurrency are put in between
    target: tuple[str, ...]  # what stands behind the options
    count: int


Run = dict[str, Any]
Runs = dict[str, list[Run]]
"""By alternative, one for each round."""


def compile_drivers(directory: Path) -> tuple[str, str]:
    """qqbench and scanbench."""
    paths = []
    for name in ("qqbench", "scanbench"):
        path = directory / name
        subprocess.run(["cc", "-O2", "-pthread", "-o", path, HERE / f"{name}.c"], check=True)
        paths.append(str(path))
    return paths[0], paths[1]


def measure(one: Alternative, concurrency: int, directory: Path) -> Run:
    """One run; the driver's JSON line."""
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
    """In every round each alternative once, in a rotated order: shared machines drift."""
    runs: Runs = {one.label: [] for one in found}
    for number in range(rounds):
        turn = number % len(found)
        for one in (*found[turn:], *found[:turn]):
            runs[one.label].append(measure(one, concurrency, directory))
            done()
    return runs


def of(runs: Sequence[Run], key: str) -> list[float]:
    return [run[key] for run in runs]
