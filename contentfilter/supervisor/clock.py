"""Whether the wall clock may be believed when it says that something is old enough to be deleted.

A machine that boots with a clock a year ahead would delete its whole quarantine and journal. So each round of
housekeeping leaves its time in a file; where the next finds that more than a day went by, nothing is deleted for its
age for another day: time to set the clock right. A daemon that was off for longer waits in the same way.
"""

import os
import struct
from contextlib import suppress
from pathlib import Path

DAY = 86_400.0
FILE = "clock"  # in the state directory
_FORM = struct.Struct("<dd")  # the last look, and since when the clock is doubted (0: it is not), in seconds since 1970


def clock_is_sane(path: Path, now: float) -> bool:
    """To be asked more often than once a day. Remembers ``now``; written in place, so a full disk does not matter."""
    looked, doubted = _read(path)
    if looked and now - looked > DAY:
        doubted = now
    elif not 0 <= now - doubted < DAY:  # a day is over, or it was set right
        doubted = 0.0
    with suppress(OSError):  # then nothing can be deleted there either
        _write(path, now, doubted)
    return not doubted


def _read(path: Path) -> tuple[float, float]:
    try:
        looked, doubted = _FORM.unpack(path.read_bytes())
    except (OSError, struct.error):
        return 0.0, 0.0
    return looked, doubted


def _write(path: Path, looked: float, doubted: float) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.pwrite(fd, _FORM.pack(looked, doubted), 0)
        os.ftruncate(fd, _FORM.size)
    finally:
        os.close(fd)
