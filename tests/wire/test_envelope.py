"""The envelope grammar on the daemon's side: the same as qmail-queue's, and fast."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.calibration import units_since

from contentfilter.errors import EnvelopeError, LocalProtocolError
from contentfilter.model import Envelope
from contentfilter.wire.envelope import build, parse

GOOD = [
    (b"F\0\0", b"", ()),
    (b"F\0Tr\0\0", b"", (b"r",)),
    (b"Fs@example.org\0Ta\0Tb\0Ta\0\0", b"s@example.org", (b"a", b"b", b"a")),
    (b"F#@[]\0T\0\0", b"#@[]", (b"",)),
    (b"FF\0TT\0\0", b"F", (b"T",)),
    (b"Fs\0T" + b"r" * 1002 + b"\0\0", b"s", (b"r" * 1002,)),
    (b"Fs\0Tr\0\0behind\0\0", b"s", (b"r",)),
    (b"Fs\0Tr\0Q\0\0", b"s", (b"r",)),
    (b"Fs\0Tr\0Q\0", b"s", (b"r",)),
    (b"Fs\0Tr\0Q1\0Tt\0\0", b"s", (b"r", b"t")),
    (b"F\xff\r\n \0T\x01\0\0", b"\xff\r\n ", (b"\x01",)),
]
BAD = [
    (b"", 54),
    (b"F", 54),
    (b"Fs", 54),
    (b"Fs\0", 54),
    (b"Fs\0Tr", 54),
    (b"Fs\0Tr\0", 54),
    (b"F" + b"s" * 1002, 54),
    (b"F" + b"s" * 1003, 11),
    (b"F" + b"s" * 1003 + b"\0\0", 11),
    (b"Fs\0T" + b"r" * 1003 + b"\0\0", 11),
    (b"Fs\0Tr\0T" + b"r" * 1003, 11),
    (b"\0", 91),
    (b"\0\0", 91),
    (b"T\0\0", 91),
    (b"fs\0Tr\0\0", 91),
    (b"Fs\0Xr\0\0", 91),
    (b"Fs\0Xr", 91),
    (b"Fs\0Xr\0T" + b"r" * 1003 + b"\0\0", 91),
    (b"Fs\0T" + b"r" * 1003 + b"\0Xr\0\0", 11),
    (b"Q\0Tr\0\0", 91),
]


@pytest.mark.parametrize(("data", "sender", "recipients"), GOOD)
def test_legal_envelopes(data: bytes, sender: bytes, recipients: tuple[bytes, ...]) -> None:
    assert parse(data) == parse(memoryview(data)) == Envelope(sender, recipients)


@pytest.mark.parametrize(("data", "status"), BAD)
def test_each_fault_has_the_status_that_qmail_queue_would_give(data: bytes, status: int) -> None:
    with pytest.raises(EnvelopeError) as raised:
        parse(data)
    assert raised.value.status == status


def test_every_cut_is_incomplete() -> None:
    whole = build(b"sender@example.org", [b"a@example.com", b"b@example.com"])
    for end in range(len(whole)):
        with pytest.raises(EnvelopeError) as raised:
            parse(whole[:end])
        assert raised.value.status == 54


addresses = st.binary(max_size=1002).map(lambda b: b.replace(b"\0", b""))


@given(addresses, st.lists(addresses, max_size=20))
def test_what_is_built_is_parsed(sender: bytes, recipients: list[bytes]) -> None:
    assert parse(build(sender, recipients)) == Envelope(sender, tuple(recipients))


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    status = 0
    sender = b""
    try:
        sender = parse(data).sender
    except EnvelopeError as error:
        status = error.status
    assert status in (11, 54, 91) or data.startswith(b"F" + sender + b"\0")


@pytest.mark.parametrize("address", [b"a\0b", b"x" * 1003])
def test_an_impossible_address_is_our_own_fault(address: bytes) -> None:
    with pytest.raises(LocalProtocolError):
        build(address, [])
    with pytest.raises(LocalProtocolError):
        build(b"", [address])


def test_100_000_recipients_take_well_under_a_tenth_of_a_second() -> None:
    data = build(b"s@example.org", [b"recipient%d@example.com" % i for i in range(100_000)])
    started = time.thread_time()
    assert len(parse(data).recipients) == 100_000
    assert units_since(started) < 5


def test_a_hostile_envelope_costs_no_more() -> None:
    started = time.thread_time()
    for data in (
        b"F" + b"x" * 5_000_000,
        b"Fs\0" + b"T\0" * 1_000_000,
        b"Fs\0" + b"Q\0" * 500_000 + b"\0",
        b"X" * 5_000_000,
    ):
        try:
            parse(data)
        except EnvelopeError:
            pass
    assert units_since(started) < 100
