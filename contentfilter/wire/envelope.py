"""Codec of qmail-queue's envelope: ``F`` sender NUL, ``T`` recipient NUL for each recipient, one NUL more.

Source: qmail-queue(8). An address has at most 1002 bytes. SPAMCONTROL and s/qmail may put
a record ``Q`` behind the recipients; it is read and dropped. Bytes after the final NUL are
ignored. The hook (queue_hook/envelope.c) reads the same grammar.
"""

from contentfilter.errors import EnvelopeError, LocalProtocolError
from contentfilter.model import Envelope

ADDRESS_MAX = 1002

TOO_LONG = 11
INCOMPLETE = 54
WRONG_LETTER = 91


def parse(data: bytes | memoryview) -> Envelope:
    """Read an envelope in one pass.

    Raises EnvelopeError with the status that qmail-queue would give: 11 for an address over
    1002 bytes, 91 for a wrong letter, 54 where the final NUL is missing.
    """
    data = bytes(data)
    # Each record starts with a letter, so the first two NULs in a row are the end.
    end = data.find(b"\0\0")
    if end < 0 and data.endswith(b"\0Q\0"):
        end = len(data) - 1  # a caller that ends its Q record only with the final NUL
    if end < 0:
        raise _fault(data.split(b"\0"), complete=False)
    records = data[:end].split(b"\0")
    recipients = tuple([record[1:] for record in records[1:] if record[0] == 0x54])  # T
    if (
        records[0][:1] != b"F"
        or max(map(len, records)) > ADDRESS_MAX + 1
        or (len(recipients) + 1 != len(records) and any(r[0] not in b"TQ" for r in records[1:]))
    ):
        raise _fault(records, complete=True)
    return Envelope(sender=records[0][1:], recipients=recipients)


def _fault(records: list[bytes], *, complete: bool) -> EnvelopeError:
    """The first thing wrong, in the order in which qmail-queue would meet it."""
    for index, record in enumerate(records):
        if not record and index == len(records) - 1:  # the input ended where a letter belongs
            break
        if not record or record[0] not in (b"TQ" if index else b"F"):
            return EnvelopeError(f"envelope record {index} starts with a wrong letter", WRONG_LETTER)
        if len(record) - 1 > ADDRESS_MAX:
            return EnvelopeError(f"address of {len(record) - 1} bytes in envelope record {index}", TOO_LONG)
    if complete:
        return EnvelopeError("envelope starts with a wrong letter", WRONG_LETTER)
    return EnvelopeError("envelope without its final NUL: the client went away", INCOMPLETE)


def build(sender: bytes, recipients: tuple[bytes, ...] | list[bytes]) -> bytes:
    """The bytes of an envelope. Raises LocalProtocolError for an address that no envelope can hold."""
    addresses = (sender, *recipients)
    block = b"F" + b"\0T".join(addresses) + b"\0\0"
    if max(map(len, addresses)) > ADDRESS_MAX or block.count(b"\0") != len(addresses) + 1:
        wrong = next(address for address in addresses if len(address) > ADDRESS_MAX or b"\0" in address)
        raise LocalProtocolError(f"not an envelope address: {wrong[:80]!r}")
    return block
