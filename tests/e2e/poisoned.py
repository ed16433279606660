"""The daemon with a defect: its signature scanner crashes on messages that ask for it, or never returns.

As a program: ``poisoned.py SETTINGS.toml``. Everything else is the real daemon.
"""

import asyncio
import ctypes
import mmap
import os
import re
import signal
import sys

from contentfilter.scanners.signatures.engine import Detection, Engine
from contentfilter.supervisor import source
from contentfilter.supervisor.maintenance import maintenance_jobs
from contentfilter.supervisor.supervisor import Supervisor
from contentfilter.worker import application
from contentfilter.worker.main import main


def scan(engine: Engine, data: mmap.mmap | bytes, *, inline: bool = False) -> Detection | None:
    """As the message says: follow a wild pointer, search without end holding the GIL, or take all memory."""
    if b"\nPOISON segfault" in data:
        ctypes.string_at(0)
    elif b"\nPOISON loop" in data:
        re.match(rb"(a|a)*$", b"a" * 64 + b"!")
    elif b"\nPOISON memory" in data:
        held = bytearray(64 << 20)
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where there is no more
        del held
    return real(engine, data, inline=inline)


real = Engine.scan
Engine.scan = scan  # type: ignore[method-assign]


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        main(application.build, sys.argv[2:])
    else:
        worker = (sys.executable, "-P", __file__, "worker")
        sys.exit(
            asyncio.run(Supervisor(source.ConfigLoader(sys.argv[1]), worker, os.environ, maintenance_jobs()).run())
        )
