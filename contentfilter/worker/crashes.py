"""Crash attribution: which message was a worker working on when it died? A table in shared memory outlives the workers.

A worker marks a message in its slot of the table while it works on it: while a step of the handling runs on the event
loop or in a thread, but not while it waits for a scanner. A mark that a dead worker leaves behind therefore names the
message that killed it, or one of very few; messages that only waited are not suspected. The supervisor moves such
marks to the list of deaths. A worker that is offered a message counts its deaths there and in the slots of workers
that are dead but not recorded yet: the hook retries within milliseconds, sooner than the supervisor notices.

Theory. Each worker holds a POSIX lock on the first byte of its slot. The kernel releases it before it closes the
worker's connections (close_files, then the deferred last fput), so a client that sees its connection closed finds the
slot unlocked. Marks carry the number of the worker's life, so that a death counts once wherever its mark is found.

Why a task factory and an executor. A mark must cover the tasks and threads that a message starts, also those started
in libraries (TaskGroup, to_thread), and only while they run. asyncio has no hook around a step of a task except the
coroutine itself; context variables reach child tasks and threads, but nothing runs when a context is entered. Marking
a message from begin to end instead would suspect every message that waits for a scanner, thousands in the worst case.
Measured, in CPU time of the loop's thread: 1.2 microseconds for a step of a message, 5 for a task or a thread's call.
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
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import coroutine
from typing import Any, TypeVar

import msgspec

from contentfilter.log import Logger

T = TypeVar("T")
DEATH_LIMIT = 2  # deaths after which a message is isolated
MEMORY = 86_400  # seconds for which a death counts against a message
DEATHS = 32  # kept in the table, the newest
SLOTS = 2048  # simultaneous workers, including those that are draining
MARKS = 48  # in a slot: the event loop, the 32 threads that asyncio starts at most, and those for the disk
TOP = 128 * 1024  # bytes in which the Received fields are searched
HALF = 4096  # bytes at each end of a longer message that its fingerprint covers; every message pays for them
_RECEIVED = re.compile(rb"(?:Received:[^\n]*\n(?:[ \t][^\n]*\n)*)*", re.IGNORECASE)
_MARK = struct.Struct("<16s16sQQ")  # fingerprint, incident, life, seconds since 1970
_SLOT = _MARK.size * MARKS
_USED = struct.Struct("<Q")  # slots that were ever used
_DEATHS_AT = _USED.size
_SLOTS_AT = _DEATHS_AT + DEATHS * _MARK.size
_SIZE = _SLOTS_AT + SLOTS * _SLOT
_NO_MARK = bytes(_MARK.size)


def fingerprint(data: mmap.mmap | bytes) -> bytes:
    """16 bytes that stay the same when a client sends a message again: the Received fields on top do not count."""
    found = _RECEIVED.match(data, 0, TOP)
    start = found.end() if found else 0
    digest = hashlib.sha256()  # half the time of blake2b where the processor has instructions for it
    if len(data) - start <= 2 * HALF:
        digest.update(data[start:])
    else:
        digest.update(b"%d\n" % (len(data) - start))
        digest.update(data[start : start + HALF])
        digest.update(data[-HALF:])
    return digest.digest()[:16]


class InProgressMark(msgspec.Struct, frozen=True):
    """A message that a worker is working on, or that it died of."""

    fingerprint: bytes
    incident: str
    life: int  # of the worker
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
    """A worker's slot in the table, for its whole life."""

    index: int
    life: int  # number of the worker since the supervisor's start, from 1

    @property
    def start(self) -> int:
        """Offset in bytes."""
        return _SLOTS_AT + self.index * _SLOT


class CrashTable:
    """The supervisor's side: assigns slots and counts deaths."""

    def __init__(self, log: Logger) -> None:
        self._log = log
        self.fd = os.memfd_create("crashes", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, _SIZE)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._table = mmap.mmap(self.fd, _SIZE)
        self._lives = 0
        self._taken: set[int] = set()
        self._deaths = 0

    def close(self) -> None:
        self._table.close()
        os.close(self.fd)

    def enlist(self) -> SlotPlace:
        """A slot for a new worker. Raises OSError if there are too many."""
        index = next((index for index in range(SLOTS) if index not in self._taken), None)
        if index is None:
            raise OSError(f"more than {SLOTS} workers")
        self._taken.add(index)
        self._lives += 1
        (used,) = _USED.unpack_from(self._table)
        _USED.pack_into(self._table, 0, max(used, index + 1))
        return SlotPlace(index, self._lives)

    def record_death(self, place: SlotPlace, *, expected: bool, child: int) -> None:
        """The worker has ended: move its marks to the deaths, unless it ended as requested, and free its slot."""
        left = _marks(self._table[place.start : place.start + _SLOT])
        for mark in {} if expected else {mark.fingerprint: mark for mark in left}.values():
            at = _DEATHS_AT + self._deaths % DEATHS * _MARK.size
            self._table[at : at + _MARK.size] = mark.packed()
            self._deaths += 1
            shown = mark.fingerprint.hex()
            count = self._counted().get(mark.fingerprint, 0)
            self._log.warning("worker.suspect", id=mark.incident, fingerprint=shown, deaths=count, child=child)
        self._table[place.start : place.start + _SLOT] = bytes(_SLOT)  # last: at no moment is a death in neither place
        self._taken.discard(place.index)

    def isolated(self) -> tuple[str, ...]:
        """Fingerprints of the messages that are isolated now, in hex."""
        return tuple(key.hex() for key, count in self._counted().items() if count >= DEATH_LIMIT)

    def forget(self) -> None:
        """Clear all deaths: the workers are new ones, perhaps of another version."""
        self._table[_DEATHS_AT:_SLOTS_AT] = bytes(_SLOTS_AT - _DEATHS_AT)

    def _counted(self) -> dict[bytes, int]:
        counts: dict[bytes, int] = {}
        for mark in _marks(self._table[_DEATHS_AT:_SLOTS_AT]):
            if time.time() - mark.since < MEMORY:
                counts[mark.fingerprint] = counts.get(mark.fingerprint, 0) + 1
        return counts


class WorkerSlot:
    """A worker's side of the table: its own marks, and the deaths that others left."""

    def __init__(self, fd: int, place: SlotPlace) -> None:
        """``fd`` of the table stays open: closing any descriptor of the file would release the lock."""
        self._fd = fd
        self._table = mmap.mmap(fd, _SIZE)
        self.place = place
        self._free = deque(place.start + i * _MARK.size for i in range(MARKS))
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, place.start)

    def put(self, packed: bytes) -> int:
        """Set a mark; returns its place for :meth:`clear`. Without a free one the work goes unmarked."""
        try:
            row = self._free.pop()
        except IndexError:
            return -1
        self._table[row : row + _MARK.size] = packed
        return row

    def clear(self, row: int) -> None:
        if row >= 0:
            self._table[row : row + _MARK.size] = _NO_MARK
            self._free.append(row)

    def deaths(self, key: bytes) -> int:
        """Number of workers that died of the message with this fingerprint."""
        (used,) = _USED.unpack_from(self._table)
        raw = self._table[_DEATHS_AT : _SLOTS_AT + used * _SLOT]  # a copy, because mmap.find looks at each byte
        if key not in raw:
            return 0
        now, lives = time.time(), set()
        for at in range(0, len(raw), _MARK.size):
            found, _, life, since = _MARK.unpack_from(raw, at)
            if found != key or life in (0, self.place.life) or now - since >= MEMORY:
                continue
            index = (at - (_SLOTS_AT - _DEATHS_AT)) // _SLOT
            if index < 0 or self._is_dead(index):
                lives.add(life)
        return len(lives)

    def _is_dead(self, index: int) -> bool:
        start = SlotPlace(index, 0).start
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, start)
        except OSError:
            return False
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, start)
        return True


class CrashAttribution:
    """Marks messages in a worker's slot while steps of their handling run: tasks and threads they start included."""

    def __init__(self, slot: WorkerSlot, loop: asyncio.AbstractEventLoop) -> None:
        self._slot = slot
        self._current: InProgressMark | None = None  # of the step that the event loop runs
        loop.set_task_factory(self._make_task)
        loop.set_default_executor(_MarkingThreads(self))

    async def attribute(self, work: Coroutine[Any, Any, T], key: bytes, incident: str) -> T:
        """The result of ``work``, the handling of the message with fingerprint ``key``."""
        return await self._run_steps(work, InProgressMark(key, incident, self._slot.place.life, int(time.time())))

    def executor(self, inner: Executor) -> Executor:
        """``inner``, with marks."""
        return _MarkingExecutor(self, inner)

    @coroutine
    def _run_steps(self, work: Coroutine[Any, Any, T], mark: InProgressMark) -> Generator[Any, Any, T]:
        """``await work``, with the mark set whenever it runs and cleared whenever it waits."""
        packed, error = mark.packed(), None
        while True:
            row, self._current = self._slot.put(packed), mark
            try:
                awaited = work.send(None) if error is None else work.throw(error)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            finally:
                self._current = None
                self._slot.clear(row)
            try:
                yield awaited
                error = None
            except BaseException as thrown:  # into us, mostly a cancellation: it is for the work
                error = thrown

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T] | Generator[Any, None, T], **more: Any
    ) -> asyncio.Task[T]:
        """Task factory of the loop: a task that a marked step creates is marked like it."""
        if self._current is not None and asyncio.iscoroutine(work):
            work = self._run_child(work, self._current)
        return asyncio.Task(work, loop=loop, **more)

    async def _run_child(self, work: Coroutine[Any, Any, T], mark: InProgressMark) -> T:
        return await self._run_steps(work, mark)

    def marked_call(self, call: Callable[..., T]) -> Callable[..., T]:
        """``call`` for a thread, with the mark of the step that hands it over, if any."""
        mark, slot = self._current, self._slot
        if mark is None:
            return call

        def run(*args: Any, **kwargs: Any) -> T:
            row = slot.put(mark.packed())
            try:
                return call(*args, **kwargs)
            finally:
                slot.clear(row)

        return run


class _MarkingThreads(ThreadPoolExecutor):
    """The default executor, with marks; asyncio takes nothing but a ThreadPoolExecutor."""

    def __init__(self, attribution: CrashAttribution) -> None:
        super().__init__(thread_name_prefix="asyncio")
        self._attribution = attribution

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        return super().submit(self._attribution.marked_call(fn), *args, **kwargs)


class _MarkingExecutor(Executor):
    """Another executor, with marks."""

    def __init__(self, attribution: CrashAttribution, inner: Executor) -> None:
        self._attribution, self._inner = attribution, inner

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        return self._inner.submit(self._attribution.marked_call(fn), *args, **kwargs)
