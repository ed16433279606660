"""Codec of qmail-queue's envelope: ``F`` sender NUL, ``T`` recipient NUL for each recipient, one NUL more.

Source: qmail-queue(8). An address has at most 1002 bytes. SPAMCONTROL and s/qmail may put
a record ``Q`` behind the recipients; it is read and dropped. Bytes after the final NUL are
ignored. The hook (queue_hook/envelope.c) reads the same grammar.

Worst case: memory for the limit of recipients and one window; time linear in the bytes, and no single call of the
interpreter works on more than a window, so that parsing in a thread does not hold up the event loop.
"""

from contentfilter.errors import EnvelopeError, LocalProtocolError
from contentfilter.model import RECIPIENTS_MAX, Envelope

ADDRESS_MAX = 1002
SURPLUS_KEPT = 1000
"""Recipients that are read of an envelope with too many of them, for log and journal."""

ENVELOPE_COPIES, RECIPIENT_COST = 10, 1000  # bytes for each byte, and for each recipient
TOO_LONG = 11
INCOMPLETE = 54
WRONG_LETTER = 91
_WINDOW = 65_536  # bytes; more than one record


def parse(data: bytes | memoryview, limit: int = RECIPIENTS_MAX) -> Envelope:
    """Read an envelope in one pass. Of more than ``limit`` recipients some are read, and the rest only counted.

    Raises EnvelopeError with the status that qmail-queue would give: 11 for an address over
    1002 bytes, 91 for a wrong letter, 54 where the final NUL is missing.
    """
    head = bytes(data[: ADDRESS_MAX + 2])
    if head[:1] not in (b"F", b""):
        raise EnvelopeError("envelope starts with a wrong letter", WRONG_LETTER)
    sender, complete, _ = head[1:].partition(b"\0")
    if not complete:
        raise _unfinished(head, b"F")
    recipients: list[bytes] = []
    surplus, at, letter = 0, len(sender) + 2, b"F"
    while True:
        window = bytes(data[at : at + _WINDOW])
        if window[:1] == b"\0" or (not window and letter == b"Q"):  # some callers end an empty Q with the final NUL
            return Envelope(sender, tuple(recipients), surplus)
        end = window.find(b"\0\0")
        block = window[: end if end >= 0 else max(0, window.rfind(b"\0"))]
        if not block:
            raise _unfinished(window, b"TQ")
        at += len(block) + 1
        letter = block[block.rfind(b"\0") + 1 :]
        if surplus:
            surplus += block.startswith(b"T") + block.count(b"\0T")
            continue
        recipients += _recipients(block)
        if len(recipients) > limit:
            surplus = max(0, len(recipients) - SURPLUS_KEPT)
            del recipients[SURPLUS_KEPT:]


def _recipients(block: bytes) -> list[bytes]:
    """The recipients in a block of whole records, without the last one's NUL."""
    if block.startswith(b"T") and block.count(b"\0") == block.count(b"\0T"):
        found = block[1:].split(b"\0T")
        if max(map(len, found)) <= ADDRESS_MAX:
            return found
    records = block.split(b"\0")
    for record in records:
        if record[0] not in b"TQ":
            raise EnvelopeError("envelope record starts with a wrong letter", WRONG_LETTER)
        if len(record) > ADDRESS_MAX + 1:
            raise EnvelopeError(f"envelope with an address of {len(record) - 1} bytes", TOO_LONG)
    return [record[1:] for record in records if record[0] == 0x54]  # T


def _unfinished(record: bytes, letters: bytes) -> EnvelopeError:
    """The fault of a record without its NUL, of which the first bytes are here."""
    if record and record[0] not in letters:
        return EnvelopeError("envelope record starts with a wrong letter", WRONG_LETTER)
    if len(record) > ADDRESS_MAX + 1:
        return EnvelopeError(f"envelope with an address over {ADDRESS_MAX} bytes", TOO_LONG)
    return EnvelopeError("envelope without its final NUL: the client went away", INCOMPLETE)


def memory_cost(size: int) -> int:
    """Bytes of memory that a worker may need for an envelope of ``size`` bytes; measured, see docs/limits.md."""
    return ENVELOPE_COPIES * size + RECIPIENT_COST * min(size // 2, RECIPIENTS_MAX)


def build(sender: bytes, recipients: tuple[bytes, ...] | list[bytes]) -> bytes:
    """The bytes of an envelope. Raises LocalProtocolError for an address that no envelope can hold."""
    addresses = (sender, *recipients)
    block = b"F" + b"\0T".join(addresses) + b"\0\0"
    if max(map(len, addresses)) > ADDRESS_MAX or block.count(b"\0") != len(addresses) + 1:
        wrong = next(address for address in addresses if len(address) > ADDRESS_MAX or b"\0" in address)
        raise LocalProtocolError(f"not an envelope address: {wrong[:80]!r}")
    return block
