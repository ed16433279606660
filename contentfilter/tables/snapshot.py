"""The snapshot: both recipient tables, and the owners of preferences, in one immutable file that all workers map.

The rows lie in buckets by CRC-32 of the key; a look-up is a hash, two offsets and a search in some
fifty bytes, straight in the map. Nothing is built in memory when a snapshot is opened, so a million
rows cost a worker nothing of its own. Equal rows in equal order give an equal file.

    magic, length and CRC-32 of the header   16 bytes, little-endian as all numbers here
    header                                   JSON
    offsets                                  32 bits for each bucket and one more: where it begins
    buckets                                  rows of: LF, key, NUL, flags, [options, NUL, options]

A file is written beside its place and renamed, and never changed afterwards: a worker that has mapped
it goes on with what it has until it opens the next.
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
from contentfilter.policy.addresses import EVERYBODY, EXEMPT, candidate_keys
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
CLAMAV, SPAMD, CLAMAV_EXEMPT, SPAMD_EXEMPT, OPTIONS, PREFS, BASE = 1, 2, 4, 8, 16, 32, 64
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
    """Each key once, with what stands behind its NUL."""
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
        self.lookup: Lookup = _make_lookup(header, file, offsets_at, extension.lower())
        """The rows of clamavclients and spamdclients that decide for a recipient; None where none applies."""
        self.owners: Owners | None = (
            _make_owners(header, file, offsets_at, extension.lower()) if header.prefs_rows else None
        )
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


def _make_lookup(header: Header, file: mmap.mmap, offsets_at: int, extension: bytes) -> Lookup:
    # One closure without inner calls: with methods and attributes a look-up takes half as long again.
    find, offsets_of = file.find, _PAIR.unpack_from
    buckets_at = offsets_at + 4 * (header.buckets + 1)
    mask = header.buckets - 1
    tables = (CLAMAV if header.clamav_rows else 0) | (SPAMD if header.spamd_rows else 0)
    default = b"@" + header.default_domain.lower() if header.default_domain else b""
    simple = header.has_domains and not (extension or header.parent_labels)
    everybody = _everybody(header)

    def lookup(recipient: bytes) -> Found:
        address = recipient.lower()
        at = address.rfind(b"@")
        if at < 0:
            if not default:
                return everybody
            at = len(address)
            address += default
        clamav, spamd = everybody
        missing = tables
        for key in (address, address[at:]) if simple else candidate_keys(address, at, extension, header):
            start, end = offsets_of(file, offsets_at + ((crc32(key) & mask) << 2))
            found = find(b"\n%b\0" % key, buckets_at + start, buckets_at + end)
            if found < 0 or b"\0" in key:
                continue
            flags = file[found + len(key) + 2]
            hit = flags & missing
            if not hit:
                continue
            virus, spam = _options(file, found, buckets_at + end) if flags & OPTIONS else (b"", b"")
            if hit & CLAMAV:
                clamav = Row(key, flags & CLAMAV_EXEMPT > 0, virus)
            if hit & SPAMD:
                spamd = clamav if hit & CLAMAV and flags in _ALIKE else Row(key, flags & SPAMD_EXEMPT > 0, spam)
            missing &= ~hit
            if not missing:
                break
        return clamav, spamd

    return lookup


def _make_owners(header: Header, file: mmap.mmap, offsets_at: int, extension: bytes) -> Owners:
    buckets_at = offsets_at + 4 * (header.buckets + 1)
    default = header.default_domain.lower()

    def owner_of(recipient: bytes) -> tuple[bytes, bytes]:
        address = recipient.lower()
        if b"@" not in address:
            address += b"@" + default
        at = address.rfind(b"@")
        for key in candidate_keys(address, at, extension, header):
            place = offsets_at + ((crc32(key) & (header.buckets - 1)) << 2)
            start, end = _PAIR.unpack_from(file, place)
            found = file.find(b"\n%b\0" % key, buckets_at + start, buckets_at + end)
            if found >= 0 and b"\0" not in key and file[found + len(key) + 2] & PREFS:
                return key, address if key.startswith(b"@") else key
        return b"", b""

    return owner_of


def _everybody(header: Header) -> Found:
    clamav, spamd = (
        None if value is None else Row(EVERYBODY, value == EXEMPT, b"" if value == EXEMPT else value)
        for value in header.everybody
    )
    return clamav, spamd


def _options(file: mmap.mmap, start: int, limit: int) -> tuple[bytes, bytes]:
    """Those of the row at ``start``, for each table."""
    end = file.find(b"\n", start + 1, limit)
    _, clamav, spamd = file[start : limit if end < 0 else end].split(b"\0")
    return clamav[1:], spamd


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
