"""This version beside another one: ``make bench BENCH="--against REV"``.

The other version is checked out and installed in a temporary directory. Both daemons run at the same time and are
measured in turns, for messages up to 16 KB: nobody protected, both signature scanners, clamd. Only ratios within a
round are compared; ``base`` below is REV, and a ratio below 1 means that this version costs less.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from figures import Figure, Summary, ratio
from lab import standin
from lab.clamd import SIGNATURE_FILE, Clamd
from lab.system import System, installed_hook
from make_signatures import make_database
from measure import Alternative, Runs, compile_drivers, of

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = {"service": {"heartbeat": 1.0}}  # the tests' daemons have a faster one
EVERYBODY = "@bench.example\n"
KINDS = ("nobody", "signatures", "clamd")
SMALL = 16_384


def install(revision: str, directory: Path) -> Path:
    """Install ``revision`` in ``directory``; returns its ``bin`` directory. Raises CalledProcessError."""
    tree = directory / "tree"
    subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), revision], check=True)
    subprocess.run(["make", "--silent", "-C", str(tree), ".venv/installed"], check=True)
    return tree / ".venv" / "bin"


def remove(directory: Path) -> None:
    """Forget the checkout that :func:`install` made."""
    subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(directory / "tree")], check=False)


def alternatives(directory: Path, corpus: Path, options: argparse.Namespace, stack: ExitStack) -> list[Alternative]:
    """Start both versions with each kind of protection."""
    qqbench, _ = compile_drivers(directory)
    stack.callback(remove, directory)
    base = install(options.against, directory)
    clamd = stack.enter_context(
        Clamd(directory / "clamd", "DisableCache yes", "SelfCheck 0", database=SIGNATURE_FILE | make_database())
    )
    controls = {
        "nobody": {},
        "signatures": {"options": "chksignature 1\nchkloadertype 1\n", "clamavclients": EVERYBODY},
        "clamd": {"clamavclients": EVERYBODY},
    }
    floor = str(standin.build(directory))
    found = []
    for kind in KINDS:
        for version, binaries in (("base", base), ("new", Path(sys.executable).parent)):
            label = f"{kind} {version}"
            python = f"python{sys.version_info.major}.{sys.version_info.minor}"
            packages = binaries.parent / "lib" / python / "site-packages"
            system = stack.enter_context(
                System(
                    directory / label.replace(" ", "-"),
                    program=binaries / "contentfilter-queue" if version == "base" else installed_hook(),
                    settings=DEFAULT,
                    controls=controls[kind],
                    clamd=clamd if kind == "clamd" else None,
                    environ={"PYTHONPATH": os.fspath(packages)},
                )
            )
            conf = shutil.copy(system.queue_conf(queue=floor), system.directory / "bench.conf")
            pids = ",".join(str(pid) for pid in (system.daemon.pid, *system.daemon.workers()))
            command = (qqbench, "-M", str(SMALL), "-D", pids, "-V", f"CONTENTFILTER_QUEUE_CONF={conf}")
            count = options.scans if kind == "clamd" else options.count
            found.append(Alternative(label, command, (str(system.program), str(corpus)), count))
    return found


def figures(levels: dict[str, Runs]) -> Iterator[Figure]:
    """The rows of the report: new / base."""
    names = (
        ("daemon", "daemon's CPU a message"),
        ("hook", "hook's CPU a message"),
        ("p99", "p99"),
        ("rate", "messages/s"),
    )
    for kind in KINDS:
        for key, name in names:
            values = {
                level: ratio(of(runs[f"{kind} new"], key), of(runs[f"{kind} base"], key))
                for level, runs in levels.items()
            }
            yield Figure(f"{name}, {kind}: this version / base", None, values)


HEADINGS = ("msg/s [min-max]", "p50 ms", "p99 ms", "hook ms", "daemon ms")


def rows(runs: Runs) -> Iterator[tuple[str, ...]]:
    """A line for each alternative, below its name and HEADINGS."""
    for label, mine in runs.items():
        rate = Summary.of(of(mine, "rate"))
        yield (
            label,
            f"{rate.median:.0f} [{rate.low:.0f}-{rate.high:.0f}]",
            *(f"{Summary.of(of(mine, key)).median:.3f}" for key in ("p50", "p99", "hook", "daemon")),
        )
