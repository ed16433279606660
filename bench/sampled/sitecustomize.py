"""CPU profiler for a worker started by ``bench/stages.py``. Python imports this module by its name.

Each time the process has used a little CPU, the innermost stage on the stack gets a point. The points are written to
the file ``$SAMPLES.PID`` when the process ends.
"""

import atexit
import json
import os
import signal
import sys
from collections import Counter
from types import FrameType

STAGES = {
    "contentfilter/doors/": "intake",
    "contentfilter/wire/": "intake",
    "contentfilter/policy/plan.py": "plan",
    "contentfilter/tables/": "plan",
    "contentfilter/scanners/signatures/": "signatures",
    "contentfilter/scanners/": "clamd and spamd",
    "contentfilter/policy/": "decide",
    "contentfilter/verdict/reply.py": "answer",
    "contentfilter/verdict/headers.py": "answer",
    "contentfilter/verdict/": "record and detail",
    "contentfilter/log": "log",
    "contentfilter/bus/sockets.py": "events",
    "contentfilter/bus/messages.py": "events",
    "contentfilter/worker/crashes.py": "crash marks",
    "contentfilter/": "glue",
    "structlog/": "log",
    "zmq/": "events",
    "asyncio/": "event loop",
    "selectors.py": "event loop",
}


def sample() -> None:
    points: Counter[str] = Counter()

    def tick(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            name = frame.f_code.co_filename
            for part, stage in STAGES.items():
                if part in name:
                    points[stage] += 1
                    return
            frame = frame.f_back
        points["other"] += 1

    def begin(number: int, frame: FrameType | None) -> None:
        points.clear()
        signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)

    def end() -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        with open(f"{os.environ['SAMPLES']}.{os.getpid()}", "w") as file:
            json.dump(points, file)

    signal.signal(signal.SIGPROF, tick)
    signal.signal(signal.SIGUSR2, begin)
    atexit.register(end)


if "SAMPLES" in os.environ and "contentfilter.worker" in sys.orig_argv:
    sample()
