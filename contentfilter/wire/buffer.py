"""Receive buffer: bytes that have arrived but are not yet a whole line or block.

Each byte is searched once, however slowly the peer sends: the buffer remembers how far it has
searched. This module also has the one function by which the codecs show a peer's bytes to people.
"""

import re

from contentfilter.errors import RemoteProtocolError

SHOWN = 200  # characters of a peer's text that reach a log


class ReceiveBuffer:
    """Takes bytes at the end, returns whole lines or exact counts from the front."""

    __slots__ = ("_data", "_searched")

    def __init__(self) -> None:
        self._data = bytearray()
        self._searched = 0

    def __len__(self) -> int:
        return len(self._data)

    def feed(self, data: bytes) -> None:
        self._data += data

    def line(self, ends: re.Pattern[bytes], limit: int) -> bytes | None:
        """The next line without its end, or None while it is incomplete.

        ``ends`` matches one byte. A line of more than ``limit`` bytes is a RemoteProtocolError,
        complete or not.
        """
        hit = ends.search(self._data, self._searched)
        length = hit.start() if hit else len(self._data)
        if length > limit:
            raise RemoteProtocolError(f"line of more than {limit} bytes")
        if hit is None:
            self._searched = length
            return None
        return self._cut(length, hit.end())

    def take(self, count: int) -> bytes | None:
        """Exactly ``count`` bytes, or None while there are fewer."""
        return self._cut(count, count) if len(self._data) >= count else None

    def _cut(self, length: int, end: int) -> bytes:
        with memoryview(self._data) as view:
            front = bytes(view[:length])
        del self._data[:end]
        self._searched = 0
        return front


def printable(data: bytes) -> str:
    """A peer's bytes for logs: printable ASCII, ``?`` for the rest, at most SHOWN characters."""
    return bytes(byte if 32 <= byte < 127 else 63 for byte in data[:SHOWN]).decode("ascii")
