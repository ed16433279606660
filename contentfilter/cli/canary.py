"""``contentfilter canary``: send the samples through the hook to verify that mail is scanned, and print the results.

Exit status 0 if every sample had the expected result, 1 if one had not or none could be sent.
"""

import json
import sys

import click
import msgspec

from contentfilter.bus import messages
from contentfilter.cli.common import print_rows
from contentfilter.cli.control import ask

WAIT = 120.0  # seconds for a round in progress and then ours, each with a scanner that does not answer
WORDS = {True: "ok", False: "WRONG", None: "-"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the complete answer as JSON.")
@click.pass_obj
def canary(config_path: str, as_json: bool) -> None:
    """Send a clean mail, EICAR, GTUBE and the start of a program through the hook, and print the results.

    None of them is delivered. The clean one must pass, and each other one must be detected by its scanner. Samples
    whose scanner is switched off are skipped.
    """
    reply = ask(config_path, messages.AskCanary(), WAIT)
    assert isinstance(reply, messages.CanaryRound)  # noqa: S101 - the daemon answers this question with nothing else
    good = not reply.problem and any(r.ok for r in reply.results) and all(r.ok is not False for r in reply.results)
    if as_json:
        click.echo(json.dumps({"ok": good, **msgspec.to_builtins(reply)}))
    elif reply.problem:
        click.echo(f"contentfilter: {reply.problem}", err=True)
    else:
        print_rows(
            ("", "sample", "result", "seconds", "text"),
            ((WORDS[r.ok], r.sample, r.result, f"{r.seconds:.3f}", r.text) for r in reply.results),
        )
    sys.exit(0 if good else 1)
