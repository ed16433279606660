"""Calibration: CPU time of a fixed workload, so that a test can bound work without a number of seconds.

Seconds depend on the machine and on its other jobs; the ratio of two measurements taken one after the other does not.
"""

import re
import time

_LINES = b"".join(b"X-Field-%d: some text of an ordinary length, and a number: %d\n" % (i, i * i) for i in range(3000))
_FIELD = re.compile(rb"([!-9;-~]+):[ \t]*([^\r\n]*)\r?\n")


def work_unit() -> float:
    """CPU seconds of this thread for regular expressions, slices and dictionaries as parsers use them; some 0.05."""
    start = time.thread_time()
    for _ in range(12):
        fields: dict[bytes, int] = {}
        at = 0
        while found := _FIELD.match(_LINES, at):
            fields[found[1].lower()] = len(found[2].split())
            at = found.end()
        assert len(fields) == 3000
    return time.thread_time() - start


def units_since(started: float) -> float:
    """Work units of CPU time that this thread has used since ``time.thread_time()`` was ``started``."""
    return (time.thread_time() - started) / work_unit()
