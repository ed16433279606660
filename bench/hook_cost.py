"""CPU cost of the hook and of the daemon, compared with minimal programs.

In every round each of these runs once:

    nothing        a program that starts and exits; the hook execs it here, so that its cost can be subtracted
    bare           reads both descriptors and exits, linked with musl and with glibc (bare.c)
    bare + memfd   also stores the message in a memfd: the minimum for a program that passes a message on
    bare + wait    reads, sleeps for 0.3 ms, execs "nothing": the effect of the pause alone on caches and clocks
    hook, echo     the real hook with a C program that answers immediately (echo.c); it execs "nothing"
    hook, daemon   the same with the real daemon, no checks; "signatures": with both signature scanners

Each for messages up to 16 KB and for the whole corpus. "own": CPU of the process, minus that of the program it execs.
"""

import argparse
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from figures import Figure, Summary, ratio
from lab import hook as hook_lab
from lab.hook import SILENT, FakeDaemon, HookProcess
from lab.lifeline import end_with_us
from lab.system import System, installed_hook
from measure import Alternative, Runs, compile_drivers, of

DEFAULT = {"service": {"heartbeat": 1.0}}  # the tests' daemons have a faster one
SMALL = 16_384
NOTHING, MUSL, GLIBC = "nothing", "bare, musl", "bare, glibc"
STORING, WAITING = "bare + memfd", "bare + wait"
BECOME = (WAITING, "hook")  # these exec "nothing" at the end
WHOLE = "whole corpus: "


def compile_bare(directory: Path) -> dict[str, str]:
    """Build the bare programs, and return them by label. Without musl-gcc all are linked with glibc."""
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
    """Start a program that answers hooks immediately, and return its socket."""
    program, path = directory / "echo", directory / "echo.sock"
    subprocess.run(["cc", "-O2", "-o", program, Path(__file__).with_name("echo.c")], check=True)
    echo = stack.enter_context(subprocess.Popen([program, path], stdout=subprocess.PIPE))
    stack.callback(echo.kill)
    end_with_us(echo.pid)
    assert echo.stdout is not None
    echo.stdout.readline()
    return path


def alternatives(directory: Path, corpus: Path, options: argparse.Namespace, stack: ExitStack) -> list[Alternative]:
    """Start the programs that answer; return all alternatives for small messages, then all for the whole corpus."""
    qqbench, _ = compile_drivers(directory)
    bare = compile_bare(directory)
    switches = {"options": "chksignature 1\nchkloadertype 1\n", "clamavclients": "@bench.example\n"}
    systems = {
        who: stack.enter_context(System(directory / who, program=installed_hook(), settings=DEFAULT, controls=controls))
        for who, controls in (("daemon", {}), ("signatures", switches))
    }
    found = {label: ((path,), ("-V", f"NEXT={bare[NOTHING]}")) for label, path in bare.items()}

    def add(libc: str, who: str, program: Path, system: System, socket: Path) -> None:
        conf = shutil.copy(system.queue_conf(queue=bare[NOTHING], socket=socket), directory / f"{who}.conf")
        pids = ",".join(str(pid) for pid in (system.daemon.pid, *system.daemon.workers()))
        watched = () if who == "echo" else ("-D", pids)
        found[f"hook, {libc}, {who}"] = ((str(program),), (*watched, "-V", f"CONTENTFILTER_QUEUE_CONF={conf}"))

    echo, daemon = start_echo(directory, stack), systems["daemon"]
    add("glibc", "echo", hook_lab.build(directory, "gcc"), daemon, echo)
    add("musl", "echo", daemon.program, daemon, echo)
    for who, system in systems.items():
        add("musl", who, system.program, system, Path(system.daemon.socket))
    return [
        Alternative(name + label, (qqbench, *sizes, *extra), (*program, str(corpus)), options.count)
        for name, sizes in (("", ("-M", str(SMALL))), (WHOLE, ()))
        for label, (program, extra) in found.items()
    ]


def own(runs: Runs, label: str) -> list[float]:
    """CPU of each round in milliseconds, without that of the program it execs."""
    prefix = WHOLE if label.startswith(WHOLE) else ""
    became = label.removeprefix(prefix).startswith(BECOME)
    nothing = of(runs[prefix + NOTHING], "hook")
    return [a - became * b for a, b in zip(of(runs[label], "hook"), nothing, strict=True)]


def figures(levels: dict[str, Runs]) -> Iterator[Figure]:
    """The rows of the report."""

    def hook(label: str, base: str) -> dict[str, Summary]:
        return {level: ratio(own(runs, label), of(runs[base], "hook")) for level, runs in levels.items()}

    def daemon(label: str, base: str) -> dict[str, Summary]:
        return {level: ratio(of(runs[label], "daemon"), of(runs[base], "hook")) for level, runs in levels.items()}

    for prefix, sizes in (("", "messages up to 16 KB"), (WHOLE, "whole corpus")):
        for who, how in (("echo", "answered immediately"), ("daemon", "waiting for the daemon")):
            label = f"{prefix}hook, musl, {who}"
            yield Figure(f"hook's own CPU / bare musl program, {sizes}, {how}", 1.6, hook(label, prefix + MUSL))
            yield Figure(f"hook's own CPU / bare glibc program, {sizes}, {how}", 0.6, hook(label, prefix + GLIBC))
    for prefix, sizes in (("", "up to 16 KB"), (WHOLE, "whole corpus")):
        what = f"daemon's CPU / bare glibc program, no checks, {sizes}"
        yield Figure(what, 0.5, daemon(f"{prefix}hook, musl, daemon", prefix + GLIBC))
    what = "daemon's CPU / bare glibc program, both signature scanners, whole corpus"
    yield Figure(what, 1.0, daemon(f"{WHOLE}hook, musl, signatures", WHOLE + GLIBC))


HEADINGS = ("CPU us", "own us", "own / bare, musl", "own / bare, glibc", "daemon us", "/ bare, glibc", "msg/s")


def rows(runs: Runs) -> Iterator[tuple[str, ...]]:
    """One table row per alternative, for HEADINGS."""
    for label, mine in runs.items():
        prefix = WHOLE if label.startswith(WHOLE) else ""
        watched = label.endswith(("daemon", "signatures"))
        alone, musl, glibc = own(runs, label), of(runs[prefix + MUSL], "hook"), of(runs[prefix + GLIBC], "hook")
        yield (
            label,
            f"{Summary.of(of(mine, 'hook')).median * 1000:.0f}",
            f"{Summary.of(alone).median * 1000:.0f}",
            str(ratio(alone, musl)),
            str(ratio(alone, glibc)),
            f"{Summary.of(of(mine, 'daemon')).median * 1000:.0f}" if watched else "",
            str(ratio(of(mine, "daemon"), glibc)) if watched else "",
            f"{Summary.of(of(mine, 'rate')).median:.0f}",
        )


def private_memory(directory: Path, size: int) -> int:
    """Private memory in KiB of a hook that waits for the answer about a message of ``size`` bytes."""
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


def memory(directory: Path) -> Figure:
    held = {"8 KB": private_memory(directory, 8_192), "4 MB": private_memory(directory, 4_000_000)}
    values = {name: Summary.of([kib]) for name, kib in held.items()}
    return Figure(f"private memory of a waiting hook, message of {' / '.join(held)}", 1024, values, unit="KiB")
