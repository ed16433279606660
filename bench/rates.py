"""Throughput and latency of the filter, compared with the programs it uses alone.

    stand-in     the stand-in for qmail-queue, run directly: the baseline
    no scan      hook + daemon, no checks
    signatures   + chksignature and chkloadertype for all recipients
    clamd        + clamd for all recipients, no signature scanners
    both         + clamd and spamd for all recipients (messages up to 250,000 bytes)
    clamd alone, both alone   with a resident client that passes descriptors
    queue        a real qmail-queue, run directly and behind the filter, if one is given

The messages are those of make_corpus.py, each once in a run, so no scan is shared. clamd has the database of
make_signatures.py, and its cache of clean files is off.
"""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from figures import Figure, Summary, ratio
from lab import standin
from lab.clamd import SIGNATURE_FILE, Clamd
from lab.spamd import Spamd
from lab.system import System, installed_hook
from make_signatures import make_database
from measure import Alternative, Run, Runs, compile_drivers, of

FLOOR, NO_SCAN, SIGNATURES, CLAMD, BOTH = "stand-in", "no scan", "signatures", "clamd", "both"
QUEUE, BEHIND = "queue", "queue, filtered"
DEFAULT = {"service": {"heartbeat": 1.0}}  # the tests' daemons have a faster one
SPAMD_LARGEST = 250_000
ALL_RECIPIENTS = "@bench.example\n"
SIMSCAN_SHARE = 50.9 / 112  # of clamd alone, at a concurrency of 8: measured once, with a simscan built for it


def alternatives(directory: Path, corpus: Path, options: argparse.Namespace, stack: ExitStack) -> list[Alternative]:
    """Start all programs to be measured, and return the alternatives."""
    qqbench, scanbench = compile_drivers(directory)
    database = SIGNATURE_FILE | make_database()
    clamd = stack.enter_context(Clamd(directory / "clamd", "DisableCache yes", "SelfCheck 0", database=database))
    spamd = stack.enter_context(Spamd(directory / "spamd", children=2))
    floor = str(standin.build(directory))
    found = [Alternative(FLOOR, (qqbench,), (floor, str(corpus)), options.count)]

    def filtered(label: str, count: int, extra: Sequence[str] = (), queue: str = "", **parts: Any) -> None:
        name = label.replace(" ", "-").replace(",", "")
        system = stack.enter_context(System(directory / name, program=installed_hook(), settings=DEFAULT, **parts))
        conf = shutil.copy(system.queue_conf(**{"queue": queue} if queue else {}), directory / name / "bench.conf")
        pids = ",".join(str(pid) for pid in (system.daemon.pid, *system.daemon.workers()))
        command = (qqbench, "-D", pids, "-V", f"CONTENTFILTER_QUEUE_CONF={conf}", *extra)
        found.append(Alternative(label, command, (str(system.program), str(corpus)), count))

    small = ("-M", str(SPAMD_LARGEST))
    filtered(NO_SCAN, options.count)
    switches = {"options": "chksignature 1\nchkloadertype 1\n", "clamavclients": ALL_RECIPIENTS}
    filtered(SIGNATURES, options.count, controls=switches)
    filtered(CLAMD, options.scans, controls={"clamavclients": ALL_RECIPIENTS}, clamd=clamd)
    protected = {"clamavclients": ALL_RECIPIENTS, "spamdclients": ALL_RECIPIENTS}
    filtered(BOTH, options.spam_scans, small, controls=protected, clamd=clamd, spamd=spamd)
    if options.qmail_queue:
        found.append(Alternative(QUEUE, (qqbench,), (options.qmail_queue, str(corpus)), options.scans))
        filtered(BEHIND, options.scans, queue=options.qmail_queue)
    alone = (scanbench, "-D", str(clamd.pid))
    found.append(Alternative(f"{CLAMD} alone", alone, ("clamd-memfd", clamd.socket, str(corpus)), options.scans))
    alone = (scanbench, "-D", f"{clamd.pid},{spamd.pid}", *small)
    sockets = f"{clamd.socket},{spamd.socket}"
    found.append(Alternative(f"{BOTH} alone", alone, ("both", sockets, str(corpus)), options.spam_scans))
    return found


def figures(levels: dict[str, Runs]) -> Iterator[Figure]:
    """The rows of the report."""

    def rates(above: str, below: str) -> dict[str, Summary]:
        return {level: ratio(of(runs[above], "rate"), of(runs[below], "rate")) for level, runs in levels.items()}

    yield Figure("messages/s, no checks / stand-in alone", 0.78, rates(NO_SCAN, FLOOR), at_least=True)
    some = next(iter(levels.values()))
    if QUEUE in some:
        yield Figure("messages/s, no checks / real qmail-queue alone", 0.78, rates(BEHIND, QUEUE), at_least=True)
    clamd = rates(CLAMD, f"{CLAMD} alone")
    yield Figure("messages/s with clamd / clamd alone", 0.97, clamd, at_least=True)
    eight = {
        level: Summary(*(part / SIMSCAN_SHARE for part in (s.median, s.low, s.high)))
        for level, s in clamd.items()
        if level == "8"
    }
    if eight:
        yield Figure("the same share / simscan's share of clamd alone", 1.9, eight, at_least=True)
    yield Figure("messages/s with clamd and spamd / both alone", 0.97, rates(BOTH, f"{BOTH} alone"), at_least=True)
    base, filtered = (QUEUE, BEHIND) if QUEUE in some else (FLOOR, NO_SCAN)
    added = {
        level: ratio([a - b for a, b in zip(of(runs[filtered], "p99"), of(runs[base], "p99"), strict=True)],
                     of(runs[base], "p99"))
        for level, runs in levels.items()
        if level == "40"
    }  # fmt: skip
    if added:
        yield Figure(f"p99 added, no checks / p99 of {base} alone", 0.6, added)


HEADINGS = ("msg/s [min-max]", "of stand-in", "of the same alone", "p50 ms", "p99 ms", "hook ms", "daemon ms", "rc")
NOTE = (
    "hook ms: CPU of the hook and the program it execs, minus the stand-in's own; daemon ms: CPU of supervisor and "
    "workers, in the rows 'alone' that of the backends."
)


def rows(runs: Runs) -> Iterator[tuple[str, ...]]:
    """One table row per alternative, for HEADINGS."""
    floor = Summary.of(of(runs[FLOOR], "hook")).median
    for label, mine in runs.items():
        alone, rate = label.endswith("alone"), Summary.of(of(mine, "rate"))
        hook = Summary.of(of(mine, "hook")).median - (0 if label in (FLOOR, QUEUE) else floor)
        same = f"{label} alone"
        yield (
            label,
            f"{rate.median:.0f} [{rate.low:.0f}-{rate.high:.0f}]",
            "" if alone else str(ratio(of(mine, "rate"), of(runs[FLOOR], "rate"))),
            str(ratio(of(mine, "rate"), of(runs[same], "rate"))) if same in runs else "",
            f"{Summary.of(of(mine, 'p50')).median:.2f}",
            f"{Summary.of(of(mine, 'p99')).median:.1f}",
            "" if alone else f"{hook:.2f}",
            f"{Summary.of(of(mine, 'daemon')).median:.2f}",
            _codes(mine[0]),
        )


def _codes(run: Run) -> str:
    codes: dict[str, int] = {}
    for what, count in run.get("rc", {}).items():
        code = what.rpartition(":")[2]
        codes[code] = codes.get(code, 0) + count
    return " ".join(f"{code}:{count}" for code, count in sorted(codes.items()))
