"""Targets: the message itself. The MIME walk and its decoders, the signature scan, header lines, the release's mark."""

import binascii
import email.parser
import email.policy
import functools
import time

from lab.calibration import work_unit
from lab.programs import b64, made, qp, uu

from contentfilter.doors import canary
from contentfilter.errors import BackendError, Cause
from contentfilter.scanners.signatures import decoders as decoding
from contentfilter.scanners.signatures import mime
from contentfilter.scanners.signatures.engine import Engine, default_loadertypes, default_signatures
from contentfilter.scanners.signatures.markers import Markers
from contentfilter.scanners.signatures.work import Work
from contentfilter.store import release_token, sidecar
from contentfilter.verdict import headers

UNITS = 60.0  # of CPU time for any input of a fuzzer's size: some hundred times what the slowest takes
SECRET = b"0123456789abcdef0123456789abcdef"
TO = (b"a@x",)
NOW = 1_700_000_000
MARKERS = Markers((b"TV", b"UE"))
FREE = Work(1 << 40)
BOTH = Engine(default_signatures(), default_loadertypes())
WARLORD = Engine(default_signatures(), default_loadertypes(), "compatible")
ALL = frozenset((b"contentfilter", b"virus-", b"spam-"))
LINES = [b"X-ContentFilter: id; virus=clean; spam=skipped\n"]
MADE = made()
TOP = b"Content-Type: multipart/mixed; boundary=frontier\n\n"


def scan(data: bytes) -> None:
    """The walk stays inside the message; a program behind hostile bytes is found, or the scan says why not."""
    started = time.thread_time()
    for leaf in mime.leaves(data, MARKERS, Work(len(data))):
        assert 0 <= leaf.start < leaf.end <= len(data)
        assert len(leaf.path) <= mime.NESTED + 1
    WARLORD.scan(data)
    for encode, name in ((b64, b"base64"), (qp, b"quoted-printable"), (uu, b"x-uuencode")):
        part = b"\n--frontier\nContent-Transfer-Encoding: " + name + b"\n\n" + encode(MADE) + b"\n--frontier--\n"
        assert finds(TOP + data + part), name
    assert time.thread_time() - started < UNITS * unit()


@functools.cache
def unit() -> float:
    """CPU seconds of a work unit on this machine."""
    return work_unit()


def finds(message: bytes) -> bool:
    try:
        return BOTH.scan(message) is not None
    except BackendError as error:
        return error.cause is Cause.LIMITS


def decoders(data: bytes) -> None:
    """Output of encoders is read back at any position, and any bytes are decoded to no more than they can hold."""
    for decode in (decoding.base64, decoding.quoted, decoding.uuencode, decoding.raw, decoding.yenc):
        assert len(b"".join(decode(data, 0, len(data), FREE))) <= 63 * (len(data) + 1)
    assert len(b"".join(decoding.binhex(data, 0, len(data), FREE))) <= 256 * (len(data) + 1)
    columns = data[0] + 1 if data else 1
    for encode, decode in ((lambda d: b64(d, columns), decoding.base64), (qp, decoding.quoted)):
        text = data[:20] + encode(data)
        assert b"".join(decode(text, len(data[:20]), len(text), FREE)) == data
    letters = bytes(set(data) & set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"))
    kept = bytes(byte for byte in data if byte in letters)
    whole = kept[: len(kept) & ~3]
    if kept == whole and b"=" not in data:
        assert b"".join(decoding.base64(data, 0, len(data), FREE)) == binascii.a2b_base64(whole)


def header_lines(data: bytes) -> None:
    """Our lines in front, forged ones renamed, the body as it was, and a subject that is tagged once."""
    tag, message = (b"[SPAM]", b"\xe2\x98\xa0 spam")[len(data) % 2], data
    header, skip = corrected(message, tag)
    prepend = b"".join((*LINES, header))
    assert prepend.startswith(LINES[0])
    assert skip in (0, len(headers.header_block(message)))
    delivered = prepend + message[skip:]
    assert delivered.endswith(message[len(headers.header_block(message)) :])
    block = delivered[len(LINES[0]) :]
    for name in (b"x-contentfilter", b"x-virus-", b"x-spam-"):
        assert not any(
            line.replace(b"\0", b"").lower().startswith(name) and b":" in line for line in field_lines(block)
        ), name
    again, cut = corrected(block, tag)
    assert b"".join((*LINES, again)) + block[cut:] == delivered
    parsed = email.parser.BytesHeaderParser(policy=email.policy.compat32).parsebytes(LINES[0] + block)
    assert [value for name, value in parsed.items() if name.lower() == "x-contentfilter"][1:] == []
    text = headers.message_id(headers.header_block(message))
    assert not text or (text.isprintable() and text.isascii() and len(text) <= headers.MESSAGE_ID_MAX)
    for value in sidecar.described(message).values():
        assert not value or (value.isprintable() and len(value) <= sidecar.FIELD_SHOWN)


def corrected(message: bytes, tag: bytes) -> tuple[bytes, int]:
    """Bytes that precede the message, and the number of its own bytes that they replace."""
    missing, changes = headers.correct(message, ALL, tag)
    header, skip = headers.changed_block(message, changes) if changes else (b"", 0)
    return missing + header, skip


def field_lines(block: bytes) -> list[bytes]:
    """The lines of a header as the most liberal reader splits them."""
    return headers.header_block(block).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")


def marks(data: bytes) -> None:
    """Nobody without the key makes a mark, and no byte of a marked message may change."""
    assert release_token.verify(data, SECRET, NOW, TO) is None
    assert canary.recognise({canary.VARIABLE.encode(): data}, SECRET, data, NOW) is None
    digest = release_token.hashlib.sha256(data).hexdigest()
    line = release_token.sign(SECRET, "0123456789abcdef", data[:40].decode("latin-1"), NOW + 60, digest, TO)
    assert line.count(b"\n") == 1
    assert release_token.verify(line + data, SECRET, NOW, TO).incident == "0123456789abcdef"
    assert release_token.verify(line + data + b"x", SECRET, NOW, TO) is None
    assert release_token.verify(line + data, SECRET, NOW, (b"b@x", *TO)) is None
    token = canary.sign(SECRET, canary.CLEAN, "0" * 32, NOW + 60, data).encode("ascii")
    name = canary.VARIABLE.encode()
    assert canary.recognise({name: token}, SECRET, data, NOW) is not None
    assert canary.recognise({name: token + data[:1]}, SECRET, data, NOW) is None or not data
    at = data[0] % len(token) if data else 0
    forged = token[:at] + bytes((token[at] ^ 1,)) + token[at + 1 :]
    assert canary.recognise({name: forged}, SECRET, data, NOW) is None
