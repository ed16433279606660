"""Prepended lines leave every byte of the original; only a mark or a forged field rewrites the header block."""

import base64
import codecs
import email.parser
import email.policy
import re
import time
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.calibration import units_since

from contentfilter.store.sidecar import described
from contentfilter.verdict import encoded_words
from contentfilter.verdict.headers import (
    HEADER_LIMIT,
    INLINE_LIMIT,
    SUBJECTS_READ,
    changed_block,
    correct,
    exceeds_limit,
    header_block,
    is_long,
    message_id,
    overruled,
    spam_fields,
)

ALL = frozenset((b"contentfilter", b"virus-", b"spam-"))
LINES = [b"X-ContentFilter: id; virus=clean; spam=skipped\n"]


def compose(original: bytes, lines: Iterable[bytes], claimed: frozenset[bytes], tag: bytes = b"") -> tuple[bytes, int]:
    """What goes in front of the original, and how much of that is left out."""
    missing, changes = correct(original, claimed, tag)
    header, skip = changed_block(original, changes) if changes else (b"", 0)
    return b"".join((*lines, missing, header)), skip


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
        (b"Subject:\n folded\n\nb", b"Subject: [SPAM]\n folded\n\nb"),
        (
            b"Subject: =?utf-8?q?h=C3=A9?=\n =?utf-8?q?llo?=\n\n",
            b"Subject: [SPAM] =?utf-8?q?h=C3=A9?=\n =?utf-8?q?llo?=\n\n",
        ),
        (b"To: a\n\nb", b"Subject: [SPAM]\nTo: a\n\nb"),
        (b"\nb", b"Subject: [SPAM]\n\nb"),
        (b"Subject: [SPAM] hi\n\nb", b"Subject: [SPAM] hi\n\nb"),
        (b"To: a\n\nSubject: in the body\n", b"Subject: [SPAM]\nTo: a\n\nSubject: in the body\n"),
    ],
)
def test_subject_tag(message, expected):
    assert delivered(message, compose(message, [], ALL, b"[SPAM] ")) == expected


def subjects(message):
    """Each Subject as a mail program shows it, white space counted as one blank."""
    parsed = email.parser.BytesParser(policy=email.policy.default).parsebytes(message)
    return [" ".join(str(value).split()) for value in parsed.get_all("Subject", [])]


TAGS = ["[SPAM] ", "***SPAM***", "[СПАМ] ", "Überprüfen: ", "\U0001f4a9", "垃圾邮件" * 12, "a\tb"]
SUBJECTS = [
    b"hi", b"", b"=?utf-8?q?h=C3=A9llo?=", b"=?utf-8?q?h=C3=A9?=\n =?iso-8859-1?q?=E4_b?= plain",
    b"plain =?utf-8?b?w6k=?=", b"\n folded at once", b"\n =?utf-8?b?w6k=?=", b"a\n b\n\tc", b"x" * 70 + b" y",
    b"=?utf-8?q?" + b"x" * 60 + b"?=", b"=?utf-8?q?not closed", b"Re: hi", b"=?x-unknown?q?x?= y",
]  # fmt: skip


@pytest.mark.parametrize("eol", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("tag", TAGS, ids=range(len(TAGS)))
@pytest.mark.parametrize("subject", SUBJECTS, ids=range(len(SUBJECTS)))
def test_the_subject_that_people_read_is_the_tag_and_the_original(subject, tag, eol):
    message = b"From: a@b.example\nSubject: %s\nTo: c@d.example\n\nbody\n" % subject
    message = message.replace(b"\n", eol)
    result = delivered(message, compose(message, LINES, ALL, tag.encode()))
    assert subjects(result) == [" ".join(f"{tag} {subjects(message)[0]}".split())]
    before, after = (email.message_from_bytes(m) for m in (message, result))
    assert (before["From"], before["To"], before.get_payload()) == (after["From"], after["To"], after.get_payload())
    assert result.isascii()
    field = re.search(rb"^Subject:[^\n]*(\n[ \t][^\n]*)*", result, re.MULTILINE).group(0)
    assert all(line.strip() for line in field.split(b"\n"))
    if all(len(line) <= 70 for line in message.split(b"\n")):
        assert all(len(line.rstrip(b"\r")) <= 76 for line in field.split(b"\n"))
    assert compose(result, [], frozenset(), tag.encode()) == (b"", 0), "tagged twice"


@pytest.mark.parametrize("prefix", ["Re: ", "RE: AW: ", "Fwd:", "Re[2]: ", "[list] Re: "])
@pytest.mark.parametrize("tag", ["[SPAM] ", "[СПАМ] "])
@pytest.mark.parametrize("charset", ["utf-8", "koi8-r"])
def test_an_answer_to_tagged_mail_is_not_tagged_again(tag, prefix, charset):
    """However the other side encodes it."""
    value = email.header.Header(f"{prefix}{tag}hello", charset if not tag.isascii() else None).encode().encode()
    message = b"Subject: " + value + b"\n\n"
    assert compose(message, [], ALL, tag.encode()) == (b"", 0)


def test_a_tag_somewhere_behind_does_not_stand_for_ours():
    message = b"Subject: buy this, not [SPAM] at all\n\n"
    assert delivered(message, compose(message, [], ALL, b"[SPAM] ")).startswith(b"Subject: [SPAM] buy")


def test_each_of_several_subjects_is_tagged():
    """Readers differ in which one they show."""
    message = b"Subject: one\nsubject : two\nSubject: [SPAM] three\n\n"
    result = delivered(message, compose(message, [], ALL, b"[SPAM] "))
    assert result == b"Subject: [SPAM] one\nsubject : [SPAM] two\nSubject: [SPAM] three\n\n"


def test_a_tag_of_blanks_is_none():
    assert compose(b"Subject: x\n\n", [], ALL, b"  ") == (b"", 0)


@pytest.mark.parametrize("name", ["ContentFilter", "ContentFilter-Released", "Virus-Status", "Spam-Flag", "spam-"])
@pytest.mark.parametrize("behind", [b"", b" ", b"\t ", b"\n ", b"\r\n\t", b" \n \n "])
@pytest.mark.parametrize("case", [str.upper, str.lower, str.title, str.swapcase])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_a_forged_field_is_renamed_however_it_is_written(name, behind, case, line_end):
    """Also behind a bare CR, which some readers take for the end of a line."""
    field = b"X-" + case(name).encode() + behind + b":"
    message = b"A: b" + line_end + field + b" YES\nB: c\n\n" + field + b" in the body\n"
    result = delivered(message, compose(message, LINES, ALL))
    assert result == LINES[0] + message.replace(field, b"X-Received-" + field, 1)


def test_a_forged_field_in_front_is_renamed_even_where_nothing_follows():
    assert compose(b"X-Spam-Flag: NO", [], ALL) == (b"X-Received-X-Spam-Flag: NO", len(b"X-Spam-Flag: NO"))


HOSTILE = {
    "one long line": b"x" * HEADER_LIMIT,
    "a long name": b"X-Spam-" + b"x" * HEADER_LIMIT,
    "blanks behind names": b"X-Spam-a" + b" " * HEADER_LIMIT,
    "empty folded lines": b"X-Spam-a" + b"\n " * (HEADER_LIMIT // 2),
    "a folded subject": b"Subject: a" + b"\n " * (HEADER_LIMIT // 2),
    "subjects": b"Subject:\n" * (HEADER_LIMIT // 9),
    "encoded subjects": b"Subject:=?x?q??=\n" * (HEADER_LIMIT // 17),
    "half words": b"Subject:" + b"=?x?q?" * (HEADER_LIMIT // 6),
    "forged fields": b"X-Spam-a:\n" * (HEADER_LIMIT // 10),
    "CR": b"\r" * HEADER_LIMIT,
    "CR and names": b"\rX-Spam-a" * (HEADER_LIMIT // 9),
    "names without end": b"X-Spam-\n" * (HEADER_LIMIT // 8),
    "folded names": b"X-Spam-\n \n" * (HEADER_LIMIT // 10),
    "names above blanks": (b"X-Spam-\n" + b" \n" * 1000) * (HEADER_LIMIT // 2008),
    "short subjects": b"Subject:\n" * (HEADER_LIMIT // 9),
    "begun tags": b"Subject: [S\n" * (HEADER_LIMIT // 12),
    "answers": b"Subject: " + b"Re: " * (HEADER_LIMIT // 4),
    "names of charsets": b"Subject: " + b"".join(b"=?x-%06d?q?x?= " % n for n in range(HEADER_LIMIT // 17)),
    "folds": b"Message-ID:" + b"\t\n" * (HEADER_LIMIT // 2 - 6),
    "names of IDs": b"Message-ID\t\n" * (HEADER_LIMIT // 12),
    "NUL": b"\0" * HEADER_LIMIT,
    "NUL and names": b"\rX\0-" * (HEADER_LIMIT // 4),
    "status": b"X-Spam-Status: Yes" + b" required=1" * (HEADER_LIMIT // 11),
}


def spamassassin(header: bytes) -> list[bytes]:
    return overruled(spam_fields(header), True)


def corrected(header: bytes) -> tuple[bytes, int]:
    return compose(header, LINES, ALL, "[СПАМ]".encode())


READERS = (corrected, spamassassin, described, exceeds_limit, is_long, lambda header: message_id(header_block(header)))


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_a_header_of_a_mebibyte_takes_no_longer_than_it_must(header):
    """All that reads it: at most 20 work units each, about a second; the worst takes a third of that."""
    message = header + b"\n\nbody"
    for read in READERS:
        started = time.thread_time()
        read(message)
        assert units_since(started) < 20, read
    prepend, skip = corrected(message)
    assert (prepend + message[skip:]).endswith(b"\n\nbody")


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_what_is_done_in_the_event_loop_takes_milliseconds(header):
    """The longest header that does not go to a thread, in each of the eight forms that it may have."""
    message = header[: INLINE_LIMIT - 10] + b"\n\nbody"
    assert not is_long(message)
    started = time.thread_time()
    for _ in range(8):
        corrected(message)
    assert units_since(started) < 2


def test_no_charset_of_a_message_is_looked_up_in_the_codec_registry():
    """It imports modules by name, and remembers each name for the life of the process."""
    names = []

    def search(name: str) -> None:
        names.append(name)

    codecs.register(search)
    try:
        for subject in range(200):
            words = b" ".join(b"=?x-%d-%d*en?%s?w6k=?=" % (subject, word, b"bq"[word % 2 :][:1]) for word in range(30))
            corrected(b"Subject: " + words + b"\n\n")
            encoded_words.decode(words)
    finally:
        codecs.unregister(search)
    assert names == []


@pytest.mark.parametrize(("name", "codec"), encoded_words._CODECS.items())
def test_every_charset_of_the_table_exists_and_decodes(name, codec):
    word = b"=?%s*en?B?%s?=" % (name.upper(), base64.b64encode("abc".encode(codec)))
    assert encoded_words.decode(word) == "abc"


@pytest.mark.parametrize("name", [b"x-unknown", b"rot13", b"zlib", b"idna", b"unicode_escape", b"utf-7", b"mbcs"])
def test_a_word_in_another_charset_stays(name):
    assert encoded_words.decode(b"=?" + name + b"?q?a?=") == f"=?{name.decode()}?q?a?="


def test_subjects_beyond_the_first_ones_are_tagged_unread(monkeypatch):
    read = []
    decode = encoded_words.decode
    monkeypatch.setattr(encoded_words, "decode", lambda value: read.append(value) or decode(value))
    message = b"Subject: [SPAM] =?utf-8?q?x?=\n" * 1000 + b"\n"
    result = delivered(message, compose(message, [], ALL, b"[SPAM]"))
    assert len(read) == SUBJECTS_READ
    assert result.count(b"[SPAM] [SPAM]") == 1000 - SUBJECTS_READ


@pytest.mark.parametrize("eol", [b"\n", b"\r\n"])
def test_a_header_beyond_the_limit_is_noticed(eol):
    line = b"A: " + b"x" * 59
    for end, beyond in ((b"\n\n", False), (b"\n", True)):
        header = (line + eol) * (HEADER_LIMIT // len(line + eol) - 1)
        message = header + b"B: " + b"x" * (HEADER_LIMIT - len(header) - 3 - len(end)) + end
        assert len(message) == HEADER_LIMIT
        assert exceeds_limit(message + b"X-ContentFilter: forged\n\n") == beyond
    assert not exceeds_limit(b"\n" + header * 2)
    assert not exceeds_limit(b"\r\n" + header * 2)
    assert not exceeds_limit(header)
    assert not exceeds_limit(b"a" * HEADER_LIMIT)


def test_a_header_beyond_the_limit_keeps_its_folded_lines_together():
    """A Subject that is missing goes in front: where we stop looking another field may go on."""
    message = b"A: b\n" + b" c\n" * HEADER_LIMIT + b"\n"
    assert delivered(message, compose(message, LINES, ALL, b"[SPAM]")) == LINES[0] + b"Subject: [SPAM]\n" + message


def test_only_spamassassins_fields_are_taken_from_its_answer():
    block = (
        b"Received: from x\r\nX-Spam-Checker-Version: SpamAssassin\r\n"
        b"X-Spam-Status: Yes, score=9\r\n\ttests=A,\r\n\tB\r\n"
        b"Subject: evil\r\nX-Spam-Level: ***\r\n"
    )
    assert b"".join(spam_fields(block)) == (
        b"X-Spam-Checker-Version: SpamAssassin\nX-Spam-Status: Yes, score=9\n\ttests=A,\n\tB\nX-Spam-Level: ***\n"
    )


def test_a_last_field_without_newline_gets_one():
    assert spam_fields(b"X-Spam-Flag: YES") == [b"X-Spam-Flag: YES\n"]
