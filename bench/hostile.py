"""Cost of hostile messages for the signature scan: CPU per 100 MB, the longest delay of another thread, peak memory.

``hostile.py [MEGABYTES] [WORD]``: each shape of tests/lab/hostile.py in that size (100), or those with WORD in
their name. The scan runs in a thread, as in a worker; meanwhile the main thread tries to run every two milliseconds.
Prints the table of docs/limits.md.
"""

import mmap
import os
import sys
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests")]

from lab.hostile import SHAPES  # noqa: E402  # the path comes first
from lab.process import exit_on_sigterm  # noqa: E402

from contentfilter.errors import BackendError  # noqa: E402  # the path comes first
from contentfilter.scanners.signatures.engine import (  # noqa: E402  # the path comes first
    Engine,
    default_loadertypes,
    default_signatures,
)

TICK = 0.002


def private_memory() -> int:
    """Private memory of this process in kilobytes, without the mapped message."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    return 0


def mapped(data: bytes) -> mmap.mmap:
    fd = os.memfd_create("message")
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        return mmap.mmap(fd, len(data), prot=mmap.PROT_READ)


def measure(name: str, size: int) -> str:
    """Measure one shape, and return its table row."""
    message = mapped(SHAPES[name](size))
    engine = Engine(default_signatures(), default_loadertypes())
    done = threading.Event()
    said = "clean"
    cpu = 0.0

    def scan() -> None:
        nonlocal said, cpu
        started = time.thread_time()
        try:
            finding = engine.scan(message)
            said = finding.rule if finding else "clean"
        except BackendError as limit:
            said = limit.detail.rpartition(": ")[2]
        cpu = time.thread_time() - started
        done.set()

    before = peak = private_memory()
    lag, last = 0.0, time.monotonic()
    threading.Thread(target=scan).start()
    while not done.is_set():
        time.sleep(TICK)
        peak = max(peak, private_memory())
        now = time.monotonic()
        lag, last = max(lag, now - last - TICK), now
    return f"| {name} | {cpu / size * 1e8:.2f} | {lag:.2f} | {(peak - before) / 1024:.0f} | {said} |"


def main() -> None:
    size = int(float(sys.argv[1]) * 1_000_000) if len(sys.argv) > 1 else 100_000_000
    print("| message | CPU s per 100 MB | longest delay, s | memory, MiB | result |\n|---|--:|--:|--:|---|")
    for name in SHAPES:
        if len(sys.argv) > 2 and sys.argv[2] not in name:
            continue
        sys.stdout.flush()
        if not (child := os.fork()):  # fresh memory for each
            print(measure(name, size), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    exit_on_sigterm()
    main()
