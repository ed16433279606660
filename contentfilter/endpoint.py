"""Addresses of backends and listeners, as settings write them."""

import ipaddress
import re
from dataclasses import dataclass

_LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")


def valid_host(text: str) -> bool:
    """Return True for an IP address and for a name that DNS or /etc/hosts can have."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        last = text.rstrip(".").rpartition(".")[2]
        return len(text) <= 253 and _NAME.fullmatch(text) is not None and not last.isdigit()  # 127.0.1 is neither
    return True


@dataclass(frozen=True, slots=True)
class Address:
    """Address of a daemon: a Unix socket's ``path``, or ``host`` and ``port``, with or without TLS."""

    path: str = ""
    host: str = ""
    port: int = 0
    tls: bool = False

    @classmethod
    def parse(cls, text: str) -> "Address":
        """``unix:/path``, ``tcp:host:port``, ``tls:host:port``, ``tcp:[v6]:port``; else a ValueError that says why."""
        kind, _, rest = text.partition(":")
        if kind == "unix":
            if not rest.startswith("/") or len(rest.encode("utf-8", "replace")) > 107:
                raise ValueError(f"{text!r}: unix: needs an absolute path of at most 107 bytes")
            if rest != rest.strip() or not rest.isprintable() or rest.endswith("/"):
                raise ValueError(f"{text!r}: unix: needs the path of a socket, without blanks at its end")
            return cls(path=rest)
        if kind not in ("tcp", "tls"):
            raise ValueError(f"{text!r}: a backend is unix:/path, tcp:host:port or tls:host:port")
        host, _, port = rest.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ValueError(f"{text!r}: write an IPv6 address in brackets, {kind}:[::1]:783")
        if not valid_host(host):
            raise ValueError(f"{text!r}: {kind}: needs a host, {kind}:host:port")
        if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65_536):
            raise ValueError(f"{text!r}: the port is a number from 1 to 65535")
        return cls(host=host, port=int(port), tls=kind == "tls")

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls' if self.tls else 'tcp'}:{host}:{self.port}"


def parse_listen(text: str) -> tuple[str, int] | None:
    """``host:port`` or ``[v6]:port``; None for ``off``. Port 0 is any free one. Raises ValueError that says why."""
    if text == "off":
        return None
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r}: write an IPv6 address in brackets, [::1]:9464")
    if not (colon and valid_host(host)):
        raise ValueError(f'{text!r}: expected "address:port" or "off"')
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 65_536):
        raise ValueError(f"{text!r}: the port is a number up to 65535")
    return host, int(port)
