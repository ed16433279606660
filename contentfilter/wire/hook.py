"""Codec of the protocol between the hook and the daemon, version 1 (docs/hook-protocol.md).

One packet each way on a SEQPACKET socket: a request that comes with the descriptors of
message and envelope, an answer, and a report where the message was split. Little-endian,
fixed width. The other end of these formats is queue_hook/ask.c and commit.c.
"""

import struct
from dataclasses import dataclass

import msgspec

from contentfilter.errors import EnvelopeError, LocalProtocolError, RemoteProtocolError
from contentfilter.model import SUBMISSIONS_MAX, Action, Reason
from contentfilter.wire import envelope as envelope_format

VERSION = 1
PACKET_MAX = 65536  # an answer; a longer one passes its body in a descriptor
REQUEST_MAX = 32 + 32768  # a request; read with one byte more, to detect a longer one
ENVIRON_MAX = 32768
TEXT_MAX = 250
SENT = b"CONTENTFILTER_SENT"  # in the environment block, where daemons that do not know it ignore it
NEVER_STARTED = -1000  # a report's status for a submission that was not started

_REQUEST = struct.Struct("<4sHHIQQI")
_ANSWER = struct.Struct("<4sHBBHHB3xQ")
_SUBMISSION = struct.Struct("<IQQQ")
_REPORT = struct.Struct("<4sHH")
_RESULT = struct.Struct("<iB3x")
_AS_RECEIVED = 1
_BODY_IN_DESCRIPTOR = 1


ACTION_CODES = {Action.QUEUE: 1, Action.REJECT: 2, Action.DEFER: 3, Action.DROP: 4}
REASON_CODES = {Reason.NONE: 0, Reason.VIRUS: 1, Reason.SPAM: 2, Reason.BANNED: 3, Reason.SIZE: 4}
"""Only the dialect ``sqmail`` tells reasons apart, by its exit status."""
_ACTION_OF = {code: action for action, code in ACTION_CODES.items()}
_REASON_OF = {code: reason for reason, code in REASON_CODES.items()}


class Request(msgspec.Struct, frozen=True):
    """One offer of a message. ``budget``: seconds left for the answer."""

    attempt: int  # 0 for the first offer of a message, 1 for the second, ...
    budget: float
    message_size: int
    envelope_size: int
    environ: dict[bytes, bytes]  # of the hook's caller; the uid of the peer decides how far to trust it
    sent: float | None = None  # when it was sent, seconds of the monotonic clock; None: an older hook, or no number


class Submission(msgspec.Struct, frozen=True):
    """Input of one real qmail-queue: ``prepend`` + message[``skip``:], and an envelope."""

    prepend: bytes = b""
    skip: int = 0
    envelope: bytes | None = None  # None: as received


class Answer(msgspec.Struct, frozen=True):
    """The answer to a request. ``text`` (printable ASCII, at most 250 bytes, no leading letter) is for refusals."""

    action: Action
    reason: Reason = Reason.NONE
    text: str = ""
    submissions: tuple[Submission, ...] = ()


class EncodedAnswer(msgspec.Struct, frozen=True):
    """The packet, and the body that must go into a sealed memfd sent along (None: inside the packet)."""

    packet: bytes
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """Result of one submission: exit status, negated signal number, or NEVER_STARTED."""

    status: int
    committed: bool


@dataclass(frozen=True, slots=True)
class CommitReport:
    """Results of a message that was split, in the order of the answer."""

    results: tuple[Result, ...]


def decode_request(packet: bytes) -> Request:
    """Decode a request. Raises RemoteProtocolError for anything that the hook would not send."""
    try:
        magic, version, attempt, budget, message, envelope, length = _REQUEST.unpack_from(packet)
    except struct.error:
        raise RemoteProtocolError("request is too short") from None
    if magic != b"CFQ1" or version != VERSION:
        raise RemoteProtocolError("not a request of protocol version 1")
    environ: dict[bytes, bytes] = {}
    if length:
        block = packet[_REQUEST.size :]
        if length != len(block) or length > ENVIRON_MAX or block[-1]:
            raise RemoteProtocolError("request with a broken environment")
        for variable in block[:-1].split(b"\0"):
            name, equals, value = variable.partition(b"=")
            if not name or not equals:
                raise RemoteProtocolError("request with a variable that is none")
            environ[name] = value
    elif len(packet) != _REQUEST.size:
        raise RemoteProtocolError("request with something behind it")
    clock = environ.pop(SENT, b"")
    sent = int(clock) / 1000 if len(clock) < 16 and clock.isdigit() else None
    return Request(attempt, budget / 1000, message, envelope, environ, sent)


def encode_request(request: Request) -> bytes:
    """Encode a request, for tests and tools; the hook builds its own."""
    block = b"".join(b"%b=%b\0" % item for item in request.environ.items())
    if request.sent is not None:
        block = b"%b=%d\0" % (SENT, round(request.sent * 1000)) + block
    if len(block) > ENVIRON_MAX:
        raise LocalProtocolError("environment over 32 KiB")
    milliseconds = round(request.budget * 1000)
    head = (b"CFQ1", VERSION, request.attempt, milliseconds, request.message_size, request.envelope_size, len(block))
    try:
        return _REQUEST.pack(*head) + block
    except struct.error as error:
        raise LocalProtocolError(f"request out of range: {error}") from None


def encode_answer(answer: Answer) -> EncodedAnswer:
    """Encode an answer. Raises LocalProtocolError for one that the hook would not accept."""
    text = answer.text.encode("ascii", "replace")
    if len(text) > TEXT_MAX or any(not 32 <= byte < 127 for byte in text):
        raise LocalProtocolError("text of an answer: printable ASCII, at most 250 bytes")
    count = len(answer.submissions)
    if (answer.action is Action.QUEUE) != bool(count) or count > SUBMISSIONS_MAX:
        raise LocalProtocolError(f"{answer.action.name} with {count} submissions")
    body = b"".join(map(_encode_submission, answer.submissions))
    apart = _ANSWER.size + len(text) + len(body) > PACKET_MAX
    flags = _BODY_IN_DESCRIPTOR if apart else 0
    head = _ANSWER.pack(
        b"CFA1", VERSION, ACTION_CODES[answer.action], REASON_CODES[answer.reason], len(text), count, flags, len(body)
    )
    return EncodedAnswer(head + text, body) if apart else EncodedAnswer(head + text + body)


def _encode_submission(submission: Submission) -> bytes:
    if submission.skip < 0:
        raise LocalProtocolError("submission that skips less than nothing")
    flags = _AS_RECEIVED if submission.envelope is None else 0
    envelope = submission.envelope or b""
    head = _SUBMISSION.pack(flags, submission.skip, len(submission.prepend), len(envelope))
    return head + submission.prepend + envelope


def decode_answer(packet: bytes, body: bytes | None = None) -> Answer:
    """Decode an answer as the hook does, for tests and tools; ``body`` is the content of the descriptor."""
    try:
        magic, version, action, reason, text_size, count, flags, length = _ANSWER.unpack_from(packet)
        answered = _ACTION_OF[action]
        why = _REASON_OF[reason]
    except (struct.error, KeyError):
        raise RemoteProtocolError("answer is too short or unknown") from None
    if magic != b"CFA1" or version != VERSION or flags > 1 or bool(flags) != (body is not None):
        raise RemoteProtocolError("not an answer of protocol version 1")
    start = _ANSWER.size + text_size
    text = packet[_ANSWER.size : start]
    block = packet[start:] if body is None else body
    if text_size > TEXT_MAX or start > len(packet) or (body is not None and start != len(packet)):
        raise RemoteProtocolError("answer with a broken text")
    if any(not 32 <= byte < 127 for byte in text):
        raise RemoteProtocolError("answer with unprintable text")
    if len(block) != length or (answered is Action.QUEUE) != bool(count) or count > SUBMISSIONS_MAX:
        raise RemoteProtocolError("answer with a broken body")
    submissions = []
    at = 0
    for _ in range(count):
        submission, at = _decode_submission(block, at)
        submissions.append(submission)
    if at != len(block):
        raise RemoteProtocolError("answer with something behind it")
    return Answer(answered, why, text.decode("ascii"), tuple(submissions))


def _decode_submission(block: bytes, at: int) -> tuple[Submission, int]:
    try:
        flags, skip, prepend, envelope = _SUBMISSION.unpack_from(block, at)
    except struct.error:
        raise RemoteProtocolError("answer with a cut submission") from None
    middle = at + _SUBMISSION.size + prepend
    end = middle + envelope
    if flags > 1 or end > len(block) or (flags and envelope):
        raise RemoteProtocolError("answer with a broken submission")
    given = None if flags else block[middle:end]
    if given is not None:
        try:
            envelope_format.parse(given)
        except EnvelopeError as error:
            raise RemoteProtocolError(f"answer with a bad envelope: {error}") from None
        if given.find(b"\0\0") != len(given) - 2:  # from a client the hook accepts more
            raise RemoteProtocolError("answer with an envelope that does not end with its final NUL")
    return Submission(block[at + _SUBMISSION.size : middle], skip, given), end


def encode_report(report: CommitReport) -> bytes:
    """Encode a report, for tests and tools."""
    head = _REPORT.pack(b"CFR1", VERSION, len(report.results))
    return head + b"".join(_RESULT.pack(r.status, r.committed) for r in report.results)


def decode_report(packet: bytes) -> CommitReport:
    """Decode a report. Raises RemoteProtocolError for anything that the hook would not send."""
    try:
        magic, version, count = _REPORT.unpack_from(packet)
    except struct.error:
        raise RemoteProtocolError("report is too short") from None
    if magic != b"CFR1" or version != VERSION or len(packet) != _REPORT.size + count * _RESULT.size:
        raise RemoteProtocolError("not a report of protocol version 1")
    pairs = _RESULT.iter_unpack(packet[_REPORT.size :])
    return CommitReport(tuple(Result(status, bool(committed)) for status, committed in pairs))
