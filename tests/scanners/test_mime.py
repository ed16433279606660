"""The walk: where parts begin and end, how they are numbered, and what their headers say."""

import base64
import functools
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.programs import b64, qp, uu
from lab.wrappings import BASE64 as BASE64_LETTERS
from lab.wrappings import HQX, binhex, xx, yenc

from contentfilter.scanners.signatures import decoders, mime
from contentfilter.scanners.signatures.lines import PIECE
from contentfilter.scanners.signatures.markers import Marker, Markers
from contentfilter.scanners.signatures.mime import Kind, Leaf
from contentfilter.scanners.signatures.work import Work

MARKERS = Markers((b"TV",))
FREE = Work(1 << 40)


def walk(text: bytes) -> list[Leaf]:
    return list(mime.leaves(text, MARKERS, Work(len(text))))


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


def test_line_ends_make_no_difference() -> None:
    other = contents(TREE.replace(b"\n", b"\r\n"))
    assert [(p, k, b.replace(b"\r\n", b"\n")) for p, k, b in other] == contents(TREE)


def test_with_bare_cr_the_parts_are_seen_and_the_text_across_them_as_well() -> None:
    other = contents(TREE.replace(b"\n", b"\r"))
    starts = {(p, k, b.partition(b"\r")[0]) for p, k, b in other}
    assert starts > {(p, k, b.partition(b"\n")[0]) for p, k, b in contents(TREE)}


def test_an_undeclared_delimiter_is_part_of_the_content() -> None:
    text = b"Content-Type: multipart/mixed; boundary=b\n\n--b\n\none\n--other\n\ntwo\n--b--\n"
    assert b"one\n--other\n\ntwo\n" in [text[leaf.start : leaf.end] for leaf in walk(text)]


def test_content_behind_an_undeclared_delimiter_is_a_leaf_if_its_header_names_an_encoding() -> None:
    text = b"From: a\n\n--other\nContent-Transfer-Encoding: base64\n\nYWJj\n--other\nX: y\n"
    assert (b"YWJj\n--other\nX: y\n", Kind.BASE64) in [(text[leaf.start : leaf.end], leaf.kind) for leaf in walk(text)]


BOGUS = [
    b'Content-Type: text/plain; boundary="in"\n\ntext\n',
    b'Content-Type: multipart/mixed; boundary="x"; boundary="in"\n\ntext\n',
    b'Content-Type: text/plain\nContent-Type: multipart/mixed; boundary="in"\n\ntext\n',
    b'Content-Type: multipart/mixed; boundary="in"\nContent-Transfer-Encoding: base64\n\ntext\n',
    b'Content-Type: multipart/mixed; boundary="in"\nX: bare\rCR\n\ntext\n',
    b'Content-Type: multipart/mixed; (c) boundary="in"\n\ntext\n',
    b'Content-Type: multipart/alternative; boundary="in"\n\n--in\n\ntext\n--in--\n',  # valid, but it has ended
    b'Content-Type: multipart/alternative; boundary="in"\n\n--in\n\ntext\n',  # ended by the boundary around it
]


@pytest.mark.parametrize("first", BOGUS)
def test_a_boundary_about_which_readers_disagree_does_not_end_a_part(first: bytes) -> None:
    second = b"Content-Transfer-Encoding: base64\n\nAAAA\n--in\nBBBB\n"
    text = b'Content-Type: multipart/mixed; boundary="out"\n\n--out\n' + first + b"--out\n" + second + b"--out--\n"
    assert b"AAAA\n--in\nBBBB\n" in [text[leaf.start : leaf.end] for leaf in walk(text) if leaf.kind == Kind.BASE64]


def test_a_boundary_about_which_all_agree_ends_every_part_inside() -> None:
    bodies = [body for _, _, body in contents(TREE)]
    assert b"html\n" in bodies
    assert all(b"--outer" not in body for body in bodies)


@pytest.mark.parametrize(
    "header",
    [
        b"Content-Transfer-Encoding:\n \n base64\n",
        b"Content-Transfer-Encoding: (" + b"c" * 5000 + b") base64\n",
        b" \nContent-Transfer-Encoding: base64\n",
        b" first\nContent-Transfer-Encoding: base64\n",
        b"Content-Transfer-Encoding: base64\nX: y\rz\n",
        b"Content-Transfer-Encoding: base64\n--x\nX: y\n",
        b"garbage\nContent-Transfer-Encoding: base64\nmore garbage\n",
    ],
)
def test_content_may_start_where_a_doubtful_header_could_end(header: bytes) -> None:
    text = b"Content-Type: multipart/mixed; boundary=b\n\n--b\n" + header + b"\nAAAA\n--b--\n"
    assert (Kind.BASE64, b"AAAA\n") in [(leaf.kind, text[leaf.start : leaf.end]) for leaf in walk(text)]


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


def test_marks_are_found_across_pieces() -> None:
    for place in range(PIECE - 40, PIECE + 4):
        text = b"x" * place + b"\n--b\nbegin 644 x\n=ybegin line=1\nTransfer-ENCODING" + b"y" * 100
        assert list(MARKERS.find(text, Work(len(text)), lambda: False)) == [
            (Marker.DELIMITER, place + 1),
            (Marker.BEGIN, place + 5),
            (Marker.YENC, place + 17),
            (Marker.ENCODING, place + 39),
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
    assert decoded(decoders.base64(text, 0, len(text), FREE)) == data
    assert decoded(decoders.base64(text, 0, len(text), FREE, "joined")) == data


def test_large_contents_survive_every_encoding() -> None:
    data = random.Random(5).randbytes(300_000)
    for encode, decode in ((b64, decoders.base64), (qp, decoders.quoted), (bytes, decoders.raw)):
        text = b"in front" + encode(data)
        assert decoded(decode(memoryview(text), 8, len(text), FREE)) == data
    text = uu(data)
    assert decoded(decoders.uuencode(text, text.index(b"\n") + 1, len(text), FREE)) == data


def test_quoted_printable_without_line_ends_is_never_cut_inside_an_escape() -> None:
    data = random.Random(6).randbytes(100_000)
    for shift in range(3):
        text = b"x" * shift + b"".join(b"=%02x" % byte for byte in data)
        assert decoded(decoders.quoted(text, 0, len(text), FREE)) == b"x" * shift + data


def test_padding_in_the_middle_is_read_in_both_ways() -> None:
    assert decoded(decoders.base64(b"TQ==WpA=AAA", 0, 11, FREE)) == b"MZ\x90\0\0"
    assert decoded(decoders.base64(b"T=V==qQ", 0, 7, FREE, "joined")) == b"MZ\x90"


def test_padding_may_stand_for_the_letter_of_value_zero() -> None:
    assert decoded(decoders.base64(b"TVq=AA=A", 0, 8, FREE, "zero")) == b"MZ\x80\0\0\0"


@given(st.binary(min_size=1, max_size=5000))
@settings(max_examples=100, deadline=None)
def test_what_other_encoders_write_is_read(data: bytes) -> None:
    for encode, decode in (
        (xx, functools.partial(decoders.uuencode, xx=True)),
        (yenc, decoders.yenc),
        (binhex, decoders.binhex),
    ):
        text = encode(data)
        assert decoded(decode(text, text.index(b"\n") + 1, len(text), FREE)) == data


def test_repeats_of_binhex_are_expanded_across_windows() -> None:
    content = b"a" * 200 + b"\x90" + b"b" * 3
    for pad in range(760, 775):
        plain = b"\x05a.exe" + b"\0" * 11 + struct.pack(">II", pad + len(content), 0) + b"cc" + b"x" * pad
        packed = plain + b"a\x90\xc8" + b"\x90\0" + b"b\x90\x03"
        letters = base64.b64encode(packed + b"\0" * (-len(packed) % 3)).translate(bytes.maketrans(BASE64_LETTERS, HQX))
        text = b":" + letters + b":\n"
        assert decoded(decoders.binhex(text, 0, len(text), FREE)) == b"x" * pad + content


def test_uuencode_is_read_whatever_its_lines_look_like() -> None:
    text = b"\n\n#35J0\r\njunk line\n#35J\n#35J0 and more\n`\nend\n#35J0\n"
    assert decoded(decoders.uuencode(text, 0, len(text), FREE)) == b"MZ\x90" + b"MZ\x80" + b"MZ\x90"


@given(st.binary(max_size=3000))
@settings(max_examples=200, deadline=None)
def test_no_bytes_make_a_decoder_fail(data: bytes) -> None:
    for decode in (decoders.base64, decoders.quoted, decoders.uuencode, decoders.raw, decoders.yenc):
        assert len(decoded(decode(data, 0, len(data), FREE))) <= 63 * (len(data) + 1)
