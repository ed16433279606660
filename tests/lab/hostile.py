"""Messages that are made to cost as much as they can: each a shape that repeats, of any size."""

import base64
import itertools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

HEAD = b"MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=b\n\n"
ENCODED = b"Content-Transfer-Encoding: base64\n\n"
QUOTED = b"Content-Transfer-Encoding: quoted-printable\n\n"
LETTERS = b"QUJD" * 19 + b"\n"  # "ABC" again and again


def filled(head: bytes, piece: bytes, size: int) -> bytes:
    """``head`` and then ``piece`` again and again, ``size`` bytes."""
    return (head + piece * ((size - len(head)) // len(piece) + 1))[:size]


def numbered(head: bytes, line: bytes, size: int) -> bytes:
    """The same with pieces that differ: ``%d`` in ``line`` is a number."""

    def pieces() -> Iterator[bytes]:
        left = size - len(head)
        for number in itertools.count():
            if left <= 0:
                return
            piece = line.replace(b"%d", b"%d" % number)
            left -= len(piece)
            yield piece

    return (head + b"".join(pieces()))[:size]


def wrapped(data: bytes) -> bytes:
    """In base64, in lines."""
    letters = base64.b64encode(data)
    return b"\n".join(letters[at : at + 76] for at in range(0, len(letters), 76)) + b"\n"


def layers(size: int) -> bytes:
    """Base64 in base64, so often that nobody follows."""
    data = filled(b"", b"just some text. ", size // 8)
    while len(data) < size * 3 // 4:
        data = ENCODED + wrapped(data)
    return (ENCODED + wrapped(data))[:size]


def documents(size: int) -> bytes:
    """A decoded message of delimiter lines only."""
    inner = filled(HEAD, b"--b\n", size * 3 // 4)
    return (b"Content-Type: message/rfc822\n" + ENCODED + wrapped(inner))[:size]


def begins(size: int) -> bytes:
    """A begin line, and every line after it could be one of uuencode."""
    return filled(b"\nbegin 644 x\n", b"M" + b"!" * 60 + b"\n", size)


SHAPES: Mapping[str, Callable[[int], bytes]] = MappingProxyType(
    {
        "plain text": lambda n: filled(b"Subject: s\n\n", b"A line as people write them, not long and not short.\n", n),
        "one base64 attachment": lambda n: filled(HEAD + b"--b\n" + ENCODED, LETTERS, n),
        "multiparts inside each other": lambda n: filled(HEAD, b"--b\n" + HEAD, n),
        "parts": lambda n: filled(HEAD, b"--b\n\nx\n", n),
        "base64 parts": lambda n: filled(HEAD, b"--b\n" + ENCODED + b"QUJD\n", n),
        "declared boundary lines": lambda n: filled(HEAD, b"--b\n", n),
        "undeclared boundary lines": lambda n: filled(b"\n\n", b"--\n", n),
        "different boundaries": lambda n: numbered(HEAD, b'--b\nContent-Type: multipart/x; boundary="n%d"\n\n', n),
        "long boundary lines": lambda n: filled(HEAD, b"--" + b"b" * 990 + b"\n", n),
        "headers inside each other": lambda n: filled(b"", b"Content-Type: message/rfc822\n\n", n),
        "header lines": lambda n: filled(b"", b"A: b\n", n),
        "no header lines": lambda n: filled(b"", b"a\n", n),
        "a folded line": lambda n: filled(b"Subject:", b"\n x", n),
        "a long line": lambda n: filled(b"\n\n", b"x", n),
        "a long header line": lambda n: filled(b"Subject: ", b"a: ", n),
        "Content-Type lines": lambda n: filled(b"", b"Content-Type: multipart/x; boundary=a\n", n),
        "Content-Type parameters": lambda n: filled(b"Content-Type: multipart/mixed", b";boundary=a", n),
        "continued parameters": lambda n: numbered(b"Content-Type: multipart/mixed", b";\n boundary*%d*=a", n),
        "encoded words": lambda n: filled(b"Subject:", b" =?utf-8?b?QUJD?=\n", n),
        "empty lines": lambda n: filled(b"", b"\n", n),
        "bare CRs": lambda n: filled(b"a: b\r\r", b"x\r", n),
        "NULs": lambda n: filled(b"Content-Type:", b"\0", n),
        "begin lines": lambda n: filled(b"\n", b"begin 644 x\n", n),
        "begin-base64 lines": lambda n: filled(b"\n", b"begin-base64 644 x\n", n),
        "begin lines with text": lambda n: filled(b"\n", b"begin 644 x\n#35J0\n", n),
        "uuencode without an end": begins,
        "equals signs": lambda n: filled(QUOTED, b"=", n),
        "quoted-printable escapes": lambda n: filled(QUOTED, b"=41", n),
        "quoted-printable lines": lambda n: filled(QUOTED, b"=\n", n),
        "base64 padding": lambda n: filled(ENCODED, b"Q=", n),
        "base64 of one letter a line": lambda n: filled(ENCODED, b"Q\n", n),
        "base64 with junk": lambda n: filled(ENCODED, b"Q!", n),
        "short runs of base64": lambda n: filled(b"\n\n", b"TVqQ" * 85 + b"\n.\n", n),
        "runs of base64": lambda n: filled(b"\n\n", b"TVqQ" * 100 + b"\n.\n", n),
        "beginnings of programs": lambda n: filled(b"\n\n", b"TVqQ\n\n", n),
        "programs without a name": lambda n: filled(ENCODED, base64.b64encode(b"MZ\0\0\0\x0032.dl_" * 3), n),
        "parts that begin as programs": lambda n: filled(HEAD, b"--b\n" + ENCODED + wrapped(b"MZ\0" * 20), n),
        "base64 in base64": layers,
        "an encoded message of boundary lines": documents,
        "headers in headers": lambda n: filled(b"", b"a:\n\n", n),
        "text in headers": lambda n: filled(b"", b"--\ngarbage\nmore\n", n),
        "text in headers, bare CR": lambda n: filled(b"", b"--\rgarbage\rmore\r", n),
        "boundary lines and empty lines": lambda n: filled(b"", b"--\n\n\n", n),
        "folded Content-Type": lambda n: filled(b"Content-Type: a", b"\n b", n),
        "open quotes": lambda n: filled(b"", b'Content-Type: x; boundary="\\\n', n),
        "one line of base64": lambda n: filled(ENCODED, b"TVqQ", n),
        "junk for base64": lambda n: filled(ENCODED, b"!", n),
        "parts that encode parts": lambda n: filled(
            HEAD, b"--b\n" + ENCODED + wrapped(b"--z\n" + ENCODED + b"YWJj\n"), n
        ),
        "raw parts that begin as programs": lambda n: filled(HEAD, b"--y\n\nMZ\0\n", n),
        "yEnc": lambda n: filled(b"\n=ybegin line=128 size=9 name=x\n", b"\x6a" * 128 + b"\n", n),
    }
)
