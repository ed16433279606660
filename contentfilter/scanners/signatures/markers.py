"""Markers: the places of a text at which the walk has something to do, found in one search."""

import enum
from collections.abc import Callable, Iterator

import ahocorasick_rs

from contentfilter.scanners.signatures.lines import PIECE, Text
from contentfilter.scanners.signatures.work import Work

_PIECE_BYTE = 1  # work


class Marker(enum.IntEnum):
    """What may start at a mark."""

    DELIMITER = 0
    BEGIN = 1  # uuencode, begin-base64
    YENC = 2
    BINHEX = 3
    BLOB = 4  # the first letters of a program in base64
    PROGRAM = 5  # not encoded
    ENCODING = 6  # the words transfer-encoding, anywhere


class Markers:
    """Search for marks: line starts with ``--``, ``begin`` and so on, and the name of a field in any case.

    Immutable; one instance per configuration. ``blobs``: first letters of base64 blobs, at least two each.
    """

    def __init__(self, blobs: tuple[bytes, ...]) -> None:
        starts = {
            b"--": Marker.DELIMITER,
            b"begin": Marker.BEGIN,
            b"=ybegin ": Marker.YENC,
            b"(This file must be": Marker.BINHEX,
            **dict.fromkeys(blobs, Marker.BLOB),
            b"MZ": Marker.PROGRAM,
        }
        patterns = {newline + start: mark for start, mark in starts.items() for newline in (b"\n", b"\r")}
        patterns |= dict.fromkeys((b"r-e", b"R-e", b"r-E", b"R-E"), Marker.ENCODING)
        self._starts = tuple(starts.items())
        self._kinds = tuple(patterns.values())
        self._overlap = max(map(len, patterns)) - 1
        self._all = ahocorasick_rs.BytesAhoCorasick(list(patterns))
        # Whatever starts at a mark has two hyphens or a blank near it: a piece without is dull, and found five times
        # as fast. Only BLOB and PROGRAM marks are lost: inside base64 they mean nothing.
        self._lively = ahocorasick_rs.BytesAhoCorasick([b"--", b" ", b"\t"])

    def find(self, data: Text, work: Work, inside_base64: Callable[[], bool]) -> Iterator[tuple[Marker, int]]:
        """Yield each mark and its position after the newline, in order. Skip dull pieces while ``inside_base64()``."""
        kinds, size = self._kinds, len(data)
        head = bytes(data[:20])
        for first, mark in self._starts:
            if mark not in (Marker.BLOB, Marker.PROGRAM) and head.startswith(first):
                yield mark, 0
        for base in range(0, size, PIECE):
            piece = data if size <= PIECE else data[base : base + PIECE + self._overlap]
            if inside_base64() and not self._lively.find_matches_as_indexes(piece):
                continue
            work.spend(_PIECE_BYTE * len(piece))
            for pattern, start, _ in self._all.find_matches_as_indexes(piece):
                if start < PIECE:
                    mark = kinds[pattern]
                    yield mark, base + start + (mark < Marker.ENCODING)

    def any(self, before: bytes, piece: bytes) -> bool:
        """True if ``piece`` contains a mark, or one starts in ``before``, the bytes in front of it."""
        search = self._all.find_matches_as_indexes
        return bool(search(before[-self._overlap :] + piece[: self._overlap]) or search(piece))
