"""The frozen values that travel between the stages of the pipeline.

Addresses, headers and messages are bytes as they came. Text that people read is ``str``.
"""

import enum
import mmap
import os
from dataclasses import dataclass, field

import msgspec

from contentfilter.errors import Cause

BytesLike = bytes | bytearray | memoryview | mmap.mmap


class OriginKind(enum.Enum):
    """Who hands us the message, and how far their environment is believed (domain-spec 1.6)."""

    STRANGER = "stranger"
    RELAY = "relay"  # RELAYCLIENT is present
    AUTHENTICATED = "authenticated"
    LOCAL = "local"  # a uid that is neither the SMTP daemon nor qmail-send
    BOUNCE = "bounce"  # the uid of qmail-send


class Origin(msgspec.Struct, frozen=True):
    """Where a message comes from: the peer's credentials and what its environment may claim."""

    kind: OriginKind
    uid: int
    pid: int = 0
    remote_ip: bytes = b""
    remote_host: bytes = b""
    helo: bytes = b""
    user: bytes = b""  # the authenticated name, when kind is AUTHENTICATED


class Envelope(msgspec.Struct, frozen=True):
    """Sender and recipients exactly as the client gave them. Zero recipients are legal."""

    sender: bytes
    recipients: tuple[bytes, ...]


@dataclass(slots=True)
class Message:
    """The message's bytes, from the descriptor that the hook passed; mapped where a copy would cost more.

    ``fd`` is open for reading, a regular file or memfd, and nobody else can change it
    (sealed, or copied before trust). Close it when the answer is out.
    """

    fd: int
    size: int
    data: mmap.mmap | bytes

    def close(self) -> None:
        """Unmap and close. Safe to call twice."""
        if isinstance(self.data, mmap.mmap):
            try:
                self.data.close()
            except BufferError:
                pass  # a thread of a cancelled scan still reads; it is unmapped when that lets go
        self.data = b""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Scanner(enum.Enum):
    """The four that look at a message, in the order in which they are asked (cheapest first)."""

    SIGNATURES = "signatures"  # chksignature
    LOADERTYPES = "loadertypes"  # chkloadertype
    CLAMD = "clamd"
    SPAMD = "spamd"


class ScanStatus(enum.Enum):
    CLEAN = "clean"
    FOUND = "found"
    SKIPPED = "skipped"  # by rule: nobody wants it, or a skip rule applies
    UNCHECKED = "unchecked"  # wanted, but not done: a fault or a limit


@dataclass(frozen=True, slots=True)
class ScanOutcome:
    """What one scanner said about one message."""

    scanner: Scanner
    status: ScanStatus
    name: str = ""  # signature or rule that hit; printable ASCII
    detail: str = ""  # reason of a skip or fault; printable ASCII
    cause: Cause | None = None  # set when status is UNCHECKED
    backend: str = ""
    seconds: float = 0.0
    score: float | None = None  # spamd
    threshold: float | None = None  # spamd
    owner: bytes = b""  # spamd: whose preferences it went by, as the table names them; empty: nobody's
    database: str = ""  # clamd: one that it had before the scan, where known
    reused: str = ""  # "kept" or "shared": what was said about an equal message
    rewritten: bytes = field(default=b"", repr=False)  # spamd HEADERS: header block; PROCESS: whole message


class Want(enum.Enum):
    """How much of spamd's answer is needed (domain-spec 4.1)."""

    CHECK = "CHECK"  # verdict only
    HEADERS = "HEADERS"  # SpamAssassin's header block, body stays ours
    PROCESS = "PROCESS"  # the whole rewritten message


class Action(enum.Enum):
    """What happens to the whole message."""

    QUEUE = "queue"
    REJECT = "reject"
    DEFER = "defer"
    DROP = "drop"


class Reason(enum.Enum):
    """Why a message is refused."""

    NONE = "none"
    VIRUS = "virus"
    SPAM = "spam"
    BANNED = "banned"
    SIZE = "size"


_PRINTABLE = bytes(b if 32 <= b < 127 else 63 for b in range(256))


def readable(data: BytesLike) -> str:
    """Printable ASCII for logs and texts: everything else becomes ``?``, as qmail-showctl does."""
    return bytes(data).translate(_PRINTABLE).decode("ascii")
