"""Limits of the receiver: connections and bytes of one user, and of all together. Pure bookkeeping, no I/O."""

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReceiverLimits:
    """The limits, for one uid and for all of them."""

    connections: int = 32  # of one uid
    all_connections: int = 256
    rate: float = 50.0  # new connections of one uid in a second, on average
    misuse: float = 20.0  # a connection without a sound request counts as this many new ones
    burst: int = 64  # new connections of one uid in a row, after a pause
    bytes: int = 256 * 1024 * 1024  # of messages and envelopes in progress, of one uid
    all_bytes: int = 1024 * 1024 * 1024


class Usage:
    """Connections and bytes in progress, by uid."""

    def __init__(self, limits: ReceiverLimits) -> None:
        self._limits = limits
        self._connections: Counter[int] = Counter()
        self._bytes: Counter[int] = Counter()
        self._tokens: dict[int, tuple[float, float]] = {}  # by uid: new connections left, and when that was so
        self.refused: Counter[int] = Counter()
        """Connections that were refused since the last :meth:`take_refused`."""

    def connect(self, uid: int, now: float) -> bool:
        """Count a connection of ``uid`` at ``now`` (monotonic). False: it has too many, or there are too many."""
        limits = self._limits
        many = self._connections[uid] >= limits.connections or self._connections.total() >= limits.all_connections
        if many or not self._spend(uid, now):
            self.refuse(uid)
            return False
        self._connections[uid] += 1
        return True

    def misused(self, uid: int, now: float) -> None:
        """A connection of ``uid`` brought no sound request, or had to be ended: fewer are taken for it."""
        self._tokens[uid] = (max(-self._limits.misuse, self._left(uid, now) - self._limits.misuse), now)
        self.refuse(uid)

    def _spend(self, uid: int, now: float) -> bool:
        """A token bucket for each uid; those that are full again are forgotten."""
        limits = self._limits
        if len(self._tokens) > 1000:
            full = 2 * limits.burst / limits.rate
            self._tokens = {uid: state for uid, state in self._tokens.items() if now - state[1] < full}
        tokens = self._left(uid, now)
        self._tokens[uid] = (tokens - 1.0 if tokens >= 1.0 else tokens, now)
        return tokens >= 1.0

    def _left(self, uid: int, now: float) -> float:
        limits = self._limits
        tokens, since = self._tokens.get(uid, (float(limits.burst), now))
        return min(float(limits.burst), tokens + (now - since) * limits.rate)

    def reserve(self, uid: int, size: int) -> bool:
        """Count ``size`` bytes for ``uid``. False: it would have too many, or there would be too many.

        One message of a user always fits into its own limit, and one into that of all users.
        """
        limits = self._limits
        own, total = self._bytes[uid], self._bytes.total()
        if (own and own + size > limits.bytes) or (total and total + size > limits.all_bytes):
            self.refuse(uid)
            return False
        self._bytes[uid] += size
        return True

    def disconnect(self, uid: int, size: int) -> None:
        """A connection of ``uid`` that had reserved ``size`` bytes has ended."""
        self._connections[uid] -= 1
        self._bytes[uid] -= size
        self._connections += Counter()  # drops what is zero: uids that are gone leave nothing behind
        self._bytes += Counter()

    def refuse(self, uid: int) -> None:
        """Count a refusal. Bounded: what exceeds 100 different uids is counted as uid -1."""
        self.refused[uid if uid in self.refused or len(self.refused) < 100 else -1] += 1

    def take_refused(self) -> dict[int, int]:
        """Refused connections by uid since the last call."""
        taken, self.refused = dict(self.refused), Counter()
        return taken
