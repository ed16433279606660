"""Which message was a worker working on when it died? A table in shared memory that outlives the workers.

A worker marks a message in its own lane of the table for as long as it works on it in this process: while a step of
its handling runs on the event loop or in a thread, not while it waits for a scanner. So a mark that a dead worker
leaves behind names the message that killed it, or one of very few, and those that only waited are no suspects. The
supervisor moves such marks to the deaths. A worker that is offered a message counts them, and those in the lanes of
workers that are dead but not buried yet: the hook comes again within milliseconds, sooner than the supervisor.

Theory. Each worker holds a POSIX lock on the first byte of its lane. The kernel drops it before it closes the
worker's connections (close_files, then the deferred last fput), so who is told by a closed connection finds the lane
unlocked. Marks carry the number of the worker's life, so that a death is counted once wherever its mark is found.
"""

import asyncio
import fcntl
import hashlib
import mmap
import os
import re
import struct
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import coroutine
from typing import Any, TypeVar

import msgspec

from contentfilter.log import Logger

T = TypeVar("T")
DEATH_LIMIT = 2  # deaths after which a message is isolated
MEMORY = 86_400  # seconds that a death is held against a message
DEATHS = 32  # that are remembered, the newest
LANES = 2048  # workers at once, those on their way out included
MARKS = 40  # in a lane: the event loop and the 32 threads that asyncio starts at most
TOP = 128 * 1024  # bytes in which the Received fields are looked for
HALF = 4096  # bytes at each end of a longer message that its fingerprint covers; every message pays for them
_RECEIVED = re.compile(rb"(?:Received:[^\n]*\n(?:[ \t][^\n]*\n)*)*", re.IGNORECASE)
_MARK = struct.Struct("<16s16sQQ")  # fingerprint, incident, life, seconds since 1970
_LANE = _MARK.size * MARKS
_USED = struct.Struct("<Q")  # lanes that were ever used
_DEATHS_AT = _USED.size
_LANES_AT = _DEATHS_AT + DEATHS * _MARK.size
_SIZE = _LANES_AT + LANES * _LANE
_NONE = bytes(_MARK.size)


def fingerprint(data: mmap.mmap | bytes) -> bytes:
    """16 bytes that stay the same when a client sends a message again: the Received fields on top do not count."""
    found = _RECEIVED.match(data, 0, TOP)
    start = found.end() if found else 0
    digest = hashlib.sha256()  # half of what blake2b takes where the processor has instructions for it
    if len(data) - start <= 2 * HALF:
        digest.update(data[start:])
    else:
        digest.update(b"%d\n" % (len(data) - start))
        digest.update(data[start : start + HALF])
        digest.update(data[-HALF:])
    return digest.digest()[:16]


class InProgressMark(msgspec.Struct, frozen=True):
    """A message that somebody works on, or died of."""

    fingerprint: bytes
    incident: str
    life: int  # the number of the worker
    since: int  # seconds since 1970

    def packed(self) -> bytes:
        return _MARK.pack(self.fingerprint, self.incident.encode("ascii", "replace"), self.life, self.since)


def _marks(raw: bytes) -> list[InProgressMark]:
    rows = _MARK.iter_unpack(raw)
    return [
        InProgressMark(key, incident.rstrip(b"\0").decode("ascii"), life, at)
        for key, incident, life, at in rows
        if life
    ]


@dataclass(frozen=True, slots=True)
class SlotPlace:
    """A worker's lane, for its whole life."""

    lane: int
    life: int

    @property
    def start(self) -> int:
        return _LANES_AT + self.lane * _LANE


class CrashTable:
    """The supervisor's end: hands out lanes, and counts the deaths."""

    def __init__(self, log: Logger) -> None:
        self._log = log
        self.fd = os.memfd_create("suspects", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, _SIZE)
        self._table = mmap.mmap(self.fd, _SIZE)
        self._lives = 0
        self._lanes: set[int] = set()
        self._deaths = 0

    def close(self) -> None:
        self._table.close()
        os.close(self.fd)

    def enlist(self) -> SlotPlace:
        """A lane for a new worker. Raises OSError when there are too many."""
        lane = next((lane for lane in range(LANES) if lane not in self._lanes), None)
        if lane is None:
            raise OSError(f"more than {LANES} workers")
        self._lanes.add(lane)
        self._lives += 1
        (used,) = _USED.unpack_from(self._table)
        _USED.pack_into(self._table, 0, max(used, lane + 1))
        return SlotPlace(lane, self._lives)

    def record_death(self, place: SlotPlace, *, expected: bool, child: int) -> None:
        """The worker is gone. What it left in its lane counts unless it was asked to end, and did."""
        left = _marks(self._table[place.start : place.start + _LANE])
        for mark in {} if expected else {mark.fingerprint: mark for mark in left}.values():
            at = _DEATHS_AT + self._deaths % DEATHS * _MARK.size
            self._table[at : at + _MARK.size] = mark.packed()
            self._deaths += 1
            shown = mark.fingerprint.hex()
            count = self._counted().get(mark.fingerprint, 0)
            self._log.warning("worker.suspect", id=mark.incident, fingerprint=shown, deaths=count, child=child)
        self._table[place.start : place.start + _LANE] = bytes(_LANE)  # after that: a death must not go unseen
        self._lanes.discard(place.lane)

    def isolated(self) -> tuple[str, ...]:
        """Fingerprints of the messages that are isolated now, in hex."""
        return tuple(key.hex() for key, count in self._counted().items() if count >= DEATH_LIMIT)

    def forget(self) -> None:
        """Give every message another chance: the workers are new ones, perhaps of another version."""
        self._table[_DEATHS_AT:_LANES_AT] = bytes(_LANES_AT - _DEATHS_AT)

    def _counted(self) -> dict[bytes, int]:
        counts: dict[bytes, int] = {}
        for mark in _marks(self._table[_DEATHS_AT:_LANES_AT]):
            if time.time() - mark.since < MEMORY:
                counts[mark.fingerprint] = counts.get(mark.fingerprint, 0) + 1
        return counts


class WorkerSlot:
    """A worker's end: marks what it works on, and knows what others died of."""

    def __init__(self, fd: int, place: SlotPlace) -> None:
        """``fd``: of the table. It stays open: to close any descriptor of the file would drop the lock."""
        self._fd = fd
        self._table = mmap.mmap(fd, _SIZE)
        self._place = place
        self._free = deque(place.start + i * _MARK.size for i in range(MARKS))
        self._now: InProgressMark | None = None  # what this step of the event loop works on
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, place.start)

    def attend(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have tasks and threads that are started for a message marked, too."""
        loop.set_task_factory(self._task)
        loop.set_default_executor(_Threads(self))

    def deaths(self, key: bytes) -> int:
        """How many workers died of this message."""
        (used,) = _USED.unpack_from(self._table)
        raw = self._table[_DEATHS_AT : _LANES_AT + used * _LANE]  # a copy, for mmap.find looks at each byte
        if key not in raw:
            return 0
        now, lives = time.time(), set()
        for at in range(0, len(raw), _MARK.size):
            found, _, life, since = _MARK.unpack_from(raw, at)
            if found != key or life in (0, self._place.life) or now - since >= MEMORY:
                continue
            lane = (at - (_LANES_AT - _DEATHS_AT)) // _LANE
            if lane < 0 or self._dead(lane):
                lives.add(life)
        return len(lives)

    def _dead(self, lane: int) -> bool:
        start = SlotPlace(lane, 0).start
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, start)
        except OSError:
            return False
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, start)
        return True

    async def handled(self, work: Coroutine[Any, Any, T], key: bytes, incident: str) -> T:
        """The result of ``work`` on a message, which is marked whenever a step of it runs."""
        return await self._stepped(work, InProgressMark(key, incident, self._place.life, int(time.time())))

    @coroutine
    def _stepped(self, work: Coroutine[Any, Any, T], mark: InProgressMark) -> Generator[Any, Any, T]:
        packed, error = mark.packed(), None
        while True:
            row, self._now = self._put(packed), mark
            try:
                awaited = work.send(None) if error is None else work.throw(error)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            finally:
                self._now = None
                self._clear(row)
            try:
                yield awaited
                error = None
            except BaseException as thrown:  # a cancellation, mostly: it is for the work
                error = thrown

    def _task(
        self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T] | Generator[Any, None, T], **more: Any
    ) -> asyncio.Task[T]:
        if self._now is not None and asyncio.iscoroutine(work):
            work = self._child(work, self._now)
        return asyncio.Task(work, loop=loop, **more)

    async def _child(self, work: Coroutine[Any, Any, T], mark: InProgressMark) -> T:
        return await self._stepped(work, mark)

    def marked(self, work: Callable[..., T]) -> Callable[..., T]:
        """``work`` for a thread, on the message that this step of the event loop works on, if any."""
        mark = self._now
        if mark is None:
            return work

        def run(*args: Any, **named: Any) -> T:
            row = self._put(mark.packed())
            try:
                return work(*args, **named)
            finally:
                self._clear(row)

        return run

    def _put(self, packed: bytes) -> int:
        """Where the mark stands; -1 where there is no room, which costs only that."""
        try:
            row = self._free.pop()
        except IndexError:
            return -1
        self._table[row : row + _MARK.size] = packed
        return row

    def _clear(self, row: int) -> None:
        if row >= 0:
            self._table[row : row + _MARK.size] = _NONE
            self._free.append(row)


class _Threads(ThreadPoolExecutor):
    """The event loop's threads, with marks."""

    def __init__(self, lane: WorkerSlot) -> None:
        super().__init__(thread_name_prefix="asyncio")
        self._lane = lane

    def submit(self, fn: Callable[..., T], /, *args: Any, **named: Any) -> "Future[T]":
        return super().submit(self._lane.marked(fn), *args, **named)
