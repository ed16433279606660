"""The journal through the whole system: ``why`` tells what ``explain`` tells, and no fault of it touches mail."""

import json
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e import mails
from lab.system import SMTP, System

from contentfilter.store.journal import FILE, SET_ASIDE

WAIT = 30.0
MIXED = (b"virus-only@mixed.example", b"spam-only@mixed.example", b"nobody@elsewhere.example")


def command(system: System, *words: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "contentfilter", "--config", str(system.daemon.config), *words]
    return subprocess.run(whole, capture_output=True, text=True, timeout=60, check=False)


def why(system: System, *words: str) -> Any:
    """Output of ``why``, as soon as the journal has the message."""
    end = time.monotonic() + WAIT
    while (done := command(system, "why", *words, "--json")).returncode:
        assert done.returncode == 1, done.stderr
        assert time.monotonic() < end, done.stderr
    return json.loads(done.stdout)


def last(system: System, count: int) -> str:
    """The incident of the newest message, once ``count`` are logged."""
    return str(system.daemon.wait_for("mail.done", count)[-1]["id"])


def journal(system: System) -> Path:
    return system.directory / "state" / FILE


def untimed(story: list[list[str]]) -> list[list[str]]:
    return [[stage, re.sub(r"[0-9.]+ ms", "… ms", text)] for stage, text in story]


@pytest.mark.parametrize(
    ("message", "recipients"),
    [
        (mails.PLAIN, [b"user@protected.example"]),
        (mails.PLAIN, [b"nobody@elsewhere.example"]),
        (mails.VIRUS, [b"user@protected.example"]),
        (mails.VIRUS, list(MIXED)),
        (mails.SPAM, [b"user@protected.example"]),
        (mails.SPAM, list(MIXED)),
        (mails.with_program(), [b"user@protected.example", b"exempt@protected.example"]),
        (mails.ODD, [b"user@protected.example"]),
    ],
    ids=["clean", "unprotected", "virus", "virus split", "spam", "spam split", "program", "odd"],
)
def test_why_tells_what_explain_tells(system: System, tmp_path: Path, message: bytes, recipients: list[bytes]) -> None:
    before = len(system.records())
    delivered = system.deliver(message, *recipients)
    facts = why(system, last(system, before + 1))
    (tmp_path / "message").write_bytes(message)
    words = [word for name, value in SMTP.items() for word in ("--env", f"{name}={value}")]
    words += [word for recipient in recipients for word in ("--recipient", recipient.decode())]
    explained = command(
        system, "explain", "--json", "--sender", "sender@example.net", *words, str(tmp_path / "message")
    )
    expected = json.loads(explained.stdout)
    assert untimed(facts["story"]) == untimed(expected["story"])
    assert len(facts["story"]) >= 6
    assert facts["text"] == delivered.text.lstrip("DZ") == expected["text"].replace("[explain]", f"[{facts['id']}]")
    for name in ("sender", "recipients", "recipient_count", "decision", "reason", "rule", "size", "remote", "origin"):
        assert facts[name] == expected[name], name


def test_the_text_that_the_client_got_is_enough(system: System) -> None:
    delivered = system.deliver(mails.VIRUS)
    assert delivered.status != 0
    found = why(system, f"host mx.example said: 554 {delivered.text}")
    assert f"[{found['id']}]" in delivered.text
    assert found["rule"].startswith("clamd: ")


def test_the_header_of_a_delivered_message_is_enough(system: System) -> None:
    message = system.deliver(mails.PLAIN).only.message.decode()
    (header,) = re.findall(r"^X-ContentFilter: .*$", message, re.MULTILINE)
    assert why(system, header)["decision"] == "queue"


def test_a_message_is_found_by_each_of_many_recipients_and_by_its_message_id(
    make_system: Callable[..., System],
) -> None:
    system = make_system()
    many = [b"user%d@many.example" % number for number in range(300)]
    system.deliver(b"Subject: x\nMessage-Id:\n <Wanted.1@example.net>\n\nx\n", *many)
    for words in (
        ["--recipient", "user299@many.example"],
        ["--recipient", "user0@many.example"],
        ["--message-id", "wanted.1@EXAMPLE.net"],
        ["--sender", "sender@example.net"],
        ["--remote", SMTP["TCPREMOTEIP"]],
    ):
        (mail,) = why(system, *words)
        assert mail["recipient_count"] == len(mail["recipients"]) == 300


def test_the_report_of_a_split_message_completes_its_story(system: System) -> None:
    before = len(system.records())
    delivered = system.deliver(mails.SPAM, *MIXED)
    assert len(delivered.queued) == 3  # virus check only, spam check only, none
    incident = last(system, before + 1)
    system.daemon.wait_for("mail.report", where=lambda line: line["id"] == incident)
    end = time.monotonic() + WAIT
    while (facts := why(system, incident))["report"] is None:
        assert time.monotonic() < end
    assert facts["report"] == ["0+", "0+", "0+"]
    assert "all 3 submissions were queued" in command(system, "why", incident).stdout


def test_everything_is_in_the_journal_when_the_daemon_has_stopped(make_system: Callable[..., System]) -> None:
    system = make_system()
    for _ in range(5):
        system.deliver(mails.PLAIN, b"nobody@elsewhere.example")
    ids = [record["id"] for record in system.daemon.wait_for("mail.done", 5)]
    assert system.daemon.stop() == 0
    assert [path.name for path in journal(system).parent.glob(FILE + "*")] == [FILE]  # nothing unfinished
    found = command(system, "why", "--since", "1h", "--json")
    assert sorted(mail["id"] for mail in json.loads(found.stdout)) == sorted(ids)


def test_a_disk_that_takes_nothing_disturbs_no_mail(make_system: Callable[..., System]) -> None:
    system = make_system()
    nobody = b"nobody@elsewhere.example"
    assert system.deliver(mails.PLAIN, nobody).status == 0
    why(system, last(system, 1))
    limit = (journal(system).stat().st_size, resource.RLIM_INFINITY)
    resource.prlimit(system.daemon.pid, resource.RLIMIT_FSIZE, (1, limit[1]))  # every write of the supervisor fails
    for _ in range(5):
        assert system.deliver(mails.PLAIN, nobody).status == 0
    (line,) = system.daemon.wait_for("journal.failed")
    assert line["level"] == "warning"
    assert line["dropped"] >= 1
    status = json.loads(command(system, "status", "--json").stdout)
    assert (status["state"], status["not_recorded"] >= 1) == ("ready", True)
    assert "missing from the journal" in command(system, "status").stdout
    assert json.loads(command(system, "why", "--since", "1h", "--json").stdout)


def test_a_damaged_journal_is_replaced_and_mail_goes_on(make_system: Callable[..., System]) -> None:
    system = make_system()
    system.deliver(mails.PLAIN, b"nobody@elsewhere.example")
    why(system, last(system, 1))
    with sqlite3.connect(journal(system)) as other:
        other.execute("DROP TABLE word")
    other.close()
    assert system.deliver(mails.PLAIN, b"nobody@elsewhere.example").status == 0
    system.daemon.wait_for("journal.set-aside")
    assert why(system, last(system, 2))["decision"] == "queue"
    assert journal(system).with_name(SET_ASIDE).exists()


def test_a_killed_supervisor_loses_only_the_last_moment(make_system: Callable[..., System]) -> None:
    system = make_system(tracebacks_allowed=True)
    for _ in range(20):
        system.deliver(mails.PLAIN, b"nobody@elsewhere.example")
    why(system, last(system, 20))
    system.deliver(mails.PLAIN, b"nobody@elsewhere.example")
    system.daemon.signal(signal.SIGKILL)
    system.daemon.wait_exit()
    found = json.loads(command(system, "why", "--since", "1h", "--json").stdout)
    assert len(found) in (20, 21)
    system.daemon.start()
    system.deliver(mails.PLAIN, b"nobody@elsewhere.example")
    assert why(system, last(system, 22))["decision"] == "queue"
    with sqlite3.connect(journal(system)) as other:
        assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    other.close()
