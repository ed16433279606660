"""A message in more forms than the hook can submit in one go: nobody is lost, and nothing is deferred for ever."""

import json
from collections.abc import Callable

from e2e.mails import SPAM
from lab.spamd import Spamd
from lab.system import System

from contentfilter.model import SUBMISSIONS_MAX

COUNT = SUBMISSIONS_MAX + 22


def test_spam_that_moves_to_too_many_addresses_is_kept_for_the_surplus(
    make_system: Callable[..., System], spamd: Spamd
) -> None:
    rows = "".join(f"u{n}@protected.example spam=move:spam{n}@jail.example\n" for n in range(COUNT))
    system = make_system(controls={"spamdclients": rows}, spamd=spamd)
    to = [b"other@elsewhere.example", *(b"u%d@protected.example" % n for n in range(COUNT))]
    done = system.deliver(SPAM, *to)
    assert (done.status, len(done.queued)) == (0, SUBMISSIONS_MAX)
    reached = {address for queued in done.queued for address in queued.envelope.recipients}
    assert reached == {to[0], *(b"spam%d@jail.example" % n for n in range(SUBMISSIONS_MAX - 1))}
    (record,) = system.daemon.wait_for("mail.done")
    assert (record["decision"], record["submissions"], record["quarantined"]) == ("queue", SUBMISSIONS_MAX, 23)
    (sidecar,) = (system.directory / "state" / "quarantine" / "entries").glob("*.json")
    assert json.loads(sidecar.read_text())["withheld_from"] == list(range(SUBMISSIONS_MAX, COUNT + 1))
    assert sidecar.with_suffix(".eml").read_bytes() == SPAM
