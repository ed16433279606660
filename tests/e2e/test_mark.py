"""Marked mail on real SpamAssassin: its lines, our subject tag, forged copies, both ways of rewriting."""

import email
import email.policy
from collections.abc import Iterator
from contextlib import ExitStack
from email.message import EmailMessage
from pathlib import Path

import pytest
from e2e.mails import PLAIN
from lab.clamd import Clamd
from lab.spamd import GTUBE, Spamd
from lab.system import System

TAG = "[СПАМ] "
TO = b"user@mixed.example"
FORGED = (
    b"X-Spam-Flag: NO\nx-spam-STATUS : No, score=-99\n\tfolded\nX-Spam-Level\n : \nX-Spam-Anything: x\n"
    b"X-Virus-Status: Clean\nX-ContentFilter: forged; virus=clean\nX-ContentFilter-Released: forged\n"
)
NAMES = {"x-contentfilter", "x-contentfilter-released", "x-virus-scanned", "x-virus-status"}


@pytest.fixture(scope="module", params=["report_safe 0", "report_safe 1"])
def systems(request: pytest.FixtureRequest, lab_directory: Path, clamd: Clamd) -> Iterator[dict[str, System]]:
    """Both ways of rewriting, under one way of SpamAssassin's reports."""
    place = lab_directory / request.param.replace("report_safe ", "mark")
    controls = {"clamavclients": "@mixed.example\n", "spamdclients": "@mixed.example\n"}
    with ExitStack() as stack:
        spamd = stack.enter_context(Spamd(place, request.param, "rewrite_header Subject ***SA***"))
        options = {"controls": controls, "clamd": clamd, "spamd": spamd}
        settings = {"service": {"workers": 1}, "journal": {"enabled": False}}
        ways = {way: settings | {"spamd": {"subject_tag": TAG, "rewrite": way}} for way in ("headers", "full")}
        headers = stack.enter_context(System(place / "h", settings=ways["headers"], **options))
        full = stack.enter_context(System(place / "f", settings=ways["full"], program=headers.program, **options))
        yield {"headers": headers, "full": full, request.param: full}


def parsed(message: bytes) -> EmailMessage:
    return email.message_from_bytes(message, policy=email.policy.default)  # type: ignore[return-value]


def spam(subject: bytes = b"Subject: offer\n", forged: bytes = b"", eol: bytes = b"\n") -> bytes:
    head = b"From: a@example.net\nTo: b@example.org\n" + forged + subject
    return (head + b"Date: Mon, 1 Jan 2024 00:00:00 +0000\nMessage-ID: <1@example.net>\n\n" + GTUBE + b"\n").replace(
        b"\n", eol
    )


SUBJECTS = {
    b"Subject: offer\n": "offer",
    b"Subject: =?utf-8?q?h=C3=A9llo?=\n =?utf-8?q?_there?=\n": "héllo there",
    b"subject:\n folded\n": "folded",
    b"": "",
}


@pytest.mark.parametrize("eol", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("subject", SUBJECTS, ids=["plain", "encoded", "folded", "missing"])
def test_spam_has_spamassassins_lines_our_tag_and_its_own_bytes(
    systems: dict[str, System], subject: bytes, eol: bytes
) -> None:
    message = spam(subject, eol=eol)
    copy = systems["headers"].deliver(message, TO).only.message
    fields = parsed(copy)
    assert fields["X-Spam-Flag"] == "YES"
    assert fields["X-Spam-Status"].startswith("Yes, score=")
    assert fields["X-Spam-Checker-Version"].startswith("SpamAssassin")
    assert fields.get_all("Subject") == [(TAG + SUBJECTS[subject]).strip()]
    assert (fields["From"], fields["Message-ID"]) == ("a@example.net", "<1@example.net>")
    assert fields["Content-Type"] is None, "the report's own header must not come along"
    body = message[message.index(eol * 2) :]
    assert copy.endswith(body)


def test_forged_lines_are_renamed_and_only_the_real_ones_speak(systems: dict[str, System]) -> None:
    copy = systems["headers"].deliver(spam(forged=FORGED), TO).only.message
    head = copy[: copy.index(b"\n\n")]
    fields = parsed(copy)
    ours = [name.lower() for name in fields if name.lower() in NAMES or name.lower().startswith("x-spam-")]
    assert len(ours) == len(set(ours)), ours
    assert "x-contentfilter-released" not in ours
    assert "x-spam-anything" not in ours
    assert fields["X-Spam-Flag"] == "YES"
    assert "score=-99" not in fields["X-Spam-Status"]
    assert head.count(b"X-Received-X-") + head.count(b"X-Received-x-") == 7
    assert copy.endswith(b"\n\n" + GTUBE + b"\n")


def test_a_full_rewrite_is_spamassassins_own_with_our_lines_in_front(systems: dict[str, System]) -> None:
    copy = systems["full"].deliver(spam(forged=FORGED), TO).only.message
    fields = parsed(copy)
    assert copy.startswith(b"X-ContentFilter: ")
    assert "virus=clean; spam=found" in fields.get_all("X-ContentFilter")[0]
    assert len(fields.get_all("X-ContentFilter")) == 1
    assert fields.get_all("X-Virus-Status") == ["Clean"]
    assert fields.get_all("X-Spam-Flag") == ["YES"]
    assert "X-ContentFilter-Released" not in fields
    assert fields["Subject"] == f"{TAG}***SA*** offer"
    if "report_safe 0" not in systems:
        assert fields.get_content_type() == "multipart/mixed"
        attached = list(fields.iter_parts())[-1]
        assert GTUBE in attached.as_bytes()


@pytest.mark.parametrize("way", ["headers", "full"])
def test_mail_that_is_no_spam_keeps_its_bytes_behind_our_lines(systems: dict[str, System], way: str) -> None:
    message = PLAIN + b"8-bit \xff, and no end"
    copy = systems[way].deliver(message, TO).only.message
    assert copy.endswith(b"\n" + message)
    assert b"spam=clean" in copy
    assert parsed(copy)["X-Spam-Status"].startswith("No, score=")


@pytest.mark.parametrize("way", ["headers", "full"])
def test_marked_mail_that_comes_back_is_not_tagged_again(systems: dict[str, System], way: str) -> None:
    """Answered by somebody, or sent through us a second time."""
    again = systems[way].deliver(spam(), TO).only.message
    subject = parsed(again)["Subject"]
    second = parsed(systems["headers"].deliver(again, TO).only.message)
    assert second["Subject"] == subject
    answer = EmailMessage(policy=email.policy.SMTP.clone(linesep="\n"))
    answer["From"], answer["Subject"] = "c@example.net", f"Re: {subject}"
    answer.set_content(GTUBE.decode())
    third = parsed(systems["headers"].deliver(answer.as_bytes(), TO).only.message)
    assert third["X-Spam-Flag"] == "YES"
    assert third["Subject"] == f"Re: {subject}"


def test_a_body_without_header_and_a_header_of_a_mebibyte(systems: dict[str, System]) -> None:
    alone = b"\n" + GTUBE + b"\n"
    copy = systems["headers"].deliver(alone, TO).only.message
    assert copy.endswith(b"\n" + alone)
    assert parsed(copy)["Subject"] == TAG.strip()
    lines = b"X-Long: " + b"word " * 200 + b"\n"
    message = lines * (1_100_000 // len(lines)) + spam(forged=FORGED)
    d = systems["headers"].deliver(message, TO)
    assert (d.status, d.text[:1], d.queued) == (82, "D", ())
    assert "message header exceeds the size limit" in d.text
