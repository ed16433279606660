"""Renders a disposition for the qmail-queue hook: bytes to prepend, bytes to skip, and an envelope per delivery."""

import mmap

from contentfilter.model import Message
from contentfilter.verdict.disposition import Delivery, Disposition, HeaderChange
from contentfilter.verdict.headers import HEADER_LIMIT, changed_block
from contentfilter.wire import envelope as envelope_format
from contentfilter.wire import hook


def render(disposition: Disposition, message: Message) -> hook.Answer:
    """The answer of the hook protocol. Raises LocalProtocolError for an address that no envelope can hold."""
    blocks: dict[int, tuple[bytes, int]] = {}  # by identity: the changes may be long, and shared by many deliveries
    submissions = tuple([_submission(delivery, message, blocks) for delivery in disposition.deliveries])
    return hook.Answer(disposition.action, disposition.reason, disposition.text, submissions)


def bytes_rendered(disposition: Disposition, message: Message, envelope: int) -> int:
    """Bytes that :func:`render` works on at most, for an envelope of ``envelope`` bytes."""
    header = min(message.size, HEADER_LIMIT)
    bodies = [
        header * bool(each.changes) if each.content is None else len(each.content) for each in disposition.deliveries
    ]
    return sum(bodies) + sum(len(field.field) for each in disposition.deliveries for field in each.added) + envelope


def _submission(delivery: Delivery, message: Message, blocks: dict[int, tuple[bytes, int]]) -> hook.Submission:
    envelope = delivery.envelope
    block = None if envelope is None else envelope_format.build(envelope.sender, envelope.recipients)
    parts = [each.field for each in delivery.added]
    if (content := delivery.content) is not None:
        header, skip = changed_block(content, delivery.changes) if delivery.changes else (b"", 0)
        return hook.Submission(b"".join((*parts, header, content[skip:])), message.size, block)
    skip = 0
    if delivery.changes:
        header, skip = _shared_block(message.data, delivery.changes, blocks)
        parts.append(header)
    return hook.Submission(b"".join(parts), skip, block)


def _shared_block(
    data: mmap.mmap | bytes, changes: tuple[HeaderChange, ...], blocks: dict[int, tuple[bytes, int]]
) -> tuple[bytes, int]:
    found = blocks.get(id(changes))
    if found is None:
        found = blocks[id(changes)] = changed_block(data, changes)
    return found
