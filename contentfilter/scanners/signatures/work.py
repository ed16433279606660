"""Work of one scan: an estimate of its CPU time, charged before each step, and the limit that ends it.

The unit is a nanosecond on a slow core. A step costs a constant, which pays for the interpreter, and an amount for each
byte that it looks at, whether or not these bytes decode to anything. The limit is proportional to the size of the
message, so no input of any structure takes more than ``PRICE`` for a byte, and no message more than ``CEILING``.
"""

from contentfilter.errors import ContentFilterError

PRICE = 1000  # for each byte of the message: 1 s for a megabyte
FLOOR = 5_000_000  # for a message of any size
CEILING = 10_000_000_000  # for a message of any size; 100 MB of ordinary mail need a twentieth
INLINE = 15_000_000  # on the event loop; a scan that needs more is repeated in a thread


class OutOfWorkError(ContentFilterError):
    """The scan has used up its work. ``inline``: more is available in a thread."""

    def __init__(self, *, inline: bool) -> None:
        super().__init__("more work than the size of the message allows")
        self.inline = inline


class Work:
    """Remaining work of one scan, and the first limit that truncated it."""

    __slots__ = ("_inline", "left", "truncated")

    def __init__(self, size: int, *, inline: bool = False) -> None:
        limit = min(FLOOR + PRICE * size, CEILING)
        self._inline = inline and limit > INLINE
        self.left: float = INLINE if self._inline else limit
        self.truncated = ""  # the limit, for people; empty: the scan is complete

    def spend(self, amount: float) -> None:
        """Charge a step. Raises OutOfWorkError."""
        self.left -= amount
        if self.left < 0:
            raise OutOfWorkError(inline=self._inline)

    def mark_truncated(self, limit: str) -> None:
        """Record that ``limit`` ended the scan of some content. The first one is kept."""
        self.truncated = self.truncated or limit
