"""What the SMTP client reads and what each recipient's copy gets in front."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contentfilter.doors.hook_answer import render
from contentfilter.errors import Cause
from contentfilter.model import (
    Action,
    Check,
    Envelope,
    Message,
    Origin,
    OriginKind,
    Reason,
    Scanner,
    ScanOutcome,
    ScanStatus,
    Want,
)
from contentfilter.policy.decide import decide
from contentfilter.policy.options import read_options
from contentfilter.policy.plan import PlanStep, RecipientPolicy, ScanPlan, Switches
from contentfilter.settings import ClamdSettings, HeaderSettings, Settings, SpamdSettings
from contentfilter.verdict import headers
from contentfilter.verdict.context import MessageContext
from contentfilter.verdict.disposition import AddHeader, Delivery, Disposition, RenameHeader, ReplaceText
from contentfilter.verdict.reply import make_disposition
from contentfilter.wire import envelope as envelope_format
from contentfilter.wire import hook

ID = "0123456789abcdef"
MAIL = b"Subject: hi\nX-Virus-Status: Clean (forged)\n\nbody\n"
STEPS = tuple(PlanStep(scanner, run=True, reason="asked") for scanner in Scanner)
CLEAN = tuple(ScanOutcome(s, ScanStatus.CLEAN) for s in (Scanner.SIGNATURES, Scanner.CLAMD))


def answer(context):
    """The disposition as the hook gets it."""
    return render(make_disposition(context), context.message)


def reply(*args, **options):
    return answer(decided(*args, **options))


def decided(
    outcomes=(),
    wants=((True, True),),
    *,
    settings=None,
    switches=None,
    kind=OriginKind.STRANGER,
    data=MAIL,
    want=Want.HEADERS,
    limit="",
    remote=b"192.0.2.1",
    options=(b"", b""),
):
    settings = settings or Settings()
    plan = ScanPlan(
        tuple(
            (RecipientPolicy(v, s, f"v{i}", f"s{i}", read_options(*options)), (i,)) for i, (v, s) in enumerate(wants)
        ),
        STEPS,
        want=want,
        limit=limit,
    )
    decision = decide(plan, outcomes, kind, len(wants), settings)
    to = tuple(b"u%d@example.org" % i for i in range(len(wants)))
    return MessageContext(
        ID,
        Origin(kind, 1, remote_ip=remote),
        Envelope(b"s@example.net", to),
        Message(-1, len(data), data),
        settings,
        switches or Switches(),
        plan,
        tuple(outcomes),
        decision,
    )


def found(scanner, name="Eicar-Test-Signature", **more):
    return ScanOutcome(scanner, ScanStatus.FOUND, name, **more)


def test_virus_text_names_the_virus_the_incident_and_the_code():
    a = reply((found(Scanner.CLAMD),))
    assert (a.action, a.reason) == (Action.REJECT, Reason.VIRUS)
    assert a.text == f"message contains a virus: Eicar-Test-Signature [{ID}] (#5.7.1)"


@pytest.mark.parametrize(
    ("outcomes", "options", "part"),
    [
        ((found(Scanner.SIGNATURES, "TVqQAAMAA"),), {}, "carries a Windows program: TVqQAAMAA"),
        (
            (found(Scanner.SPAMD, score=15.5, threshold=5.0),),
            {"settings": Settings(spamd=SpamdSettings(action="reject"))},
            "looks like spam (15.5 / 5)",
        ),
        ((ScanOutcome(Scanner.CLAMD, ScanStatus.UNCHECKED, cause=Cause.TIMEOUT),), {}, "virus check not possible now"),
        ((), {"limit": "databytes=5"}, "exceeds the size limit"),
        ((), {"limit": "maxrecipients=5"}, "too many recipients"),
    ],
)
def test_every_refusal_says_why(outcomes, options, part):
    text = reply(outcomes, **options).text
    assert part in text
    assert f"[{ID}]" in text


@given(st.text(max_size=400))
def test_no_name_can_forge_a_reply_line(name):
    text = reply((found(Scanner.CLAMD, name),)).text
    assert len(text) <= 250
    assert all(32 <= ord(c) < 127 for c in text)
    assert text.endswith(f"[{ID}] (#5.7.1)")


def only(a):
    assert a.action is Action.QUEUE
    assert len(a.submissions) == 1
    return a.submissions[0]


def test_unprotected_mail_only_gets_lines_in_front():
    s = only(reply(wants=((False, False),)))
    assert s == hook.Submission(
        b"X-ContentFilter: %b; virus=skipped; spam=skipped\nX-Originating-IP: [192.0.2.1]\n" % ID.encode(), 0, None
    )


def test_a_clean_mail_says_who_looked_and_loses_forged_claims():
    s = only(reply(CLEAN, wants=((True, False),)))
    assert s.prepend + MAIL[s.skip :] == (
        b"X-ContentFilter: %b; virus=clean; spam=skipped\n"
        b"X-Virus-Scanned: contentfilter (signatures, clamd)\nX-Virus-Status: Clean\nX-Originating-IP: [192.0.2.1]\n"
        b"Subject: hi\nX-Received-X-Virus-Status: Clean (forged)\n\nbody\n" % ID.encode()
    )


def test_unchecked_is_said_and_is_not_clean():
    unchecked = (ScanOutcome(Scanner.CLAMD, ScanStatus.UNCHECKED, cause=Cause.TOO_BIG),)
    s = only(reply(unchecked, wants=((True, False),)))
    assert b"virus=unchecked" in s.prepend
    assert b"X-Virus-Status: Clean\n" not in s.prepend


@pytest.mark.parametrize("kind", OriginKind, ids=lambda k: k.value)
def test_originating_ip_is_for_smtp_mail_and_its_switch(kind):
    smtp = kind in (OriginKind.STRANGER, OriginKind.RELAY, OriginKind.AUTHENTICATED)
    assert (b"X-Originating-IP: [192.0.2.1]\n" in only(reply(kind=kind)).prepend) is smtp
    assert b"X-Originating-IP" not in only(reply(kind=kind, switches=Switches(xoriginatingip=False))).prepend


def test_envelope_to_only_where_one_recipient_travels_alone():
    on = Switches(xenveloptoheader=True)
    assert b"X-Envelope-To: u0@example.org\n" in only(reply(switches=on)).prepend
    assert b"X-Envelope-To" not in only(reply(wants=((False, False), (False, False)), switches=on)).prepend


def test_spam_is_marked_with_spamassassins_lines_and_the_tag():
    block = b"X-Spam-Flag: YES\r\nX-Spam-Status: Yes\r\nSubject: hi\r\n\r\n"
    spam = (found(Scanner.SPAMD, score=9.0, threshold=5.0, rewritten=block),)
    s = only(reply(spam, wants=((False, True),), settings=Settings(spamd=SpamdSettings(subject_tag="[SPAM] "))))
    result = s.prepend + MAIL[s.skip :]
    assert b"X-Spam-Flag: YES\nX-Spam-Status: Yes\n" in result
    assert b"Subject: [SPAM] hi\n" in result
    assert result.endswith(b"\n\nbody\n")


def test_those_who_did_not_ask_get_their_bytes_and_no_foreign_verdict():
    spam = (found(Scanner.SPAMD, score=9.0, threshold=5.0, rewritten=b"X-Spam-Flag: YES\n\n"),)
    a = reply(spam, wants=((False, True), (False, False)))
    marked, plain = a.submissions
    assert envelope_format.parse(marked.envelope).recipients == (b"u0@example.org",)
    assert envelope_format.parse(plain.envelope).recipients == (b"u1@example.org",)
    assert b"X-Spam" in marked.prepend
    assert b"X-Spam" not in plain.prepend
    assert plain.skip == 0


def test_full_rewrite_takes_spamds_message_for_spam_only():
    rewritten = b"Subject: *****SPAM***** hi\nX-Spam-Flag: YES\n\nattached\n"
    settings = Settings(spamd=SpamdSettings(rewrite="full"))
    spam = (found(Scanner.SPAMD, score=9.0, threshold=5.0, rewritten=rewritten),)
    s = only(reply(spam, wants=((False, True),), settings=settings, want=Want.PROCESS))
    assert s.skip == len(MAIL)
    assert s.prepend.endswith(rewritten)
    ham = (ScanOutcome(Scanner.SPAMD, ScanStatus.CLEAN, score=1.0, threshold=5.0, rewritten=MAIL),)
    s = only(reply(ham, wants=((False, True),), settings=settings, want=Want.PROCESS))
    assert (s.prepend + MAIL[s.skip :]).endswith(b"\n\nbody\n")
    assert s.skip == 0


def test_what_is_moved_goes_to_the_other_address_only_and_says_for_whom_it_was():
    a = reply(
        (found(Scanner.CLAMD),),
        wants=((True, False), (False, False), (True, False)),
        options=(b"virus=move:Jail@x", b""),
    )
    moved, plain = a.submissions
    assert envelope_format.parse(moved.envelope) == Envelope(b"s@example.net", (b"Jail@x",))
    assert moved.prepend.count(b"X-Envelope-To: ") == 2
    assert b"X-Envelope-To: u0@example.org\nX-Envelope-To: u2@example.org\n" in moved.prepend
    assert b"X-Virus-Status: Infected (Eicar-Test-Signature)\n" in moved.prepend
    assert envelope_format.parse(plain.envelope).recipients == (b"u1@example.org",)
    assert b"X-Envelope-To" not in plain.prepend


def test_a_move_of_the_only_recipient_does_not_go_with_the_envelope_as_received():
    s = only(reply((found(Scanner.CLAMD),), wants=((True, False),), options=(b"virus=move:jail@x", b"")))
    assert envelope_format.parse(s.envelope).recipients == (b"jail@x",)


@pytest.mark.parametrize(
    ("score", "own", "want", "flag", "status"),
    [
        (3.0, b"score=2", Want.HEADERS, True, b"X-Spam-Status: Yes, score=3.0 tests=A,\n\tB"),
        (3.0, b"score=2", Want.PROCESS, True, b"X-Spam-Status: Yes, score=3.0 tests=A,\n\tB"),
        (9.0, b"score=14", Want.HEADERS, False, b"X-Spam-Status: No, score=9.0 tests=A,\n\tB"),
        (9.0, b"score=14", Want.PROCESS, False, b"X-Spam-Status: No, score=9.0 tests=A,\n\tB"),
        (9.0, b"score=9", Want.HEADERS, True, b"X-Spam-Status: Yes, score=9.0 required=5.0 tests=A,\n\tB"),
        (3.0, b"score=9", Want.HEADERS, False, b"X-Spam-Status: No, score=3.0 required=5.0 tests=A,\n\tB"),
    ],
)
def test_spamassassins_lines_say_what_the_recipients_own_score_says(score, own, want, flag, status):
    said = b"Yes" if score >= 5 else b"No"
    block = b"X-Spam-Status: %b, score=%.1f required=5.0 tests=A,\n\tB\nX-Spam-Level: ***\n\nother body\n" % (
        said,
        score,
    )
    block = b"X-Spam-Flag: YES\n" + block if score >= 5 else block
    verdict = ScanStatus.FOUND if score >= 5 else ScanStatus.CLEAN
    outcome = ScanOutcome(Scanner.SPAMD, verdict, score=score, threshold=5.0, rewritten=block)
    settings = Settings(spamd=SpamdSettings(subject_tag="[SPAM] "))
    s = only(reply((outcome,), wants=((False, True),), settings=settings, want=want, options=(b"", own)))
    result = s.prepend + MAIL[s.skip :]
    assert result.count(b"X-Spam-Flag: YES\n") == flag
    assert status in result
    assert b"X-Spam-Level: ***\n" in result
    assert (b"Subject: [SPAM] hi\n" in result) is flag
    assert result.endswith(b"\n\nbody\n")


def test_marked_virus_is_delivered_with_its_name():
    s = only(
        reply((found(Scanner.CLAMD),), wants=((True, False),), settings=Settings(clamd=ClamdSettings(action="mark")))
    )
    assert b"virus=found" in s.prepend
    assert b"X-Virus-Status: Infected (Eicar-Test-Signature)\n" in s.prepend


def test_headers_can_be_switched_off():
    off = Settings(headers=HeaderSettings(trace=False, scanned=False))
    s = only(reply(CLEAN, wants=((True, False),), settings=off, switches=Switches(xoriginatingip=False)))
    assert s.prepend.startswith(b"Subject")  # only the forged claim is renamed


@given(st.binary(max_size=2000))
def test_what_is_queued_is_our_lines_and_the_original_bytes(data):
    s = only(reply(wants=((False, False),), data=b"Subject: x\n\n" + data))
    assert s.skip == 0
    assert all(line.startswith(b"X-") for line in s.prepend.splitlines())


def test_a_header_is_corrected_once_for_all_deliveries_that_are_alike_in_it(monkeypatch):
    """A hostile one is long, and there may be 128 deliveries."""
    asked = []

    def counted(data, claimed, tag):
        asked.append((claimed, tag))
        return correct(data, claimed, tag)

    correct = headers.correct
    monkeypatch.setattr(headers, "correct", counted)
    plan = ((RecipientPolicy(True, False, "v", "s"), (0, 1, 2)),)
    decision = decide(ScanPlan(plan, STEPS), CLEAN, OriginKind.STRANGER, 3, Settings())
    deliveries = tuple(d for d in decision.deliveries for _ in range(50))
    context = MessageContext(
        ID,
        Origin(OriginKind.STRANGER, 1),
        Envelope(b"s@example.net", (b"a@b.example",) * 3),
        Message(-1, len(MAIL), MAIL),
        Settings(),
        Switches(),
        ScanPlan(plan, STEPS),
        CLEAN,
        msgspec.structs.replace(decision, deliveries=deliveries),
    )
    assert len(answer(context).submissions) == 50 * len(decision.deliveries)
    assert len(asked) == 1


def test_the_texts_and_fields_go_by_the_check_and_not_by_the_scanner(monkeypatch):
    monkeypatch.setattr(Scanner.LOADERTYPES, "check", Check.SPAM)
    spam = (found(Scanner.LOADERTYPES, score=15.5, threshold=5.0),)
    assert "looks like spam (15.5 / 5)" in reply(spam, settings=Settings(spamd=SpamdSettings(action="reject"))).text
    down = ScanOutcome(Scanner.LOADERTYPES, ScanStatus.UNCHECKED, cause=Cause.TIMEOUT)
    assert "spam check not possible now" in reply((down,)).text
    virus = (
        ScanOutcome(Scanner.CLAMD, ScanStatus.CLEAN),
        ScanOutcome(Scanner.LOADERTYPES, ScanStatus.CLEAN, score=0.0),
    )
    assert b"X-Virus-Scanned: contentfilter (clamd)\n" in only(reply(virus)).prepend


# The disposition itself: nothing in it belongs to the hook


def test_a_disposition_names_the_edits_and_not_their_bytes_on_the_wire():
    plain = make_disposition(decided(CLEAN, wants=((True, False),)))
    assert plain == Disposition(
        Action.QUEUE,
        deliveries=(
            Delivery(
                added=(
                    AddHeader(b"X-ContentFilter: %b; virus=clean; spam=skipped\n" % ID.encode()),
                    AddHeader(b"X-Virus-Scanned: contentfilter (signatures, clamd)\n"),
                    AddHeader(b"X-Virus-Status: Clean\n"),
                    AddHeader(b"X-Originating-IP: [192.0.2.1]\n"),
                ),
                changes=(RenameHeader(12, b"X-Virus-Status", b"X-Received-X-Virus-Status"),),
            ),
        ),
    )
    settings = Settings(spamd=SpamdSettings(subject_tag="[SPAM]"))
    block = b"X-Spam-Flag: YES\r\nX-Spam-Status: Yes,\r\n\tscore=9\r\n\r\n"
    spam = (found(Scanner.SPAMD, score=9.0, threshold=5.0, rewritten=block),)
    (tagged,) = make_disposition(decided(spam, wants=((False, True),), settings=settings)).deliveries
    assert tagged.changes == (ReplaceText(0, b"Subject: ", b"Subject: [SPAM] "),)
    assert tagged.added[-2:] == (AddHeader(b"X-Spam-Flag: YES\n"), AddHeader(b"X-Spam-Status: Yes,\n\tscore=9\n"))


def test_a_disposition_says_who_gets_the_message_and_who_does_not():
    wants = ((True, False), (False, False))
    split = make_disposition(decided((found(Scanner.CLAMD),), wants=wants))
    assert [each.envelope for each in split.deliveries] == [Envelope(b"s@example.net", (b"u1@example.org",))]
    assert split.withheld == (b"u0@example.org",)
    moved = make_disposition(decided((found(Scanner.CLAMD),), wants=wants, options=(b"virus=move:jail@x", b"")))
    assert [each.envelope.recipients for each in moved.deliveries] == [(b"jail@x",), (b"u1@example.org",)]
    assert moved.withheld == ()


def test_equal_changes_are_one_value_for_all_deliveries():
    context = decided(CLEAN, wants=((True, False),) * 2)
    groups = context.decision.deliveries * 2
    decision = msgspec.structs.replace(context.decision, deliveries=groups)
    one, two = make_disposition(msgspec.structs.replace(context, decision=decision)).deliveries
    assert one.changes
    assert one.changes is two.changes
