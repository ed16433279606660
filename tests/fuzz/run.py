"""Fuzzing, by hand or by ``make fuzz``: each target for some seconds, one after the other. Status 1: findings.

Python's targets run under atheris, the hook's own parsers under libFuzzer with sanitizers. What was learned stays in
build/fuzz, and the next run goes on from there. An input that breaks a promise is printed with its path: put it into
tests/fuzz/corpus/TARGET, where every test run tries it again, and mend what it shows.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from fuzz.hook_library import HOOK, SOURCE
from fuzz.searches import SEARCHES
from fuzz.seeds import write_seeds

HERE = Path(__file__).resolve()
WORK = HERE.parents[2] / "build" / "fuzz"
SANITIZED = ("-O1", "-g", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all")
HOOKS = {"hook_envelope": "envelopes", "hook_answer": "answer", "hook_conf": "queue_conf", "hook_request": "request"}
"""The hook's parsers, and the targets whose inputs they start from."""


def fuzz_here(target: str, options: list[str]) -> None:
    """Does not return."""
    import atheris

    with atheris.instrument_imports(include=["contentfilter"]):
        from fuzz.targets import TARGETS
    atheris.Setup([target, *options], TARGETS[target])
    atheris.Fuzz()


def compiled(name: str) -> str:
    program = WORK / name
    what = f"-DFUZZ={name.removeprefix('hook_')}"
    subprocess.run(
        ["clang", "-std=gnu11", "-D_GNU_SOURCE", "-w", *SANITIZED, f"-I{HOOK}", what, "-o", program, SOURCE], check=True
    )
    return str(program)


def run(name: str, seconds: int) -> bool:
    """True if it ended without a finding."""
    learned, findings = WORK / "learned" / name, WORK / "findings" / name
    for directory in (learned, findings):
        directory.mkdir(parents=True, exist_ok=True)
    start = WORK / "seeds" / HOOKS.get(name, name)
    begin = [compiled(name)] if name in HOOKS else [sys.executable, str(HERE), "--one", name]
    options = [f"-max_total_time={seconds}", "-max_len=4096", "-timeout=20", f"-artifact_prefix={findings}/"]
    paths = os.pathsep.join([str(HERE.parents[2]), str(HERE.parents[1])])
    with open(WORK / f"{name}.log", "w+b") as log:
        done = subprocess.run(
            [*begin, *options, str(learned), str(start)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": paths},
            check=False,
        )
        log.seek(0)
        said = log.read()
    runs = re.findall(rb"^(?:Done (\d+) runs|#(\d+)\s)", said, re.MULTILINE)
    count = int(max(runs[-1])) if runs else 0
    print(
        f"{name:16} {count:>10} runs  {'ok' if not done.returncode else f'FOUND: see {log.name}, {findings}'}",
        flush=True,
    )
    return not done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="default: all")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=1, help="for the searches (tests/fuzz/searches.py)")
    arguments = parser.parse_args()
    names = write_seeds(WORK / "seeds")
    targets = arguments.targets or (*HOOKS, *names, *SEARCHES)
    sound = [searched(name, arguments.seed) if name in SEARCHES else run(name, arguments.seconds) for name in targets]
    sys.exit(not all(sound))


def searched(name: str, seed: int) -> bool:
    """Run one search; True if it found nothing."""
    print(f"--- {name}, seed {seed}", flush=True)
    found = SEARCHES[name](seed)
    for one in found:
        print(f"FOUND: {one}")
    return not found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        fuzz_here(sys.argv[2], sys.argv[3:])
    main()
