"""Intake state of one worker, shared by all doors: limits, counters and the admission queue.

A connection with a message holds a slot or waits for one (policy/admission.py). All connections come from users of the
mail system, or from the receiver process, which limits those of other users (contentfilter/receiver).
"""

import asyncio
import os
import time
from base64 import b32hexencode
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from random import getrandbits
from typing import Any, Protocol

import msgspec

from contentfilter.deadline import Deadline
from contentfilter.doors.origin import ResolvedOrigin
from contentfilter.log import Logger, RateLimiter
from contentfilter.model import Action, Envelope, Message, Origin, OriginKind
from contentfilter.policy.admission import UNLIMITED, AdmissionQueue, Priority
from contentfilter.threads import DaemonExecutor
from contentfilter.verdict.disposition import Disposition

OPENING_THREADS = 8


class AcceptedMessage(msgspec.Struct, frozen=True):
    """An opened message that has a slot. Its door closes ``message`` after the answer."""

    incident: str
    origin: Origin
    envelope: Envelope
    message: Message
    deadline: Deadline  # the result must be ready by then
    attempt: int = 0  # 0 for the first offer of a message, 1 for the second, ...
    environ: Mapping[bytes, bytes] = {}  # of the client, where the door knows it


class PendingMessage(msgspec.Struct, frozen=True):
    """A message that waits for a slot, unopened."""

    incident: str
    origin: Origin
    priority: Priority
    size: int  # bytes
    attempt: int = 0


class Waiter(Protocol):
    """A connection that waits for a slot."""

    def begin(self) -> None:
        """It has a slot now."""
        ...

    def shed_connection(self) -> None:
        """The queue is full: close without an answer, so that the client retries."""
        ...


class Handler(Protocol):
    """Decides about messages."""

    def hold(self) -> AbstractContextManager[object]:
        """While it is held, the handler stays usable, whatever is reloaded."""
        ...

    def recipient_limit(self, kind: OriginKind, /) -> int:
        """Recipients above which a message from such a client is rejected; see :class:`Envelope`."""
        ...

    async def handle(self, accepted: AcceptedMessage, /) -> Disposition:
        """Call it while the handler is held. May raise anything: that defers the message."""
        ...

    def rejected_busy(
        self, pending: PendingMessage, envelope: Envelope, why: str, text: str, seconds: float, /
    ) -> None:
        """Record that a message got no slot within ``seconds`` and was deferred with ``text``. May raise anything."""
        ...


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """Limits and handler for new messages; a reload replaces the whole value."""

    handler: Handler
    origin: ResolvedOrigin
    budget: float  # seconds for one message
    max_in_flight: int
    max_waiting: int = 1024
    max_bytes: int = UNLIMITED  # bytes of large messages in flight
    max_message: int = UNLIMITED  # bytes
    admission_wait: float = 30.0  # seconds


@dataclass(slots=True)
class Counters:
    """Intake counters since the worker's start."""

    accepted: int = 0
    answered: int = 0
    garbage: int = 0
    bad_messages: int = 0
    gone: int = 0
    errors: int = 0
    retries: int = 0  # offers with attempt > 0
    crowded: int = 0  # offers closed because the queue was full
    busy: int = 0  # messages deferred because no slot was free in time


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Notifications for the owner of an IntakeState."""

    closed: Callable[[Any], None]  # a connection has closed
    slot_freed: Callable[[], None]
    emit: Callable[[str, dict[str, Any]], None]  # an event with its fields


class IntakeState:
    """Shared by all connections of one worker."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, log: Logger, limits: IntakeLimits, callbacks: Callbacks
    ) -> None:
        self.loop, self.log, self.limits, self.callbacks = loop, log, limits, callbacks
        self.own_uid = os.geteuid()
        self.counters = Counters()
        self.garbage_log = RateLimiter(1.0)
        self.queue: AdmissionQueue[Waiter] = AdmissionQueue(limits.max_in_flight, limits.max_waiting, limits.max_bytes)
        self.exhausted = ""  # the resource that is below its watermark: no message gets a slot meanwhile
        self.opening: Executor = DaemonExecutor("open", OPENING_THREADS)

    def apply(self, limits: IntakeLimits) -> None:
        self.limits = limits
        queue = self.queue
        queue.slots, queue.max_waiting, queue.byte_limit = limits.max_in_flight, limits.max_waiting, limits.max_bytes
        self.fill_slots()

    def set_exhausted(self, resource: str) -> None:
        """Give no slots while ``resource`` is below its watermark; empty: continue."""
        self.exhausted = resource
        self.queue.suspended = bool(resource)
        self.fill_slots()

    def release(self, priority: Priority) -> None:
        """Give back a slot."""
        self.queue.release(priority)
        self.fill_slots()
        self.callbacks.slot_freed()

    def fill_slots(self) -> None:
        """Give free slots to connections that wait."""
        while (entry := self.queue.next_ready()) is not None:
            entry.waiter.begin()

    def reject_busy(self, pending: PendingMessage, envelope: Envelope, seconds: float) -> Disposition:
        """The deferral of a message that waited ``seconds`` without getting a slot."""
        self.counters.busy += 1
        code = "4.3.1" if self.exhausted else "4.3.2"
        why = f"content filter is short of {self.exhausted}" if self.exhausted else "content filter busy"
        disposition = deferral(why, pending.incident, code)
        try:
            self.limits.handler.rejected_busy(pending, envelope, why, disposition.text, seconds)
        except Exception:  # the message is deferred in any case
            self.counters.errors += 1
            self.log.exception("intake.internal-error", id=pending.incident)
        return disposition

    def is_trusted(self, uid: int) -> bool:
        """True for clients that run as a user of the mail system."""
        return self.limits.origin.system(uid, self.own_uid)


def new_incident() -> str:
    """Sixteen letters and digits that sort by time: 45 bits of milliseconds, 35 random ones, in base32hex."""
    number = time.time_ns() // 1_000_000 << 35 | getrandbits(35)
    return b32hexencode(number.to_bytes(10, "big")).decode("ascii").lower()


def deferral(what: str, incident: str, code: str = "4.3.0") -> Disposition:
    return Disposition(Action.DEFER, text=f"{what}, please try again [{incident}] (#{code})")
