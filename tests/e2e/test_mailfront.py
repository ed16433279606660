"""A client by somebody else: mailfront's SMTP server hands its mail to the hook and prints the replies."""

import os
import shutil
import subprocess
from collections.abc import Sequence

import pytest
from e2e.mails import PLAIN, SPAM, VIRUS
from lab.system import SMTP, System

MAILFRONT = shutil.which("smtpfront-qmail", path=os.environ["PATH"] + ":/usr/sbin") or "smtpfront-qmail"


def session(system: System, message: bytes, recipients: Sequence[str], **conf: object) -> list[str]:
    """One SMTP session; the replies, one per command."""
    conf_path = system.queue_conf(dialect="stock", **conf)
    records = system.directory / "mailfront"
    records.mkdir(exist_ok=True)
    env = {
        **SMTP,
        "PATH": "/usr/sbin:/usr/bin:/bin",
        "QMAILHOME": str(system.directory),
        "QMAILQUEUE": str(system.program),
        "CONTENTFILTER_QUEUE_CONF": str(conf_path),
        "STANDIN_DIR": str(records),
        "RELAYCLIENT": "",
    }
    lines = [b"EHLO client.example", b"MAIL FROM:<a@example.net>"]
    lines += [b"RCPT TO:<%b>" % r.encode() for r in recipients]
    text = message.replace(b"\n.", b"\n..").replace(b"\n", b"\r\n")
    lines += [b"DATA", text + b".", b"QUIT", b""]
    run = subprocess.run([MAILFRONT], input=b"\r\n".join(lines), capture_output=True, env=env, timeout=90, check=False)
    return [line for line in run.stdout.decode("ascii").splitlines() if line[3:4] != "-"]


@pytest.mark.parametrize(
    ("message", "code", "part"),
    [(PLAIN, "250", "Accepted message qp "), (VIRUS, "554", "5.3.0"), (SPAM, "250", "Accepted message qp ")],
    ids=["plain", "virus", "spam"],
)
def test_smtp_replies(system: System, message: bytes, code: str, part: str) -> None:
    replies = session(system, message, ["user@protected.example"])
    answer = replies[-2]  # the last but QUIT's
    assert answer.startswith(code), replies
    assert part in answer


def test_the_number_in_the_reply_is_the_queues_process(system: System) -> None:
    answer = session(system, PLAIN, ["user@protected.example"])[-2]
    number = answer.rpartition("qp ")[2].split()[0]
    recorded = {path.stem for path in (system.directory / "mailfront").glob("*.msg")}
    assert number in recorded


def test_no_daemon_is_a_temporary_reply(system: System) -> None:
    replies = session(system, PLAIN, ["user@protected.example"], socket="/nonexistent/socket", budget=1)
    assert replies[-2].startswith("451")
