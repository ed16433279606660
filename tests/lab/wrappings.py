"""Mail that carries a program in ways about which readers disagree: encodings, header tricks, structure tricks.

``wrappings(seed, count)`` combines them at random, the same for the same seed. A wrapping says of which tricks it is
made, so that a miss can be counted by group.
"""

import base64
import binascii
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lab.programs import b64, qp, uu, wrap

XX = b"+-0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
HQX = b"!\"#$%&'()*+,-012345689@ABCDEFGHIJKLMNPQRSTUVXYZ[`abcdefhijklmpqr"
BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


@dataclass(frozen=True, slots=True)
class Wrapping:
    """A message, and the tricks in it: carrier, field, header, body, structure."""

    tricks: tuple[str, ...]
    message: bytes


def xx(program: bytes) -> bytes:
    """Xxencode."""
    lines = []
    for at in range(0, len(program), 45):
        piece = program[at : at + 45]
        letters = base64.b64encode(piece + b"\0" * (-len(piece) % 3)).translate(bytes.maketrans(BASE64, XX))
        lines.append(XX[len(piece) : len(piece) + 1] + letters + b"\n")
    return b"begin 644 a.exe\n" + b"".join(lines) + b"+\nend\n"


def yenc(program: bytes) -> bytes:
    """One yEnc block of 128 columns, all critical characters escaped."""
    lines, line = [], bytearray()
    for byte in program:
        value = (byte + 42) & 255
        line += bytes((value,)) if value not in b"\0\n\r=.\t " else bytes((61, (value + 64) & 255))
        if len(line) >= 128:
            lines.append(bytes(line))
            line.clear()
    body = b"\n".join((*lines, bytes(line)))
    size = b"size=%d" % len(program)
    return b"=ybegin line=128 " + size + b" name=a.exe\n" + body + b"\n=yend " + size + b"\n"


def binhex(program: bytes) -> bytes:
    """BinHex 4.0: header, data fork, resource fork, each with its checksum; runs are left alone."""

    def checked(data: bytes) -> bytes:
        return data + struct.pack(">H", binascii.crc_hqx(data + b"\0\0", 0))

    header = b"\x05a.exe\0" + b"????????" + b"\0\0" + struct.pack(">II", len(program), 0)
    data = (checked(header) + checked(program) + checked(b"")).replace(b"\x90", b"\x90\0")
    letters = base64.b64encode(data + b"\0" * (-len(data) % 3)).translate(bytes.maketrans(BASE64, HQX))
    return b"(This file must be converted with BinHex 4.0)\n\n" + wrap(b":" + letters + b":", 64)


def der(tag: int, content: bytes) -> bytes:
    """A value of DER."""
    size = len(content)
    length = bytes((size,)) if size < 128 else b"\x83" + size.to_bytes(3, "big")
    return bytes((tag,)) + length + content


def signed(message: bytes, chunk: int = 0) -> bytes:
    """CMS signed-data around a message; ``chunk``: in indefinite lengths and pieces, as openssl streams it."""
    data, envelope = (bytes.fromhex(f"06092a864886f70d01070{kind}") for kind in "12")
    algorithms = der(0x31, der(0x30, bytes.fromhex("0609608648016503040201")))
    if not chunk:
        content = der(0x30, data + der(0xA0, der(4, message)))
        return der(0x30, envelope + der(0xA0, der(0x30, b"\x02\x01\x01" + algorithms + content + der(0x31, b""))))
    pieces = b"".join(der(4, message[at : at + chunk]) for at in range(0, len(message), chunk))
    content = b"\x30\x80" + data + b"\xa0\x80\x24\x80" + pieces + b"\0\0" * 3
    return (
        b"\x30\x80" + envelope + b"\xa0\x80\x30\x80\x02\x01\x01" + algorithms + content + der(0x31, b"") + b"\0\0" * 3
    )


def junk_lines(text: bytes, junk: bytes) -> bytes:
    """One piece of junk in the middle of each line."""
    return b"".join(line[:20] + junk + line[20:] + b"\n" for line in text.split(b"\n") if line)


Random = random.Random
Carrier = Callable[[bytes, Random], tuple[bytes, bytes]]  # the program to the encoding's name and the body


def base64_body(program: bytes, rng: Random) -> bytes:
    return b64(program, rng.choice((4, 60, 64, 72, 76, 76, 76, 77, 200, 990)))


CARRIERS: dict[str, Carrier] = {
    "base64": lambda p, r: (b"base64", base64_body(p, r)),
    "base64, junk in each line": lambda p, r: (
        b"base64",
        junk_lines(b64(p), r.choice((b"!", b"-", b" ", b"\t", b".", b"\0", b"\xff", b"!!!", b"* ", b"\r"))),
    ),
    "base64, lines of junk": lambda p, r: (
        b"base64",
        b64(p).replace(
            b"\n", b"\n" + r.choice((b"--\n", b"--!!\n", b"\n", b"---\n\n", b"- -\n", b"!\n")), r.randrange(9)
        ),
    ),
    "base64, padding inside": lambda p, r: (
        b"base64",
        b"".join(b64(p[at : at + n]) for n in (r.choice((1, 10, 100, 256, 500)),) for at in range(0, len(p), n)),
    ),
    "base64, = as zero": lambda p, r: (b"base64", zeros(b64(p), r)),
    "quoted-printable": lambda p, r: (b"quoted-printable", r.choice((qp, binascii.b2a_qp))(p)),
    "quoted-printable, lower case": lambda p, r: (b"quoted-printable", qp(p).lower()),
    "8bit": lambda p, r: (r.choice((b"8bit", b"binary", b"7bit")), p),
    "uuencode": lambda p, r: (r.choice((b"x-uuencode", b"uuencode", b"x-uue", b"7bit", b"base64")), uu(p)),
    "xxencode": lambda p, r: (r.choice((b"x-xxencode", b"7bit")), xx(p)),
    "yEnc": lambda p, r: (r.choice((b"x-yencode", b"8bit", b"7bit")), yenc(p)),
    "BinHex": lambda p, r: (r.choice((b"mac-binhex40", b"7bit", b"x-binhex40")), binhex(p)),
    "begin-base64": lambda p, r: (b"7bit", b"begin-base64 644 a.exe\n" + b64(p) + b"====\n"),
}


def zeros(text: bytes, rng: Random) -> bytes:
    """Some letters of value zero are written as padding."""
    out = bytearray(text)
    for _ in range(rng.randrange(1, 6)):
        at = text.find(b"A", rng.randrange(8, 80))
        if at >= 0:
            out[at : at + 1] = b"="
    return bytes(out)


Field = Callable[[bytes, Random], bytes]  # the encoding's name to the complete field

FIELDS: dict[str, Field] = {
    "plain field": lambda e, r: b"Content-Transfer-Encoding: " + e + b"\n",
    "odd case": lambda e, r: b"cOnTENT-tRANSFER-EnCODING:" + e.upper() + b"\n",
    "folded": lambda e, r: b"Content-Transfer-Encoding:\n" + r.choice((b" ", b"\t", b"    ")) + e + b"\n",
    "folded over blanks": lambda e, r: (
        b"Content-Transfer-Encoding:\n" + r.choice((b" ", b"\t", b"  ")) + b"\n " + e + b"\n"
    ),
    "comment": lambda e, r: b"Content-Transfer-Encoding: (x) " + e + r.choice((b"", b" (y)", b";", b"; x=y")) + b"\n",
    "long comment": lambda e, r: (
        b"Content-Transfer-Encoding: (" + r.choice((b"c" * 4200, b"c" * 60 + b"\n " + b"c " * 3000)) + b") " + e + b"\n"
    ),
    "blank before the colon": lambda e, r: b"Content-Transfer-Encoding : " + e + b"\n",
    "quoted": lambda e, r: b'Content-Transfer-Encoding: "' + e + b'"\n',
    "twice, last counts": lambda e, r: b"Content-Transfer-Encoding: 7bit\nContent-Transfer-Encoding: " + e + b"\n",
    "twice, first counts": lambda e, r: b"Content-Transfer-Encoding: " + e + b"\nContent-Transfer-Encoding: 8bit\n",
    "bare CR behind": lambda e, r: (
        b"Content-Transfer-Encoding: " + e + b"\nX: y" + r.choice((b"\rz", b"\r\rz", b"\r")) + b"\n"
    ),
    "dashes behind": lambda e, r: (
        b"Content-Transfer-Encoding: " + e + b"\n" + r.choice((b"--\n", b"--x\n", b"--x: y\n", b"---\nX: y\n"))
    ),
    "garbage before": lambda e, r: b"garbage\nContent-Transfer-Encoding: " + e + b"\n",
    "bare CR before": lambda e, r: b"X: y\rz\nContent-Transfer-Encoding: " + e + b"\n",
    "none": lambda e, r: b"",
}

TYPES = (
    b"Content-Type: application/octet-stream; name=a.exe\n",
    b"Content-Type: application/x-msdownload\n",
    b"Content-Type: text/plain\n",
    b"Content-Type: image/png\n",
    b"",
)

HEADERS: dict[str, Callable[[bytes, Random], bytes]] = {
    "plain header": lambda h, r: h,
    "blank first": lambda h, r: r.choice((b" ", b"\t", b" \n", b"\t \n")) + h,
    "CRLF": lambda h, r: h.replace(b"\n", b"\r\n"),
    "many fields": lambda h, r: b"".join(b"X-%d: y\n" % n for n in range(r.choice((3, 40, 300)))) + h,
    "bogus boundary here": lambda h, r: b'Content-Type: text/plain; boundary="!!"\n' + h,
    "bogus boundary behind": lambda h, r: h + b'Content-Type: multipart/mixed; boundary="!!"\n',
    "blank line of blanks": lambda h, r: h + r.choice((b" ", b"\t", b"  \t")) + b"\n",
}


def simple(part: bytes, rng: Random, boundary: bytes = b"") -> bytes:
    """Multipart of a text and the part; an empty boundary is chosen."""
    boundary = boundary or rng.choice((b"XX", b"=_frontier", b"a b", b"----=_Part_1.2"))
    text = rng.choice(
        (
            b"Content-Type: text/plain\n\nHello.\n",
            b"\nHello.\n-- \nme\n",
            b'Content-Type: text/plain; boundary="!!"\n\nHello.\n',
            b'Content-Type: text/plain; boundary="--"\n\nbase64\n',
        )
    )
    return (
        b'From: a@example.org\nMIME-Version: 1.0\nContent-Type: multipart/mixed; boundary="' + boundary + b'"\n\n'
        b"preamble\n--" + boundary + b"\n" + text + b"--" + boundary + b"\n" + part + b"\n--" + boundary + b"--\n"
    )


def unreadable(part: bytes, rng: Random) -> bytes:
    """A multipart whose boundary some readers can't read."""
    declared = rng.choice(
        (
            b"multipart/mixed; " + b"x=" + b"y" * 4200 + b"; boundary=XX",
            b"multipart/mixed;\n \n boundary=XX",
            b"multipart/mixed; boundary*0=X; boundary*1=X",
            b"multipart/mixed; boundary*=us-ascii''XX",
            b'multipart/mixed; boundary="X\\X"',
            b"multipart/mixed; boundary=XX; boundary=YY",
            b"multipart/mixed; (boundary=YY) boundary=XX",
            b"multipart/mixed boundary=XX",
            b"multipart/mixed; boundary = XX",
            b"multipart/mixed; boundary='XX'",
        )
    )
    encoding = rng.choice((b"", b"Content-Transfer-Encoding: base64\n"))
    return (
        b"From: a@example.org\nMIME-Version: 1.0\nContent-Type: " + declared + b"\n" + encoding + b"\n--XX\n"
        b"\nHello.\n--XX\n" + part + b"\n--XX--\n"
    )


def forwarded(part: bytes, rng: Random) -> bytes:
    """message/rfc822, not encoded."""
    return simple(b"Content-Type: message/rfc822\n\n" + simple(part, rng, b"inner"), rng, b"outer")


def encoded_forward(part: bytes, rng: Random) -> bytes:
    """message/rfc822 in base64, some levels deep."""
    inner = simple(part, rng)
    for _ in range(rng.randrange(1, 7)):
        inner = b"Content-Type: message/rfc822\nContent-Transfer-Encoding: base64\n\n" + b64(inner)
    return b"From: a@example.org\nMIME-Version: 1.0\n" + inner


def opaque(part: bytes, rng: Random) -> bytes:
    """Opaque S/MIME."""
    kind = rng.choice((b"application/pkcs7-mime; smime-type=signed-data", b"application/x-pkcs7-mime; name=smime.p7m"))
    inner = signed(rng.choice((simple(part, rng), part)), rng.choice((0, 0, 1000, 57)))
    return b"From: a@example.org\nContent-Type: " + kind + b"\nContent-Transfer-Encoding: base64\n\n" + b64(inner)


STRUCTURES: dict[str, Callable[[bytes, Random], bytes]] = {
    "multipart": simple,
    "single part": lambda p, r: b"From: a@example.org\nMIME-Version: 1.0\n" + p,
    "unreadable boundary": unreadable,
    "forwarded": forwarded,
    "forwarded in base64": encoded_forward,
    "opaque S/MIME": opaque,
    "undeclared boundary": lambda p, r: simple(p, r).replace(b"boundary=", b"x="),
    "no end": lambda p, r: simple(p, r).rpartition(b"\n--")[0] + b"\n",
    "pasted": lambda p, r: b"From: a@example.org\n\nSee this:\n\n" + p,
    "mbox": lambda p, r: b"From a@b Mon Jan  1 00:00:00 2024\n" + simple(p, r),
    "nested": lambda p, r: simple(
        b'Content-Type: multipart/alternative; boundary="in"\n\n--in\n\ntext\n--in\n' + p + b"\n--in--\n", r
    ),
    "after an alternative": lambda p, r: simple(
        b'Content-Type: multipart/alternative; boundary="!!"\n\n--!!\n\ntext\n--!!--\n\n--XX\n' + p, r, b"XX"
    ),
}


def wrapping(program: bytes, rng: Random) -> Wrapping:
    """One combination."""
    carrier, field, header, structure = (rng.choice(list(table)) for table in (CARRIERS, FIELDS, HEADERS, STRUCTURES))
    if rng.random() < 0.3:  # one trick, or two
        field = "plain field"
    if rng.random() < 0.4:
        header = "plain header"
    if rng.random() < 0.3:
        structure = "multipart"
    encoding, body = CARRIERS[carrier](program, rng)
    fields = rng.choice(TYPES) + FIELDS[field](encoding, rng)
    head = HEADERS[header](fields, rng)
    tricks = [carrier, field, header, structure]
    if rng.random() < 0.25 and carrier.startswith("base64"):
        tricks.append("bogus delimiters")
        lines = body.split(b"\n")
        lines[rng.randrange(1, 8)] += b"\n--!!"
        body = b"\n".join(lines)
    part = head + b"\n" + body
    message = STRUCTURES[structure](part, rng)
    if rng.random() < 0.1:
        tricks.append("all CRLF")
        message = message.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    return Wrapping(tuple(tricks), message)


def wrappings(program: bytes, seed: int, count: int) -> Iterator[Wrapping]:
    """``count`` random combinations."""
    for number in range(count):
        yield wrapping(program, Random(f"{seed}.{number}"))
