"""``contentfilter canary``: is mail really scanned? Sends the samples through the hook and prints what became of them.

Exit status 0 when every sample was treated as it should be, 1 when one was not or nothing could be sent.
"""

import json
import sys

import click
import msgspec

from contentfilter.bus import messages
from contentfilter.cli.common import print_rows
from contentfilter.cli.control import ask

WAIT = 120.0  # seconds: a round under way, and then ours, each with a scanner that does not answer
WORDS = {True: "ok", False: "WRONG", None: "-"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The whole answer as JSON.")
@click.pass_obj
def canary(config_path: str, as_json: bool) -> None:
    """Send a clean mail, EICAR, GTUBE and a program's beginning through the hook, and say what became of them.

    Nobody gets any of them. The clean one must pass, each of the others must be caught by its scanner. Those whose
    scanner is switched off are skipped.
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
            ("", "sample", "result", "seconds", "what was said"),
            ((WORDS[r.ok], r.sample, r.result, f"{r.seconds:.3f}", r.text) for r in reply.results),
        )
    sys.exit(0 if good else 1)
