"""What neither supervisor nor workers need is given up at their start, under systemd or not.

No program that they start gains rights (no_new_privs; the canary's hook needs none). No core file, and no other process
of the same user, gets at the mail in their memory. What they create is theirs alone. What only root can give up is for
the unit (etc/systemd), or for whoever switches to the user. Linux only; see prctl(2), setrlimit(2).
"""

import ctypes
import os
import resource

PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38


def give_up_privileges() -> None:
    """For this process and those that it starts, but not-dumpable ends with exec: each calls this. Raises OSError."""
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((PR_SET_NO_NEW_PRIVS, 1), (PR_SET_DUMPABLE, 0)):
        if libc.prctl(option, *(ctypes.c_ulong(number) for number in (value, 0, 0, 0))):
            raise OSError(ctypes.get_errno(), f"prctl {option}")
