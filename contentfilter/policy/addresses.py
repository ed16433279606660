"""Table keys and the order in which they apply to a recipient. Pure: bytes in, bytes out.

A canonical key is one of ``user@domain``, ``@domain``, ``.domain`` (sub-domains at any depth, not the domain
itself) and ``*``. A to Z are folded, nothing else is. For one recipient the first of these that stands in a
table decides, whether it protects or exempts: the address; the address with its extension cut off, a piece at
a time; ``@domain``; the ``.parents`` from the nearest on; ``*``.

A recipient without a domain is looked up with the one that qmail-send will add (control/envnoathost, else
control/me); where that is not known only ``*`` can apply.
"""

import enum
import re
from collections.abc import Iterator, Mapping

from contentfilter.model import readable

EVERYBODY = b"*"
EXEMPT = b"!"
MAX_KEY = 1000  # bytes; qmail-queue refuses addresses over 1002

PLAIN_KEYS = re.compile(rb"(?:(?:[0-9a-z_+=][0-9a-z_.+=-]*+)?@[0-9a-z-]++(?:\.[0-9a-z-]++)+\n){0,10000}")
"""Matches as many folded lines (at most ten thousand) as hold a canonical address or @domain beyond doubt.

Spares :func:`parse_key` for most rows of a large table.
"""

_STRANGE = re.compile(rb"[\x00-\x20\x7f]")
_LABEL = rb"[^\x00-\x20\x7f@*?\[\]\\\"'<>(),;:=!|/.]+"
_DOMAIN = re.compile(_LABEL + rb"(?:\." + _LABEL + rb")*|\[[0-9a-f.:]+\]")


class KeyKind(enum.Enum):
    """What a key stands for, the most specific first."""

    ADDRESS = "address"
    EXTENSION = "address without extension"
    DOMAIN = "domain"
    PARENT = "sub-domains"
    EVERYBODY = "everybody"


def parse_key(raw: bytes) -> tuple[bytes, str]:
    """The canonical key for what an administrator wrote (without ``!``), and what is wrong with it.

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


def candidates(
    recipient: bytes, extension: bytes = b"", default_domain: bytes = b""
) -> Iterator[tuple[KeyKind, bytes]]:
    """All keys that could decide for ``recipient``, the most specific first.

    ``extension`` is one character or empty; with ``-``, user-a-b@d is also user-a@d and user@d.
    """
    address = recipient.lower()
    local, at, domain = address.rpartition(b"@")
    if not at:
        local, domain = address, default_domain.lower()
    if domain:
        yield KeyKind.ADDRESS, local + b"@" + domain
        end = local.rfind(extension) if extension else -1
        while end > 0:
            yield KeyKind.EXTENSION, local[:end] + b"@" + domain
            end = local.rfind(extension, 0, end)
        yield KeyKind.DOMAIN, b"@" + domain
        dot = domain.find(b".")
        while dot >= 0:
            yield KeyKind.PARENT, domain[dot:]
            dot = domain.find(b".", dot + 1)
    yield KeyKind.EVERYBODY, EVERYBODY


def deciding(
    table: Mapping[bytes, bytes], recipient: bytes, extension: bytes = b"", default_domain: bytes = b""
) -> tuple[KeyKind, bytes] | None:
    """The kind and key of the row of ``table`` that decides for ``recipient``; None where no row applies."""
    found = candidates(recipient, extension, default_domain)
    return next(((kind, key) for kind, key in found if key in table), None)
