"""``bench/run.py --hook``: what the hook itself costs, beside programs that do next to nothing.

In every round each of these runs once, against one daemon with nobody protected:

    nothing        a program that starts and ends: what the hook turns into here, so that its cost can be taken off
    bare           reads both descriptors and ends, linked with musl and with glibc (bare.c)
    bare + memfd   also keeps the message in a memfd: nobody who passes a message on can do less
    hook           the real thing, linked with musl and with glibc; it turns into "nothing"

Each for messages up to 16 KB and for the whole corpus. "own": CPU of the process less that of "nothing".
"""

import argparse
import os
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lab import hook as hook_lab
from lab.hook import SILENT, FakeDaemon, HookProcess
from lab.system import System, installed_hook
from measure import Alternative, Run, compile_drivers, median
from rich.table import Table

SMALL = 16_384
NOTHING, MUSL, GLIBC, STORING = "nothing", "bare, musl", "bare, glibc", "bare + memfd, musl"
WHOLE = "whole corpus: "


def compile_bare(directory: Path) -> dict[str, str]:
    """The bare programs by label. Without musl-gcc all are linked with glibc."""
    source = Path(__file__).with_name("bare.c")
    musl = "musl-gcc" if shutil.which("musl-gcc") else "cc"
    programs = {}
    kinds = {NOTHING: (musl, "-DNOTHING"), MUSL: (musl, "-DREAD"), GLIBC: ("cc", "-DREAD"), STORING: (musl, "-DSTORE")}
    for label, (compiler, kind) in kinds.items():
        path = directory / label.replace(" ", "-").replace(",", "")
        subprocess.run([compiler, "-O2", "-static", "-s", kind, "-o", path, source], check=True)
        programs[label] = str(path)
    return programs


def alternatives(directory: Path, corpus: Path, options: argparse.Namespace, stack: ExitStack) -> list[Alternative]:
    """Start the daemon; everything for small messages, then everything for all."""
    qqbench, _ = compile_drivers(directory)
    bare = compile_bare(directory)
    system = stack.enter_context(System(directory / "daemon", program=installed_hook()))
    conf = shutil.copy(system.queue_conf(queue=bare[NOTHING]), directory / "bench.conf")
    pids = ",".join(str(pid) for pid in (system.daemon.pid, *system.daemon.workers()))
    through = ("-D", pids, "-V", f"CONTENTFILTER_QUEUE_CONF={conf}")
    programs = {label: (path, ()) for label, path in bare.items()} | {
        "hook, musl": (str(system.program), through),
        "hook, glibc": (str(hook_lab.build(directory, "gcc")), through),
    }
    return [
        Alternative(name + label, (qqbench, *sizes, *extra), (program, str(corpus)), options.count)
        for name, sizes in (("", ("-M", str(SMALL))), (WHOLE, ()))
        for label, (program, extra) in programs.items()
    ]


def table_for(concurrency: int, found: Sequence[Alternative], runs: dict[str, list[Run]]) -> Table:
    table = Table(title=f"{concurrency} at a time", title_justify="left")
    table.add_column("what")
    for heading in ("CPU us", "own us", "own / bare, musl", "own / bare, glibc", "daemon us", "/ bare, glibc", "msg/s"):
        table.add_column(heading, justify="right")
    for one in found:
        mine = runs[one.label]
        prefix = WHOLE if one.label.startswith(WHOLE) else ""
        base = {label: runs[prefix + label] for label in (NOTHING, MUSL, GLIBC)}
        filtered = "hook" in one.label
        own = [a["hook"] - filtered * b["hook"] for a, b in zip(mine, base[NOTHING], strict=True)]
        table.add_row(
            one.label,
            f"{median(mine, 'hook') * 1000:.0f}",
            f"{statistics.median(own) * 1000:.0f}",
            ratios(own, base[MUSL]),
            ratios(own, base[GLIBC]),
            f"{median(mine, 'daemon') * 1000:.0f}" if filtered else "",
            ratios([run["daemon"] for run in mine], base[GLIBC]) if filtered else "",
            f"{median(mine, 'rate'):.0f}",
            end_section=prefix == "" and one.label == "hook, glibc",
        )
    return table


def ratios(values: Sequence[float], base: Sequence[Run]) -> str:
    """The median of the rounds' ratios to the CPU of ``base``, with their range."""
    found = sorted(value / run["hook"] for value, run in zip(values, base, strict=True))
    return f"{statistics.median(found):.2f} [{found[0]:.2f}-{found[-1]:.2f}]"


def private_memory(directory: Path, size: int) -> int:
    """KiB that only the hook has, while it waits for an answer about ``size`` bytes."""
    program = hook_lab.build(directory)
    path = directory / "silent.sock"
    conf = directory / "silent.conf"
    conf.write_text(f"socket {path}\nqueue /bin/true\n")
    with FakeDaemon(path, SILENT) as daemon:
        envelope = b"Fa@b.example\0Tc@d.example\0\0"
        process = HookProcess(program, b"m" * size, envelope, {"CONTENTFILTER_QUEUE_CONF": str(conf)}, {}, directory)
        daemon.wait(offers=1)
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        process.kill()
        process.wait()
    os.unlink(path)
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def note(directory: Path) -> str:
    sizes = {"8 KB": 8_192, "4 MB": 4_000_000}
    held = ", ".join(f"{private_memory(directory, size)} KiB ({name})" for name, size in sizes.items())
    return f"Private memory of a hook that waits, by the size of its message: {held}. The message itself is in a memfd."
