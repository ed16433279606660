#!/usr/bin/env python3
"""Overload: thousands of concurrent hooks and a slow clamd; results, memory of the workers, and time to recover.

    PYTHONPATH=. bench/overload.py --hooks 2000 --scan 0.1

Exit status 0 only if nothing was lost, duplicated or rejected. tests/e2e/test_overload.py is the short form.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from e2e.test_overload import AV, body, network, nothing_bad, slow  # noqa: E402  (tests/ is on the path only now)
from lab.crowd import Crowd, most_memory  # noqa: E402
from lab.peers import Peer, read_clamd  # noqa: E402
from lab.process import exit_on_sigterm  # noqa: E402
from lab.system import System  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hooks", type=int, default=2000)
    parser.add_argument("--scan", type=float, default=0.1, help="seconds that clamd takes for each message")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cf-") as name:
        directory = Path(name)
        directory.chmod(0o711)
        with Peer(directory, slow(given.scan, b"fd[10]: OK\0"), read_clamd, backlog=256) as clamd:
            settings = {"service": {"workers": given.workers}}
            with System(directory / "s", controls={"clamavclients": "*\n"}, settings=settings, clamd=clamd) as system:
                crowd = Crowd(system, "crowd", budget=240)
                crowd.start(range(given.hooks), body, network, AV)
                outcome = crowd.wait(300)
                began = time.monotonic()
                fresh = system.deliver(b"Subject: after it\n\n", AV)
                recovered = time.monotonic() - began
                peaks = [most_memory(pid) for pid in system.daemon.workers()]
                rate, deferred = given.hooks / outcome.seconds, given.hooks - len(outcome.accepted)
                print(f"{given.hooks} hooks in {outcome.seconds:.1f} s ({rate:.0f}/s): {deferred} deferred as busy")
                print(f"a message sent afterwards: status {fresh.status} in {recovered:.2f} s")
                print(f"largest worker: {max(peaks) / 1e6:.0f} MB")
                nothing_bad(outcome, given.hooks)


if __name__ == "__main__":
    exit_on_sigterm()
    main()
