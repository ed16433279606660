"""The frozen values that travel between the stages of the pipeline.

Addresses, headers and messages are bytes as received. Text for people is ``str``.
"""

import enum
import errno
import mmap
import os
from dataclasses import dataclass, field

import msgspec

from contentfilter.errors import Cause

BytesLike = bytes | bytearray | memoryview | mmap.mmap


class OriginKind(enum.Enum):
    """The kind of client that submits a message, which decides how far its environment is trusted (domain-spec 1.6)."""

    STRANGER = "stranger"
    RELAY = "relay"  # RELAYCLIENT is present
    AUTHENTICATED = "authenticated"
    LOCAL = "local"  # a uid that is neither the SMTP daemon nor qmail-send
    BOUNCE = "bounce"  # the uid of qmail-send


class Origin(msgspec.Struct, frozen=True):
    """Origin of a message: the credentials of the peer, and what its environment may claim."""

    kind: OriginKind
    uid: int
    pid: int = 0
    remote_ip: bytes = b""
    remote_host: bytes = b""
    helo: bytes = b""
    user: bytes = b""  # the authenticated name, when kind is AUTHENTICATED


RECIPIENTS_MAX = 100_000
"""Recipients of one message, whoever sends it."""


class Envelope(msgspec.Struct, frozen=True):
    """Sender and recipients exactly as the client gave them. Zero recipients are legal."""

    sender: bytes
    recipients: tuple[bytes, ...]
    surplus: int = 0  # recipients beyond ``recipients``: too many, so the message is not delivered

    @property
    def count(self) -> int:
        """Number of recipients that the client gave."""
        return len(self.recipients) + self.surplus


@dataclass(slots=True)
class Message:
    """The bytes of a message, from the descriptor that the hook passed; mapped where a copy would cost more.

    ``fd`` is open for reading, a regular file or memfd, and no other process can change it
    (sealed, or copied before trust). Close it when the answer has been sent.
    """

    fd: int
    size: int
    data: mmap.mmap | bytes

    def view(self) -> memoryview:
        """All bytes, which stay valid until the view is released, even if the message is closed meanwhile.

        For readers in a thread: reading ``data`` piece by piece would end early, without an error. Raises OSError
        when the message is closed already.
        """
        view = memoryview(self.data)
        if len(view) != self.size:
            view.release()
            raise OSError(errno.EBADF, "the message has been closed")
        return view

    def close(self) -> None:
        """Unmap and close. Safe to call twice."""
        if isinstance(self.data, mmap.mmap):
            try:
                self.data.close()
            except BufferError:
                pass  # a thread still reads it, through a view or in a cancelled scan; unmapped when that ends
        self.data = b""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Check(enum.Enum):
    """The two checks that a recipient can have. Each scanner belongs to one of them."""

    VIRUS = "virus"
    SPAM = "spam"


_CHECK_OF = {"signatures": Check.VIRUS, "loadertypes": Check.VIRUS, "clamd": Check.VIRUS, "spamd": Check.SPAM}


class Scanner(enum.Enum):
    """The scanners, each with its check. Their order is that of :data:`STAGES`: outcomes count in this order."""

    SIGNATURES = "signatures"  # chksignature
    LOADERTYPES = "loadertypes"  # chkloadertype
    CLAMD = "clamd"
    SPAMD = "spamd"

    def __init__(self, name: str) -> None:
        self.check = _CHECK_OF[name]


STAGES: tuple[tuple[Scanner, ...], ...] = (
    (Scanner.SIGNATURES, Scanner.LOADERTYPES),  # one pass over the message
    (Scanner.CLAMD,),
    (Scanner.SPAMD,),
)
"""The order in which scanners are asked, the cheapest first; those of one stage are asked together."""


class ScanStatus(enum.Enum):
    """Result of one scanner, in short."""

    CLEAN = "clean"
    FOUND = "found"
    SKIPPED = "skipped"  # by rule: no recipient has the check, or a skip rule applies
    UNCHECKED = "unchecked"  # requested, but not done: a fault or a limit


@dataclass(frozen=True, slots=True)
class ScanOutcome:
    """Result of one scanner for one message."""

    scanner: Scanner
    status: ScanStatus
    name: str = ""  # signature or rule that hit; printable ASCII
    detail: str = ""  # reason of a skip or fault; printable ASCII
    cause: Cause | None = None  # set when status is UNCHECKED
    backend: str = ""
    seconds: float = 0.0
    score: float | None = None  # spamd
    threshold: float | None = None  # spamd
    owner: bytes = b""  # spamd: of the preferences that it used, as the table names them; empty: of none
    database: str = ""  # clamd: its database before the scan, where known
    reused: str = ""  # "kept" or "shared": the result of an equal message
    rewritten: bytes = field(default=b"", repr=False)  # spamd HEADERS: header block; PROCESS: whole message


class Want(enum.Enum):
    """The part of spamd's answer that is needed (domain-spec 4.1)."""

    CHECK = "CHECK"  # verdict only
    HEADERS = "HEADERS"  # SpamAssassin's header block; the body stays as received
    PROCESS = "PROCESS"  # the whole rewritten message


class Action(enum.Enum):
    """Action for the whole message."""

    QUEUE = "queue"
    REJECT = "reject"
    DEFER = "defer"
    DROP = "drop"


class Reason(enum.Enum):
    """Reason of a refusal."""

    NONE = "none"
    VIRUS = "virus"
    SPAM = "spam"
    BANNED = "banned"
    SIZE = "size"


_PRINTABLE = bytes(b if 32 <= b < 127 else 63 for b in range(256))


def readable(data: BytesLike) -> str:
    """Printable ASCII for logs and texts: everything else becomes ``?``, as qmail-showctl does."""
    return bytes(data).translate(_PRINTABLE).decode("ascii")
