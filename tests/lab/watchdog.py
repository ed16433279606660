"""Watchdog of the event loop: reports each callback that used more CPU time than LIMIT, in tests and in daemons.

CPU time of the loop's thread, not wall time: it depends little on the other jobs of the machine. Collections of
garbage, imports and everything else that a callback sets off count as well. In a daemon it is installed by
``watched/sitecustomize.py``; the reports go to the file that the environment variable REPORT names.
"""

import asyncio
import os
import sys
import time
from asyncio import events
from collections.abc import Callable
from typing import Any

LIMIT = 0.1  # seconds: twice the promise, because the same work takes up to twice the time beside a busy hyperthread
REPORT = "CONTENTFILTER_LOOP_REPORT"
held: list[str] = []
"""Reports of this process, in tests."""


def install(report: Callable[[str], None]) -> None:
    """From now on, ``report`` gets a line for each callback of any loop of this process that took too long."""
    run = events.Handle._run

    def _run(handle: Any) -> None:
        if getattr(handle, "_callback", None) is None:
            return run(handle)
        callback, arguments = handle._callback, handle._args
        began = time.thread_time()
        try:
            return run(handle)
        finally:
            if (used := time.thread_time() - began) > LIMIT:
                report(f"{used * 1000:.0f} ms of CPU time in {name(callback, arguments)}")

    events.Handle._run = _run  # type: ignore[method-assign]


def name(callback: Any, arguments: Any) -> str:
    """The coroutine and the line at which it waits now, or the function."""
    task = getattr(callback, "__self__", None)
    if not isinstance(task, asyncio.Task):
        return f"{getattr(callback, '__qualname__', callback)!s} {arguments!r:.200}"
    chain, waiting = [], task.get_coro()
    while waiting is not None and len(chain) < 20:
        code = getattr(waiting, "cr_code", None) or getattr(waiting, "gi_code", None)
        frame = getattr(waiting, "cr_frame", None) or getattr(waiting, "gi_frame", None)
        if code is None:
            break
        chain.append(f"{code.co_qualname} ({os.path.basename(code.co_filename)}:{frame.f_lineno if frame else 'end'})")
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "gi_yieldfrom", None)
    return " > ".join(chain)


def install_in_daemon() -> None:
    """Reports go to the end of the file, with the command line."""
    path = os.environ[REPORT]

    def report(text: str) -> None:
        words = " ".join(sys.orig_argv)[:160]
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(fd, f"{text} [{words}]\n".encode())
        finally:
            os.close(fd)

    install(report)
