"""Clock sanity: guards deletion by age against a wall clock that jumped.

A machine that boots with a clock a year ahead would delete its whole quarantine and journal. So each round of
maintenance leaves its time in a file. If the next round finds that more than a day has passed, nothing is deleted
because of its age for another day: time to correct the clock. A daemon that was off for longer waits in the same way.
"""

import os
import struct
from contextlib import suppress
from pathlib import Path

from contentfilter.errors import ConfigError
from contentfilter.files import read_file

DAY = 86_400.0
FILE = "clock"  # in the state directory
_FORM = struct.Struct("<dd")  # the last check, and the start of the doubt (0: none), in seconds since 1970


def clock_is_sane(path: Path, now: float) -> bool:
    """Call more often than once a day. Records ``now``, in place, so a full disk does not matter."""
    checked, doubted = _read(path)
    if checked and now - checked > DAY:
        doubted = now
    elif not 0 <= now - doubted < DAY:  # a day has passed, or the clock was corrected
        doubted = 0.0
    with suppress(OSError):  # nothing can be deleted there then
        _write(path, now, doubted)
    return not doubted


def _read(path: Path) -> tuple[float, float]:
    try:
        checked, doubted = _FORM.unpack(read_file(str(path), _FORM.size)[0])
    except (ConfigError, struct.error):
        return 0.0, 0.0
    return checked, doubted


def _write(path: Path, checked: float, doubted: float) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        os.pwrite(fd, _FORM.pack(checked, doubted), 0)
        os.ftruncate(fd, _FORM.size)
    finally:
        os.close(fd)
