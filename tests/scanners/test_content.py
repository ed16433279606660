"""Two messages count as the same only if nothing differs but the words that our own server writes anew for each try."""

import asyncio
import hashlib
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lab.slow import tried

from contentfilter.model import Message
from contentfilter.scanners.content import LOOK, THREAD_ABOVE, Content, Digest, digest, volatile_spans

MAIL = b"Subject: hello\n\nletter\n"
FIELDS = {
    "qmail-smtpd": b"Received: from a.example (HELO b) (192.0.2.1)\n  by in with SMTP; 9 Nov 2026 01:02:03 -0000\n",
    "no HELO": b"Received: from a.example (192.0.2.1)\n  by in.example with SMTP; 9 Nov 2026 01:02:03 -0000\n",
    "ident": b"Received: from unknown (HELO b) (joe@192.0.2.1)\n  by in.example with SMTP; 9 Nov 2026 01:02:03 -0000\n",
    "login, TLS": b"Received: from unknown (EHLO b) (joe@example.org@2001:db8::1)\n"
    b"  by in.example with ESMTPSA (TLS_AES_256_GCM_SHA384 encrypted); 9 Nov 2026 01:02:03 -0000\n",
    "weekday": b"Received: from a (HELO b) ([192.0.2.1])\n  by in with SMTP; Mon, 9 Nov 2026 01:02:03 +0100 (CET)\n",
    "SPF": b"Received-SPF: pass (in.example: local policy)\n client-ip=192.0.2.1;\n"
    b"Received: from a (HELO b) (192.0.2.1)\n  by in.example with SMTP; 9 Nov 2026 01:02:03 -0000\n",
    "CR": b"Received: from a (HELO b) (192.0.2.1)\r\n  by in.example with SMTP; 9 Nov 2026 01:02:03 -0000\r\n",
}

TEXT = st.binary(max_size=40)
PIECES = st.sampled_from(
    [
        b"Received: from ", b"Received-SPF: ", b"mail.example", b" (HELO mx)", b" (192.0.2.7)", b"\n", b"\n  by x; ",
        b"9 Nov 2026 01:02:03 -0000", b"10 Nov 2026 01:02:04 -0000", b" ", b"; ", b"x" * 300, b"\0", b"{'date': 3}",
        b"Subject: x\n\n",
    ]
)  # fmt: skip
MESSAGES = st.lists(st.one_of(PIECES, TEXT), max_size=12).map(b"".join)


def of(data: bytes) -> Digest:
    return digest(data, volatile_spans(data))


def holes(data: bytes) -> list[bytes]:
    return [data[start:end] for start, end in volatile_spans(data).spans()]


@pytest.mark.parametrize("field", FIELDS.values(), ids=list(FIELDS))
def test_the_same_mail_from_another_try_is_the_same(field: bytes) -> None:
    later = field.replace(b"9 Nov 2026 01:02:03", b"10 Nov 2026 23:59:59")
    assert later != field
    assert of(field + MAIL) == of(later + MAIL)


@pytest.mark.parametrize("field", FIELDS.values(), ids=list(FIELDS))
def test_from_another_client_it_has_the_same_content_and_another_client(field: bytes) -> None:
    there = field.replace(b"192.0.2.1", b"198.51.100.200").replace(b"2001:db8::1", b"2001:db8::fe")
    here, there = field + MAIL, there.replace(b"client-ip=198.51.100.200", b"client-ip=192.0.2.1") + MAIL
    assert of(here).core == of(there).core
    assert of(here).client != of(there).client


@given(MESSAGES, MESSAGES)
@example(tried(MAIL, 1), tried(MAIL, 2))
def test_messages_with_one_digest_differ_in_dates_and_names_only(one: bytes, other: bytes) -> None:
    """And in nothing else, however both are made."""
    if of(one).core != of(other).core:
        return
    a, b = volatile_spans(one), volatile_spans(other)
    assert [span is None for span in a] == [span is None for span in b]
    assert _without(one) == _without(other)
    if of(one) == of(other):
        assert a.client is None or one[slice(*a.client)] == other[slice(*b.client or (0, 0))]


def _without(data: bytes) -> bytes:
    for start, end in reversed(volatile_spans(data).spans()):
        data = data[:start] + b"\xff\0" + data[end:]
    return data


@given(MESSAGES, st.data())
def test_any_byte_that_is_not_in_such_a_word_counts(message: bytes, draw: st.DataObject) -> None:
    if not message:
        return
    at = draw.draw(st.integers(0, len(message) - 1))
    if any(start <= at < end for start, end in volatile_spans(message).spans()):
        return
    changed = message[:at] + bytes([message[at] ^ draw.draw(st.integers(1, 255))]) + message[at + 1 :]
    assert of(changed).core != of(message).core


@given(MESSAGES)
def test_what_is_left_out_is_a_date_or_names_and_short(message: bytes) -> None:
    words = volatile_spans(message)
    if words.date:
        assert re.fullmatch(rb"[A-Za-z0-9:,+() -]{1,60}", message[slice(*words.date)])
    if words.client:
        text = message[slice(*words.client)]
        assert re.fullmatch(rb"[A-Za-z0-9._:@+()\[\] -]{1,1100}", text)
        assert all(len(word) <= 512 for word in text.split())
    assert all(end <= LOOK for _, end in words.spans())


@pytest.mark.parametrize(
    "top",
    [
        b"Received: from $(evil) (HELO b) (192.0.2.1)\n  by in with SMTP; now\n",
        b"Received: from " + b"a" * 256 + b" (HELO b) (192.0.2.1)\n  by in with SMTP; now\n",
        b"Received: from a (HELO b) (192.0.2.1\n  by in with SMTP; now\n",
        b"Subject: first\nReceived: from a (HELO b) (192.0.2.1)\n  by in with SMTP; 9 Nov 2026 01:02:03 -0000\n",
        b"received: from a (HELO b) (192.0.2.1)\n  by in with SMTP; 9 Nov 2026 01:02:03 -0000\n",
        b"Received: from a (HELO b) (192.0.2.1)\n " + b" x\n" * LOOK,
    ],
)
def test_what_has_not_the_form_counts_as_it_is(top: bytes) -> None:
    assert holes(top + MAIL) == []


def test_only_the_first_received_field_has_words_of_its_own() -> None:
    message = tried(tried(MAIL, 1), 2)
    assert len(holes(message)) == 2
    assert of(message).core != of(tried(tried(MAIL, 3), 2)).core


def test_where_a_word_was_taken_out_counts() -> None:
    """A message cannot be made equal to another one by writing down what is left of that."""
    message = tried(MAIL, 1)
    rest = message
    for start, end in reversed(volatile_spans(message).spans()):
        rest = rest[:start] + rest[end:]
    assert of(rest).core != of(message).core


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [10, THREAD_ABOVE + 10])
async def test_a_message_that_is_closed_meanwhile_still_has_its_digest_and_one_closed_before_has_none(
    size: int,
) -> None:
    data = b"x" * size
    message = Message(-1, size, data)
    content = Content(message)
    hashing = content.hashing()
    message.close()
    assert await hashing == of(data)
    assert await content.digest() == of(data)
    assert await Content(message).digest() is None


def test_the_digest_is_of_all_bytes_of_a_plain_message() -> None:
    assert of(MAIL).core == hashlib.sha256(b"%d {}\n" % len(MAIL) + MAIL).digest()
    assert asyncio  # the marks above need it
