"""The one error tree.

Scanners raise only :class:`BackendError`; codecs raise only :class:`ProtocolError`;
reading configuration raises only :class:`ConfigError`. The pipeline turns backend
errors into outcomes by the failure table. Whatever else escapes is a defect and
becomes a deferral at one boundary, never a permanent refusal.
"""

import enum
from dataclasses import dataclass


class ContentFilterError(Exception):
    """Root of everything that this package raises on purpose."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a file that a person wrote: where it is and what to do."""

    path: str
    line: int  # 1-based; 0 where no line applies (a missing file)
    text: str
    warning: bool = False  # it works, but perhaps not as meant

    def __str__(self) -> str:
        where = f"{self.path}:{self.line}" if self.line else self.path
        return f"{where}: {self.text}"


class ConfigError(ContentFilterError):
    """Configuration that must not go live. Carries every problem found, not only the first."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(str(p) for p in problems))
        self.problems = problems


class ProtocolError(ContentFilterError):
    """Bytes that do not follow a wire format."""


class LocalProtocolError(ProtocolError):
    """We were about to send something malformed: a defect on our side."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something malformed."""


class EnvelopeError(RemoteProtocolError):
    """An envelope that qmail-queue would refuse; ``status`` is the exit status it would give."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class MessageError(ContentFilterError):
    """A descriptor that cannot serve as a message (a pipe, a directory, write-only, growing …)."""


class Cause(enum.Enum):
    """Why a scanner gave no verdict. The failure table has one row for each."""

    DOWN = "down"  # nobody listens, or the connection was cut without an answer
    TIMEOUT = "timeout"
    BUSY = "busy"  # backlog full, or our own limit reached
    TOO_BIG = "too-big"
    LIMITS = "limits"  # the scanner stopped at one of its own limits: not scanned to the end
    BAD_REPLY = "bad-reply"
    RELOADING = "reloading"
    MEMORY = "memory"  # the scanner itself ran out of memory
    POISON = "poison"  # the message killed two workers: it is no longer examined
    BYPASSED = "bypassed"  # an operator ordered that it is not asked for a while


class BackendError(ContentFilterError):
    """A scanner that gave no verdict.

    ``backend`` names the endpoint (as configured), ``detail`` is printable text for the log.
    """

    def __init__(self, cause: Cause, backend: str, detail: str) -> None:
        super().__init__(f"{backend}: {cause.value}: {detail}")
        self.cause = cause
        self.backend = backend
        self.detail = detail


class UnresponsiveError(BackendError):
    """A backend that was asked shows no sign of life for longer than `[failure] patience`: nobody waits for it."""


class QuarantineError(ContentFilterError):
    """An entry of the quarantine that is not there, is damaged, or could not be released."""


class JournalError(ContentFilterError):
    """The journal could not be read or written. ``unusable``: and will not be until the file is replaced."""

    def __init__(self, text: str, *, unusable: bool = False) -> None:
        super().__init__(text)
        self.unusable = unusable


class RefusedError(ContentFilterError):
    """The request would break something, or cannot be done; the text says the remedy."""
