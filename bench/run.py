#!/usr/bin/env python3
"""``make bench``: the cost of the filter as ratios within interleaved runs, compared with targets.

Parts: rates (throughput, latency), hook (CPU of hook and daemon), single (scans, tables, startup), growth (size,
recipients, rows, concurrent hooks), memory, stages (CPU of a worker by stage). In every round each alternative runs
once, in rotated order, because machines drift: only ratios within a round are comparable, and the tables show
their medians [lowest-highest].

Writes to bench/out: report.md (the table of docs/performance.md and all details), runs.json (every single run),
and each plot as PNG and as text.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import against  # noqa: E402  (tests/ is on the path only now)
import growth  # noqa: E402
import hook_cost  # noqa: E402
import parts  # noqa: E402
import rates  # noqa: E402
import stages  # noqa: E402
from figures import Figure, Summary, markdown  # noqa: E402
from lab.lifeline import end_with_us  # noqa: E402
from lab.process import exit_on_sigterm  # noqa: E402
from measure import Runs, interleaved, of  # noqa: E402
from plots import Plot, save, text  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402

PARTS = ("rates", "hook", "single", "growth", "memory", "stages")
QUICK = {"rounds": 1, "count": 200, "scans": 100, "spam_scans": 12, "messages": 4_000}


class Report:
    """Results so far: figures, plots, tables and raw runs."""

    def __init__(self, console: Console, out: Path) -> None:
        self.console, self.out = console, out
        self.figures: list[Figure] = []
        self.plots: list[Plot] = []
        self.details: list[str] = []
        self.runs: dict[str, dict[str, Runs]] = {}

    def add(self, figures: Iterable[Figure], plots: Iterable[Plot] = ()) -> None:
        for figure in figures:
            self.figures.append(figure)
            self.console.print("  ".join(cell for cell in figure.cells() if cell), markup=False, highlight=False)
        for plot in plots:
            self.plots.append(plot)
            self.console.print(text(plot), markup=False, highlight=False)

    def table(self, title: str, headings: Sequence[str], rows: Iterable[tuple[str, ...]]) -> None:
        shown = Table(title=title, title_justify="left")
        shown.add_column("what")
        for heading in headings:
            shown.add_column(heading, justify="right")
        for row in rows:
            shown.add_row(*row)
        self.console.print(shown)
        plain = Console(width=150, record=True, quiet=True)
        plain.print(shown)
        self.details.append(plain.export_text())

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        for plot in self.plots:
            save(plot, self.out)
        machine = f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"
        blocks = [f"```\n{one.rstrip()}\n```\n" for one in (*self.details, *map(text, self.plots))]
        sections = (f"# Measured on {machine}\n", markdown(self.figures), rates.NOTE + "\n", *blocks)
        (self.out / "report.md").write_text("\n".join(sections))
        found = {"figures": [asdict(figure) for figure in self.figures], "runs": self.runs}
        (self.out / "runs.json").write_text(json.dumps(found, default=str))
        self.console.print(f"written so far: {self.out}/report.md, runs.json, and the plots", highlight=False)


def compared(part: ModuleType, directory: Path, corpus: Path, options: argparse.Namespace, report: Report) -> None:
    """Run a part that consists of rounds of alternatives."""
    levels = [int(level) for level in options.concurrency.split(",")]
    runs: dict[str, Runs] = {}
    with ExitStack() as stack:
        found = part.alternatives(directory, corpus, options, stack)
        progress = stack.enter_context(
            Progress(console=report.console, transient=True, disable=not sys.stdout.isatty())
        )
        task = progress.add_task("measuring", total=len(levels) * options.rounds * len(found))
        for level in levels:
            runs[str(level)] = interleaved(found, level, options.rounds, directory, lambda: progress.advance(task))
            report.table(f"{level} concurrent messages", part.HEADINGS, part.rows(runs[str(level)]))
    report.runs[part.__name__] = runs
    report.add(part.figures(runs))
    if part is rates:
        shown = (rates.FLOOR, rates.NO_SCAN, rates.SIGNATURES, rates.CLAMD, rates.BOTH)
        curves = {
            label: [(float(level), Summary.of(of(some[label], "rate")).median) for level, some in runs.items()]
            for label in shown
        }
        report.add((), (Plot("throughput", "Throughput", "concurrent messages", "messages/s", curves),))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PART", action="append", choices=PARTS, help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="a short trial: one round with few messages")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", default="1,8,40", help="list of concurrencies (1,8,40)")
    parser.add_argument("--count", type=int, default=800, help="messages per run (800)")
    parser.add_argument("--scans", type=int, default=400, help="per run with clamd (400)")
    parser.add_argument("--spam-scans", type=int, default=48, help="per run with spamd (48)")
    parser.add_argument("--messages", type=int, default=200_000, help="for the growth of memory (200000)")
    parser.add_argument("--qmail-queue", metavar="PROGRAM", help="also measure with this real qmail-queue")
    parser.add_argument("--against", metavar="REV", help="only compare this version with that of another commit")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    report = Report(Console(width=None if sys.stdout.isatty() else 150), options.out)

    def single(directory: Path, corpus: Path) -> None:
        for found in (parts.scans(corpus), parts.tables(directory), parts.starts(directory)):
            report.add(found)

    def grown(directory: Path, corpus: Path) -> None:
        report.add(*growth.curves(directory))
        report.add(*growth.crowd(directory, corpus))

    run: dict[str, Callable[[Path, Path], None]] = {
        "against": lambda directory, corpus: compared(against, directory, corpus, options, report),
        "rates": lambda directory, corpus: compared(rates, directory, corpus, options, report),
        "hook": lambda directory, corpus: (
            compared(hook_cost, directory, corpus, options, report),
            report.add((hook_cost.memory(directory),)),
        )[0],
        "single": single,
        "growth": grown,
        "memory": lambda directory, corpus: report.add(growth.memory(directory, corpus, options)),
        "stages": lambda directory, corpus: report.add((), (stages.shares(directory, corpus, options),)),
    }
    failed: list[str] = []
    for part in ("against",) if options.against else options.only or PARTS:
        directory = Path(tempfile.mkdtemp(prefix="cf-bench-"))
        directory.chmod(0o711)  # clamd and spamd run as their own users
        try:
            corpus = directory / "corpus"
            words = [sys.executable, HERE / "make_corpus.py", corpus]
            with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
                end_with_us(process.pid)
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, words)
            report.console.rule(part)
            run[part](directory, corpus)
        except Exception:  # what the other parts measure is worth having all the same
            traceback.print_exc()
            failed.append(part)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        report.write()
    if failed:
        report.console.print(f"FAILED: {', '.join(failed)}; see the traceback of each above", style="red")
    return 1 if failed else 0


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main(sys.argv[1:]))
