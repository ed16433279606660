"""The walk: where parts begin and end, how they are numbered, and what their headers say."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.programs import b64, qp, uu

from contentfilter.scanners.signatures import decoders, mime
from contentfilter.scanners.signatures.mime import Kind, Leaf, LineStarts

LINE_STARTS = LineStarts((b"TV",))


def walk(text: bytes) -> list[Leaf]:
    return list(mime.leaves(text, LINE_STARTS, mime.ScanLimits()))


def contents(text: bytes) -> list[tuple[str, Kind, bytes]]:
    return [
        (".".join(map(str, leaf.path)), Kind(leaf.kind), text[leaf.start : leaf.end])
        for leaf in walk(text)
        if leaf.declared
    ]


TREE = b"""From: a
Content-Type: multipart/mixed; boundary=outer

preamble
--outer
Content-Type: multipart/alternative;
\tboundary="in ner"

--in ner

plain
--in ner
Content-Transfer-Encoding: Quoted-Printable

html
--in ner--
--outer
Content-Type: message/rfc822

Subject: s
Content-Type: multipart/mixed; boundary=deep

--deep
Content-Transfer-Encoding: BASE64

YWJj
--deep--
--outer--
epilogue
"""


def test_parts_are_numbered_as_in_imap() -> None:
    found = {path: (kind, body) for path, kind, body in contents(TREE) if body.strip()}
    assert found["1.1"] == (Kind.PLAIN, b"plain\n")
    assert found["1.2"] == (Kind.QUOTED, b"html\n")
    assert found["2.1"] == (Kind.BASE64, b"YWJj\n")
    assert found[""] == (Kind.COMPOSITE, b"preamble\n")


@pytest.mark.parametrize("newline", [b"\r\n", b"\r"])
def test_line_ends_make_no_difference(newline: bytes) -> None:
    other = contents(TREE.replace(b"\n", newline))
    assert [(p, k, b.replace(newline, b"\n")) for p, k, b in other] == contents(TREE)


def test_an_undeclared_delimiter_gives_both_readings() -> None:
    text = b"Content-Type: multipart/mixed; boundary=b\n\n--b\n\none\n--other\n\ntwo\n--b--\n"
    bodies = [text[leaf.start : leaf.end] for leaf in walk(text)]
    assert b"one\n" in bodies
    assert b"two\n" in bodies
    assert b"one\n--other\n\ntwo\n" in bodies


def test_a_header_without_an_empty_line_gives_both_readings() -> None:
    text = b"Content-Transfer-Encoding: base64\nAAAA\n\nBBBB\n"
    assert [(text[leaf.start : leaf.end], leaf.kind) for leaf in walk(text)] == [
        (b"AAAA\n\nBBBB\n", Kind.BASE64),
        (b"BBBB\n", Kind.BASE64),
    ]


@pytest.mark.parametrize(
    ("field", "boundary"),
    [
        (b"boundary=b", b"b"),
        (b'boundary="b c"', b"b c"),
        (b'boundary = "b\\"c"', b'b"c'),
        (b'BOUNDARY="b  "', b"b"),
        (b'boundary=""', b""),
        (b"boundary*=b", b"b"),
        (b"boundary*0=b", b"b"),
        (b"x=y;\r\n boundary=b; z", b"b"),
        (b"boundary=(", b""),
        (b'boundary="open', b"open"),
        (b"boundary=a; boundary=b", b"b"),
    ],
)
def test_boundaries_are_read_as_someone_would_read_them(field: bytes, boundary: bytes) -> None:
    text = b"Content-Type: multipart/mixed; " + field + b"\n\n--" + boundary + b"  \n\none\n--" + boundary + b"--\n"
    assert ("1", Kind.PLAIN, b"one\n") in contents(text)


@pytest.mark.parametrize(
    "field",
    [
        b"CONTENT-TRANSFER-ENCODING:BASE64",
        b'Content-Transfer-Encoding :\r\n\t(x)"base64"',
        b"Content-\0Transfer-Encoding: base64",
    ],
)
def test_an_encoding_is_seen_however_it_is_declared(field: bytes) -> None:
    text = b"X: y\n" + field + b"\nZ: z\n\nYWJj\n"
    assert (Kind.BASE64, b"YWJj\n") in [(kind, body) for _, kind, body in contents(text)]


def test_headers_in_headers_end_at_a_depth() -> None:
    text = b"".join(b"X: %d\n\n" % i for i in range(200)) + b"body"
    assert len(walk(text)) == mime.NESTED
    assert walk(text)[-1].end == len(text)


def test_after_too_many_parts_the_rest_is_one_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mime, "PARTS", 3)
    text = (
        b"Content-Type: multipart/mixed; boundary=b\n\n" + b"".join(b"--b\n\n%d\n" % i for i in range(6)) + b"--b--\n"
    )
    assert text[walk(text)[-1].start :] == b"2\n--b\n\n3\n--b\n\n4\n--b\n\n5\n--b--\n"


def test_after_too_many_undeclared_delimiters_only_declared_ones_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mime, "UNDECLARED", 2)
    text = b"Content-Type: multipart/mixed; boundary=b\n\n" + b"--x\n\ny\n" * 5 + b"--b\n\nlast\n--b--\n"
    assert contents(text)[-1] == ("1", Kind.PLAIN, b"last\n")
    assert sum(not leaf.declared for leaf in walk(text)) == 2


def test_marks_are_found_across_pieces() -> None:
    for place in range(mime.PIECE - 12, mime.PIECE + 4):
        text = b"x" * place + b"\n--b\nbegin 644 x\n" + b"y" * 100
        assert list(LINE_STARTS.find(text, lambda: False)) == [
            (LineStarts.DELIMITER, place + 1),
            (LineStarts.BEGIN, place + 5),
        ]


def test_a_part_after_a_large_base64_part_is_seen() -> None:
    text = (
        b"Content-Type: multipart/mixed; boundary=b\n\n--b\nContent-Transfer-Encoding: base64\n\n"
        + b64(bytes(100_000))
        + b"--b\n\nhello\nbegin 644 x\n#35J0\nend\n--b--\n"
    )
    assert Kind.UUENCODE in {Kind(leaf.kind) for leaf in walk(text)}


# ---- decoding


def decoded(windows: object) -> bytes:
    return b"".join(windows)  # type: ignore[call-overload, no-any-return]


@given(st.binary(max_size=200_000), st.integers(1, 5000))
@settings(max_examples=40, deadline=None)
def test_base64_of_any_line_length_is_decoded(data: bytes, columns: int) -> None:
    text = b64(data, columns)
    assert decoded(decoders.base64(text, 0, len(text))) == data
    assert decoded(decoders.base64(text, 0, len(text), joined=True)) == data


def test_large_contents_survive_every_encoding() -> None:
    data = random.Random(5).randbytes(300_000)
    for encode, decode in ((b64, decoders.base64), (qp, decoders.quoted), (bytes, decoders.raw)):
        text = b"in front" + encode(data)
        assert decoded(decode(memoryview(text), 8, len(text))) == data
    text = uu(data)
    assert decoded(decoders.uuencode(text, text.index(b"\n") + 1, len(text))) == data


def test_quoted_printable_without_line_ends_is_never_cut_inside_an_escape() -> None:
    data = random.Random(6).randbytes(100_000)
    for shift in range(3):
        text = b"x" * shift + b"".join(b"=%02x" % byte for byte in data)
        assert decoded(decoders.quoted(text, 0, len(text))) == b"x" * shift + data


def test_padding_in_the_middle_is_read_in_both_ways() -> None:
    assert decoded(decoders.base64(b"TQ==WpA=AAA", 0, 11)) == b"MZ\x90\0\0"
    assert decoded(decoders.base64(b"T=V==qQ", 0, 7, joined=True)) == b"MZ\x90"


def test_uuencode_is_read_whatever_its_lines_look_like() -> None:
    text = b"\n\n#35J0\r\njunk line\n#35J\n#35J0 and more\n`\nend\n#35J0\n"
    assert decoded(decoders.uuencode(text, 0, len(text))) == b"MZ\x90" + b"MZ\x80" + b"MZ\x90"


@given(st.binary(max_size=3000))
@settings(max_examples=200, deadline=None)
def test_no_bytes_make_a_decoder_fail(data: bytes) -> None:
    for decode in (decoders.base64, decoders.quoted, decoders.uuencode, decoders.raw):
        assert len(decoded(decode(data, 0, len(data)))) <= 63 * (len(data) + 1)
