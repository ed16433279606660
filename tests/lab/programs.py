"""Windows programs to find, and mail to hide them in. The real ones come with pip and setuptools: their launchers."""

import base64
import binascii
import struct
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path


def made() -> bytes:
    """A program as a linker would lay it out: DOS header, PE header, a name to import. Nothing that runs."""
    dos = b"MZ\x90\0\x03\0\0\0\x04\0\0\0\xff\xff\0\0\xb8".ljust(60, b"\0") + struct.pack("<I", 128)
    stub = b"This program cannot be run in DOS mode.\r\r\n$".ljust(64, b"\0")
    header = b"PE\0\0" + struct.pack("<HHIIIHH", 0x14C, 1, 0, 0, 0, 224, 0x102)
    code = bytes(range(256)) * 8
    return (dos + stub + header).ljust(512, b"\0") + code + b"\0KERNEL32.dll\0ExitProcess\0" + code


def real() -> dict[str, Path]:
    """The launchers in the installed pip and setuptools, each once; a distribution may have stripped them."""
    found: dict[str, Path] = {}
    seen = set()
    for name in ("pip", "setuptools"):
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            path = Path(str(file.locate()))
            if path.suffix == ".exe" and path.is_file() and path.read_bytes() not in seen:
                seen.add(path.read_bytes())
                found[f"{name}-{path.name}"] = path
    return found


def wrap(text: bytes, columns: int = 76) -> bytes:
    return b"".join(text[at : at + columns] + b"\n" for at in range(0, len(text), columns))


def b64(data: bytes, columns: int = 76) -> bytes:
    return wrap(base64.b64encode(data), columns)


def uu(data: bytes) -> bytes:
    lines = [binascii.b2a_uu(data[at : at + 45]) for at in range(0, len(data), 45)]
    return b"begin 644 a.exe\n" + b"".join(lines) + b"`\nend\n"


def qp(data: bytes) -> bytes:
    """Every byte escaped, soft line breaks in between."""
    return b"=\n".join(b"".join(b"=%02X" % byte for byte in data[at : at + 20]) for at in range(0, len(data), 20))


BINARY = b"Content-Type: application/octet-stream\n"
BASE64 = BINARY + b"Content-Transfer-Encoding: base64\n"
QUOTED = BINARY + b"Content-Transfer-Encoding: quoted-printable\n"
FORWARD = b"Content-Type: message/rfc822\n"


def mixed(header: bytes, body: bytes, *, boundary: bytes = b"XX", declared: bytes = b'boundary="XX"') -> bytes:
    """A multipart message: a text part with a signature line, then a part of the given header and body."""
    return (
        b"From: a@example.org\nMIME-Version: 1.0\nContent-Type: multipart/mixed; " + declared + b"\n\n"
        b"A message in MIME format.\n--" + boundary + b"\nContent-Type: text/plain\n\nHello there.\n\n-- \nme\n"
        b"--" + boundary + b"\n" + header + b"\n" + body + b"\n--" + boundary + b"--\n"
    )


def disguises(program: bytes) -> Iterator[tuple[str, bytes]]:
    """Messages that carry the program so that some mail reader would unpack it."""
    text = base64.b64encode(program)
    lines = b64(program)
    plain = mixed(BASE64, lines)
    for columns in (1, 3, 4, 60, 76, 77, 1000, len(text)):
        yield f"{columns} columns", mixed(BASE64, wrap(text, columns))
    yield "crlf", plain.replace(b"\n", b"\r\n")
    yield "bare cr", plain.replace(b"\n", b"\r")
    yield (
        "junk between the letters",
        mixed(BASE64, b"\xff! \0*\r\n--\n".join(text[i : i + 5] for i in range(0, len(text), 5))),
    )
    yield "junk in front", mixed(BASE64, b"!!\n-\n \0" * 50 + lines)
    yield "delimiters in front", mixed(BASE64, b"--\n--!\n\n" * 5 + lines)
    yield "delimiters inside", mixed(BASE64, lines[:50] + b"\n--\n\n" + lines[50:400] + b"\n--!\n" + lines[400:])
    yield (
        "padding, then more",
        mixed(BASE64, b"".join(b64(program[i : i + 1000]) for i in range(0, len(program), 1000))),
    )
    yield "padding after each byte", mixed(BASE64, b"".join(b64(program[i : i + 1]) for i in range(len(program))))
    yield "padding that is ignored", mixed(BASE64, text[:1] + b"=" + text[1:2] + b"==" + text[2:])
    yield "quoted-printable", mixed(QUOTED, qp(program))
    yield "quoted-printable as binascii writes it", mixed(QUOTED, binascii.b2a_qp(program, istext=False))
    yield "quoted-printable, undeclared", mixed(BINARY, qp(program))
    yield "uuencode", mixed(BINARY + b"Content-Transfer-Encoding: x-uuencode\n", uu(program))
    yield "uuencode in a text", b"From: a\n\nhello\nbegin of text\n" + uu(program)
    yield "uuencode in a base64 part by declaration", mixed(BASE64, uu(program))
    yield "uuencode alone", uu(program)
    yield "uuencode with base64", b"From: a\n\nhello\nbegin-base64 644 x\n" + lines + b"====\n"
    yield "8bit", mixed(BINARY + b"Content-Transfer-Encoding: 8bit\n", program)
    yield "8bit, no multipart", b"From: a\nContent-Type: application/octet-stream\n\n" + program
    yield "base64 twice", mixed(BASE64, b64(lines))
    yield "base64 twice, inner lines joined", mixed(BASE64, b64(text))
    yield "base64 three times", mixed(BASE64, b64(b64(lines)))
    yield "base64 in quoted-printable", mixed(QUOTED, qp(lines))
    yield (
        "quoted-printable in base64",
        mixed(BASE64, b64(b"Content-Transfer-Encoding: quoted-printable\n\n" + qp(program))),
    )
    yield "uuencode in base64", mixed(BASE64, b64(b"hello\n\n" + uu(program)))
    yield "forwarded", mixed(FORWARD, plain, boundary=b"OUT", declared=b"boundary=OUT")
    yield "forwarded in base64", mixed(FORWARD + b"Content-Transfer-Encoding: base64\n", b64(plain), boundary=b"OUT")
    yield "forwarded in quoted-printable", mixed(FORWARD + b"Content-Transfer-Encoding: quoted-printable\n", qp(plain))
    yield "40 headers in each other", b"".join(FORWARD + b"X: %d\n\n" % i for i in range(40)) + plain
    deep = plain
    for level in range(40):
        deep = mixed(FORWARD, deep, boundary=b"B%d" % level, declared=b"boundary=B%d" % level)
    yield "40 multiparts in each other", deep
    yield "no boundary declared", mixed(BASE64, lines, declared=b"")
    yield "another boundary declared", mixed(BASE64, lines, declared=b"boundary=YY")
    yield "boundary in another case", mixed(BASE64, lines, declared=b"boundary=xx")
    yield "empty boundary", mixed(BASE64, lines, boundary=b"", declared=b'boundary=""')
    yield "boundary with blanks", mixed(BASE64, lines, declared=b'boundary="XX   "')
    yield "two Content-Types", mixed(BASE64, lines, declared=b"boundary=YY\nContent-Type: multipart/mixed; boundary=XX")
    yield "no empty line", mixed(BASE64[:-1], lines)
    yield "blanks in the empty line", mixed(BASE64 + b" \t", lines)
    yield "after the closing boundary", mixed(b"X: y\n", b"text") + b"\n--XX\n" + BASE64 + b"\n" + lines
    yield "in the epilogue", mixed(b"X: y\n", b"text") + b"\n" + BASE64 + b"\n" + lines
    yield "multipart declared base64", plain.replace(b"MIME-Version: 1.0", b"Content-Transfer-Encoding: base64")
    yield "multipart in base64", b"Content-Type: multipart/mixed\nContent-Transfer-Encoding: base64\n\n" + b64(plain)
    yield "no multipart", b"From: a\n" + BASE64 + b"\n" + lines
    yield "empty lines first", b"\n\n" + BASE64 + b"\n" + lines
    yield "no header", lines
    yield "pasted", b"From: a\n\nsee this\n" + lines
    yield "pasted with its header", b"From: a\n\nsee this\n\n" + BASE64 + b"\n" + lines
    yield "bounced", b"From: a\n\nHi. This is the\n\n--- Below this line is a copy.\n\nReturn-Path: <x>\n" + plain
    yield "mbox", b"From a@b Mon Jan 1 00:00:00 2024\n" + plain
    yield "many dashes before", plain.replace(b"Hello there.", b"-----BEGIN X-----\n" * 1000)
    for field in (
        b"CONTENT-TRANSFER-ENCODING: BASE64",
        b"content-transfer-encoding:base64",
        b"Content-Transfer-Encoding:\n base64",
        b'Content-Transfer-Encoding: \t"base64"',
        b"Content-Transfer-Encoding: (c) base64 (d)",
        b"Content-Transfer-Encoding : base64;",
        b"Content-Transfer-Encoding: 7bit\nContent-Transfer-Encoding: base64",
        b"Content-Transfer-Encoding: base64\nContent-Transfer-Encoding: 7bit",
        b"Content-Transfer-Encoding: 7bit",
        b"Content-Transfer-Encoding: quoted-printable",
        b"Content-Transfer-Encoding: x-unknown",
        b"X: no encoding at all",
        b"garbage\nContent-Transfer-Encoding: base64",
        b"Content-Tr\0ansfer-Encoding: base64",
        b"X: " + b"y" * 100_000 + b"\nContent-Transfer-Encoding: base64",
    ):
        yield repr(field[:80]), mixed(BINARY + field + b"\n", lines)
