"""Progress of long operations: a bar on a terminal, otherwise a line every ten seconds.

Written to standard error, so that standard output and ``--json`` are not affected. Without a terminal, an operation
that ends before the first line is due prints nothing. rich is loaded only to draw.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

EVERY = 10.0  # seconds between two lines where there is no terminal


class Progress:
    """State of the operation. ``drawn``: as a bar on a terminal, where other lines must use :meth:`say`."""

    drawn = False

    def __init__(self, what: str, total: int | None = None) -> None:
        self._what = what
        self._total = total
        self._began = time.monotonic()
        self.count = 0

    def step(self) -> None:
        """Count one more step."""
        self.count += 1

    def say(self, text: str) -> None:
        """Print a line to standard error."""
        click.echo(text, err=True)

    def line(self) -> str:
        far = "" if self._total is None else f": {self.count:,} of {self._total:,}"
        return f"contentfilter: {self._what}{far}, after {time.monotonic() - self._began:.0f} s"


@contextmanager
def progress(what: str, total: int | None = None, *, every: float = EVERY) -> Iterator[Progress]:
    """Show progress during the block. ``total``: number of steps; None if unknown."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _drawn(what, total) as bar:
            yield bar
        return
    plain, ended = Progress(what, total), threading.Event()

    def report() -> None:
        while not ended.wait(every):
            plain.say(plain.line())

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield plain
    finally:
        ended.set()
        thread.join()


@contextmanager
def _drawn(what: str, total: int | None) -> Iterator[Progress]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        SpinnerColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.progress import Progress as Bars
    from rich.text import Text

    columns = [SpinnerColumn(), TextColumn("{task.description}")]
    if total is not None:
        columns += [BarColumn(), TaskProgressColumn(), MofNCompleteColumn()]
    bars = Bars(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=total is None)

    class Drawn(Progress):
        drawn = True

        def step(self) -> None:
            super().step()
            bars.advance(task)

        def say(self, text: str) -> None:
            bars.console.print(Text(text), soft_wrap=True)

    with bars:
        task = bars.add_task(escape(what), total=total)
        yield Drawn(what, total)
