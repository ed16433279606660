"""TLS for backends on other machines: certificates are always verified, and so is the name in them.

There is no setting that turns the verification off: who stands between could then read all mail and call all of
it ham. A context is made once for each configuration, never for a connection.
"""

import socket
import ssl
from dataclasses import dataclass
from typing import Any

from contentfilter.config.settings import Spamd
from contentfilter.errors import ConfigError, Problem


@dataclass(frozen=True, slots=True)
class Tls:
    """What a ``tls:`` backend needs: a context, and the name that its certificate must carry (empty: its host's)."""

    context: ssl.SSLContext
    name: str = ""


def client(config: Spamd, section: str = "spamd") -> Tls:
    """Raises ConfigError that names the key and the file."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    if config.tls_ca:
        context = _only(config.tls_ca, section)
    if config.tls_cert:
        try:
            context.load_cert_chain(config.tls_cert, config.tls_key or None, password=_no_password)
        except (OSError, ValueError) as error:
            # OpenSSL does not tell which of the two files it means.
            both = f"{config.tls_cert} with tls_key {config.tls_key or '(the same file)'}"
            raise _wrong(config.tls_cert, f"[{section}] tls_cert: {both}", error) from error
    return Tls(context, config.tls_name)


def _only(authorities: str, section: str) -> ssl.SSLContext:
    """A context that trusts these authorities and no others."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies certificate and name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        context.load_verify_locations(cafile=authorities)
    except (OSError, ValueError) as error:
        raise _wrong(authorities, f"[{section}] tls_ca: {authorities}", error) from error
    return context


def _no_password() -> str:
    raise ValueError("the key has a password, and nobody is there to type it")


def _wrong(path: str, what: str, error: Exception) -> ConfigError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    reason = getattr(error, "reason", None)
    known = {
        "NO_CERTIFICATE_OR_CRL_FOUND": "there is no certificate in it",
        "KEY_VALUES_MISMATCH": "certificate and key do not belong together",
    }
    if isinstance(error, ssl.SSLError) and reason not in known:
        why = "not PEM, or without the key"
    return ConfigError((Problem(path, 0, f"{what}: {known.get(str(reason), why)}"),))


def explain(error: ssl.SSLError, name: str) -> str:
    """What went wrong, for the log. ``name``: the one that the certificate should carry."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message.rstrip('.')} (expected is {name})"
    reason = (error.reason or "closed in the middle").lower().replace("_", " ")
    hint = "; does it speak TLS there?" if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE") else ""
    return f"TLS: {reason}{hint}"


class TlsSocket:
    """A connected socket under TLS with the few methods that the conversation uses.

    What cannot go on now is BlockingIOError, as with a plain socket. An end without TLS's own farewell is
    ConnectionResetError: somebody may have cut the answer short.
    """

    def __init__(self, sock: socket.socket, tls: Tls, host: str) -> None:
        self._name = tls.name or host
        self._sock = tls.context.wrap_socket(
            sock, server_hostname=self._name, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        self._ended = False

    @property
    def name(self) -> str:
        return self._name

    def fileno(self) -> int:
        return self._sock.fileno()

    def shake_hands(self) -> None:
        """One step. BlockingIOError: wait for the peer, then call again. Raises OSError; ssl.SSLError is one."""
        self._step(self._sock.do_handshake)

    def sendmsg(self, buffers: list[bytes | memoryview]) -> int:
        sent: int = self._step(self._sock.send, next(filter(len, buffers), b""))
        return sent

    def recv(self, size: int) -> bytes:
        if self._ended:
            return b""
        data: bytes = self._step(self._sock.recv, size)
        return data

    def shutdown(self, how: int) -> None:
        """Say that we send no more; the answer may still come."""
        try:
            self._sock.unwrap()
            self._ended = True  # the peer has said the same
        except (ssl.SSLError, OSError):
            pass  # sent, or it cannot be sent any more; what is there to be read tells which

    def close(self) -> None:
        self._sock.close()

    def _step(self, do: Any, *arguments: Any) -> Any:
        try:
            return do(*arguments)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            raise ConnectionResetError("closed in the middle of TLS") from error
