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
from contentfilter.wire.envelope import memory_cost

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
    bytes_charged: int

    @property
    def large(self) -> bool:
        return self.bytes_charged > 0


def priority_of(origin: Origin, size: int, envelope: int = 0) -> Priority:
    """The priority of a message of ``size`` bytes whose envelope has ``envelope`` bytes.

    The rank is by size alone. An envelope is charged at the memory that it may take while the message is handled.
    """
    charged = size + memory_cost(envelope)
    rank = 2 * (size + envelope > LARGE) + (origin.kind not in _OURS)
    return Priority(source_of(origin), rank, charged if charged > LARGE else 0)


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

    priority: Priority
    waiter: T


class AdmissionQueue(Generic[T]):
    """Slots, and the queue for them. Whoever gets a slot gives it back with :meth:`release`."""

    def __init__(self, slots: int, max_waiting: int = UNLIMITED, byte_limit: int = UNLIMITED) -> None:
        """``max_waiting``: number of entries. ``byte_limit``: bytes of large messages in slots; one always fits."""
        self.slots, self.max_waiting, self.byte_limit = slots, max_waiting, byte_limit
        self.suspended = False  # while set, no slot is given
        self.in_use = 0
        self._bytes_in_use = 0
        self._served = 0
        self._in_use_by: dict[SourceKey, int] = {}
        self._waiting_by: dict[SourceKey, int] = {}
        self._by_age: OrderedDict[QueueEntry[T], None] = OrderedDict()
        self._ranks: tuple[OrderedDict[SourceKey, deque[QueueEntry[T]]], ...] = tuple(
            OrderedDict() for _ in range(RANKS)
        )
        self._blocked: QueueEntry[T] | None = None  # a large message that has its turn, but does not fit yet

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
        return len(self._by_age) >= self.max_waiting and max(self._waiting_by.values(), default=0) < 2

    def try_acquire(self, priority: Priority) -> bool:
        """Take a slot if one is free. Then only large messages can wait, because :meth:`next_ready` was called."""
        if not self._free() or (priority.large and self._by_age) or not self._fits(priority):
            return False
        self._acquire(priority)
        return True

    def enqueue(self, entry: QueueEntry[T]) -> QueueEntry[T] | None:
        """Add an entry. Returns the entry that is shed for it, perhaps the new one; None if there is room."""
        source = entry.priority.source
        self._by_age[entry] = None
        self._ranks[entry.priority.rank].setdefault(source, deque()).append(entry)
        self._waiting_by[source] = self._waiting_by.get(source, 0) + 1
        if len(self._by_age) <= self.max_waiting:
            return None
        most = max(self._waiting_by.values())
        greedy = source if most == 1 else max(self._waiting_by, key=self._waiting_by.__getitem__)
        shed = next(queues[greedy][-1] for queues in reversed(self._ranks) if greedy in queues)
        self.withdraw(shed)
        return shed

    def withdraw(self, entry: QueueEntry[T]) -> None:
        """Remove an entry; does nothing if it is not in the queue."""
        if entry not in self._by_age:
            return
        priority = entry.priority
        del self._by_age[entry]
        queues = self._ranks[priority.rank]
        queues[priority.source].remove(entry)
        if not queues[priority.source]:
            del queues[priority.source]
        self._waiting_by[priority.source] -= 1
        if not self._waiting_by[priority.source]:
            del self._waiting_by[priority.source]
        if self._blocked is entry:
            self._blocked = None

    def next_ready(self) -> QueueEntry[T] | None:
        """Remove and return the entry that gets a free slot. Call it after each change until it returns None."""
        if not self._by_age or not self._free():
            return None
        entry = self._choose()
        if entry is None:
            return None
        priority = entry.priority
        self.withdraw(entry)
        if priority.source in (queues := self._ranks[priority.rank]):
            queues.move_to_end(priority.source)
        self._acquire(priority)
        self._served += 1
        return entry

    def acquire(self, priority: Priority) -> None:
        """Take a slot without :meth:`try_acquire`, for one that has had its turn."""
        self._acquire(priority)

    def release(self, priority: Priority) -> None:
        """Give back a slot."""
        self.in_use -= 1
        self._bytes_in_use -= priority.bytes_charged
        self._in_use_by[priority.source] -= 1
        if not self._in_use_by[priority.source]:
            del self._in_use_by[priority.source]

    def _free(self) -> bool:
        return self.in_use < self.slots and not self.suspended

    def _fits(self, priority: Priority) -> bool:
        total = self._bytes_in_use + priority.bytes_charged
        return not priority.large or not self._bytes_in_use or total <= self.byte_limit

    def _acquire(self, priority: Priority) -> None:
        self.in_use += 1
        self._bytes_in_use += priority.bytes_charged
        self._in_use_by[priority.source] = self._in_use_by.get(priority.source, 0) + 1

    def _choose(self) -> QueueEntry[T] | None:
        if self._blocked is not None and self._fits(self._blocked.priority):
            return self._blocked
        if self._served % OLDEST_EVERY == OLDEST_EVERY - 1 and self._may_start(oldest := next(iter(self._by_age))):
            return oldest
        for queues in self._ranks:
            if queues:
                first = queues[self._fewest(queues)][0]
                if self._may_start(first):
                    return first
        return None

    def _may_start(self, entry: QueueEntry[T]) -> bool:
        if not entry.priority.large:
            return True
        if self._blocked is None and not self._fits(entry.priority):
            self._blocked = entry
        return self._blocked is None

    def _fewest(self, queues: OrderedDict[SourceKey, deque[QueueEntry[T]]]) -> SourceKey:
        """The source that holds the fewest slots, the first of them in their order of turns."""
        best, fewest = next(iter(queues)), UNLIMITED
        for source in queues:
            in_use = self._in_use_by.get(source, 0)
            if in_use < fewest:
                best, fewest = source, in_use
            if not in_use:
                break
        return best
