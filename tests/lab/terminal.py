"""A command whose standard error is a terminal, while its standard output is read by a program."""

import os
import pty
import subprocess
import sys

WAIT = 30.0


def run(arguments: list[str], environ: dict[str, str]) -> tuple[bytes, bytes]:
    """(standard output, what the terminal got) of ``python ARGUMENTS``, which must end well."""
    ours, theirs = pty.openpty()
    words = [sys.executable, *arguments]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, **environ}) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # EIO: the other end is closed
                break
        os.close(ours)
        assert process.stdout is not None
        out = process.stdout.read()
        assert process.wait(WAIT) == 0, shown
    return out, shown
