"""The snapshot: both recipient tables and the owners of preferences in one immutable file, which all workers map.

A look-up is a hash, two offsets and a search in some fifty bytes of the map. Nothing is built in memory when a snapshot
is opened, so a million rows cost a worker no memory of its own. Equal rows in equal order give an equal file.
docs/snapshot-format.md describes the format.

A file is written beside its place and renamed, and never changed afterwards: a worker that has mapped it continues with
it until it opens the next.
"""

import mmap
import os
import stat
import struct
import sys
import time
from array import array
from collections.abc import Mapping
from functools import lru_cache
from itertools import accumulate, repeat
from zlib import crc32

import msgspec

from contentfilter.errors import ConfigError, Problem
from contentfilter.files import SourceState, replace_file
from contentfilter.policy.addresses import EVERYBODY, EXEMPT, alias, candidate_keys, folded, normal
from contentfilter.policy.plan import Lookup, Owners, Row
from contentfilter.tables.rows import Rows

FILE = "tables.snapshot"
"""Its name in the state directory."""
MAGIC = b"CFTABLE1"
_PREFIX = struct.Struct("<8sII")
_PAIR = struct.Struct("<II")
_MAX_HEADER = 1 << 20
_READ = 1 << 20

# What the flags byte of a row says. BASE keeps it clear of NUL and LF.
CLAMAV, SPAMD, CLAMAV_EXEMPT, SPAMD_EXEMPT, OPTIONS, PREFS, BASE, ALIAS = 1, 2, 4, 8, 16, 32, 64, 128
_BOTH = BASE | CLAMAV | SPAMD  # without options
_ALIKE = (_BOTH, _BOTH | PREFS, _BOTH | CLAMAV_EXEMPT | SPAMD_EXEMPT, _BOTH | CLAMAV_EXEMPT | SPAMD_EXEMPT | PREFS)

Found = tuple[Row | None, Row | None]


class Header(msgspec.Struct, frozen=True):
    """Header of a snapshot."""

    created: float  # seconds since 1970
    sources: tuple[SourceState, ...]
    clamav_rows: int
    spamd_rows: int
    buckets: int  # a power of two
    size: int  # bytes of all buckets
    checksum: int  # CRC-32 of offsets and buckets: equal for equal rows
    default_domain: bytes
    everybody: tuple[bytes | None, bytes | None]  # what ``*`` has in each table
    has_domains: bool  # whether there are @domain keys at all
    parent_labels: tuple[int, ...]  # how many labels the .domain keys have, most first
    local_sizes: tuple[int, ...]  # how long the local parts of the addresses are
    prefs_rows: int = 0


def compile_snapshot(rows: Rows, path: str, created: float | None = None) -> Header:
    """Write ``rows`` to ``path``, atomically and durably. Takes about a second for a million rows.

    Raises OSError when it cannot be written; what was there stays.
    """
    records = _records(rows.clamav, rows.spamd)
    for key in rows.prefs:
        flags, *options = records.get(key, bytes((BASE,)))
        records[key] = bytes((flags | PREFS, *options))
    for key in [key for key in records if b"xn--" in key]:
        if (other := alias(key)) and other not in records:
            flags, *options = records[key]
            records[other] = bytes((flags | ALIAS, *options))
    count = 1 << max(0, len(records) - 1).bit_length()
    slots = [b""] * count
    mask = count - 1
    for crc, record in zip(map(crc32, records), map(b"\n%b\0%b".__mod__, records.items()), strict=True):
        slots[crc & mask] += record
    offsets = array("I", accumulate(map(len, slots), initial=0))
    if sys.byteorder == "big":
        offsets.byteswap()
    buckets = b"".join(slots)
    local_sizes = set(map(bytes.rfind, records, repeat(b"@")))
    others = [key for key in records if b"@" not in key] if -1 in local_sizes else []
    header = Header(
        created=time.time() if created is None else created,
        sources=rows.sources,
        clamav_rows=len(rows.clamav),
        spamd_rows=len(rows.spamd),
        buckets=count,
        size=len(buckets),
        checksum=crc32(buckets, crc32(offsets)),
        default_domain=rows.default_domain,
        everybody=(rows.clamav.get(EVERYBODY), rows.spamd.get(EVERYBODY)),
        has_domains=0 in local_sizes,
        parent_labels=tuple(sorted({key.count(b".") for key in others if key != EVERYBODY}, reverse=True)),
        local_sizes=tuple(sorted(local_sizes - {-1, 0})),
        prefs_rows=len(rows.prefs),
    )
    head = msgspec.json.encode(header)
    replace_file(path, (_PREFIX.pack(MAGIC, len(head), crc32(head)), head, offsets.tobytes(), buckets), mode=0o600)
    return header


def _records(clamav: Mapping[bytes, bytes], spamd: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Each key once, with the bytes that follow its NUL."""
    record = lru_cache(_record)
    records = dict.fromkeys(clamav, record(b"", None))
    if any(clamav.values()):
        records.update((key, record(value, None)) for key, value in clamav.items() if value)
    for key, value in spamd.items():
        records[key] = record(clamav.get(key), value)
    return records


def _record(clamav: bytes | None, spamd: bytes | None) -> bytes:
    flags = BASE
    if clamav is not None:
        flags |= CLAMAV | CLAMAV_EXEMPT if clamav == EXEMPT else CLAMAV
    if spamd is not None:
        flags |= SPAMD | SPAMD_EXEMPT if spamd == EXEMPT else SPAMD
    options = [value if value and value != EXEMPT else b"" for value in (clamav, spamd)]
    if not any(options):
        return bytes((flags,))
    return bytes((flags | OPTIONS,)) + b"\0".join(options)


class Snapshot:
    """An open snapshot. Reads only; any number of processes share its memory."""

    def __init__(self, header: Header, file: mmap.mmap, offsets_at: int, extension: bytes) -> None:
        self.header = header
        self._file = file
        self._rows_at = offsets_at + 4 * (header.buckets + 1)
        index = _Index(header, file, offsets_at, extension.lower())
        self.lookup: Lookup = index.rows
        """The rows of clamavclients and spamdclients that decide for a recipient; None where none applies."""
        self.owners: Owners | None = index.owner if header.prefs_rows else None
        """Whose SpamAssassin preferences a recipient has; None where nobody has any."""

    @classmethod
    def open(cls, path: str, extension: bytes = b"") -> "Snapshot":
        """Map the file after checking all of it. ``extension``: see :func:`addresses.candidates`.

        Raises ConfigError for a file that is not there, cannot be read, is damaged, or is no snapshot.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as e:
            raise ConfigError((Problem(path, 0, f"cannot open the table snapshot: {e.strerror}"),)) from e
        try:
            header, offsets_at = _check(fd)
            return cls(header, mmap.mmap(fd, 0, access=mmap.ACCESS_READ), offsets_at, extension)
        except (ValueError, OSError) as e:
            raise ConfigError((Problem(path, 0, f"not a usable table snapshot: {e}"),)) from e
        finally:
            os.close(fd)

    def rows(self) -> Rows:
        """The rows it was made of, in another order, for comparison with the source. Needs memory for all."""
        clamav: dict[bytes, bytes] = {}
        spamd: dict[bytes, bytes] = {}
        prefs = []
        for record in self._file[self._rows_at :].split(b"\n")[1:]:
            key, _, rest = record.partition(b"\0")
            if rest[0] & ALIAS:
                continue
            flags, options = rest[0], rest[1:].split(b"\0") if rest[0] & OPTIONS else (b"", b"")
            if flags & CLAMAV:
                clamav[key] = EXEMPT if flags & CLAMAV_EXEMPT else options[0]
            if flags & SPAMD:
                spamd[key] = EXEMPT if flags & SPAMD_EXEMPT else options[1]
            if flags & PREFS:
                prefs.append(key)
        return Rows(clamav, spamd, self.header.default_domain, self.header.sources, prefs)

    def close(self) -> None:
        """Unmap. Safe to call twice; a look-up afterwards is a ValueError."""
        self._file.close()


class _Index:
    """Look-ups in the mapped file; docs/snapshot-format.md describes it."""

    def __init__(self, header: Header, file: mmap.mmap, offsets_at: int, extension: bytes) -> None:
        self._header, self._file, self._extension = header, file, extension
        self._offsets_at = offsets_at
        self._buckets_at = offsets_at + 4 * (header.buckets + 1)
        self._default = b"@" + folded(header.default_domain) if header.default_domain else b""
        self._tables = (CLAMAV if header.clamav_rows else 0) | (SPAMD if header.spamd_rows else 0)
        self._everybody = tuple(
            None if value is None else Row(EVERYBODY, value == EXEMPT, b"" if value == EXEMPT else value)
            for value in header.everybody
        )

    def rows(self, recipient: bytes) -> Found:
        """The row of each table that decides for a recipient: the first of its keys that this table has, else ``*``."""
        clamav, spamd = self._everybody
        missing = self._tables
        for key in self._keys(recipient):
            flags, virus, spam = self._record(key)
            hit = flags & missing
            if hit and flags & ALIAS:
                key = normal(key)
            if hit & CLAMAV:
                clamav = Row(key, flags & CLAMAV_EXEMPT > 0, virus)
            if hit & SPAMD:
                spamd = (
                    clamav if hit & CLAMAV and flags & ~ALIAS in _ALIKE else Row(key, flags & SPAMD_EXEMPT > 0, spam)
                )
            missing &= ~hit
            if not missing:
                break
        return clamav, spamd

    def owner(self, recipient: bytes) -> tuple[bytes, bytes]:
        """The owner of the preferences that a recipient has, and the name to ask spamd with; both empty: nobody."""
        keys = self._keys(recipient)
        for key in keys:
            flags = self._record(key)[0]
            if flags & PREFS:
                own, address = (normal(key), normal(keys[0])) if flags & ALIAS else (key, keys[0])
                return own, address if own.startswith(b"@") else own
        return b"", b""

    def _keys(self, recipient: bytes) -> list[bytes]:
        """The keys that could decide, the most specific first; none for a recipient without any domain."""
        address = folded(recipient)
        at = address.rfind(b"@")
        if at < 0:
            at = len(address)
            address += self._default
        return candidate_keys(address, at, self._extension, self._header) if at < len(address) else []

    def _record(self, key: bytes) -> tuple[int, bytes, bytes]:
        """The flags of a key, and the options in each table; 0 for a key that is in none."""
        place = self._offsets_at + ((crc32(key) & (self._header.buckets - 1)) << 2)
        start, end = _PAIR.unpack_from(self._file, place)
        end += self._buckets_at
        found = self._file.find(b"\n%b\0" % key, self._buckets_at + start, end)
        if found < 0 or b"\0" in key:  # a NUL is never part of a key, but ends one
            return 0, b"", b""
        at = found + len(key) + 2
        flags = self._file[at]
        if not flags & OPTIONS:
            return flags, b"", b""
        stop = self._file.find(b"\n", at, end)
        virus, _, spam = self._file[at + 1 : end if stop < 0 else stop].partition(b"\0")
        return flags, virus, spam


def read_header(path: str) -> Header:
    """Read the header of the snapshot at ``path``; its rows are not read. Raises OSError or ConfigError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _header(fd)[0]
    except ValueError as e:
        raise ConfigError((Problem(path, 0, f"not a usable table snapshot: {e}"),)) from e
    finally:
        os.close(fd)


def _header(fd: int) -> tuple[Header, int]:
    """The header and where the offsets begin. ValueError says what is wrong; nothing is trusted before its checksum."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    prefix = os.pread(fd, _PREFIX.size, 0)
    if not prefix.startswith(MAGIC):
        raise ValueError("it does not start with " + MAGIC.decode())
    if len(prefix) < _PREFIX.size:
        raise ValueError("it is cut off")
    _, length, checksum = _PREFIX.unpack(prefix)
    head = os.pread(fd, min(length, _MAX_HEADER), _PREFIX.size)
    if len(head) < length or crc32(head) != checksum:
        raise ValueError("its header is damaged")
    try:
        header = msgspec.json.decode(head, type=Header)
    except msgspec.DecodeError as e:
        raise ValueError(f"its header is another version's: {e}") from e
    offsets_at = _PREFIX.size + length
    if header.buckets < 1 or header.buckets & (header.buckets - 1):
        raise ValueError("its header makes no sense")
    if status.st_size != offsets_at + 4 * (header.buckets + 1) + header.size:
        raise ValueError(f"it has {status.st_size} bytes, which its header contradicts")
    return header, offsets_at


def _check(fd: int) -> tuple[Header, int]:
    """As :func:`_header`, with the checksum of all rows."""
    header, offsets_at = _header(fd)
    checksum, at = 0, offsets_at
    while part := os.pread(fd, _READ, at):  # not through the map: what is only checked need not stay resident
        checksum, at = crc32(part, checksum), at + len(part)
    if checksum != header.checksum:
        raise ValueError("its checksum is wrong")
    return header, offsets_at
