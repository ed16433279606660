"""Parser for clamd.conf, as far as the doctor needs it. Source: clamd.conf(5)."""

import os
import re

from contentfilter.endpoint import Address

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_conf(text: str) -> dict[str, str]:
    """Values by name; the last line of a name counts."""
    return dict(re.findall(r"^[ \t]*([A-Za-z]\w*)[ \t]+([^\s#]+)", text, re.MULTILINE))


def size(text: str) -> int | None:
    """Bytes of a number with an optional K, M or G; None for anything else."""
    match = re.fullmatch(r"([0-9]{1,15})([KMG]?)", text.upper())
    return int(match[1]) * _UNITS[match[2]] if match else None


def is_of(values: dict[str, str], address: Address) -> bool:
    """True if the clamd with this configuration listens at ``address``."""
    if address.path:
        return os.path.realpath(values.get("LocalSocket", "")) == os.path.realpath(address.path)  # /var/run is /run
    return address.host in ("127.0.0.1", "::1", "localhost") and values.get("TCPSocket") == str(address.port)
