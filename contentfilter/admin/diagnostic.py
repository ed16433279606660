"""What an examination found, and how several run at once without one of them holding up the others.

A probe is a function without arguments that gives findings. It may block: it runs in a thread that nobody joins
for longer than the deadline, and that does not keep the process alive.
"""

import enum
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from contentfilter.deadline import Deadline

T = TypeVar("T")

AS_ROOT = "Call the doctor as root."


class Level(enum.Enum):
    OK = "ok"
    WARNING = "warning"  # works, but perhaps not for long, or not as meant
    ERROR = "error"  # mail is not scanned, not accepted, or open to others


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One thing that was looked at. ``remedy`` is a sentence; empty where nothing is to be done."""

    level: Level
    topic: str
    what: str
    remedy: str = ""


DiagnosticProbe = Callable[[], Iterable[Diagnostic]]


def run(works: Mapping[str, Callable[[], T]], deadline: Deadline) -> dict[str, T | Exception]:
    """The results of all works by name, in the order given; what raised, or is late (TimeoutError), is an exception."""
    results: dict[str, T | Exception] = {name: TimeoutError() for name in works}

    def work(name: str, function: Callable[[], T]) -> None:
        try:
            results[name] = function()
        except Exception as error:
            results[name] = error

    threads = [threading.Thread(target=work, args=item, name=item[0], daemon=True) for item in works.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(deadline.left())
    return dict(results)  # a copy: late threads may still write


def examine(probes: Mapping[str, DiagnosticProbe], deadline: Deadline) -> tuple[Diagnostic, ...]:
    """The findings of all probes. One that is late, or breaks, is an error among them."""
    found: list[Diagnostic] = []
    works = {name: partial(_all_of, probe) for name, probe in probes.items()}
    for name, result in run(works, deadline).items():
        topic = name.partition(" ")[0]
        if isinstance(result, TimeoutError):
            what, remedy = f"{name}: no answer in time", "See what it waits for: a file system or a daemon that hangs."
            found.append(Diagnostic(Level.ERROR, topic, what, remedy))
        elif isinstance(result, OSError):
            what = f"{result.filename or name}: {result.strerror or result}"
            remedy = AS_ROOT if isinstance(result, PermissionError) else "See what is wrong with it, and try again."
            found.append(Diagnostic(Level.ERROR, topic, what, remedy))
        elif isinstance(result, Exception):
            what, remedy = f"{name}: {type(result).__name__}: {result}", "Report this as a defect of the doctor."
            found.append(Diagnostic(Level.ERROR, topic, what, remedy))
        else:
            found += result
    return tuple(found)


def _all_of(probe: DiagnosticProbe) -> tuple[Diagnostic, ...]:
    return tuple(probe())
