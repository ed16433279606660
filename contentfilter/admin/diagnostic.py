"""Diagnostics of the doctor, and the runner that executes probes in parallel under one deadline.

A probe is a function without arguments that returns diagnostics. It may block: it runs in a daemon thread, which is
joined no longer than the deadline allows.
"""

import enum
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from contentfilter.deadline import Deadline

T = TypeVar("T")

AS_ROOT = "Run the doctor as root."


class Level(enum.Enum):
    OK = "ok"
    WARNING = "warning"  # works, but perhaps not for long, or not as intended
    ERROR = "error"  # mail is not scanned, not accepted, or open to others


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """Result of one check. ``remedy`` is a sentence; empty where there is nothing to do."""

    level: Level
    topic: str
    what: str
    remedy: str = ""


DiagnosticProbe = Callable[[], Iterable[Diagnostic]]


def run(tasks: Mapping[str, Callable[[], T]], deadline: Deadline) -> dict[str, T | Exception]:
    """Results by name, in the order given; an exception for what raised, TimeoutError for what is late."""
    results: dict[str, T | Exception] = {name: TimeoutError() for name in tasks}

    def task(name: str, function: Callable[[], T]) -> None:
        try:
            results[name] = function()
        except Exception as error:
            results[name] = error

    threads = [threading.Thread(target=task, args=item, name=item[0], daemon=True) for item in tasks.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(deadline.left())
    return dict(results)  # a copy: late threads may still write


def examine(probes: Mapping[str, DiagnosticProbe], deadline: Deadline) -> tuple[Diagnostic, ...]:
    """The diagnostics of all probes. A probe that is late or fails is reported as an error."""
    found: list[Diagnostic] = []
    tasks = {name: partial(_all_of, probe) for name, probe in probes.items()}
    for name, result in run(tasks, deadline).items():
        topic = name.partition(" ")[0]
        if isinstance(result, TimeoutError):
            what, remedy = (
                f"{name}: no answer in time",
                "Find out what it waits for: a file system or a daemon that hangs.",
            )
            found.append(Diagnostic(Level.ERROR, topic, what, remedy))
        elif isinstance(result, OSError):
            what = f"{result.filename or name}: {result.strerror or result}"
            remedy = AS_ROOT if isinstance(result, PermissionError) else "Correct it, and run the doctor again."
            found.append(Diagnostic(Level.ERROR, topic, what, remedy))
        elif isinstance(result, Exception):
            what, remedy = (
                f"{name}: {type(result).__name__}: {result}",
                "This is a bug of the doctor: please report it.",
            )
            found.append(Diagnostic(Level.ERROR, topic, what, remedy))
        else:
            found += result
    return tuple(found)


def _all_of(probe: DiagnosticProbe) -> tuple[Diagnostic, ...]:
    return tuple(probe())
