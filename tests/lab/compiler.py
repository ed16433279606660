"""C programs of the lab: compiled once per test run and linked to where they are needed.

A compilation costs as much as the start of a daemon, and a test run starts a hundred systems.
"""

import fcntl
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

SHARED = "CONTENTFILTER_LAB_PROGRAMS"  # environment: the directory that all processes of a test run share


def compiled(directory: Path, name: str, command: Sequence[str | Path]) -> Path:
    """Return ``directory / name``; run ``command`` (a compiler, without ``-o``) if no process of this run did before.

    Safe for several test processes. Raises CalledProcessError.
    """
    program = directory / name
    if program.exists():
        return program
    if SHARED not in os.environ:
        return _compile(program, command)
    shared = Path(os.environ[SHARED])
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = shared / name
        if not made.exists():
            _compile(made, command)
    link = directory / f"{name}.{os.getpid()}"  # then renamed, for several processes may come here
    try:
        link.hardlink_to(made)
    except OSError:  # another file system
        link.symlink_to(made)
    link.replace(program)
    link.unlink(missing_ok=True)  # rename() does nothing if both are links to one file
    return program


def _compile(program: Path, command: Sequence[str | Path]) -> Path:
    unfinished = program.with_name(f"{program.name}.{os.getpid()}")
    subprocess.run([*command, "-o", unfinished], check=True)
    return unfinished.replace(program)
