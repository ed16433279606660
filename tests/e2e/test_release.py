"""Quarantined mail can be released, and a forwarded copy passes the filter once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.mails import VIRUS
from lab.standin import Standin
from lab.system import System

LOCAL = {"TCPREMOTEIP": "", "PROTO": ""}  # as qmail-local starts qmail-queue for a forward


def command(system: System, *words: str, env: dict[str, str]) -> str:
    run = subprocess.run(
        [sys.executable, "-P", "-m", "contentfilter", "--config", str(system.daemon.config), *words],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=True,
        timeout=60,
    )
    return run.stdout


def released(system: System, tmp_path: Path, *options: str) -> bytes:
    """A virus, kept for the protected recipient, released by an operator: what the real queue gets."""
    d = system.deliver(VIRUS, b"user@protected.example", b"user@elsewhere.example", sender=b"kept@example.net")
    assert d.only.envelope.recipients == (b"user@elsewhere.example",)
    standin = Standin(system.queue_program, tmp_path / "released")
    listed = json.loads(command(system, "quarantine", "list", "--json", env={}))
    incident = next(e["incident"] for e in listed if e["sender"] == "kept@example.net")
    words = ("quarantine", "release", incident, "--queue", str(system.queue_program), "--yes", *options)
    command(system, *words, env=standin.environ())
    facts = json.loads(command(system, "why", incident, "--json", env={}))["quarantine"]
    assert [(done["by"] != "", done["to"]) for done in facts["released"]] == [(True, ["user@protected.example"])]
    (queued,) = standin.queued()
    assert queued.envelope.sender == b"kept@example.net"
    assert queued.envelope.recipients == (b"user@protected.example",)
    assert queued.message.endswith(VIRUS)
    return queued.message


TO = b"user@protected.example"
FORWARD = b"other@protected.example"
QMAIL = b"Delivered-To: user@protected.example\nReceived: (qmail 12 invoked by uid 500); 9 Jan 2027 08:15:00 -0000\n"


def test_released_mail_passes_once_when_it_is_forwarded_as_announced(make_system, clamd, tmp_path: Path) -> None:
    system = make_system(clamd=clamd)
    message = QMAIL + released(system, tmp_path, "--forward", FORWARD.decode())
    d = system.deliver(message, FORWARD, env=LOCAL)
    assert d.status == 0
    assert d.only.message.endswith(VIRUS)
    record = system.daemon.wait_for("mail.done", count=2)[1]
    assert record["rule"].startswith("released from quarantine (")
    assert b"\nX-Received-X-ContentFilter-Released: " in d.only.message, "a used token is no mark"
    assert system.deliver(message, FORWARD, env=LOCAL).text[:1] == "D", "a second use is scanned"
    assert system.deliver(d.only.message, FORWARD, env=LOCAL).text[:1] == "D"


@pytest.mark.parametrize("trace", [True, False])
def test_the_token_opens_nothing_else(make_system, clamd, tmp_path: Path, trace: bool) -> None:
    system = make_system(clamd=clamd, settings={"headers": {"trace": trace}})
    message = QMAIL + released(system, tmp_path)
    name = b"X-ContentFilter-Released"
    line = next(line for line in message.splitlines(True) if line.startswith(name))
    variants = {
        "other recipient": (message, (FORWARD,)),
        "extra recipient": (message, (TO, FORWARD)),
        "line above": (b"Subject: urgent\n" + message, (TO,)),
        "line between": (message.replace(line, b"Subject: urgent\n" + line), (TO,)),
        "line below": (message.replace(line, line + b"Subject: urgent\n"), (TO,)),
        "header": (message.replace(b"Subject: look", b"Subject: edit"), (TO,)),
        "body": (message + b"x", (TO,)),
        "twice": (message.replace(line, line + line), (TO,)),
        "forged above": (name + b": x\n" + message, (TO,)),
        "user": (message.replace(b"; by=", b"; by=x"), (TO,)),
        "was over SMTP": (message.replace(b"invoked by uid 500", b"invoked from network"), (TO,)),
    }
    for what, (data, recipients) in variants.items():
        assert system.deliver(data, *recipients, env=LOCAL).text[:1] == "D", what
    assert system.deliver(message, TO).text[:1] == "D", "over SMTP"
    assert system.deliver(message, TO, env={"TCPREMOTEIP": "", "SMTPHELOHOST": "x"}).text[:1] == "D", "over SMTP"
    assert system.deliver(message, TO, env=LOCAL).status == 0, "none of them has used it"


@pytest.mark.parametrize("trace", [True, False])
def test_a_token_that_comes_over_smtp_is_renamed(make_system, clamd, tmp_path: Path, trace: bool) -> None:
    """Also for recipients without any check, whatever the settings."""
    system = make_system(clamd=clamd, settings={"headers": {"trace": trace, "scanned": False}})
    message = released(system, tmp_path)
    copy = system.deliver(message, b"user@elsewhere.example").only.message
    assert copy.count(b"X-ContentFilter-Released:") == copy.count(b"X-Received-X-ContentFilter-Released:") == 1
    back = system.deliver(b"Delivered-To: user@elsewhere.example\n" + copy, TO, env=LOCAL)
    assert back.text[:1] == "D"


def test_a_token_that_cannot_be_marked_as_used_defers_the_message(make_system, clamd, tmp_path: Path) -> None:
    """Neither is it lost, nor does the token count twice."""
    system = make_system(clamd=clamd)
    message = QMAIL + released(system, tmp_path)
    place = system.directory / "state" / "released"
    place.write_bytes(b"in the way")
    d = system.deliver(message, TO, env=LOCAL)
    assert (d.status, d.text[:1], d.queued) == (82, "Z", ())
    assert system.daemon.wait_for("mail.done", count=2)[1]["rule"].startswith("quarantine: the release token cannot")
    place.unlink()
    assert system.deliver(message, TO, env=LOCAL).status == 0


def test_a_new_key_makes_earlier_tokens_ordinary_mail(make_system, clamd, tmp_path: Path) -> None:
    system = make_system(clamd=clamd)
    message = QMAIL + released(system, tmp_path)
    (system.directory / "state" / "release.key").unlink()
    command(system, "reload", "--restart", env={})
    assert system.deliver(message, TO, env=LOCAL).text[:1] == "D"
