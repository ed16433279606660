"""Trust in the environment: every mark, from every kind of peer."""

import pytest

from contentfilter.doors.origin import classify, resolve
from contentfilter.model import OriginKind
from contentfilter.settings import OriginSettings

USERS = {"qmaild": 101, "vpopmail": 102, "qmails": 103}
RULES, _ = resolve(OriginSettings(), USERS.__getitem__)
SMTP, OTHER_SMTP, SEND, SOMEBODY = 101, 102, 103, 1000

STRANGER, RELAY, AUTH = OriginKind.STRANGER, OriginKind.RELAY, OriginKind.AUTHENTICATED


@pytest.mark.parametrize(
    ("environ", "kind"),
    [
        ({}, STRANGER),
        ({b"RELAYCLIENT": b""}, RELAY),
        ({b"RELAYCLIENT": b"@suffix"}, RELAY),
        ({b"SMTPAUTHUSER": b"u"}, AUTH),
        ({b"SMTP_AUTH_USER": b"u"}, AUTH),
        ({b"AUTHUSER": b"u"}, AUTH),
        ({b"AUTHUSER": b"u", b"RELAYCLIENT": b""}, AUTH),
        ({b"AUTHUSER": b""}, STRANGER),
        ({b"AUTHUSER": b"", b"RELAYCLIENT": b""}, RELAY),
        ({b"SMTPAUTHUSER": b"", b"SMTP_AUTH_USER": b"u"}, AUTH),
        ({b"AUTHENTICATED": b"1"}, AUTH),
        ({b"AUTHENTICATED": b"0"}, STRANGER),
        ({b"AUTHENTICATED": b""}, STRANGER),
        ({b"AUTHENTICATED": b"10"}, STRANGER),
        ({b"TCPREMOTEINFO": b"u"}, STRANGER),
        ({b"AUTHINFO": b"u"}, STRANGER),
        ({b"QMAILAUTHENTICATED": b"pass"}, STRANGER),
        ({b"authuser": b"u"}, STRANGER),
    ],
)
def test_marks_count_only_from_the_smtp_users(environ: dict[bytes, bytes], kind: OriginKind) -> None:
    assert classify(SMTP, 7, environ, RULES).kind is kind
    assert classify(OTHER_SMTP, 7, environ, RULES).kind is kind
    assert classify(SEND, 7, environ, RULES).kind is OriginKind.BOUNCE
    assert classify(SOMEBODY, 7, environ, RULES).kind is OriginKind.LOCAL
    assert classify(0, 7, environ, RULES).kind is OriginKind.LOCAL


def test_a_forger_gets_nothing_of_his_environment_into_the_origin() -> None:
    forged = {b"TCPREMOTEIP": b"192.0.2.1", b"AUTHUSER": b"boss", b"HELOHOST": b"x", b"TCPREMOTEHOST": b"y"}
    for uid in (SOMEBODY, SEND):
        origin = classify(uid, 7, forged, RULES)
        assert (origin.uid, origin.pid) == (uid, 7)
        assert (origin.remote_ip, origin.remote_host, origin.helo, origin.user) == (b"", b"", b"", b"")


@pytest.mark.parametrize(
    ("environ", "ip"),
    [
        ({b"TCPREMOTEIP": b"192.0.2.1"}, b"192.0.2.1"),
        ({b"TCPREMOTEIP": b"2001:db8::1"}, b"2001:db8::1"),
        ({b"PROTO": b"TCP6", b"TCP6REMOTEIP": b"2001:db8::1"}, b"2001:db8::1"),
        ({b"PROTO": b"TCP6", b"TCP6REMOTEIP": b"2001:db8::1", b"TCPREMOTEIP": b"192.0.2.1"}, b"2001:db8::1"),
        ({b"PROTO": b"TCP", b"TCP6REMOTEIP": b"::ffff:192.0.2.1", b"TCPREMOTEIP": b"192.0.2.1"}, b"192.0.2.1"),
        ({b"PROTO": b"TCP6", b"TCPREMOTEIP": b"192.0.2.1"}, b"192.0.2.1"),
        ({}, b""),
    ],
)
def test_the_remote_address_is_found_in_either_tcpservers_words(environ: dict[bytes, bytes], ip: bytes) -> None:
    assert classify(SMTP, 7, environ, RULES).remote_ip == ip


def test_the_user_is_the_value_that_proved_the_login() -> None:
    origin = classify(SMTP, 7, {b"SMTPAUTHUSER": b"", b"AUTHUSER": b"joe", b"TCPREMOTEINFO": b"eve"}, RULES)
    assert origin.user == b"joe"
    assert classify(SMTP, 7, {b"AUTHENTICATED": b"1"}, RULES).user == b""


def test_unknown_names_are_reported_and_numbers_are_taken() -> None:
    rules, unknown = resolve(OriginSettings(smtp_users=("nobody-here-1", "65533"), bounce_users=("nobody-here-2",)))
    assert rules.smtp_uids == {65533}
    assert rules.bounce_uids == frozenset()
    assert unknown == ("nobody-here-1", "nobody-here-2")


def test_without_known_users_no_environment_is_trusted() -> None:
    rules, _ = resolve(OriginSettings(smtp_users=(), bounce_users=()))
    assert classify(0, 7, {b"AUTHUSER": b"u"}, rules).kind is OriginKind.LOCAL
    assert not rules.system(1000, own=500)
    assert rules.system(0, own=500)
    assert rules.system(500, own=500)
