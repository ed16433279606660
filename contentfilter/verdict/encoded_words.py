"""Encoded words of RFC 2047: makes them, and decodes those in a field's value, with a fixed set of charsets.

A charset is looked up in a table of this module and nowhere else: Python's codec registry imports modules by name and
remembers every name, and the names here come from senders.
"""

import base64
import quopri
import re
from collections.abc import Iterator

LOOK_MAX = 1000
"""Bytes of a value that are decoded, at most a hundred words."""

_WORD = re.compile(rb"=\?([!->@-~]{1,40})\?([bq])\?([ !->@-~]*)\?=", re.IGNORECASE)
_BETWEEN = re.compile(rb"(\?=) (?==\?)")
_PIECE = 36  # bytes of an encoded word: 60 characters, so that it fits beside "Subject: "

_SAME = (
    "utf-8", "koi8-r", "koi8-u", "big5", "big5-hkscs", "gb18030", "iso-2022-jp", "iso-2022-kr", "euc-jp",
    *(f"iso-8859-{part}" for part in range(1, 17) if part != 12),
    *(f"windows-{page}" for page in range(1250, 1259)),
)  # fmt: skip
_ALIASES = {
    "utf8": "utf-8",
    "us-ascii": "ascii",
    "ascii": "ascii",
    "latin1": "iso-8859-1",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "shift-jis": "cp932",
    "euc-kr": "cp949",
    "ks_c_5601-1987": "cp949",
    "windows-874": "cp874",
    "tis-620": "cp874",
    "iso-8859-8-i": "iso-8859-8",
    "ibm850": "cp850",
    "ibm852": "cp852",
    "ibm866": "cp866",
}
_CODECS = {name.encode(): codec for name, codec in (*zip(_SAME, _SAME, strict=True), *_ALIASES.items())}


def encode(text: str, before_word: bool = False) -> bytes:
    """``text`` for a header: unchanged if it is printable ASCII, else in encoded words.

    White space between encoded words is not displayed: ``before_word`` puts the space between two into the first.
    """
    if text.isascii() and text.isprintable():
        return text.encode("ascii")
    pieces = [b""]
    for character in text + " " * before_word:
        more = character.encode("utf-8")
        if len(pieces[-1]) + len(more) > _PIECE:  # no character may be cut in two
            pieces.append(b"")
        pieces[-1] += more
    return b"\n ".join(b"=?utf-8?b?" + base64.b64encode(piece) + b"?=" for piece in pieces)


def begins_with_word(value: bytes) -> bool:
    return _WORD.match(value) is not None


def decode(value: bytes) -> str:
    """The first LOOK_MAX bytes of a field's value as people read them: unfolded, with encoded words decoded.

    A word in an unknown charset stays as it is; bytes that its charset does not have become U+FFFD.
    """
    start = b" ".join(value[:LOOK_MAX].split())
    if b"=?" not in start:
        return start.decode("utf-8", "replace")
    return "".join(_pieces(_BETWEEN.sub(rb"\1", start)))


def _pieces(text: bytes) -> Iterator[str]:
    at = 0
    for word in _WORD.finditer(text):
        yield text[at : word.start()].decode("utf-8", "replace")
        at = word.end()
        charset, encoding, data = word.groups()
        codec = _CODECS.get(charset.partition(b"*")[0].lower())  # RFC 2231: charset*language
        try:
            raw = base64.b64decode(data + b"==") if encoding in b"bB" else quopri.decodestring(data, header=True)
            yield raw.decode(codec, "replace") if codec else word.group(0).decode("utf-8", "replace")
        except ValueError:
            yield word.group(0).decode("utf-8", "replace")
    yield text[at:].decode("utf-8", "replace")
