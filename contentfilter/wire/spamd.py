"""Codec of spamd's requests and responses, without I/O.

Theory. One request per connection: a line, headers, an empty line, the message, end of input.
The response is a status line; a failure ends there, and so does PING's answer (what follows is
ignored). A success goes on with headers in any order and case, and an empty line; a body follows
when Content-length says so. A body counts only when it is complete and nothing follows.

Sources: SpamAssassin's PROTOCOL text (SPAMC/1.5) and the answers of spamd 4.0 to experiments.
"""

import re
from dataclasses import dataclass

from contentfilter.errors import Cause, LocalProtocolError, RemoteProtocolError
from contentfilter.wire.buffer import ReceiveBuffer, printable

COMMANDS = frozenset({"CHECK", "HEADERS", "PROCESS", "SYMBOLS", "PING"})
USER_LIMIT = 1024
LINE_LIMIT = 4096
HEADER_LIMIT = 64  # header lines in a response

_WITH_BODY = frozenset({"HEADERS", "PROCESS", "SYMBOLS"})
_LF = re.compile(rb"\n")
_STATUS = re.compile(rb"SPAMD/\d{1,3}\.\d{1,3} +(\d{1,3})(?: +(.*))?", re.DOTALL)
_HEADER = re.compile(rb"([A-Za-z0-9-]+):(.*)", re.DOTALL)
_NUMBER = rb"(-?\d{1,9}(?:\.\d{1,9})?)"
_SPAM = re.compile(rb"(true|false|yes|no)\s*;\s*" + _NUMBER + rb"\s*/\s*" + _NUMBER, re.IGNORECASE)
_LENGTH = re.compile(rb"\d{1,12}")

# sysexits(3) as spamd uses them, without 0 (success).
_CAUSES = {
    64: Cause.BAD_REPLY,  # usage
    65: Cause.BAD_REPLY,  # data
    66: Cause.BAD_REPLY,  # no input
    67: Cause.BAD_REPLY,  # no such user
    68: Cause.DOWN,  # no such host
    69: Cause.DOWN,  # unavailable: its preferences' database, zlib missing
    70: Cause.BAD_REPLY,  # internal error
    71: Cause.DOWN,  # the system refused, e.g. fork
    72: Cause.DOWN,
    73: Cause.DOWN,
    74: Cause.DOWN,
    75: Cause.BUSY,  # "try again later"
    76: Cause.BAD_REPLY,  # it did not understand the request
    77: Cause.DOWN,  # no permission
    78: Cause.DOWN,  # its configuration
    79: Cause.TIMEOUT,
}


def cause(code: int, text: str = "") -> Cause:
    """The cause of a response without a verdict, from its code (not 0) and text."""
    if "memory" in text.lower():
        return Cause.MEMORY
    return _CAUSES.get(code, Cause.BAD_REPLY)


def usable_user(user: bytes) -> bool:
    """True if this name may be in a ``User:`` header: not empty, not long, no control characters."""
    return 0 < len(user) <= USER_LIMIT and min(user) >= 32 and 127 not in user


def request(command: str, size: int, *, user: bytes = b"", compress: bool = False) -> bytes:
    """The request line and headers. ``size``: bytes of the body that will follow, after compression.

    Raises LocalProtocolError for an unknown command and for values that could end a line.
    """
    if command not in COMMANDS:
        raise LocalProtocolError(f"{command!r} is not a command that this program gives to spamd")
    if user and not usable_user(user):
        raise LocalProtocolError("a user name with control characters, or too long")
    if size < 0:
        raise LocalProtocolError("a body of negative size")
    lines = [command.encode("ascii") + b" SPAMC/1.5"]
    if command != "PING":
        lines.append(b"Content-length: %d" % size)
        if user:
            lines.append(b"User: " + user)
        if compress:
            lines.append(b"Compress: zlib")
    return b"\r\n".join((*lines, b"", b""))


@dataclass(frozen=True, slots=True)
class Response:
    """A response of spamd. With ``code`` 0 (success), spam, score and threshold are valid, except for PING."""

    code: int
    text: str  # printable ASCII
    spam: bool = False
    score: float = 0.0
    threshold: float = 0.0
    body: bytes = b""


class ResponseReader:
    """Reader of one response: feed it bytes, or the end of input, until it returns the event.

    ``max_body``: largest body in bytes; a longer one is refused as soon as it is announced.
    """

    __slots__ = ("_buffer", "_command", "_head", "_length", "_lines", "_max_body", "_spam", "_status")

    def __init__(self, command: str, max_body: int) -> None:
        self._buffer = ReceiveBuffer()
        self._command = command
        self._max_body = max_body
        self._status: tuple[int, str] | None = None
        self._lines = 0
        self._length: int | None = None
        self._spam: tuple[bool, float, float] | None = None
        self._head = True  # still reading the head

    def feed(self, data: bytes) -> Response | None:
        """The response, or None while it is incomplete. Errors: RemoteProtocolError."""
        self._buffer.feed(data)
        while self._head:
            line = self._buffer.line(_LF, LINE_LIMIT)
            if line is None:
                return None
            early = self._read_line(line.removesuffix(b"\r"))
            if early is not None:
                return early
        body = self._buffer.take(self._length or 0)
        if body is None:
            return None
        if len(self._buffer):
            raise RemoteProtocolError(f"{len(self._buffer)} bytes after the end of the response")
        if self._status is None or self._spam is None:
            raise RemoteProtocolError("no status or no verdict")
        code, text = self._status
        spam, score, threshold = self._spam
        return Response(code, text, spam, score, threshold, body)

    def end(self) -> Response:
        """The peer closed before the response was whole: always RemoteProtocolError."""
        if self._status is None and not len(self._buffer):
            raise RemoteProtocolError("closed without an answer")
        if not self._head:
            raise RemoteProtocolError(f"body cut off: {len(self._buffer)} of {self._length} bytes")
        raise RemoteProtocolError("head of the response cut off")

    def _read_line(self, line: bytes) -> Response | None:
        if self._status is None:
            match = _STATUS.fullmatch(line)
            if match is None:
                raise RemoteProtocolError(f"not a response: {printable(line)!r}")
            self._status = (int(match[1]), printable(match[2] or b""))
            if self._status[0] or self._command == "PING":
                return Response(*self._status)
        elif line:
            self._lines += 1
            if self._lines > HEADER_LIMIT:
                raise RemoteProtocolError(f"more than {HEADER_LIMIT} header lines")
            self._read_header(line)
        else:
            self._end_head()
        return None

    def _read_header(self, line: bytes) -> None:
        match = _HEADER.fullmatch(line)
        if match is None:
            raise RemoteProtocolError(f"not a header: {printable(line)!r}")
        name, value = match[1].lower(), match[2].strip(b" \t")
        if name == b"content-length":
            if self._length is not None or _LENGTH.fullmatch(value) is None or int(value) > self._max_body:
                raise RemoteProtocolError(f"bad or second Content-length: {printable(value)!r}")
            self._length = int(value)
        elif name == b"spam":
            spam = _SPAM.fullmatch(value)
            if self._spam is not None or spam is None:
                raise RemoteProtocolError(f"bad or second Spam header: {printable(value)!r}")
            self._spam = (spam[1].lower() in (b"true", b"yes"), float(spam[2]), float(spam[3]))

    def _end_head(self) -> None:
        if self._spam is None:
            raise RemoteProtocolError("no Spam header")
        if self._length is None and self._command in _WITH_BODY:
            raise RemoteProtocolError("no Content-length")
        self._head = False
