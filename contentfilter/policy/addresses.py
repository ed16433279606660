"""Table keys, and their precedence for a recipient. Pure: bytes in, bytes out.

A canonical key is one of ``user@domain``, ``@domain``, ``.domain`` (sub-domains at any depth, not the domain
itself) and ``*``. A to Z are folded, nothing else is. For one recipient the first of these keys that is in a
table decides, whether it protects or exempts: the address; the address with its extension cut off, a piece at
a time; ``@domain``; the ``.parents`` from the nearest on; ``*``.

A recipient without a domain is looked up with the one that qmail-send will add (control/envnoathost, else
control/me); where that is not known only ``*`` can apply.
"""

import enum
import re
from collections.abc import Collection, Iterator, Mapping
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
_LABEL = rb"[^\x00-\x20\x7f@*?\[\]\\\"'<>(),;:=!|/.]+"
_DOMAIN = re.compile(_LABEL + rb"(?:\." + _LABEL + rb")*|\[[0-9a-f.:]+\]")


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
    key = raw.lower()
    if key in (b"*", b"@"):
        return EVERYBODY, ""
    wrong = _wrong(key)
    if wrong:
        return b"", wrong
    return (key if b"@" in key or key.startswith(b".") else b"@" + key), ""


def _wrong(key: bytes) -> str:
    if not key:
        return "no key; write user@domain, @domain, .domain or *"
    if len(key) > MAX_KEY:
        return f"longer than {MAX_KEY} bytes"
    if _STRANGE.search(key):
        return "a blank or control character inside a key"
    if key[:1] in b"<\"'":
        return "write the bare address, without quotes or angle brackets"
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
    return ""


class KeyShape(Protocol):
    """Summary of the keys of a table, so that a look-up can skip keys that it cannot have."""

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

    ``address`` is in lower case and has its domain from ``at``, the offset of its last @. ``extension``: see
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
    address = recipient.lower()
    if b"@" not in address:
        address += b"@" + default_domain.lower()
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
