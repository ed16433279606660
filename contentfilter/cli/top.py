"""``contentfilter top``: live view of the status, with rates and the latest decisions.

A live screen on a terminal, which q or Ctrl-C ends; otherwise plain lines after each interval. Rates and times cover
the messages seen since the start, and at most one minute. Exit statuses: 0 ended by the user; 1 no daemon answers at
the start; 2 wrong usage.
"""

import json
import math
import os
import select
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click
import msgspec

from contentfilter.bus import messages, sockets
from contentfilter.bus.feed import Feed
from contentfilter.cli.common import latency
from contentfilter.cli.control import find_feed
from contentfilter.cli.status import StyledLine, lines, styled
from contentfilter.cli.tail import summary
from contentfilter.deadline import Deadline
from contentfilter.monitor.diagnosis import diagnose

if TYPE_CHECKING:
    from rich.console import RenderableType

ANSWER = 3.0  # seconds for the daemon to answer
SPAN = 60.0  # seconds that rates and times cover
KEPT = 50_000  # messages; above it, the latest are used
SHOWN = 10  # decisions
STYLES = {"good": "bold green", "bad": "bold red", "warning": "yellow", "plain": "", "faint": "dim"}


@click.command()
@click.option(
    "--interval", type=click.FloatRange(0.2, 3600), default=2.0, show_default=True, help="Seconds between two updates."
)
@click.option("--once", is_flag=True, help="Print once, after one interval.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line, after each interval.")
@click.pass_obj
def top(config_path: str, interval: float, once: bool, as_json: bool) -> None:
    """Live view: status, rates, scanners, workers, latest decisions.

    On a terminal, q or Ctrl-C ends it. Otherwise it prints after each interval.
    """
    run = find_feed(config_path)
    try:
        with Feed(run, ("mail.done",)) as feed:
            watched = Watched(run, feed)
            if once or as_json or not (sys.stdout.isatty() and sys.stdin.isatty()):
                _plain(watched, interval, once, as_json)
            else:
                _live(watched, interval)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@dataclass(frozen=True, slots=True)
class Sample:
    """Decided message, as far as rates and times need it."""

    at: float  # monotonic
    decision: str
    ms: float
    scans: tuple[tuple[str, float], ...]  # scanner, milliseconds


@dataclass(slots=True)
class Watched:
    """Decisions seen so far, and the feed that they come from."""

    run: str
    feed: Feed
    began: float = field(default_factory=time.monotonic)
    mails: deque[Sample] = field(default_factory=lambda: deque(maxlen=KEPT))
    last: deque[str] = field(default_factory=lambda: deque(maxlen=SHOWN))

    def take(self, deadline: Deadline) -> bool:
        """Read events until the deadline. False: a key was pressed."""
        while not deadline.expired():
            event = self.feed.next(deadline)
            if isinstance(event, messages.Event):
                self.last.append(summary(event, time.time()))
                if (sample := _sample(event.fields)) is not None:
                    self.mails.append(sample)
            elif event is None and not deadline.expired():
                return False
        return True

    def status(self) -> messages.Status | None:
        reply = sockets.ask(self.run, messages.AskStatus(), ANSWER)
        return reply if isinstance(reply, messages.Status) else None

    def rates(self) -> dict[str, Any]:
        """Messages and scans per second, and their times in milliseconds."""
        now = time.monotonic()
        span = max(0.001, min(SPAN, now - self.began))
        while self.mails and self.mails[0].at < now - SPAN:
            self.mails.popleft()
        if len(self.mails) == KEPT:
            span = now - self.mails[0].at
        decisions: dict[str, int] = {}
        scans: dict[str, list[float]] = {}
        for sample in self.mails:
            decisions[sample.decision] = decisions.get(sample.decision, 0) + 1
            for scanner, ms in sample.scans:
                scans.setdefault(scanner, []).append(ms)
        return {
            "seconds": round(span, 3),
            "messages": _rate([sample.ms for sample in self.mails], span),
            "decisions": {name: round(count / span, 3) for name, count in sorted(decisions.items())},
            "scanners": {name: _rate(times, span) for name, times in sorted(scans.items())},
        }


def _rate(times: Sequence[float], span: float) -> dict[str, float | None]:
    return {"rate": round(len(times) / span, 3), "p50": quantile(times, 0.5), "p95": quantile(times, 0.95)}


def quantile(values: Iterable[float], share: float) -> float | None:
    """Nearest-rank quantile; None without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def _sample(fields: dict[str, Any]) -> Sample | None:
    try:
        scans = tuple((str(scan["scanner"])[:20], float(scan["ms"])) for scan in fields["scans"] if scan["ms"])
        return Sample(time.monotonic(), str(fields["decision"])[:20], float(fields["ms"]), scans)
    except (KeyError, TypeError, ValueError):
        return None


def _screen(watched: Watched, status: messages.Status | None) -> Iterator[StyledLine]:
    now = time.time()
    if status is None:
        yield "bad", "the daemon does not answer; hooks wait and keep their mail"
        yield "plain", "  -> systemctl status contentfilter; runbook: The daemon does not answer"
    else:
        yield from lines(status, diagnose(status, now), now)
    rates = watched.rates()
    yield "plain", ""
    whole = ", ".join(f"{name} {rate:.1f}/s" for name, rate in rates["decisions"].items())
    yield "plain", f"last {rates['seconds']:.0f} s: {_times(rates['messages'])}" + (f" ({whole})" if whole else "")
    for name, rate in rates["scanners"].items():
        yield "plain", f"  {name}: {_times(rate)}"
    yield "plain", ""
    yield from (("faint", line) for line in reversed(watched.last))


def _times(rate: dict[str, float | None]) -> str:
    text = f"{rate['rate']:.1f}/s"
    if rate["p50"] is not None and rate["p95"] is not None:
        text += f", {latency(rate['p50'], rate['p95'])}"
    return text


def _plain(watched: Watched, interval: float, once: bool, as_json: bool) -> None:
    while True:
        watched.take(Deadline.after(interval))
        status = watched.status()
        if as_json:
            seen = msgspec.to_builtins(diagnose(status, time.time())) if status else None
            shown = {"rates": watched.rates(), "status": msgspec.to_builtins(status), "glance": seen}
            click.echo(json.dumps(shown | {"last": list(watched.last)}))
        else:
            for style, text in _screen(watched, status):
                click.echo(styled(style, text))
            click.echo("" if once else "-" * 40)
        if once:
            return


def _live(watched: Watched, interval: float) -> None:
    from rich.console import Console
    from rich.live import Live

    with _keys() as fd, Live(screen=True, auto_refresh=False, console=Console(highlight=False)) as live:
        watched.feed.watch(fd, reading=True)
        due = Deadline.after(0)
        while True:
            live.update(_renderable(_screen(watched, watched.status())), refresh=True)
            due = Deadline.after(interval)
            while not watched.take(due):
                keys = os.read(fd, 64).lower()
                if not keys or any(key in keys for key in (b"q", b"\x03", b"\x04")):
                    return


def _renderable(shown: Iterable[StyledLine]) -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    from contentfilter.cli.common import printable

    return Group(
        *(Text(printable(text), style=STYLES[style], no_wrap=True, overflow="ellipsis") for style, text in shown)
    )


@contextmanager
def _keys() -> Iterator[int]:
    """Descriptor that delivers single keys without echo, Ctrl-C included; the terminal is restored at the end."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    mode = termios.tcgetattr(fd)
    mode[3] &= ~termios.ISIG  # a signal could arrive where Python cannot raise it
    termios.tcsetattr(fd, termios.TCSADRAIN, mode)
    try:
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        while select.select([fd], [], [], 0)[0] and os.read(fd, 64):
            pass
