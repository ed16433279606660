"""Header fields of a delivery: reads the header block, and finds the changes in the fields that are already there.

The added fields go in front of the message, and as long as nothing else must change every byte of the original stays.
Two things change existing fields: the subject tag on spam, and forged copies of our own fields, which are renamed.
The body is never touched here.
"""

import mmap
import re

from contentfilter.model import readable
from contentfilter.verdict import encoded_words
from contentfilter.verdict.disposition import HeaderChange, RenameHeader, ReplaceText
from contentfilter.verdict.encoded_words import LOOK_MAX, begins_with_word

HEADER_LIMIT = 1 << 20
"""Maximum size of a header in bytes. A message with a longer one is rejected, except a bounce."""
INLINE_LIMIT = 1 << 14
"""Bytes of a header that may be worked on in the event loop: the worst one takes milliseconds for each delivery."""

MESSAGE_ID_MAX = 250
SUBJECTS_READ = 16
"""Subject fields that are searched for a tag; further ones are tagged without that."""
LINE_MAX = 76  # of a line with encoded words (RFC 2047, 2)

_MESSAGE_ID = re.compile(rb"^Message-ID[ \t]*:[ \t\r]*(?:\n[ \t]+)?([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
_OURS = re.compile(  # readers that drop NULs or take a name with blanks must not be fooled either
    rb"(?:^|(?<=\r))\0*X\0*-\0*("
    + b"|".join(rb"\0*".join(b"%c" % letter for letter in name) for name in (b"ContentFilter", b"Virus-", b"Spam-"))
    + rb")[^\r\n\t :]*+(?=[^\r\n:]*+(?:\r?\n[ \t\0]+)*:)",
    re.IGNORECASE | re.MULTILINE,
)
_OUR_NAMES = (b"x-contentfilter", b"x-virus-", b"x-spam-")
_FLAG = re.compile(rb"X-Spam-Flag:", re.IGNORECASE)
_STATUS = re.compile(rb"(X-Spam-Status:[ \t]*)(Yes|No)\b([^\n]*)", re.IGNORECASE)
_REQUIRED = re.compile(rb" required=[0-9.+-]+")
_SUBJECT = re.compile(rb"^(Subject[ \t]*:)([^\n]*(?:\n[ \t][^\n]*)*)", re.IGNORECASE | re.MULTILINE)
_NO_LINE_ENDS = bytes.maketrans(b"\r\0", b"  ")
_REPLY = r"(?:(?:\w{1,5}(?:\[\d{1,3}\])?:|\[[^]]{1,40}\]) ?){0,10}"  # Re: AW: Re[2]: [a mailing list]
_FIELD = re.compile(rb"^([!-9;-~]+)[ \t]*:[^\n]*(?:\n[ \t][^\n]*)*\n?", re.MULTILINE)


def header_block(data: mmap.mmap | bytes) -> bytes:
    """The header of a message: everything before the empty line, with the last field's line end.

    A message that begins with an empty line has none. Where no empty line comes within HEADER_LIMIT,
    the block ends at the last whole line inside it.
    """
    if (end := _header_end(data)) >= 0:
        return bytes(data[:end])
    head = bytes(data[:HEADER_LIMIT])
    return head if len(head) < HEADER_LIMIT else head[: head.rfind(b"\n") + 1]


def exceeds_limit(data: mmap.mmap | bytes) -> bool:
    """True if the header does not end within HEADER_LIMIT: forged fields behind it would not be noticed."""
    return len(data) > HEADER_LIMIT and _header_end(data) < 0


def is_long(data: mmap.mmap | bytes) -> bool:
    """True if work on the header belongs in a thread: it does not end within INLINE_LIMIT."""
    return len(data) > INLINE_LIMIT and _header_end(data, INLINE_LIMIT) < 0


def _header_end(data: mmap.mmap | bytes, limit: int = HEADER_LIMIT) -> int:
    """Offset of the empty line; -1 if there is none within ``limit``."""
    if data[:1] == b"\n" or data[:2] == b"\r\n":
        return 0
    end = data.find(b"\n\n", 0, limit)
    earlier = data.find(b"\n\r\n", 0, end + 2 if end >= 0 else limit)
    found = earlier if earlier >= 0 else end
    return found + 1 if found >= 0 else -1


def message_id(block: bytes) -> str:
    """The Message-ID in a header block, readable, cut at MESSAGE_ID_MAX; empty when there is none."""
    at = block.find(b"\nMessage-I")  # as nearly everybody writes it: many times faster than to try every line
    field = (_MESSAGE_ID.match(block, at + 1) if at >= 0 else None) or _MESSAGE_ID.search(block)
    return readable(field.group(1)[:MESSAGE_ID_MAX]).rstrip() if field else ""


def spam_fields(block: bytes) -> list[bytes]:
    """SpamAssassin's own fields (X-Spam-...) from the header block that its HEADERS command returned, each with its LF.

    A CR inside a line, where some readers would see another field begin, becomes a blank; a NUL, too.
    """
    text = block.replace(b"\r\n", b"\n").translate(_NO_LINE_ENDS)
    fields = [m.group(0) for m in _FIELD.finditer(text) if m.group(1)[:7].lower() == b"x-spam-"]
    return [field if field.endswith(b"\n") else field + b"\n" for field in fields]


def overruled(fields: list[bytes], found: bool) -> list[bytes]:
    """SpamAssassin's fields with the verdict of a recipient's own threshold in place of SpamAssassin's."""
    word = b"Yes" if found else b"No"
    kept = [b"X-Spam-Flag: YES\n"] if found else []
    for field in fields:
        if status := _STATUS.match(field):
            end = _REQUIRED.sub(b"", status.group(3)) + field[status.end() :]
            kept.append(status.group(1) + word + end)
        elif not _FLAG.match(field):
            kept.append(field)
    return kept


def correct(
    original: mmap.mmap | bytes, claimed: frozenset[bytes], subject_tag: bytes = b""
) -> tuple[bytes, tuple[HeaderChange, ...]]:
    """The changes in the header block of ``original``: forged copies of our fields are renamed, the subject is tagged.

    ``claimed`` says which families of fields speak for us in a delivery (b"contentfilter",
    b"virus-", b"spam-"): only those are renamed, to ``X-Received-X-...``. ``subject_tag`` (UTF-8) is put
    in front of each Subject unless it is there already, also behind ``Re:``.
    Returns (a Subject field to add where there is none, else empty; the changes in order of their offset).
    """
    block = header_block(original)
    lower = block.replace(b"\0", b"").lower()  # most messages have none of them, and the pattern tries every byte
    changes: list[HeaderChange] = []
    if any(name in lower for name in _OUR_NAMES):
        for field in _OURS.finditer(block):
            if field.group(1).replace(b"\0", b"").lower() in claimed:
                name = field.group(0)
                changes.append(RenameHeader(field.start(), name, b"X-Received-" + name))
    tag = subject_tag.decode("utf-8", "replace").strip()
    if not tag:
        return b"", tuple(changes)
    missing, tagged = _tag_subjects(block, tag)
    return missing, tuple(sorted([*changes, *tagged], key=_offset) if tagged else changes)


def _offset(change: HeaderChange) -> int:
    return change.at


def changed_block(original: mmap.mmap | bytes, changes: tuple[HeaderChange, ...]) -> tuple[bytes, int]:
    """The header block of ``original`` with ``changes`` made, and how many bytes of the original it replaces."""
    block = header_block(original)
    pieces: list[bytes] = []
    end = 0
    for change in changes:
        pieces += (block[end : change.at], change.new)
        end = change.at + len(change.old)
    return b"".join((*pieces, block[end:])), len(block)


def _tag_subjects(block: bytes, text: str) -> tuple[bytes, list[ReplaceText]]:
    """The tag in front of each Subject: readers differ in which of several they show. Results: see :func:`correct`."""
    plain, present = text.encode("utf-8"), re.compile(_REPLY + re.escape(text))
    tags = encoded_words.encode(text), encoded_words.encode(text, before_word=True)
    fold = b"\r\n " if b"\r\n" in block else b"\n "
    changes: list[ReplaceText] = []
    subject, read = None, 0
    for subject in _SUBJECT.finditer(block):
        value = subject.group(2).lstrip(b" \t")
        if read < SUBJECTS_READ and (b"=?" in value[:LOOK_MAX] or plain in value[:LOOK_MAX]):
            read += 1
            if present.match(encoded_words.decode(value)):
                continue
        name = subject.group(1)
        new = name + b" " + tags[begins_with_word(value.lstrip())]
        if value[:1] not in (b"\r", b"\n"):
            length = len(new) - new.rfind(b"\n") + len(value.split(b"\n", 1)[0].rstrip(b"\r"))
            new += b" " if length <= LINE_MAX else fold
        old = block[subject.start() : subject.end() - len(value)]
        changes.append(ReplaceText(subject.start(), old, new))
    return b"" if subject else b"Subject: " + tags[0] + b"\n", changes
