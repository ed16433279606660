"""Admission queue: priorities and fairness per source when the concurrency limit is reached.

Theory. A free slot goes to the best rank that waits: small messages before large ones, and within each our own users
and bounces before the rest. Within a rank it goes to the source that holds the fewest slots, and among equals to the
one that was served longest ago. So a source with a thousand messages delays another source by one message, not by a
thousand. Every OLDEST_EVERY-th slot, however, goes to the message that has waited longest, whatever its rank or source:
with n messages before it, a message is served within OLDEST_EVERY * (n + 1) slots, so none starves.

Large messages also share a limit on their bytes. One that has its turn but does not fit keeps its turn: small messages
pass it, other large ones do not. When the queue is full, the source with the most messages in it loses the last of
them, whose client retries. Sizes are bytes.
"""

import ipaddress
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from contentfilter.model import Origin, OriginKind

LARGE = 262_144  # bytes; a message above it ranks behind the small ones
OLDEST_EVERY = 4
RANKS = 4
UNLIMITED = 1 << 62
_OURS = frozenset((OriginKind.BOUNCE, OriginKind.AUTHENTICATED, OriginKind.RELAY))

SourceKey = tuple[str, bytes | int]
T = TypeVar("T")


class Priority(msgspec.Struct, frozen=True):
    """Priority of a message: its source, its rank (0 goes first), and the bytes charged to the limit (0: small)."""

    source: SourceKey
    rank: int
    volume: int

    @property
    def large(self) -> bool:
        return self.volume > 0


def priority_of(origin: Origin, size: int) -> Priority:
    """The priority of a message of ``size`` bytes."""
    large = size > LARGE
    return Priority(source_of(origin), 2 * large + (origin.kind not in _OURS), size if large else 0)


def source_of(origin: Origin) -> SourceKey:
    """The unit of fairness: the authenticated user, the network over SMTP (/24, IPv6 /64), else the local user."""
    if origin.user:
        return "user", origin.user
    if not origin.remote_ip:
        return "uid", origin.uid
    if b":" not in origin.remote_ip or b"." in origin.remote_ip:  # IPv4, perhaps mapped into IPv6
        return "net", origin.remote_ip.rpartition(b".")[0] or origin.remote_ip
    try:
        return "net", ipaddress.IPv6Address(origin.remote_ip.partition(b"%")[0].decode("ascii")).packed[:8]
    except ValueError:
        return "net", origin.remote_ip


@dataclass(slots=True, eq=False)
class QueueEntry(Generic[T]):
    """An entry of the queue, and the waiter that it belongs to."""

    claim: Priority
    waiter: T


class AdmissionQueue(Generic[T]):
    """Slots, and the queue for them. Whoever gets a slot gives it back with :meth:`leave`."""

    def __init__(self, places: int, room: int = UNLIMITED, volume: int = UNLIMITED) -> None:
        """``room``: maximum number of entries. ``volume``: bytes of large messages in slots; one always fits."""
        self.places, self.room, self.volume = places, room, volume
        self.closed = False  # while set, no slot is given
        self.held = 0
        self._volume_held = 0
        self._served = 0
        self._held_by: dict[SourceKey, int] = {}
        self._waiting_by: dict[SourceKey, int] = {}
        self._by_age: OrderedDict[QueueEntry[T], None] = OrderedDict()
        self._ranks: tuple[OrderedDict[SourceKey, deque[QueueEntry[T]]], ...] = tuple(
            OrderedDict() for _ in range(RANKS)
        )
        self._stuck: QueueEntry[T] | None = None  # a large message that has its turn, but does not fit yet

    def __len__(self) -> int:
        """Number of entries."""
        return len(self._by_age)

    def ahead(self, rank: int) -> int:
        """Number of entries that a newcomer of ``rank`` would not pass."""
        return sum(len(queue) for queues in self._ranks[: rank + 1] for queue in queues.values())

    def full(self) -> bool:
        """True if a newcomer could only be shed."""
        if self._free():
            return False
        return len(self._by_age) >= self.room and max(self._waiting_by.values(), default=0) < 2

    def take(self, claim: Priority) -> bool:
        """Take a slot if one is free. Then only large messages can be waiting, because :meth:`next` was called."""
        if not self._free() or (claim.large and self._by_age) or not self._fits(claim):
            return False
        self._book(claim)
        return True

    def join(self, ticket: QueueEntry[T]) -> QueueEntry[T] | None:
        """Add an entry. Returns the entry that is shed for it, perhaps the new one; None if there is room."""
        source = ticket.claim.source
        self._by_age[ticket] = None
        self._ranks[ticket.claim.rank].setdefault(source, deque()).append(ticket)
        self._waiting_by[source] = self._waiting_by.get(source, 0) + 1
        if len(self._by_age) <= self.room:
            return None
        most = max(self._waiting_by.values())
        greedy = source if most == 1 else max(self._waiting_by, key=self._waiting_by.__getitem__)
        leaving = next(queues[greedy][-1] for queues in reversed(self._ranks) if greedy in queues)
        self.quit(leaving)
        return leaving

    def quit(self, ticket: QueueEntry[T]) -> None:
        """Remove an entry; does nothing if it is not in the queue."""
        if ticket not in self._by_age:
            return
        claim = ticket.claim
        del self._by_age[ticket]
        queues = self._ranks[claim.rank]
        queues[claim.source].remove(ticket)
        if not queues[claim.source]:
            del queues[claim.source]
        self._waiting_by[claim.source] -= 1
        if not self._waiting_by[claim.source]:
            del self._waiting_by[claim.source]
        if self._stuck is ticket:
            self._stuck = None

    def next(self) -> QueueEntry[T] | None:
        """Remove and return the entry that gets a free slot. Call it after each change until it returns None."""
        if not self._by_age or not self._free():
            return None
        ticket = self._choose()
        if ticket is None:
            return None
        claim = ticket.claim
        self.quit(ticket)
        if claim.source in (queues := self._ranks[claim.rank]):
            queues.move_to_end(claim.source)
        self._book(claim)
        self._served += 1
        return ticket

    def leave(self, claim: Priority) -> None:
        """Give back a slot."""
        self.held -= 1
        self._volume_held -= claim.volume
        self._held_by[claim.source] -= 1
        if not self._held_by[claim.source]:
            del self._held_by[claim.source]

    def _free(self) -> bool:
        return self.held < self.places and not self.closed

    def _fits(self, claim: Priority) -> bool:
        return not claim.large or not self._volume_held or self._volume_held + claim.volume <= self.volume

    def _book(self, claim: Priority) -> None:
        self.held += 1
        self._volume_held += claim.volume
        self._held_by[claim.source] = self._held_by.get(claim.source, 0) + 1

    def _choose(self) -> QueueEntry[T] | None:
        if self._stuck is not None and self._fits(self._stuck.claim):
            return self._stuck
        if self._served % OLDEST_EVERY == OLDEST_EVERY - 1 and self._may_go(oldest := next(iter(self._by_age))):
            return oldest
        for queues in self._ranks:
            if queues:
                first = queues[self._fewest(queues)][0]
                if self._may_go(first):
                    return first
        return None

    def _may_go(self, ticket: QueueEntry[T]) -> bool:
        if not ticket.claim.large:
            return True
        if self._stuck is None and not self._fits(ticket.claim):
            self._stuck = ticket
        return self._stuck is None

    def _fewest(self, queues: OrderedDict[SourceKey, deque[QueueEntry[T]]]) -> SourceKey:
        """The source that holds the fewest slots, the first of them in their order of turns."""
        best, fewest = next(iter(queues)), UNLIMITED
        for source in queues:
            held = self._held_by.get(source, 0)
            if held < fewest:
                best, fewest = source, held
            if not held:
                break
        return best
