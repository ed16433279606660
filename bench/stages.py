"""CPU of a worker by stage, in microseconds per message, from samples that it takes of itself."""

import argparse
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from lab.clamd import Clamd
from lab.system import System, installed_hook
from measure import Alternative, compile_drivers, measure
from plots import Plot

SAMPLED = Path(__file__).resolve().parent / "sampled"
DEFAULT = {"service": {"heartbeat": 1.0}}  # the tests' daemons have a faster one
ALL_RECIPIENTS = "@bench.example\n"


def shares(directory: Path, corpus: Path, options: argparse.Namespace) -> Plot:
    """Measure each kind of protection, and return the plot."""
    qqbench, _ = compile_drivers(directory)
    switches = {"options": "chksignature 1\nchkloadertype 1\n", "clamavclients": ALL_RECIPIENTS}
    with Clamd(directory / "stages-clamd") as clamd:
        kinds: dict[str, dict[str, Any]] = {
            "no checks": {},
            "signatures": {"controls": switches},
            "clamd": {"controls": {"clamavclients": ALL_RECIPIENTS}, "clamd": clamd},
        }
        found = {
            kind: stages(directory / kind.split()[0], corpus, qqbench, options, more) for kind, more in kinds.items()
        }
    names = sorted({stage for times in found.values() for stage in times}, key=lambda name: -found["signatures"][name])
    curves = {name: [(i, times[name]) for i, times in enumerate(found.values())] for name in names}
    return Plot("stages", "CPU of a worker", "", "us per message", curves, bars=tuple(found))


def stages(
    directory: Path, corpus: Path, qqbench: str, options: argparse.Namespace, more: dict[str, Any]
) -> Counter[str]:
    """Microseconds per message, by stage."""
    directory.mkdir()
    samples = directory / "samples"
    path = os.pathsep.join((str(SAMPLED), os.environ.get("PYTHONPATH", "")))
    environ = {"SAMPLES": str(samples), "PYTHONPATH": path}
    count = options.count * 5
    with System(directory, program=installed_hook(), environ=environ, settings=DEFAULT, **more) as system:
        workers = system.daemon.workers()
        for worker in workers:
            os.kill(worker, signal.SIGUSR2)
        conf = f"CONTENTFILTER_QUEUE_CONF={system.queue_conf()}"
        command = (qqbench, "-D", ",".join(map(str, workers)), "-V", conf)
        run = measure(Alternative("stages", command, (str(system.program), str(corpus)), count), 8, directory)
        system.daemon.stop()
    points: Counter[str] = Counter()
    for worker in workers:
        points.update(json.loads(Path(f"{samples}.{worker}").read_text()))
    each = run["daemon"] * 1000 / points.total()  # the clock of the samples is coarse, that of the CPU is not
    return Counter({stage: count * each for stage, count in points.items()})
