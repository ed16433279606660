"""Prepended lines leave every byte of the original; only a mark or a forged field rewrites the header block."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contentfilter.verdict.headers import HEADER_LIMIT, compose, header_block, spam_lines

ALL = frozenset((b"contentfilter", b"virus-", b"spam-"))
LINES = [b"X-ContentFilter: id; virus=clean; spam=skipped\n"]


def delivered(original, prepend_skip):
    prepend, skip = prepend_skip
    return prepend + original[skip:]


@pytest.mark.parametrize(
    ("message", "block"),
    [
        (b"", b""),
        (b"\nbody", b""),
        (b"\r\nbody", b""),
        (b"A: 1\n\nbody\n\nmore", b"A: 1\n"),
        (b"A: 1\r\nB: 2\r\n\r\nbody", b"A: 1\r\nB: 2\r\n"),
        (b"A: 1\n\r\nbody", b"A: 1\n"),
        (b"A: 1\nB: 2\n", b"A: 1\nB: 2\n"),
        (b"A: 1\nno newline at the end", b"A: 1\nno newline at the end"),
        (b"just text without header", b"just text without header"),
    ],
)
def test_where_the_header_ends(message, block):
    assert header_block(message) == block


def test_an_endless_header_is_looked_at_only_to_the_limit():
    message = b"A: " + b"x" * 100 + b"\n"
    message *= HEADER_LIMIT // len(message) + 10
    block = header_block(message)
    assert len(block) <= HEADER_LIMIT
    assert block.endswith(b"\n")
    assert message.startswith(block)


@given(st.binary(max_size=300))
def test_without_forged_fields_every_byte_stays(message):
    prepend, skip = compose(message, LINES, frozenset())
    assert (prepend, skip) == (LINES[0], 0)


@given(st.binary(max_size=300), st.sampled_from([b"\n", b"\r\n"]))
def test_the_body_is_never_touched(body, eol):
    message = b"Subject: hi" + eol + b"x-spam-status: No" + eol + eol + body
    result = delivered(message, compose(message, LINES, ALL, b"[SPAM]"))
    assert result.endswith(eol + eol + body)
    assert result.startswith(LINES[0])


def test_forged_copies_of_our_fields_are_renamed_and_only_those():
    message = (
        b"X-ContentFilter: me\nX-Virus-Status: Clean\nX-SPAM-Flag : NO\n folded\nX-Virusfree: y\nTo: a\n"
        b"\nX-Spam-Flag: body\n"
    )
    result = delivered(message, compose(message, LINES, ALL))
    assert result == LINES[0] + (
        b"X-Received-X-ContentFilter: me\nX-Received-X-Virus-Status: Clean\nX-Received-X-SPAM-Flag : NO\n folded\n"
        b"X-Virusfree: y\nTo: a\n\nX-Spam-Flag: body\n"
    )


def test_fields_that_do_not_speak_for_us_stay():
    message = b"X-Spam-Flag: NO\nX-Virus-Status: Clean\n\n"
    assert compose(message, LINES, frozenset((b"contentfilter",)))[1] == 0
    assert b"X-Received-X-Virus" in compose(message, LINES, frozenset((b"virus-",)))[0]
    assert b"X-Received-X-Spam" not in compose(message, LINES, frozenset((b"virus-",)))[0]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"Subject: hi\n\nb", b"Subject: [SPAM] hi\n\nb"),
        (b"subject:hi\n\nb", b"subject: [SPAM] hi\n\nb"),
        (b"Subject:\n folded\n\nb", b"Subject: [SPAM] \n folded\n\nb"),
        (
            b"Subject: =?utf-8?q?h=C3=A9?=\n =?utf-8?q?llo?=\n\n",
            b"Subject: [SPAM] =?utf-8?q?h=C3=A9?=\n =?utf-8?q?llo?=\n\n",
        ),
        (b"To: a\n\nb", b"To: a\nSubject: [SPAM]\n\nb"),
        (b"\nb", b"Subject: [SPAM]\n\nb"),
        (b"Subject: [SPAM] hi\n\nb", b"Subject: [SPAM] hi\n\nb"),
        (b"To: a\n\nSubject: in the body\n", b"To: a\nSubject: [SPAM]\n\nSubject: in the body\n"),
    ],
)
def test_subject_tag(message, expected):
    assert delivered(message, compose(message, [], ALL, b"[SPAM] ")) == expected


def test_only_spamassassins_fields_are_taken_from_its_answer():
    block = (
        b"Received: from x\r\nX-Spam-Checker-Version: SpamAssassin\r\n"
        b"X-Spam-Status: Yes, score=9\r\n\ttests=A,\r\n\tB\r\n"
        b"Subject: evil\r\nX-Spam-Level: ***\r\n"
    )
    assert spam_lines(block) == (
        b"X-Spam-Checker-Version: SpamAssassin\nX-Spam-Status: Yes, score=9\n\ttests=A,\n\tB\nX-Spam-Level: ***\n"
    )


def test_a_last_field_without_newline_gets_one():
    assert spam_lines(b"X-Spam-Flag: YES") == b"X-Spam-Flag: YES\n"
