#!/usr/bin/env python3
"""``make demo``: real messages through the compiled hook, the worker pool, the signature scanners, a real clamd and
a real spamd, into a stand-in for qmail-queue; the results as a table.

Everything runs on private sockets in a temporary directory that is removed at the end. Exit status 0 only if every
message had the expected result.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from e2e import mails  # noqa: E402  (tests/ is on the path only now)
from lab.process import exit_on_sigterm  # noqa: E402
from lab.system import Delivered, System, installed_hook, scanners  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.table import Table  # noqa: E402

CONTROLS = {
    "options": "chksignature 1\nchkloadertype 1\nsamsgsize 200000\nskipcachk 1\n",
    "clamavclients": "# who wants a virus check\n@example.com\n!lab@example.com\n",
    "spamdclients": "# who wants a spam check\nanna@example.com\nbela@example.com\n",
}
SETTINGS = {"spamd": {"subject_tag": "[SPAM] "}}


@dataclass(frozen=True, slots=True)
class Example:
    """One message: recipients, environment and expected result."""

    what: str
    message: bytes
    to: tuple[bytes, ...]
    expected: str  # part of the result
    env: tuple[tuple[str, str], ...] = ()


ANNA, BELA, CARL, LAB, OUT = (
    name + b"@" + domain
    for name, domain in (
        (b"anna", b"example.com"),
        (b"bela", b"example.com"),
        (b"carl", b"example.com"),
        (b"lab", b"example.com"),
        (b"joe", b"elsewhere.example"),
    )
)

CASES = (
    Example("a letter to an unprotected recipient", mails.PLAIN, (OUT,), "queued: virus=skipped; spam=skipped"),
    Example("a letter", mails.PLAIN, (ANNA,), "queued: virus=clean; spam=clean"),
    Example("NUL bytes, bare CR, no final newline", mails.ODD, (CARL,), "queued: virus=clean; spam=skipped"),
    Example("EICAR", mails.VIRUS, (ANNA,), "rejected: message contains a virus"),
    Example("EICAR from an authenticated client", mails.VIRUS, (CARL,), "queued", (("SMTPAUTHUSER", "carl"),)),
    Example("EICAR to an exempt recipient", mails.VIRUS, (LAB,), "queued: virus=skipped"),
    Example(
        "a Windows executable named invoice.pdf", mails.with_program(), (CARL,), "rejected: message carries a Windows"
    ),
    Example("GTUBE", mails.SPAM, (ANNA,), "queued: virus=clean; spam=found"),
    Example("GTUBE to one recipient with a spam check and one without", mails.SPAM, (ANNA, CARL), "2 submissions"),
    Example("EICAR to one protected and one unprotected recipient", mails.VIRUS, (ANNA, OUT), "queued: virus=skipped"),
)


def outcome(d: Delivered) -> str:
    """The reply that qmail's client would have seen, and how the message was queued."""
    if d.text:
        return {"D": "rejected: ", "Z": "deferred: "}[d.text[0]] + d.text[1:]
    if d.status or not d.queued:
        return f"status {d.status}, {len(d.queued)} queued {d.stderr.strip()}"
    ours = [q.message.split(b"\n", 1)[0].decode("ascii", "replace").partition("; ")[2] for q in d.queued]
    if len(ours) == 1:
        return f"queued: {ours[0]}"
    to = [q.envelope.recipients[0].decode().partition("@")[0] for q in d.queued]
    return f"{len(ours)} submissions: " + ", ".join(f"{who}: {how}" for who, how in zip(to, ours, strict=True))


def run(console: Console, system: System) -> int:
    table = Table(title="results", title_justify="left", show_lines=False)
    for heading in ("message", "to", "result", "ms", "decided by"):
        table.add_column(heading, justify="right" if heading == "ms" else "left", overflow="fold")
    wrong = 0
    for number, case in enumerate(CASES, 1):
        sender = b"demo%d@example.net" % number
        d = system.deliver(case.message, *case.to, sender=sender, env=dict(case.env))
        record = system.daemon.wait_for("mail.done", where=lambda r, s=sender: r["sender"] == s.decode())[0]
        result = outcome(d)
        right = case.expected in result
        wrong += not right
        names = ", ".join(to.decode().partition("@")[0] for to in case.to)
        result = escape(result)
        shown = result if right else f"[red]{result}[/red] (expected: {case.expected})"
        table.add_row(case.what, names, shown, f"{record['ms']:.1f}", record["rule"])
    console.print(table)
    return wrong


def show_explain(console: Console, system: System) -> None:
    """Run ``contentfilter explain`` on one of the messages."""
    path = system.directory / "eicar.eml"
    path.write_bytes(mails.VIRUS)
    words = ["explain", "--recipient", "anna@example.com", "--recipient", "joe@elsewhere.example"]
    command = [sys.executable, "-P", "-m", "contentfilter", "--config", str(system.daemon.config), *words, str(path)]
    console.print(f"\n[bold]contentfilter {' '.join(words)} eicar.eml[/bold]\n")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    console.print(result.stdout + result.stderr, markup=False, highlight=False)


def main(arguments: Sequence[str]) -> int:
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 160)
    directory = Path(tempfile.mkdtemp(prefix="cf-demo-"))
    directory.chmod(0o711)  # clamd and spamd run as their own users
    try:
        console.print("starting clamd, spamd, the daemon with two workers ...")
        with (
            scanners(directory) as (clamd, spamd),
            System(
                directory / "main",
                controls=CONTROLS,
                settings=SETTINGS,
                clamd=clamd,
                spamd=spamd,
                program=installed_hook(),
            ) as system,
        ):
            wrong = run(console, system)
            show_explain(console, system)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if wrong:
        console.print(f"[red]{wrong} of {len(CASES)} messages did not have the expected result[/red]")
        return 1
    console.print(f"all {len(CASES)} messages had the expected result")
    return 0


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main(sys.argv[1:]))
