"""The header lines that a delivery gets, and what changes in the ones that were there.

The result is ``prepend`` and ``skip``: the delivered message is ``prepend`` followed by the original
from byte ``skip`` on. As long as nothing that exists must change, ``skip`` is 0 and every byte of the
original stays. Two things make the header block be rewritten: a subject tag on spam, and forged copies
of our own headers, which are renamed. The body is never touched here.
"""

import mmap
import re
from collections.abc import Iterable

from contentfilter.model import readable

HEADER_LIMIT = 1 << 20
"""Bytes at the start of a message in which the header block is looked for."""

MESSAGE_ID_MAX = 250

_MESSAGE_ID = re.compile(rb"^Message-ID[ \t]*:[ \t\r]*(?:\n[ \t]+)?([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
_OURS = re.compile(rb"^X-(ContentFilter|Virus-|Spam-)[!-9;-~]*(?=[ \t]*:)", re.IGNORECASE | re.MULTILINE)
_FLAG = re.compile(rb"^X-Spam-Flag:[^\n]*\n", re.IGNORECASE | re.MULTILINE)
_STATUS = re.compile(rb"^(X-Spam-Status:[ \t]*)(Yes|No)\b([^\n]*)", re.IGNORECASE | re.MULTILINE)
_REQUIRED = re.compile(rb" required=[0-9.+-]+")
_SUBJECT = re.compile(rb"^(Subject[ \t]*:)([^\n]*(?:\n[ \t][^\n]*)*)", re.IGNORECASE | re.MULTILINE)
_FIELD = re.compile(rb"^([!-9;-~]+)[ \t]*:[^\n]*(?:\n[ \t][^\n]*)*\n?", re.MULTILINE)


def header_block(data: mmap.mmap | bytes) -> bytes:
    """The header of a message: everything before the empty line, with the last field's line end.

    A message that begins with an empty line has none. Where no empty line comes within HEADER_LIMIT,
    the block ends at the last whole line inside it.
    """
    if data[:1] == b"\n" or data[:2] == b"\r\n":
        return b""
    end = data.find(b"\n\n", 0, HEADER_LIMIT)
    earlier = data.find(b"\n\r\n", 0, end + 2 if end >= 0 else HEADER_LIMIT)
    if (end := earlier if earlier >= 0 else end) >= 0:
        return bytes(data[: end + 1])
    head = bytes(data[:HEADER_LIMIT])
    return head if len(head) < HEADER_LIMIT else head[: head.rfind(b"\n") + 1]


def message_id(block: bytes) -> str:
    """The Message-ID in a header block, readable, cut at MESSAGE_ID_MAX; empty when there is none."""
    at = block.find(b"\nMessage-I")  # as nearly everybody writes it: many times faster than to try every line
    field = (_MESSAGE_ID.match(block, at + 1) if at >= 0 else None) or _MESSAGE_ID.search(block)
    return readable(field.group(1)[:MESSAGE_ID_MAX]).rstrip() if field else ""


def spam_lines(block: bytes) -> bytes:
    """SpamAssassin's own fields (X-Spam-…) out of the header block that its HEADERS command returned."""
    text = block.replace(b"\r\n", b"\n")
    fields = (m.group(0) for m in _FIELD.finditer(text) if m.group(1)[:7].lower() == b"x-spam-")
    return b"".join(field if field.endswith(b"\n") else field + b"\n" for field in fields)


def overruled(fields: bytes, found: bool) -> bytes:
    """SpamAssassin's fields with the verdict of a recipient's own threshold in place of its own."""
    kept = _FLAG.sub(b"", fields)
    kept = _STATUS.sub(lambda m: m.group(1) + (b"Yes" if found else b"No") + _REQUIRED.sub(b"", m.group(3)), kept)
    return b"X-Spam-Flag: YES\n" + kept if found else kept


def compose(
    original: mmap.mmap | bytes, lines: Iterable[bytes], claimed: frozenset[bytes], subject_tag: bytes = b""
) -> tuple[bytes, int]:
    """``lines`` (each with its line end) in front of ``original``, forged copies of our fields renamed.

    ``claimed`` says which families of fields speak for us in this delivery (b"contentfilter",
    b"virus-", b"spam-"): only those are renamed, to ``X-Received-X-…``. ``subject_tag`` is put in
    front of the subject unless it is there already; a missing Subject is added.
    Returns (prepend, skip).
    """

    def rename(field: re.Match[bytes]) -> bytes:
        return b"X-Received-" + field.group(0) if field.group(1).lower() in claimed else field.group(0)

    ours = b"".join(lines)
    block = header_block(original)
    renamed = _OURS.sub(rename, block)
    if subject_tag:
        renamed = _tagged(renamed, subject_tag)
    if renamed == block:
        return ours, 0
    return ours + renamed, len(block)


def _tagged(block: bytes, tag: bytes) -> bytes:
    found = _SUBJECT.search(block)
    if found is None:
        gap = b"" if not block or block.endswith(b"\n") else b"\n"
        return block + gap + b"Subject: " + tag.rstrip() + b"\n"
    value = found.group(2).lstrip(b" \t")
    if value.startswith(tag.rstrip()):
        return block
    return block[: found.start(2)] + b" " + tag.rstrip() + b" " + value + block[found.end(2) :]
