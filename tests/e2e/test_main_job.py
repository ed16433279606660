"""A message goes through the hook, the daemon, real clamd and spamd, and into the stand-in for qmail-queue."""

import json

import pytest
from e2e.mails import ODD, PLAIN, SPAM, VIRUS, with_program
from lab.spamd import Spamd
from lab.system import System

REJECTED = 82  # with the text on descriptor 6: what notqmail understands


def test_unprotected_mail_passes_unscanned_with_its_bytes(system: System) -> None:
    d = system.deliver(ODD, b"user@elsewhere.example")
    assert d.status == 0
    ours, _, rest = d.only.message.partition(b"Subject: odd")
    assert b"Subject: odd" + rest == ODD
    assert b"virus=skipped; spam=skipped" in ours
    assert b"X-Originating-IP: [192.0.2.7]" in ours


def test_the_real_queue_runs_in_the_hooks_process(system: System) -> None:
    d = system.deliver(PLAIN)
    assert (d.only.pid, d.only.message[-len(PLAIN) :]) == (d.pid, PLAIN)


def test_clean_protected_mail_says_who_looked(system: System) -> None:
    message = system.deliver(PLAIN).only.message
    assert b"virus=clean; spam=clean" in message
    assert b"X-Virus-Scanned: contentfilter (signatures, loadertypes, clamd)" in message
    assert b"X-Spam-Status: No" in message
    assert message.endswith(PLAIN)


def test_a_virus_is_refused_with_its_name_and_the_incident(system: System) -> None:
    d = system.deliver(VIRUS)
    assert d.status == REJECTED
    assert d.text.startswith("Dmessage contains a virus: Eicar-Test-Signature")
    record = next(r for r in system.daemon.wait_for("mail.done", where=lambda r: f"[{r['id']}]" in d.text))
    assert (record["decision"], record["reason"]) == ("reject", "virus")
    assert d.queued == ()


def test_a_windows_program_is_refused_before_clamd_is_asked(system: System) -> None:
    d = system.deliver(with_program())
    assert d.status == REJECTED
    assert "carries a Windows program" in d.text
    record = next(iter(system.daemon.wait_for("mail.done", where=lambda r: f"[{r['id']}]" in d.text)))
    assert [scan["scanner"] for scan in record["scans"]] == ["signatures"]


def test_spam_is_delivered_marked(system: System) -> None:
    message = system.deliver(SPAM).only.message
    assert b"spam=found" in message
    assert b"X-Spam-Flag: YES" in message
    assert b"\nSubject: [SPAM] offer\n" in message
    assert message.endswith(SPAM[SPAM.index(b"\n\n") :])


def test_an_exempt_recipient_gets_everything(system: System) -> None:
    d = system.deliver(VIRUS, b"exempt@protected.example")
    assert d.status == 0
    assert d.only.message.endswith(VIRUS)


def test_recipients_who_want_different_things_get_them(system: System) -> None:
    """Refused for one, marked for the other: the first's copy is kept, the second's is delivered."""
    message = SPAM + VIRUS[VIRUS.index(b"\n\n") :]
    d = system.deliver(message, b"virus-only@mixed.example", b"spam-only@mixed.example", b"none@mixed.example")
    assert d.status == 0
    forms = {q.envelope.recipients: q.message for q in d.queued}
    assert set(forms) == {(b"spam-only@mixed.example",), (b"none@mixed.example",)}
    assert b"X-Spam-Flag: YES" in forms[(b"spam-only@mixed.example",)]
    assert b"X-Spam-Flag" not in forms[(b"none@mixed.example",)]
    entries = list((system.directory / "state" / "quarantine" / "entries").glob("*.json"))
    assert any("virus-only@mixed.example" in entry.read_text() for entry in entries)


def test_mail_above_samsgsize_is_not_sent_to_spamd(system: System) -> None:
    d = system.deliver(SPAM + b"x" * 76 * 3000)
    assert b"virus=clean; spam=skipped" in d.only.message


def test_the_record_has_the_fixed_fields(system: System) -> None:
    d = system.deliver(PLAIN, sender=b"fields@example.net")
    record = next(iter(system.daemon.wait_for("mail.done", where=lambda r: r["sender"] == "fields@example.net")))
    assert d.status == 0
    expected = {
        "origin": "stranger",
        "remote": "192.0.2.7",
        "recipients": ["user@protected.example"],
        "recipient_count": 1,
        "size": len(PLAIN),
        "decision": "queue",
        "rule": "clean",
        "submissions": 1,
    }
    assert {key: record[key] for key in expected} == expected
    assert [scan["scanner"] for scan in record["scans"]] == ["signatures", "loadertypes", "clamd", "spamd"]
    assert all(scan["ms"] >= 0 for scan in record["scans"])
    json.dumps(record)


@pytest.mark.parametrize(
    ("level", "skipped"), [(0, ()), (1, ("authenticated",)), (2, ("authenticated", "relay"))], ids=[0, 1, 2]
)
def test_skipcachk_by_origin(make_system, clamd, level, skipped) -> None:
    system = make_system(clamd=clamd, controls={"skipcachk": f"{level}\n", "clamglobal": "1\n"})
    for env, kind in (
        ({}, "stranger"),
        ({"RELAYCLIENT": ""}, "relay"),
        ({"SMTPAUTHUSER": "anna"}, "authenticated"),
        ({"TCPREMOTEINFO": "anna"}, "stranger"),
    ):
        assert (system.deliver(VIRUS, env=env).status == 0) is (kind in skipped), env
    kinds = [record["origin"] for record in system.daemon.wait_for("mail.done", 4)]
    assert kinds == ["stranger", "relay", "authenticated", "stranger"]


def test_a_local_user_cannot_claim_a_login(make_system, clamd) -> None:
    settings = {"origin": {"smtp_users": []}}
    system = make_system(clamd=clamd, settings=settings, controls={"clamglobal": "1\n", "skipcachk": "2\n"})
    d = system.deliver(VIRUS, env={"SMTPAUTHUSER": "root", "RELAYCLIENT": "", "AUTHENTICATED": "1"})
    assert d.status == REJECTED


def test_a_bounce_is_dropped_into_quarantine_never_refused(make_system, clamd) -> None:
    import os

    settings = {"origin": {"smtp_users": [], "bounce_users": [str(os.getuid())]}}
    system = make_system(clamd=clamd, settings=settings)
    d = system.deliver(VIRUS, sender=b"")
    assert (d.status, d.queued, d.text) == (0, (), "")
    assert len(list((system.directory / "state" / "quarantine" / "entries").glob("*.json"))) == 1


def test_databytes_is_a_second_line_of_defence(make_system) -> None:
    system = make_system(controls={"databytes": "100\n"})
    assert system.deliver(b"x" * 100).status == 0
    assert "(#5.3.4)" in system.deliver(b"x" * 101).text


def test_clamd_down_defers_and_spamd_down_passes_unchecked(make_system, clamd) -> None:
    nobody = "unix:/nonexistent/socket"
    system = make_system(settings={"clamd": {"backends": [nobody]}, "spamd": {"backends": [nobody]}})
    d = system.deliver(PLAIN)
    assert d.status == REJECTED
    assert d.text.startswith("Zvirus check not possible now (down)")
    d = system.deliver(PLAIN, b"spam-only@mixed.example")
    assert b"virus=skipped; spam=unchecked" in d.only.message


def test_full_rewrite_comes_from_spamd(make_system, lab_directory) -> None:
    with Spamd(lab_directory / "spamd-full", "report_safe 1", "rewrite_header Subject ***SPAM***") as spamd:
        system = make_system(spamd=spamd, settings={"spamd": {"rewrite": "full"}})
        message = system.deliver(SPAM, b"spam-only@mixed.example").only.message
        assert b"message/rfc822" in message
        assert b"\nSubject: ***SPAM*** offer" in message
        assert b"X-ContentFilter: " in message
        clean = system.deliver(PLAIN, b"spam-only@mixed.example").only.message
        assert clean.endswith(PLAIN)
