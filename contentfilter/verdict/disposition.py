"""Disposition: what happens to a message, for whom, and which header fields change; independent of the door.

A door renders it in its own protocol. doors/hook_answer.py renders it for the qmail-queue hook, which prepends bytes,
skips bytes of the original, and can deliver several forms of one message. A milter renders the same values:

    action, text       SMFIR_REPLYCODE or SMFIR_CONTINUE; DROP is SMFIR_DISCARD
    Delivery.envelope  SMFIR_DELRCPT for each recipient that is not in it, SMFIR_ADDRRCPT for one that is new
    AddHeader          SMFIR_INSHEADER; position 0 for the first, 1 for the second, ...
    RenameHeader       SMFIR_CHGHEADER with an empty value, and SMFIR_INSHEADER with the new name in its place
    ReplaceText        SMFIR_CHGHEADER with the field's value as it reads after the replacement
    Delivery.content   SMFIR_CHGHEADER for each field of the new header, SMFIR_REPLBODY
    withheld           SMFIR_DELRCPT

Offsets count from the start of the message, so a milter finds the field of an edit from the fields it has received.
A milter has one form of each message; it delivers the first and must hand any further form to a mail system itself.
"""

import msgspec

from contentfilter.model import Action, Envelope, Reason


class AddHeader(msgspec.Struct, frozen=True):
    """A new field in front of the message: ``Name: value``, perhaps folded, with its final LF."""

    field: bytes


class RenameHeader(msgspec.Struct, frozen=True):
    """The field that begins at ``at`` is called ``new`` in place of ``old``; its value stays.

    Behind a bare CR, where only some readers see a field begin, ``at`` is inside the value of another field.
    """

    at: int
    old: bytes
    new: bytes


class ReplaceText(msgspec.Struct, frozen=True):
    """The bytes ``old`` at ``at``, inside one field, become ``new``."""

    at: int
    old: bytes
    new: bytes


HeaderChange = RenameHeader | ReplaceText


class Delivery(msgspec.Struct, frozen=True):
    """One form of the message and its recipients. ``changes`` are in order of their offset and do not overlap.

    Deliveries with equal changes share one tuple, so a door can render it once.
    """

    envelope: Envelope | None = None  # None: as received
    added: tuple[AddHeader, ...] = ()
    changes: tuple[HeaderChange, ...] = ()
    content: bytes | None = None  # replaces the whole message, and ``changes`` refer to it; None: as received


class Disposition(msgspec.Struct, frozen=True):
    """The result for one message. ``text`` is for the SMTP client: printable ASCII, at most 250 bytes."""

    action: Action
    reason: Reason = Reason.NONE
    text: str = ""
    deliveries: tuple[Delivery, ...] = ()
    withheld: tuple[bytes, ...] = ()  # recipients for whom the message is kept in quarantine
