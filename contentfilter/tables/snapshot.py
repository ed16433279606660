"""The snapshot: both recipient tables in one immutable file that all workers map.

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
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from zlib import crc32

import msgspec

from contentfilter.errors import ConfigError, Problem
from contentfilter.policy.addresses import EVERYBODY, EXEMPT
from contentfilter.policy.plan import Row
from contentfilter.tables.files import replace_file
from contentfilter.tables.rows import Rows, Source

MAGIC = b"CFTABLE1"
_PREFIX = struct.Struct("<8sII")
_PAIR = struct.Struct("<II")
_MAX_HEADER = 1 << 20
_READ = 1 << 20

# What the flags byte of a row says. BASE keeps it clear of NUL and LF.
CLAMAV, SPAMD, CLAMAV_EXEMPT, SPAMD_EXEMPT, OPTIONS, BASE = 1, 2, 4, 8, 16, 64
_BOTH, _BOTH_EXEMPT = BASE | CLAMAV | SPAMD, BASE | CLAMAV | SPAMD | CLAMAV_EXEMPT | SPAMD_EXEMPT

Found = tuple[Row | None, Row | None]


class Header(msgspec.Struct, frozen=True):
    """What a snapshot says about itself."""

    created: float  # seconds since 1970
    sources: tuple[Source, ...]
    clamav_rows: int
    spamd_rows: int
    buckets: int  # a power of two
    size: int  # bytes of all buckets
    checksum: int  # CRC-32 of offsets and buckets: equal for equal rows
    default_domain: bytes
    has_domains: bool  # whether there are @domain keys at all
    parent_labels: tuple[int, ...]  # how many labels the .domain keys have, most first
    local_sizes: tuple[int, ...]  # how long the local parts of the addresses are


def compile_snapshot(rows: Rows, path: str, created: float | None = None) -> Header:
    """Write ``rows`` to ``path``, atomically and durably. Takes about a second for a million rows.

    Raises OSError when it cannot be written; what was there stays.
    """
    records = dict(_records(rows.clamav, rows.spamd))
    count = 1 << max(0, len(records) - 1).bit_length()
    slots = [b""] * count
    mask = count - 1
    for key, crc in zip(records, map(crc32, records), strict=True):
        slots[crc & mask] += b"\n%b\0%b" % (key, records[key])
    offsets = array("I", accumulate(map(len, slots), initial=0))
    if sys.byteorder == "big":
        offsets.byteswap()
    buckets = b"".join(slots)
    header = Header(
        created=time.time() if created is None else created,
        sources=rows.sources,
        clamav_rows=len(rows.clamav),
        spamd_rows=len(rows.spamd),
        buckets=count,
        size=len(buckets),
        checksum=crc32(buckets, crc32(offsets)),
        default_domain=rows.default_domain,
        has_domains=any(key.startswith(b"@") for key in records),
        parent_labels=tuple(sorted({key.count(b".") for key in records if key.startswith(b".")}, reverse=True)),
        local_sizes=tuple(sorted({key.rfind(b"@") for key in records} - {-1, 0})),
    )
    head = msgspec.json.encode(header)
    replace_file(path, (_PREFIX.pack(MAGIC, len(head), crc32(head)), head, offsets.tobytes(), buckets), mode=0o640)
    return header


def _records(clamav: Mapping[bytes, bytes], spamd: Mapping[bytes, bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Each key once, with what stands behind its NUL."""
    record = lru_cache(_record)
    for key, value in clamav.items():
        yield key, record(value, spamd.get(key))
    for key, value in spamd.items():
        if key not in clamav:
            yield key, record(None, value)


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
        self._offsets_at = offsets_at
        self._buckets_at = offsets_at + 4 * (header.buckets + 1)
        self._mask = header.buckets - 1
        self._extension = extension.lower()
        self._local_sizes = frozenset(header.local_sizes)
        self._default = b"@" + header.default_domain.lower() if header.default_domain else b""
        self._simple = not (extension or header.parent_labels)
        self._tables = (CLAMAV if header.clamav_rows else 0) | (SPAMD if header.spamd_rows else 0)
        self._everybody: Found = (None, None)
        self._everybody = self._first((EVERYBODY,))

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

    def close(self) -> None:
        """Unmap. Safe to call twice; a look-up afterwards is a ValueError."""
        self._file.close()

    def lookup(self, recipient: bytes) -> Found:
        """The rows of clamavclients and spamdclients that decide for ``recipient``; None where none applies."""
        address = recipient.lower()
        at = address.rfind(b"@")
        if at < 0:
            at = len(address)
            address += self._default
            if not self._default:
                return self._everybody
        if self._simple:
            return self._first((address, address[at:]) if self.header.has_domains else (address,))
        return self._first(self._keys(address, at))

    def _keys(self, address: bytes, at: int) -> list[bytes]:
        """What :func:`addresses.candidates` says, without ``*`` and without keys that no row can have."""
        keys = [address]
        domain = address[at:]
        if self._extension:
            end = address.rfind(self._extension, 0, at)
            while end > 0:
                if end in self._local_sizes:
                    keys.append(address[:end] + domain)
                end = address.rfind(self._extension, 0, end)
        if self.header.has_domains:
            keys.append(domain)
        if self.header.parent_labels:
            labels = domain[1:].split(b".")
            keys += [b"." + b".".join(labels[-n:]) for n in self.header.parent_labels if n < len(labels)]
        return keys

    def _first(self, keys: Sequence[bytes]) -> Found:
        """For each table the row of the first key that it has, else that of ``*``."""
        file, offsets_at, buckets_at, mask = self._file, self._offsets_at, self._buckets_at, self._mask
        clamav, spamd = self._everybody
        missing = self._tables
        for key in keys:
            start, end = _PAIR.unpack_from(file, offsets_at + ((crc32(key) & mask) << 2))
            found = file.find(b"\n%b\0" % key, buckets_at + start, buckets_at + end)
            if found < 0 or b"\0" in key:
                continue
            flags = file[found + len(key) + 2]
            hit = flags & missing
            if not hit:
                continue
            if flags == _BOTH or flags == _BOTH_EXEMPT:
                row = Row(key, flags == _BOTH_EXEMPT)
                clamav, spamd = row if hit & CLAMAV else clamav, row if hit & SPAMD else spamd
            else:
                options = self._options(flags, found + len(key) + 3, buckets_at + end)
                clamav = Row(key, bool(flags & CLAMAV_EXEMPT), options[0]) if hit & CLAMAV else clamav
                spamd = Row(key, bool(flags & SPAMD_EXEMPT), options[1]) if hit & SPAMD else spamd
            missing &= ~hit
            if not missing:
                break
        return clamav, spamd

    def _options(self, flags: int, start: int, limit: int) -> tuple[bytes, bytes]:
        if not flags & OPTIONS:
            return b"", b""
        end = self._file.find(b"\n", start, limit)
        clamav, _, spamd = self._file[start : limit if end < 0 else end].partition(b"\0")
        return clamav, spamd


def _check(fd: int) -> tuple[Header, int]:
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
    header = msgspec.json.decode(head, type=Header)
    offsets_at = _PREFIX.size + length
    if header.buckets < 1 or header.buckets & (header.buckets - 1):
        raise ValueError("its header makes no sense")
    if status.st_size != offsets_at + 4 * (header.buckets + 1) + header.size:
        raise ValueError(f"it has {status.st_size} bytes, which its header contradicts")
    checksum, at = 0, offsets_at
    while part := os.pread(fd, _READ, at):  # not through the map: what is only checked need not stay resident
        checksum, at = crc32(part, checksum), at + len(part)
    if checksum != header.checksum:
        raise ValueError("its checksum is wrong")
    return header, offsets_at
