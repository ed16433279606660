"""Quarantined mail can be released, and passes the filter when it is forwarded."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def released(system: System, tmp_path: Path) -> bytes:
    """A virus, kept for the protected recipient, released by an operator: what the real queue gets."""
    d = system.deliver(VIRUS, b"user@protected.example", b"user@elsewhere.example", sender=b"kept@example.net")
    assert d.only.envelope.recipients == (b"user@elsewhere.example",)
    standin = Standin(system.queue_program, tmp_path / "released")
    listed = json.loads(command(system, "quarantine", "list", "--json", env={}))
    incident = next(e["incident"] for e in listed if e["sender"] == "kept@example.net")
    words = ("quarantine", "release", incident, "--queue", str(system.queue_program), "--yes")
    command(system, *words, env=standin.environ())
    facts = json.loads(command(system, "why", incident, "--json", env={}))["quarantine"]
    assert [(done["by"] != "", done["to"]) for done in facts["released"]] == [(True, ["user@protected.example"])]
    (queued,) = standin.queued()
    assert queued.envelope.sender == b"kept@example.net"
    assert queued.envelope.recipients == (b"user@protected.example",)
    assert queued.message.endswith(VIRUS)
    return queued.message


def test_released_mail_is_not_caught_again_when_it_is_forwarded(make_system, clamd, tmp_path: Path) -> None:
    system = make_system(clamd=clamd)
    message = released(system, tmp_path)
    forwarded = b"Delivered-To: user@protected.example\n" + message
    d = system.deliver(forwarded, b"other@protected.example", env=LOCAL)
    assert d.status == 0
    assert d.only.message.endswith(VIRUS)
    record = system.daemon.wait_for("mail.done", count=2)[1]
    assert record["rule"].startswith("released from quarantine (")
    # Its own output carries the token on: a second forward passes too.
    assert system.deliver(d.only.message, b"third@protected.example", env=LOCAL).status == 0


def test_the_token_opens_nothing_for_others(make_system, clamd, tmp_path: Path) -> None:
    system = make_system(clamd=clamd)
    message = released(system, tmp_path)
    over_smtp = system.deliver(message, b"other@protected.example")
    assert over_smtp.status == 82
    edited = system.deliver(message.replace(b"Subject: look", b"Subject: edit"), b"o@protected.example", env=LOCAL)
    assert edited.status == 82
