"""Run a command under the system call filter of a unit: ``sandbox.py UNIT COMMAND...``, without systemd.

The filter is made from the unit's own lines: SystemCallFilter (sets expanded by ``systemd-analyze
syscall-filter``), RestrictAddressFamilies, MemoryDenyWriteExecute (by prctl, Linux 6.3), NoNewPrivileges.
x86-64 only. What is filtered gives EPERM, as in the unit.
"""

import ctypes
import errno
import os
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_MDWE, PR_GET_MDWE = 38, 22, 65, 66
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06
ARGUMENT = 16  # of args[0] in struct seccomp_data


def values(unit: Path, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", unit.read_text(), re.MULTILINE)


def expanded(name: str) -> set[str]:
    """A system call, or all of a set such as ``@system-service``."""
    if not name.startswith("@"):
        return {name}
    text = subprocess.run(
        ["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True
    ).stdout
    words = [line.strip() for line in text.splitlines()[1:] if line.strip() and not line.strip().startswith("#")]
    return set().union(*map(expanded, words))


def allowed(unit: Path) -> set[str]:
    """As systemd reads it: an allow list, from which later lines take away, and to which they add."""
    names = expanded("@default")  # always in an allow list
    for line in values(unit, "SystemCallFilter"):
        found = set().union(*map(expanded, line.removeprefix("~").split()))
        names = names - found if line.startswith("~") else names | found
    return names


def program(unit: Path) -> bytes:
    """Classic BPF, see seccomp(2)."""
    numbers = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", HEADER.read_text())}
    families = [getattr(socket, name) for name in " ".join(values(unit, "RestrictAddressFamilies")).split()]
    code = [(LOAD, 0, 0, 0), (JUMP_EQUAL, 0, 2 * len(families) + 2, numbers["socket"]), (LOAD, 0, 0, ARGUMENT)]
    for family in families:
        code += [(JUMP_EQUAL, 0, 1, family), (RETURN, 0, 0, ALLOW)]
    code.append((RETURN, 0, 0, ERRNO | errno.EAFNOSUPPORT))
    for name in sorted(allowed(unit) & numbers.keys()):
        code += [(JUMP_EQUAL, 0, 1, numbers[name]), (RETURN, 0, 0, ALLOW)]
    code.append((RETURN, 0, 0, ERRNO | errno.EPERM))
    return b"".join(struct.pack("<HBBI", *each) for each in code)


def enter(unit: Path) -> None:
    """This process and all that it starts. Raises OSError."""
    code = program(unit)
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer)))
    calls = [(PR_SET_NO_NEW_PRIVS, 1, 0)]
    if values(unit, "MemoryDenyWriteExecute") == ["yes"]:
        calls.append((PR_SET_MDWE, 1, 0))
    calls.append((PR_SET_SECCOMP, 2, ctypes.addressof(header)))
    for number, first, second in calls:
        if libc.prctl(number, ctypes.c_ulong(first), ctypes.c_ulong(second), ctypes.c_ulong(0), ctypes.c_ulong(0)):
            raise OSError(ctypes.get_errno(), f"prctl {number}")


def main() -> None:
    enter(Path(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
