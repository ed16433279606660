"""Hardening of supervisor and workers at their start, with or without systemd.

Programs that they start gain no privileges (no_new_privs; the canary's hook needs none). Neither a core file nor
another process of the same user can expose the mail in their memory. Files they create are private. What only root can
drop is left to the unit (etc/systemd), or to whatever switches to the user. Linux only; see prctl(2), setrlimit(2).
"""

import ctypes
import os
import resource
from contextlib import suppress
from pathlib import Path

PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38


def give_up_privileges() -> None:
    """Drop what this process and its children do not need. Raises OSError.

    Each program calls it for itself, because exec makes a process dumpable again.
    """
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((PR_SET_NO_NEW_PRIVS, 1), (PR_SET_DUMPABLE, 0)):
        if libc.prctl(option, *(ctypes.c_ulong(number) for number in (value, 0, 0, 0))):
            raise OSError(ctypes.get_errno(), f"prctl {option}")


def give_way(oom_score: int, niceness: int = 0) -> None:
    """Make the kernel end this process before others when memory runs out, and run it after others.

    Before :func:`give_up_privileges`, after which the process may not. A refusal is no error.
    """
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(oom_score), encoding="ascii")
    with suppress(OSError):
        os.nice(niceness)
