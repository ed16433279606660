"""Random tables, recipients and scanner results through the real hook and daemon: what comes out is what the rules say.

CONTENTFILTER_EXAMPLES sets how many configurations are tried; each one gets a handful of mails.
"""

import base64
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.rules import TAGS, Expected, Mail, World, expect
from hypothesis import HealthCheck, Phase, event, example, given, note, settings
from hypothesis import strategies as st
from lab.peers import Peer
from lab.scripted import CLAMD_FAULTS, SPAMD_FAULTS, scripted
from lab.system import Delivered, System

from contentfilter.wire import envelope

EXAMPLES = int(os.environ.get("CONTENTFILTER_EXAMPLES", "150"))
TOLD = 82  # the status for which notqmail reads the text
SENDER = b"sender@example.net"
INCIDENT = re.compile(rb"^(X-ContentFilter: )[0-9a-z]{16};")

KEYS = ["a@x.example", "b@x.example", "@x.example", "@sub.x.example", ".x.example", ".example", "@y.test", "*"]
RECIPIENTS = [
    "a@x.example",
    "B@X.example",
    "c@x.example",
    "a@sub.x.example",
    "d@deep.sub.x.example",
    "a@y.test",
    "lone",
]
VIRUS = ["", "virus=mark", "virus=remove", "virus=reject", "virus=move:jail@x.example", "virus=move:Junk@y.test"]
SPAM = [
    "", "spam=mark", "spam=remove", "spam=reject", "spam=move:jail@x.example", "spam=move:Junk@y.test",
    "score=aggressive", "score=permissive spam=reject", "spam=remove reject_score=9", "reject_score=0",
    "score=2.5 spam=mark reject_score=12", "spam=move:jail@x.example score=2.5", "spam=move:Junk@y.test reject_score=0",
]  # fmt: skip
ACTION, FAULT = st.sampled_from(["mark", "remove", "reject"]), st.sampled_from(["pass", "pass", "defer"])


def table(options: list[str]) -> st.SearchStrategy[dict[str, str]]:
    return st.dictionaries(st.sampled_from(KEYS), st.sampled_from(["!", *options]), min_size=3, max_size=8)


def seldom(value: object, *others: object) -> st.SearchStrategy[object]:
    return st.sampled_from([value] * 4 + list(others))


WORLDS = st.builds(
    World,
    clamav=table(VIRUS), spamd=table(SPAM), strictest=seldom(False, True), signatures=ACTION, virus=ACTION,
    pua=st.sampled_from(["", "pass", "mark", "remove"]), spam=ACTION, reject_score=st.sampled_from([0.0, 10.0]),
    tag=st.sampled_from(list(TAGS)), full=st.booleans(), own=st.booleans(),
    faults=st.fixed_dictionaries(dict.fromkeys(("clamd", "spamd", "too_big", "limits"), FAULT)),
    trace=seldom(True, False), scanned=seldom(True, False), caller=seldom("smtp", "local", "bounce"),
    clamglobal=seldom(False, True), spamglobal=seldom(False, True),
    skipcachk=seldom(0, 1, 2), skipsachk=seldom(0, 1, 2),
    samsgsize=seldom(0, 400), chksignature=st.booleans(), maxrecipients=seldom(0, 6), envelope_to=st.booleans(),
    originating=st.booleans(),
)  # fmt: skip

SCORES = st.sampled_from(
    ["0/5", "2/5", "2.5/2", "3.9/5", "4/5", "5/5", "7.5/5", "7.5/8", "9/5", "12/5", "14/20", "20/5"]
)


@st.composite
def mails(draw: st.DrawFn, clamd: st.SearchStrategy[str], spamd: st.SearchStrategy[str]) -> Mail:
    words = [f"clamd={draw(clamd)}", f"spamd={draw(spamd)}"]
    for address, score in draw(st.dictionaries(st.sampled_from(RECIPIENTS), SCORES, max_size=3)).items():
        words.append(f"{address.lower()}={score}")
    lines = ["From: a@example.net", "X-Test: " + " ".join(words)]
    if draw(st.booleans()):
        lines += ["X-Spam-Flag: NO", "X-Virus-Status: Clean", "X-ContentFilter: forged"]
    body = draw(st.sampled_from(["letter\n", "\0 \r \xff no end", "long " * 70, "program"]))
    if body == "program":
        lines += ["MIME-Version: 1.0", "Content-Transfer-Encoding: base64"]
        body = base64.encodebytes(b"MZ\x90\0\x03\0\0\0\x04" + bytes(200)).decode()
    message = "\n".join([*lines, "Subject: offer", "", body]).encode("latin-1")
    to = draw(st.lists(st.sampled_from(RECIPIENTS), min_size=1, max_size=8))
    return Mail(message, tuple(to), draw(st.sampled_from(["stranger", "relay", "authenticated"])))


ANSWERS = st.sampled_from([*["clean"] * 5, "Lab.Malware-1", "PUA.Lab.Tool", "limits", "too-big"])
CALM = mails(ANSWERS, st.one_of(SCORES, SCORES, st.just("busy")))
FAULTY = mails(st.sampled_from(["clean", *CLAMD_FAULTS]), st.one_of(SCORES, st.sampled_from(list(SPAMD_FAULTS))))
"""These make a backend rest, so they come last under a configuration."""
MOVES = World(
    clamav={"c@x.example": "virus=move:jail@x.example"},
    spamd={"a@x.example": "spam=move:jail@x.example", "b@x.example": "spam=move:Junk@y.test", "*": "spam=mark"},
    faults=dict.fromkeys(("clamd", "spamd", "too_big", "limits"), "pass"),
)
SPAM_TO_MOVE = Mail(b"X-Test: clamd=Lab.Malware-1 spamd=9/5\nSubject: offer\n\nletter\n", (*RECIPIENTS, *RECIPIENTS))
CLIENTS = {"stranger": {}, "relay": {"RELAYCLIENT": ""}, "authenticated": {"SMTPAUTHUSER": "anna"}}


class Running:
    """One system whose configuration and tables are rewritten for each world."""

    def __init__(self, system: System, clamd: Peer, spamd: Peer) -> None:
        self.system, self._clamd, self._spamd = system, clamd, spamd
        self.entries = system.directory / "state" / "quarantine" / "entries"
        self._kept: set[str] = set()

    def becomes(self, world: World) -> None:
        for name, rows in (("clamavclients", world.clamav), ("spamdclients", world.spamd)):
            lines = [f"!{key}\n" if value == "!" else f"{key} {value}\n" for key, value in rows.items()]
            self.system.control(name, "".join(lines))
        options = {
            "clamglobal": int(world.clamglobal), "spamglobal": int(world.spamglobal), "skipcachk": world.skipcachk,
            "skipsachk": world.skipsachk, "samsgsize": world.samsgsize, "chksignature": int(world.chksignature),
            "chkloadertype": 0, "maxrecipients": world.maxrecipients, "xenveloptoheader": int(world.envelope_to),
            "xoriginatingip": int(world.originating),
        }  # fmt: skip
        self.system.control("options", "".join(f"{name} {value}\n" for name, value in options.items()))
        me = [str(os.getuid())]
        self.system.daemon.configure(
            {
                "service": {"workers": 1},
                "origin": {
                    "smtp_users": me if world.caller == "smtp" else [],
                    "bounce_users": me if world.caller == "bounce" else [],
                },
                "tables": {"recipients": "strictest" if world.strictest else "split"},
                "signatures": {"action": world.signatures},
                "clamd": {"backends": [self._clamd.backend], "action": world.virus},
                "spamd": {
                    "backends": [self._spamd.backend],
                    "action": world.spam,
                    "reject_score": world.reject_score,
                    "subject_tag": world.tag,
                    "rewrite": "full" if world.full else "headers",
                    "user": "recipient" if world.own else "none",
                },
                "classes": {"pua": world.pua},
                "failure": world.faults,
                "headers": {"trace": world.trace, "scanned": world.scanned},
                "journal": {"enabled": False},
            }
        )
        self.system.daemon.reload()
        self.system.daemon.wait_notified("RELOADING", "1")
        self.system.daemon.wait_notified("READY", "1")
        assert [line["text"] for line in self.system.daemon.log("service.problem")] == []

    def deliver(self, mail: Mail) -> Delivered:
        return self.system.deliver(
            mail.message, *(r.encode() for r in mail.recipients), sender=SENDER, env=CLIENTS[mail.client]
        )

    def newly_kept(self) -> list[Path]:
        """Sidecars that were not there before."""
        names = {path.name for path in self.entries.glob("*.json")}
        new, self._kept = names - self._kept, names
        return [self.entries / name for name in sorted(new)]


@pytest.fixture(scope="module")
def running(lab_directory: Path) -> Iterator[Running]:
    with scripted(lab_directory) as (clamd, spamd):
        start = {"service": {"workers": 1}, "journal": {"enabled": False}}
        with System(lab_directory / "every", clamd=clamd, spamd=spamd, settings=start) as system:
            yield Running(system, clamd, spamd)


@pytest.mark.timeout(300 + EXAMPLES)  # a failure takes its time to be made small
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
@given(world=WORLDS, calm=st.lists(CALM, min_size=5, max_size=10), last=FAULTY)
@example(world=MOVES, calm=[SPAM_TO_MOVE], last=SPAM_TO_MOVE)
def test_every_recipient_gets_what_the_rules_say(running: Running, world: World, calm: list[Mail], last: Mail) -> None:
    running.becomes(world)
    for mail in (*calm, last):
        note(f"at fault: {mail}")
        d = running.deliver(mail)
        check(running, world, mail, d)


def check(running: Running, world: World, mail: Mail, d: Delivered) -> None:
    """Every recipient is accounted for once, and the bytes are those."""
    expected, kept = expect(world, mail), running.newly_kept()
    assert d.stderr == ""
    if expected.text:
        event("refused" if expected.text[0] == "D" else "deferred")
        assert (d.status, d.queued, kept) == (TOLD, (), [])
        assert re.fullmatch(expected.text.replace("ID", "[0-9a-z]{16}"), d.text), (expected.text, d.text)
        return
    event(f"{len(expected.copies)} copies, {'some' if expected.withheld else 'none'} kept")
    assert (d.status, d.text) == (0, "")
    assert accounted(d, kept) == planned(expected, mail)
    assert len(kept) == bool(expected.withheld)
    for sidecar in kept:
        said = json.loads(sidecar.read_text())
        assert said["withheld_from"] == list(expected.withheld)
        assert sidecar.with_suffix(".eml").read_bytes() == mail.message
    got = sorted((q.envelope_bytes, INCIDENT.sub(rb"\1ID;", q.message)) for q in d.queued)
    wanted = [(envelope.build(SENDER, [r.encode() for r in to]), message) for to, message in expected.copies]
    assert got == sorted(wanted)


def accounted(d: Delivered, kept: list[Path]) -> list[bytes]:
    """Recipients of the message and those for whom it was quarantined, each as often as it happened."""
    found = [address for q in d.queued for address in q.envelope.recipients]
    for said in (json.loads(sidecar.read_text()) for sidecar in kept):
        found += [bytes.fromhex(said["envelope_hex"]["recipients"][index]) for index in said["withheld_from"]]
    return sorted(found)


def planned(expected: Expected, mail: Mail) -> list[bytes]:
    """The same by the rules."""
    found = [address for to, _ in expected.copies for address in to]
    return sorted(address.encode() for address in found + [mail.recipients[index] for index in expected.withheld])
