"""Growth of cost with the size of a message, recipients, rows, concurrent hooks, and the number of messages."""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from figures import Figure, Summary, exponent
from lab.system import System, installed_hook
from measure import Alternative, compile_drivers, measure
from parts import look_up, resident
from plots import Plot

SIZES = (1 << 10, 1 << 13, 1 << 16, 1 << 19, 1 << 22, 1 << 25, 200 << 20)
RECIPIENTS = (1, 10, 100, 1_000, 10_000, 100_000)
TABLES = (1_000, 10_000, 100_000, 1_000_000)
HOOKS = (50, 200, 500, 1_000, 2_000)
LINE = b"Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6\n"
HEAD = (
    b"From: a@b.example\nTo: user@bench.example\nSubject: growth\nMIME-Version: 1.0\n"
    b"Content-Type: application/octet-stream\nContent-Transfer-Encoding: base64\n\n"
)
Points = list[tuple[float, float]]


def message(size: int) -> bytes:
    return HEAD + LINE * max(1, (size - len(HEAD)) // len(LINE))


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        began = time.monotonic()
        work()
        times.append(time.monotonic() - began)
    return Summary.of(times).median


def deliveries(system: System, given: Iterator[tuple[int, bytes, tuple[bytes, ...]]]) -> Points:
    """Points (x, milliseconds from the start of the hook to its end)."""
    points = []
    for x, data, recipients in given:

        def once(data: bytes = data, recipients: tuple[bytes, ...] = recipients) -> None:
            delivered = system.deliver(data, *recipients)
            assert delivered.status == 0, delivered

        once()
        points.append((x, 1000 * median_seconds(once, 3 if len(data) > 1 << 24 or len(recipients) > 10_000 else 7)))
    return points


def curves(directory: Path) -> tuple[list[Figure], list[Plot]]:
    """Latency of hook and daemon by size and by recipients, and of the look-up alone by rows."""
    switches = {"options": "chksignature 1\nchkloadertype 1\n", "clamavclients": "@bench.example\n"}
    sizes, figures = {}, []
    for label, controls in (("no checks", {}), ("both signature scanners", switches)):
        with System(directory / label.split()[0], program=installed_hook(), controls=controls) as system:
            user = (b"user@bench.example",)
            sizes[label] = deliveries(system, ((size, message(size), user) for size in SIZES))
            if not controls:
                many = ((n, message(8192), tuple(b"u%d@bench.example" % i for i in range(n))) for n in RECIPIENTS)
                recipients = deliveries(system, many)
        steep = exponent([point for point in sizes[label] if point[0] >= 1 << 19])
        figures.append(Figure(f"growth with size from 512 KB to 200 MB, {label} (1: linear)", 1.1, one(steep)))
    steep = exponent([point for point in recipients if point[0] >= 1_000])
    figures.append(Figure("growth with recipients from 1,000 to 100,000 (1: linear)", 1.1, one(steep)))
    rows = [(float(count), Summary.of(look_up(count, directory) for _ in range(5)).median) for count in TABLES]
    figures.append(Figure("growth of a look-up with rows, 1,000 to a million (0: flat)", 0.1, one(exponent(rows))))
    return figures, [
        Plot("latency-size", "Latency against size", "bytes", "milliseconds", sizes),
        Plot("latency-recipients", "Latency against recipients", "recipients", "milliseconds", {"all": recipients}),
        Plot("lookup-rows", "Table look-up against rows", "rows", "microseconds", {"look-up": rows}),
    ]


def one(value: float) -> dict[str, Summary]:
    return {"": Summary.of([value])}


def crowd(directory: Path, corpus: Path) -> tuple[list[Figure], list[Plot]]:
    """Thousands of concurrent hooks, no checks: the time per hook compared with that of a few."""
    qqbench, _ = compile_drivers(directory)
    points: Points = []
    with System(directory / "crowd", program=installed_hook()) as system:
        conf = f"CONTENTFILTER_QUEUE_CONF={system.queue_conf()}"
        for hooks in HOOKS:
            command = (qqbench, "-M", "16384", "-V", conf)
            many = Alternative("hooks", command, (str(system.program), str(corpus)), hooks)
            runs = [measure(many, hooks, directory) for _ in range(5)]
            assert all(code.endswith(":0") or code == "0" for run in runs for code in run["rc"]), runs[0]["rc"]
            points.append((hooks, Summary.of(run["wall"] for run in runs).median))
    few, all_of_them = dict(points)[200], points[-1][1]
    share = all_of_them / (few * HOOKS[-1] / 200)
    figure = Figure("2,000 concurrent hooks / ten times the time of 200", 1.25, one(share))
    return [figure], [Plot("crowd", "Concurrent hooks", "hooks", "seconds until the last", {"all": points})]


def memory(directory: Path, corpus: Path, options: argparse.Namespace) -> Iterator[Figure]:
    """Resident memory of a worker: idle, after a message of 200 MB, and over many thousands of messages."""
    qqbench, _ = compile_drivers(directory)
    settings = {"service": {"workers": 1}}
    with System(directory / "memory", program=installed_hook(), settings=settings) as system:
        (worker,) = system.daemon.workers()
        yield Figure("a worker's resident memory, idle", 60, one(resident(worker)), unit="MiB")
        assert system.deliver(message(SIZES[-1])).status == 0
        yield Figure("the same, after a message of 200 MB", 60, one(resident(worker)), unit="MiB")
        conf = f"CONTENTFILTER_QUEUE_CONF={system.queue_conf()}"
        command, target = (qqbench, "-V", conf), (str(system.program), str(corpus))
        tenth = Alternative("memory", command, target, options.messages // 10)
        held = []
        for _ in range(10):
            measure(tenth, 8, directory)
            held.append(resident(worker))
        yield Figure(f"the same, after {options.messages:,} messages", 60, one(held[-1]), unit="MiB")
        name = f"its growth over the last nine tenths of {options.messages:,} messages"
        yield Figure(name, 1, one(held[-1] - held[0]), unit="MiB")
