"""Table keys, and their precedence for a recipient. Pure: bytes in, bytes out.

A canonical key is one of ``user@domain``, ``@domain``, ``.domain`` (sub-domains at any depth, not the domain
itself) and ``*``. All of them are in :func:`normal` form, so that addresses that are equal for people are equal here.
For one recipient the first of these keys that is in a
table decides, whether it protects or exempts: the address; the address with its extension cut off, a piece at
a time; ``@domain``; the ``.parents`` from the nearest on; ``*``.

A recipient without a domain is looked up with the one that qmail-send will add (control/envnoathost, else
control/me); where that is not known only ``*`` can apply.
"""

import enum
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Protocol

from contentfilter.model import readable

EVERYBODY = b"*"
EXEMPT = b"!"
MAX_KEY = 1000  # bytes; qmail-queue refuses addresses over 1002

PLAIN_KEYS = re.compile(rb"(?:(?:[0-9a-z_+=][0-9a-z_.+=-]*+)?@[0-9a-z-]++(?:\.[0-9a-z-]++)+\n){0,10000}")
"""Matches folded lines (at most ten thousand) that hold nothing but a canonical address or @domain each.

Spares :func:`parse_key` for most rows of a large table.
"""

_STRANGE = re.compile(rb"[\x00-\x20\x7f]")
_LABEL = rb"[0-9a-z_-]+"
_DOMAIN = re.compile(_LABEL + rb"(?:\." + _LABEL + rb")*|\[[0-9a-f.:]+\]")
_NO_LOCAL = re.compile(rb"[<>\",;:]")
_INVISIBLE = (  # white space, controls and characters that are shown as nothing: Unicode's Default_Ignorable and others
    "\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u2000-\u200f\u2028-\u202f\u205f-\u206f"
    "\u2800\u3000\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\uffff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff"
)
_INVISIBLE_INSIDE = re.compile(f"[{_INVISIBLE}]")
_INVISIBLE_ENDS = re.compile(f"\\A[{_INVISIBLE}]+|[{_INVISIBLE}]+\\Z")
_DOTS = str.maketrans("\u3002\uff0e\uff61", "...")  # full stops that IDNA takes for a dot
_MAX_LABEL = 59  # octets of an A-label without its xn--, each of which stands for one letter at most
_MAX_LETTERS = 32  # different ones in a label; the time of the encoding grows with both
_XN = b"xn--"


def folded(address: bytes) -> bytes:
    """An address in lower case: A to Z, and in a domain in other letters all of them, composed (Unicode's NFKC).

    The time is linear, whatever a stranger sends. A domain may still be written in two ways: see :func:`normal`.
    """
    if address.isascii() or len(address) > MAX_KEY:
        return address.lower()
    local, at, domain = address.rpartition(b"@")
    try:
        text = unicodedata.normalize("NFKC", domain.decode("utf-8").translate(_DOTS)).lower()
        domain = unicodedata.normalize("NFC", text).encode("utf-8")
    except UnicodeDecodeError:
        pass
    return local.lower() + at + domain.lower()


@lru_cache(1024)  # of at most MAX_KEY bytes each
def normal(address: bytes) -> bytes:
    """The form in which keys are stored: :func:`folded`, with U-labels of the domain as A-labels (RFC 5890, ``xn--``).

    Takes milliseconds for the worst domain; for keys, not for recipients.
    """
    local, at, domain = folded(address).rpartition(b"@")
    if domain.isascii():
        return local + at + domain
    try:
        return local + at + b".".join(map(_ascii_label, domain.decode("utf-8").split(".")))
    except UnicodeDecodeError:
        return local + at + domain


def alias(key: bytes) -> bytes:
    """The other spelling of a key in normal form, with U-labels, as :func:`folded` has it; empty if there is none."""
    local, at, domain = key.rpartition(b"@")
    if _XN not in domain or len(domain) > MAX_KEY:
        return b""
    try:
        labels = [
            label[4:].decode("punycode").encode("utf-8") if label.startswith(_XN) else label
            for label in domain.split(b".")
        ]
    except UnicodeError:
        return b""
    other = local + at + b".".join(labels)
    return other if other != key and normal(other) == key else b""


def _ascii_label(label: str) -> bytes:
    if label.isascii() or len(label) > _MAX_LABEL or len(set(label)) > _MAX_LETTERS:
        return label.encode("utf-8")
    return _XN + label.encode("punycode")


class KeyKind(enum.Enum):
    """Kinds of keys, the most specific first."""

    ADDRESS = "address"
    EXTENSION = "address without extension"
    DOMAIN = "domain"
    PARENT = "sub-domains"
    EVERYBODY = "everybody"


def parse_key(raw: bytes) -> tuple[bytes, str]:
    """The canonical key for the text of an administrator (without ``!``), or what is wrong with it.

    One of the two is empty. ``domain`` means ``@domain``, and ``@`` means ``*``.
    """
    key, wrong = _visible(raw)
    if key in (b"*", b"@"):
        return EVERYBODY, ""
    key = normal(key)
    wrong = wrong or _wrong(key)
    if wrong:
        return b"", wrong
    return (key if b"@" in key or key.startswith(b".") else b"@" + key), ""


def _visible(raw: bytes) -> tuple[bytes, str]:
    """The text without invisible characters at its ends, and the complaint about one inside or about its encoding."""
    if raw.isascii():
        return raw, ""
    try:
        text = _INVISIBLE_ENDS.sub("", raw.decode("utf-8"))
    except UnicodeDecodeError:
        domain = raw.rpartition(b"@")[2]
        return raw, "" if domain.isascii() else "the domain is not UTF-8"
    inside = _INVISIBLE_INSIDE.search(text)
    if inside:
        return raw, f"an invisible character, U+{ord(inside[0]):04X}, inside a key"
    letters = text.rpartition("@")[2].translate(_DOTS)
    odd = [char for char in letters if not (char.isascii() or char.isalnum() or unicodedata.category(char)[0] == "M")]
    return text.encode("utf-8"), f"{odd[0]!r} cannot be in a domain" if odd else ""


def _wrong(key: bytes) -> str:
    if not key:
        return "no key; write user@domain, @domain, .domain or *"
    if len(key) > MAX_KEY:
        return f"longer than {MAX_KEY} bytes"
    if _STRANGE.search(key):
        return "a blank or control character inside a key"
    if key[:1] in b"<\"'":
        return "write the bare address, without quotes or angle brackets"
    if key.startswith(b"mailto:"):
        return "write the bare address, without mailto:"
    local, at, domain = key.rpartition(b"@")
    if b"*" in key:
        if domain.startswith(b"*.") and local in (b"*", b""):
            return f"for sub-domains write {readable(domain[1:])}"
        if local == b"*":
            return f"for a whole domain write @{readable(domain)}"
        return "only a lone * is a wildcard; write @domain, or .domain for sub-domains"
    if not at:
        domain = key.removeprefix(b".")
    if not domain:
        return "no domain; write user@domain"
    if at and not local and domain.startswith(b"."):
        return f"for sub-domains write {readable(domain)}"
    if not _DOMAIN.fullmatch(domain):
        return f"{readable(domain)!r} is not a domain"
    if b"@" in local:
        return "more than one @"
    if character := _NO_LOCAL.search(local):
        return f"{readable(character[0])!r} cannot be in an address"
    return ""


class KeyShape(Protocol):
    """Properties of the keys of a table, by which a look-up skips keys that it cannot have."""

    @property
    def local_sizes(self) -> Collection[int]:
        """Lengths of the local parts of its addresses."""
        ...

    @property
    def has_domains(self) -> bool:
        """True if it has a ``@domain``."""
        ...

    @property
    def parent_labels(self) -> Collection[int]:
        """Numbers of labels of its ``.domain`` keys, the largest first."""
        ...


def candidate_keys(address: bytes, at: int, extension: bytes, shape: KeyShape | None = None) -> list[bytes]:
    """The keys that could decide for ``address``, the most specific first, without ``*``.

    ``address`` is in normal form and has its domain from ``at``, the offset of its last @. ``extension``: see
    :func:`candidates`. ``shape`` omits keys that are not in the table.
    """
    keys = [address]
    domain = address[at:]
    end = address.rfind(extension, 0, at) if extension else 0
    while end > 0:
        if shape is None or end in shape.local_sizes:
            keys.append(address[:end] + domain)
        end = address.rfind(extension, 0, end)
    if shape is None or shape.has_domains:
        keys.append(domain)
    labels = domain[1:].split(b".")
    counts = range(len(labels) - 1, 0, -1) if shape is None else shape.parent_labels
    keys += [b"." + b".".join(labels[-count:]) for count in counts if count < len(labels)]
    return keys


def candidates(
    recipient: bytes, extension: bytes = b"", default_domain: bytes = b""
) -> Iterator[tuple[KeyKind, bytes]]:
    """All keys that could decide for ``recipient``, each with its kind, the most specific first.

    ``extension`` is one character or empty; with ``-``, user-a-b@d is also user-a@d and user@d.
    """
    address = normal(recipient)
    if b"@" not in address:
        address += b"@" + normal(default_domain)
    at = address.rfind(b"@")
    domain = address[at:]
    if domain != b"@":
        exact, *others = candidate_keys(address, at, extension)
        yield KeyKind.ADDRESS, exact
        for key in others:
            if key == domain:
                yield KeyKind.DOMAIN, key
            else:
                yield KeyKind.EXTENSION if b"@" in key else KeyKind.PARENT, key
    yield KeyKind.EVERYBODY, EVERYBODY


def deciding(
    table: Mapping[bytes, bytes], recipient: bytes, extension: bytes = b"", default_domain: bytes = b""
) -> tuple[KeyKind, bytes] | None:
    """The kind and key of the row of ``table`` that decides for ``recipient``; None where no row applies."""
    found = candidates(recipient, extension, default_domain)
    return next(((kind, key) for kind, key in found if key in table), None)
