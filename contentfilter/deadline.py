"""One absolute end for everything that is done for a message.

Every wait takes what is left of it; nobody starts a clock of their own. Times are
seconds of the monotonic clock, the one that asyncio's loop uses too.
"""

import asyncio
import time

import msgspec


class Deadline(msgspec.Struct, frozen=True):
    """An absolute moment on the monotonic clock."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """The moment ``seconds`` from now."""
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds that remain; never negative."""
        return max(0.0, self.at - time.monotonic())

    def expired(self) -> bool:
        return time.monotonic() >= self.at

    def within(self, seconds: float) -> "Deadline":
        """The earlier of this end and ``seconds`` from now: a step's own limit inside the whole budget."""
        return Deadline(min(self.at, time.monotonic() + seconds))

    def before(self, margin: float) -> "Deadline":
        """This end, ``margin`` seconds earlier: leaves time to answer."""
        return Deadline(self.at - margin)

    def timeout(self) -> asyncio.Timeout:
        """``async with deadline.timeout():`` raises TimeoutError at the end.

        asyncio's loop runs on the same monotonic clock, so the absolute moment carries over.
        """
        return asyncio.timeout_at(self.at)
