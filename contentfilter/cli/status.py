"""``contentfilter status``: one screen that shows whether mail is flowing, current problems, and their remedies.

Exit statuses: 0 no problem; 1 a problem, or no daemon answers; 2 wrong usage. Read-only, and therefore available to
every user who may open the control socket.
"""

import json
import os
import sys
import time
from collections.abc import Iterator

import click
import msgspec

from contentfilter.bus import messages
from contentfilter.bus.messages import Window
from contentfilter.cli.common import latency, printable
from contentfilter.cli.control import ask
from contentfilter.monitor.diagnosis import WORDS, Diagnosis, clock, diagnose, length
from contentfilter.tables.keeper import TableState

WAIT = 5.0  # seconds
WORKERS_SHOWN = 16
"""Maximum number of workers shown with a line each; above it, only those that are not idle."""

StyledLine = tuple[str, str]
"""Style (good, bad, warning, plain, faint) and text."""

_COLOURS = {"good": {"fg": "green", "bold": True}, "bad": {"fg": "red", "bold": True}, "warning": {"fg": "yellow"}}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@click.pass_obj
def status(config_path: str, as_json: bool) -> None:
    """Show whether mail is flowing, current problems, and their remedies.

    Status 0: no problem; 1: a problem, or no daemon answers.
    """
    reply = fetch(config_path)
    now = time.time()
    seen = diagnose(reply, now)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(seen) | msgspec.to_builtins(reply)))
    else:
        for style, text in lines(reply, seen, now):
            click.echo(styled(style, text))
    sys.exit(0 if seen.ok else 1)


def fetch(config_path: str) -> messages.Status:
    """Status of the daemon. Exits with status 1 if it does not answer."""
    reply = ask(config_path, messages.AskStatus(), WAIT)
    assert isinstance(reply, messages.Status)  # noqa: S101 - the daemon answers this question with nothing else
    return reply


def styled(style: str, text: str) -> str:
    """Text with colours; click removes them where the output is not a terminal."""
    text = printable(text)
    if os.environ.get("NO_COLOR"):
        return text
    if style == "faint":
        return click.style(text, dim=True)
    colour = _COLOURS.get(style)
    return click.style(text, **colour) if colour else text  # type: ignore[arg-type]


def lines(reply: messages.Status, seen: Diagnosis, now: float) -> Iterator[StyledLine]:
    """Lines of the screen, most important first."""
    yield ("good" if seen.ok else "bad" if not seen.flowing or _unchecked(seen) else "warning"), seen.verdict
    for issue in seen.troubles:
        if not seen.verdict.endswith(issue.what):  # already in the verdict
            yield "warning", f"! {issue.what}"
        yield "plain", f"  -> {issue.remedy}; runbook: {issue.runbook}"
    if reply.window is not None:
        yield from _window(reply.window)
    if seen.oldest is not None:
        oldest = seen.oldest
        yield "plain", f"oldest message: {oldest.incident}, {oldest.stage} for {oldest.seconds:.1f} s"
    if reply.waiting:
        yield "plain", f"{reply.waiting} hooks are waiting for a worker"
    for backend in reply.backends:
        yield _backend(backend, now)
    if reply.canary:
        caught = ", ".join(f"{sample.sample} {sample.result}" for sample in reply.canary)
        yield "plain", f"canary: {caught}, {length(now - max(sample.at for sample in reply.canary))} ago"
    yield from _workers(reply.workers)
    if reply.tables is not None:
        yield "plain", _tables(reply.tables)
    if reply.not_recorded:
        lost = f"{reply.not_recorded} messages are missing from the journal; see journal.failed in the log"
        yield "warning", lost
    yield "faint", _daemon(reply)


def _unchecked(seen: Diagnosis) -> bool:
    return any(issue.effect == "unchecked" for issue in seen.troubles)


def _window(window: Window) -> Iterator[StyledLine]:
    done = ", ".join(f"{count} {decision}" for decision, count in window.decisions.items() if count)
    text = f"last 15 minutes: {window.messages} messages" + (f" ({done})" if done else "")
    if window.p50 is not None and window.p95 is not None:
        text += f", {latency(window.p50, window.p95)}"
    yield "plain", text
    for what, counts in (("deferred", window.deferred), ("passed unchecked", window.unchecked)):
        if counts:
            yield "warning", f"  {what}: " + ", ".join(f"{count} by {rule}" for rule, count in list(counts.items())[:5])


def _backend(backend: messages.BackendStatus, now: float) -> StyledLine:
    name = f"{backend.scanner} {backend.backend}"
    use = f", {backend.outstanding} of {backend.limit} requests" if backend.outstanding else ""
    use += f", {backend.waiting} waiting" if backend.waiting else ""
    if not backend.wanted:
        use += ", not used by any recipient"
    if backend.state == "failing":
        why = WORDS.get(backend.cause, backend.cause) + (f" ({backend.detail})" if backend.detail else "")
        style = "warning" if backend.wanted else "faint"
        return style, f"{name}: {why} since {clock(backend.since, now)}, {length(now - backend.since)}{use}"
    if backend.state == "unknown":
        return "plain", f"{name}: no answer yet{use}"
    return "plain" if backend.wanted else "faint", f"{name}: healthy, answered {length(now - backend.heard)} ago{use}"


def _workers(workers: tuple[messages.WorkerStatus, ...]) -> Iterator[StyledLine]:
    ordered = sorted(workers, key=lambda worker: (worker.slot, worker.pid))
    shown = ordered
    if len(ordered) > WORKERS_SHOWN:
        shown = [worker for worker in ordered if worker.open or worker.state != "ready"][:WORKERS_SHOWN]
    for worker in shown:
        yield ("plain" if worker.state == "ready" else "warning"), _worker(worker)
    if len(shown) < len(ordered):
        yield "faint", f"and {len(ordered) - len(shown)} more workers"


def _worker(worker: messages.WorkerStatus) -> str:
    text = f"worker {worker.slot} pid {worker.pid} {worker.state}"
    if worker.state == "starting":
        return f"{text} for {worker.age:.0f} s"
    text += f", {worker.open} in flight" if worker.open else ", idle"
    text += f", {worker.waiting} of them waiting for a slot" if worker.waiting else ""
    if worker.in_flight:
        oldest = max(worker.in_flight, key=lambda message: message.seconds)
        text += f": {oldest.incident} {oldest.stage} for {oldest.seconds + worker.silent:.1f} s"
    text += f", {worker.counters.get('answered', 0)} answered"
    if worker.silent > 5:
        text += f", no heartbeat for {worker.silent:.0f} s"
    return text


def _tables(state: TableState) -> str:
    if not state.loaded:
        return f"no recipient tables, mail that needs them is deferred: {state.trouble}"
    rows = f"tables: {state.clamav_rows} rows in clamavclients, {state.spamd_rows} in spamdclients, from {state.source}"
    stale = f"OUT OF DATE for {state.age:.0f} s: {state.trouble}"
    return f"{rows}, {stale if state.trouble else f'verified {state.age:.0f} s ago'}"


def _daemon(reply: messages.Status) -> str:
    text = f"contentfilter {reply.version} pid {reply.pid}, {reply.state}, configuration {reply.generation}, "
    text += f"up {length(reply.uptime)}, {reply.socket}"
    died = ", ".join(f"{count} {reason}" for reason, count in reply.deaths.items() if count)
    return text + (f", workers replaced: {died}" if died else "")
