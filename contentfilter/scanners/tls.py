"""TLS for backends on other machines: certificates are always verified, and so is the name in them.

There is no setting that turns the verification off: who stands between could then read all mail and call all of
it ham. A context is made once for each configuration, never for a connection.
"""

import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass

from contentfilter.errors import ConfigError, Problem
from contentfilter.settings import SpamdSettings

PIECE = 65_536  # bytes that are encrypted or received at once


@dataclass(frozen=True, slots=True)
class Tls:
    """What a ``tls:`` backend needs: a context, and the name that its certificate must carry (empty: its host's)."""

    context: ssl.SSLContext
    name: str = ""


def tls_for(config: SpamdSettings) -> Tls | None:
    """None where no backend speaks TLS. Raises ConfigError."""
    return client(config) if any(backend.startswith("tls:") for backend in config.backends) else None


def client(config: SpamdSettings, section: str = "spamd") -> Tls:
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
    ConnectionResetError: somebody may have cut the answer short. OpenSSL works on memory here, because its farewell on
    a socket also reads, and would throw away an answer that is there already.
    """

    def __init__(self, sock: socket.socket, tls: Tls, host: str) -> None:
        self._sock = sock
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = tls.context.wrap_bio(self._in, self._out, server_hostname=tls.name or host)
        self._unsent = b""  # encrypted, but not yet taken by the socket

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def unsent(self) -> bool:
        return bool(self._unsent or self._out.pending)

    def shake_hands(self) -> None:
        """BlockingIOError: wait for the peer, then call again. Raises OSError; ssl.SSLError is one."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._push()
                self._pull()
            except ssl.SSLEOFError as error:
                raise ConnectionResetError("closed in the TLS handshake") from error
            except ssl.SSLError:
                self._push()  # the alert tells the other side what is wrong
                raise
            else:
                self._push()
                return

    def sendmsg(self, buffers: list[bytes | memoryview]) -> int:
        self._push()
        if self._unsent:
            raise BlockingIOError
        buffer = next(filter(len, buffers), b"")
        sent = self._tls.write(buffer[:PIECE]) if buffer else 0
        self._push()
        return sent

    def recv(self, size: int) -> bytes:
        with suppress(OSError):  # who takes no more may still have answered
            self._push()
        while True:
            try:
                return self._tls.read(size)
            except ssl.SSLWantReadError:
                self._pull()
            except ssl.SSLEOFError as error:
                raise ConnectionResetError("closed in the middle of TLS") from error

    def shutdown(self, how: int) -> None:
        """Say that we send no more; the answer may still come."""
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # it waits for the peer's farewell, which comes behind the answer
        self._push()

    def close(self) -> None:
        self._sock.close()

    def _push(self) -> None:
        """Send what is encrypted, as far as the socket takes it."""
        try:
            while self.unsent:
                self._unsent = self._unsent or self._out.read()
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except BlockingIOError:
            pass

    def _pull(self) -> None:
        """Take what has arrived. BlockingIOError: nothing."""
        data = self._sock.recv(PIECE)
        if data:
            self._in.write(data)
        else:
            self._in.write_eof()
