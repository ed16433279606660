"""``bench/run.py --hook``: what the hook itself costs, beside programs that do next to nothing.

In every round each of these runs once:

    nothing        a program that starts and ends: what the hook becomes here, so that its cost can be taken off
    bare           reads both descriptors and ends, linked with musl and with glibc (bare.c)
    bare + memfd   also keeps the message in a memfd: nobody who passes a message on can do less
    bare + wait    reads, sleeps for 0.3 ms, becomes "nothing": what the pause alone does to caches and clocks
    hook, echo     the real thing and a C program that answers at once (echo.c); it becomes "nothing"
    hook, daemon   the same with the real daemon, nobody protected

Each for messages up to 16 KB and for the whole corpus. "own": CPU of the process, less that of what it became.
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
NOTHING, MUSL, GLIBC = "nothing", "bare, musl", "bare, glibc"
STORING, WAITING = "bare + memfd", "bare + wait"
BECOME = (WAITING, "hook")  # these are "nothing" at the end
WHOLE = "whole corpus: "


def compile_bare(directory: Path) -> dict[str, str]:
    """The bare programs by label. Without musl-gcc all are linked with glibc."""
    source = Path(__file__).with_name("bare.c")
    musl = "musl-gcc" if shutil.which("musl-gcc") else "cc"
    programs = {}
    kinds = {
        NOTHING: (musl, "-DNOTHING"),
        MUSL: (musl, "-DREAD"),
        GLIBC: ("cc", "-DREAD"),
        STORING: (musl, "-DSTORE"),
        WAITING: (musl, "-DWAIT"),
    }
    for label, (compiler, kind) in kinds.items():
        path = directory / label.replace(" ", "-").replace(",", "")
        subprocess.run([compiler, "-O2", "-static", "-s", kind, "-o", path, source], check=True)
        programs[label] = str(path)
    return programs


def start_echo(directory: Path, stack: ExitStack) -> Path:
    """A program that answers hooks at once; its socket."""
    program, path = directory / "echo", directory / "echo.sock"
    subprocess.run(["cc", "-O2", "-o", program, Path(__file__).with_name("echo.c")], check=True)
    echo = stack.enter_context(subprocess.Popen([program, path], stdout=subprocess.PIPE))
    stack.callback(echo.kill)
    assert echo.stdout is not None
    echo.stdout.readline()
    return path


def alternatives(directory: Path, corpus: Path, options: argparse.Namespace, stack: ExitStack) -> list[Alternative]:
    """Start what answers; everything for small messages, then everything for all."""
    qqbench, _ = compile_drivers(directory)
    bare = compile_bare(directory)
    system = stack.enter_context(System(directory / "daemon", program=installed_hook()))
    pids = ",".join(str(pid) for pid in (system.daemon.pid, *system.daemon.workers()))
    sockets = {"echo": start_echo(directory, stack), "daemon": system.daemon.socket}
    found = {label: ((path,), ("-V", f"NEXT={bare[NOTHING]}")) for label, path in bare.items()}
    for libc, program in (("musl", system.program), ("glibc", hook_lab.build(directory, "gcc"))):
        for who, socket in sockets.items():
            conf = shutil.copy(system.queue_conf(queue=bare[NOTHING], socket=socket), directory / f"{who}.conf")
            watched = ("-D", pids) if who == "daemon" else ()
            extra = (*watched, "-V", f"CONTENTFILTER_QUEUE_CONF={conf}")
            if (libc, who) != ("glibc", "daemon"):
                found[f"hook, {libc}, {who}"] = ((str(program),), extra)
    return [
        Alternative(name + label, (qqbench, *sizes, *extra), (*program, str(corpus)), options.count)
        for name, sizes in (("", ("-M", str(SMALL))), (WHOLE, ()))
        for label, (program, extra) in found.items()
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
        label = one.label.removeprefix(prefix)
        watched = label.endswith("daemon")
        own = [a["hook"] - label.startswith(BECOME) * b["hook"] for a, b in zip(mine, base[NOTHING], strict=True)]
        table.add_row(
            one.label,
            f"{median(mine, 'hook') * 1000:.0f}",
            f"{statistics.median(own) * 1000:.0f}",
            ratios(own, base[MUSL]),
            ratios(own, base[GLIBC]),
            f"{median(mine, 'daemon') * 1000:.0f}" if watched else "",
            ratios([run["daemon"] for run in mine], base[GLIBC]) if watched else "",
            f"{median(mine, 'rate'):.0f}",
            end_section=one.label == "hook, glibc, echo",
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
