#!/usr/bin/env python3
"""``make bench``: what the filter costs, as ratios inside one interleaved run.

In every round each alternative runs once, in a rotated order, because shared machines drift: only ratios within a
round are worth comparing, and the table shows their medians. The messages are those of make_corpus.py, the client is
qqbench (it starts the program as qmail-smtpd would), the backends alone are driven by scanbench.

    stand-in     the program behind the hook, run directly: the floor
    no scan      hook + daemon, nobody is protected
    signatures   + chksignature and chkloadertype for everybody
    clamd        + clamd for everybody, no signature scanners
    spamd        + spamd for everybody (messages up to 250,000 bytes)
    clamd alone, spamd alone   what they can do behind a resident client
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import hook_cost  # noqa: E402  (tests/ is on the path only now)
from lab import standin  # noqa: E402
from lab.clamd import Clamd  # noqa: E402
from lab.spamd import Spamd  # noqa: E402
from lab.system import System, installed_hook  # noqa: E402
from measure import Alternative, Run, compile_drivers, measure, median  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402

FLOOR, NO_SCAN = "stand-in", "no scan"
SPAMD_LARGEST = 250_000
EVERYBODY = "@bench.example\n"


def alternatives(directory: Path, corpus: Path, options: argparse.Namespace, stack: ExitStack) -> list[Alternative]:
    """Start everything that is measured."""
    qqbench, scanbench = compile_drivers(directory)
    clamd = stack.enter_context(Clamd(directory / "clamd", "DisableCache yes"))
    spamd = stack.enter_context(Spamd(directory / "spamd", children=2))
    floor = str(standin.build(directory))
    found = [Alternative(FLOOR, (qqbench,), (floor, str(corpus)), options.count)]

    def filtered(label: str, count: int, base: str = "", extra: Sequence[str] = (), **parts: Any) -> None:
        name = label.replace(" ", "-")
        system = stack.enter_context(System(directory / name, program=installed_hook(), **parts))
        conf = shutil.copy(system.queue_conf(), directory / name / "bench.conf")
        pids = ",".join(str(pid) for pid in (system.daemon.pid, *system.daemon.workers()))
        command = (qqbench, "-D", pids, "-V", f"CONTENTFILTER_QUEUE_CONF={conf}", *extra)
        found.append(Alternative(label, command, (str(system.program), str(corpus)), count, base))

    small = ("-M", str(SPAMD_LARGEST))
    filtered(NO_SCAN, options.count)
    switches = {"options": "chksignature 1\nchkloadertype 1\n", "clamavclients": EVERYBODY}
    filtered("signatures", options.count, controls=switches)
    filtered("clamd", options.clamd_count, "clamd alone", controls={"clamavclients": EVERYBODY}, clamd=clamd)
    filtered("spamd", options.spamd_count, "spamd alone", small, controls={"spamdclients": EVERYBODY}, spamd=spamd)
    alone = (scanbench, "-D", str(clamd.pid))
    found.append(Alternative("clamd alone", alone, ("clamd-memfd", clamd.socket, str(corpus)), options.clamd_count))
    alone = (scanbench, "-D", str(spamd.pid), *small)
    found.append(Alternative("spamd alone", alone, ("spamd-check", spamd.socket, str(corpus)), options.spamd_count))
    return found


def ratio(runs: Sequence[Run], base: Sequence[Run]) -> str:
    """The median of the rounds' ratios of rates, with their range."""
    ratios = sorted(a["rate"] / b["rate"] for a, b in zip(runs, base, strict=True))
    return f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}-{ratios[-1]:.2f}]"


def table_for(concurrency: int, found: Sequence[Alternative], runs: dict[str, list[Run]]) -> Table:
    table = Table(title=f"{concurrency} at a time", title_justify="left")
    table.add_column("what")
    for heading in (
        "msg/s [min-max]",
        "of stand-in",
        "of backend alone",
        "p50 ms",
        "p99 ms",
        "hook ms",
        "daemon ms",
        "rc",
    ):
        table.add_column(heading, justify="right")
    floor = median(runs[FLOOR], "hook")
    for one in found:
        mine = runs[one.label]
        rates = [run["rate"] for run in mine]
        alone = one.label.endswith("alone")
        hook = "" if alone else f"{median(mine, 'hook') - (0 if one.label == FLOOR else floor):.2f}"
        codes: dict[str, int] = {}
        for what, count in mine[0].get("rc", {}).items():
            code = what.rpartition(":")[2]
            codes[code] = codes.get(code, 0) + count
        table.add_row(
            one.label,
            f"{statistics.median(rates):.0f} [{min(rates):.0f}-{max(rates):.0f}]",
            "" if alone else ratio(mine, runs[FLOOR]),
            ratio(mine, runs[one.base]) if one.base else "",
            f"{median(mine, 'p50'):.2f}",
            f"{median(mine, 'p99'):.1f}",
            hook,
            f"{median(mine, 'daemon'):.2f}",
            " ".join(f"{code}:{count}" for code, count in sorted(codes.items())),
        )
    return table


NOTE = (
    "hook ms: CPU of the hook and what it becomes, less the stand-in's own; daemon ms: CPU of supervisor and workers, "
    "for the rows 'alone' of the backend. Ratios: medians over the rounds [lowest-highest]."
)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hook", action="store_true", help="the hook's own cost instead, beside bare programs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", default="1,8,40", help="messages at a time, a list (1,8,40)")
    parser.add_argument("--count", type=int, default=800, help="messages per run (800)")
    parser.add_argument("--clamd-count", type=int, default=400)
    parser.add_argument("--spamd-count", type=int, default=48)
    parser.add_argument("--json", metavar="FILE", help="keep every single run, one JSON line each")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    levels = [int(level) for level in options.concurrency.split(",")]
    directory = Path(tempfile.mkdtemp(prefix="cf-bench-"))
    directory.chmod(0o711)  # clamd and spamd run as their own users
    try:
        corpus = directory / "corpus"
        subprocess.run([sys.executable, HERE / "make_corpus.py", corpus], check=True, stdout=subprocess.DEVNULL)
        with ExitStack() as stack:
            start, table, note = (alternatives, table_for, lambda _: NOTE)
            if options.hook:
                start, table, note = (hook_cost.alternatives, hook_cost.table_for, hook_cost.note)
            found = start(directory, corpus, options, stack)
            progress = stack.enter_context(Progress(console=console, transient=True, disable=not sys.stdout.isatty()))
            task = progress.add_task("measuring", total=len(levels) * options.rounds * len(found))
            for level in levels:
                runs: dict[str, list[Run]] = {one.label: [] for one in found}
                for number in range(options.rounds):
                    turn = number % len(found)
                    for one in found[turn:] + found[:turn]:
                        runs[one.label].append(measure(one, level, directory))
                        progress.advance(task)
                console.print(table(level, found, runs))
                if options.json:
                    with Path(options.json).open("a") as file:
                        file.writelines(json.dumps(run) + "\n" for mine in runs.values() for run in mine)
            console.print(note(directory), markup=False)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
