"""Who goes first where more messages come than there are places, and who has to come again.

Theory. A place that gets free goes to the best rank that waits: small before large, and within each our own
users and bounces before the rest. Within a rank it goes to the source that holds the fewest places,
and among equals to the one that was served longest ago. So a source with a thousand messages delays another source
by one message, not by a thousand. But every OLDEST_EVERY-th place goes to whoever waits longest, whatever its rank
or source: somebody with n messages before it is served after at most OLDEST_EVERY * (n + 1) places, and nobody starves.

Large messages have a bound on their bytes besides. One that has its turn, but does not fit, keeps its turn: small ones
pass it by, other large ones do not. Where the waiting room is full, the source with the most messages in it loses
its last one, which comes again. Sizes are bytes.
"""

import ipaddress
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from contentfilter.model import Origin, OriginKind

LARGE = 262_144  # bytes; above it a message comes after the small ones
OLDEST_EVERY = 4
RANKS = 4
UNLIMITED = 1 << 62
_OURS = frozenset((OriginKind.BOUNCE, OriginKind.AUTHENTICATED, OriginKind.RELAY))

SourceKey = tuple[str, bytes | int]
T = TypeVar("T")


class Priority(msgspec.Struct, frozen=True):
    """What a message may expect: whose it is, its rank (0 goes first), and the bytes that count (0: small)."""

    source: SourceKey
    rank: int
    volume: int

    @property
    def large(self) -> bool:
        return self.volume > 0


def priority_of(origin: Origin, size: int) -> Priority:
    """The claim of a message of ``size`` bytes."""
    large = size > LARGE
    return Priority(source_of(origin), 2 * large + (origin.kind not in _OURS), size if large else 0)


def source_of(origin: Origin) -> SourceKey:
    """Who counts as one: the authenticated user, the network over SMTP (/24, IPv6 /64), else the local user."""
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
    """A place in the line, and who waits there."""

    claim: Priority
    waiter: T


class AdmissionQueue(Generic[T]):
    """Places, and those who wait for one. Who takes a place gives it back with :meth:`leave`."""

    def __init__(self, places: int, room: int = UNLIMITED, volume: int = UNLIMITED) -> None:
        """``room``: how many may wait. ``volume``: bytes of large messages in places; one always fits."""
        self.places, self.room, self.volume = places, room, volume
        self.closed = False  # nobody gets a place
        self.held = 0
        self._volume_held = 0
        self._served = 0
        self._held_by: dict[SourceKey, int] = {}
        self._waiting_by: dict[SourceKey, int] = {}
        self._by_age: OrderedDict[QueueEntry[T], None] = OrderedDict()
        self._ranks: tuple[OrderedDict[SourceKey, deque[QueueEntry[T]]], ...] = tuple(
            OrderedDict() for _ in range(RANKS)
        )
        self._stuck: QueueEntry[T] | None = None  # a large one that has its turn, but does not fit yet

    def __len__(self) -> int:
        """How many wait."""
        return len(self._by_age)

    def ahead(self, rank: int) -> int:
        """How many wait whom ``rank`` does not pass."""
        return sum(len(queue) for queues in self._ranks[: rank + 1] for queue in queues.values())

    def full(self) -> bool:
        """One more could only be turned away."""
        if self._free():
            return False
        return len(self._by_age) >= self.room and max(self._waiting_by.values(), default=0) < 2

    def take(self, claim: Priority) -> bool:
        """A place at once, if one is free. Then nobody waits but large ones, because :meth:`next` was called."""
        if not self._free() or (claim.large and self._by_age) or not self._fits(claim):
            return False
        self._book(claim)
        return True

    def join(self, ticket: QueueEntry[T]) -> QueueEntry[T] | None:
        """Wait. Returns who has to go for it, perhaps the newcomer itself."""
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
        """Wait no longer. For a ticket that does not wait this does nothing."""
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
        """Who gets a free place now. Call it until it is None, after each change."""
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

    def hold(self, claim: Priority) -> None:
        """Take a place without asking :meth:`take`; for who has had its turn."""
        self._book(claim)

    def leave(self, claim: Priority) -> None:
        """Give a place back."""
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
        """Of those in their order of turns, the first that holds the fewest places."""
        best, fewest = next(iter(queues)), UNLIMITED
        for source in queues:
            held = self._held_by.get(source, 0)
            if held < fewest:
                best, fewest = source, held
            if not held:
                break
        return best
