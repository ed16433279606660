"""TLS contexts for backends on other machines: certificates are always verified, and so is the name in them.

There is no setting that turns the verification off: a man in the middle could then read all mail and call all of it
ham. A context is made once for each configuration, never for a connection.
"""

import asyncio
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass

from contentfilter.errors import ConfigError, Problem
from contentfilter.settings import SpamdSettings

PIECE = 65_536  # bytes encrypted or received in one step
HANDSHAKE = 262_144  # bytes of the peer's handshake; certificates take a few thousand


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS parameters of a ``tls:`` backend: the context, and the name in its certificate (empty: the host's)."""

    context: ssl.SSLContext
    name: str = ""


def tls_for(config: SpamdSettings) -> Tls | None:
    """The parameters, or None if no backend speaks TLS. Raises ConfigError."""
    return client(config) if any(backend.startswith("tls:") for backend in config.backends) else None


def client(config: SpamdSettings, section: str = "spamd") -> Tls:
    """A client's parameters. Raises ConfigError that names the key and the file."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    if config.tls_ca:
        context = _only(config.tls_ca, section)
    if config.tls_cert:
        try:
            context.load_cert_chain(config.tls_cert, config.tls_key or None, password=_no_password)
        except (OSError, ValueError) as error:
            # OpenSSL does not say which of the two files it means.
            both = f"{config.tls_cert} with tls_key {config.tls_key or '(the same file)'}"
            raise _wrong(config.tls_cert, f"[{section}] tls_cert: {both}", error) from error
    return Tls(context, config.tls_name)


def _only(authorities: str, section: str) -> ssl.SSLContext:
    """A context that trusts only these authorities."""
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
    """Text of a TLS error for the log. ``name``: the expected name in the certificate."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message.rstrip('.')} (expected is {name})"
    reason = (error.reason or "closed in the middle").lower().replace("_", " ")
    hint = "; does it speak TLS there?" if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE") else ""
    return f"TLS: {reason}{hint}"


class TlsConnection:
    """A connected socket under TLS.

    OpenSSL works on memory: its close_notify on a socket also reads, and would discard an answer that is there
    already. One task may send while another receives.
    """

    def __init__(self, sock: socket.socket, tls: Tls, host: str) -> None:
        """Raises ValueError if ``host`` cannot be the name in a certificate."""
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = tls.context.wrap_bio(self._in, self._out, server_hostname=tls.name or host)

    async def handshake(self) -> None:
        """Raises OSError; ssl.SSLError is one."""
        read = 0
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                if read > HANDSHAKE:
                    raise OSError("TLS: the handshake is too long") from None
                await self._flush()
                read += await self._fill()
            except ssl.SSLEOFError as error:
                raise ConnectionResetError("closed in the TLS handshake") from error
            except ssl.SSLError:
                await self._flush()  # the alert tells the other side what is wrong
                raise
            else:
                return await self._flush()

    async def send(self, batch: tuple[bytes | memoryview, ...]) -> None:
        for buffer in batch:
            for start in range(0, len(buffer), PIECE):
                self._tls.write(buffer[start : start + PIECE])
                await self._flush()

    async def receive(self) -> bytes:
        """Empty at the end. An end without TLS's close_notify is ConnectionResetError: it may have been cut."""
        while True:
            try:
                return self._tls.read(PIECE)
            except ssl.SSLWantReadError:
                await self._fill()
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLEOFError as error:
                raise ConnectionResetError("closed in the middle of TLS") from error

    async def end_sending(self) -> None:
        """Send close_notify; the answer may still come."""
        with suppress(ssl.SSLError):  # it waits for the peer's, which comes after the answer
            self._tls.unwrap()
        await self._flush()

    def abort(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    async def _flush(self) -> None:
        """Send what is encrypted."""
        if self._out.pending:
            await self._loop.sock_sendall(self._sock, self._out.read())

    async def _fill(self) -> int:
        """Wait for more from the peer; returns its bytes."""
        data = await self._loop.sock_recv(self._sock, PIECE)
        await asyncio.sleep(0)  # a peer that floods must not hold the loop
        if data:
            self._in.write(data)
        else:
            self._in.write_eof()
        return len(data)
