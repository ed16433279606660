"""What all connections of one worker share: terms, counters, and the places that they wait for.

A connection that brought a message has a place or waits for one (policy/admission.py). One that brought nothing yet
has a seat; a local user gets only a few of them, so that idle connections cannot keep mail out.
"""

import asyncio
import os
import time
from base64 import b32hexencode
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import getrandbits
from typing import Any, Protocol

import msgspec

from contentfilter.deadline import Deadline
from contentfilter.doors.message import Spool
from contentfilter.doors.origin import ResolvedOrigin
from contentfilter.log import Logger, RateLimiter
from contentfilter.model import Action, Message, Origin
from contentfilter.policy.admission import UNLIMITED, AdmissionQueue, Priority
from contentfilter.wire import hook

MAX_IDLE = 16  # connections of one local user that have not sent a request
MAX_IDLE_TOTAL = 256  # of all local users together


class AcceptedMessage(msgspec.Struct, frozen=True):
    """One offered message, ready to be handled. Its owner closes ``message`` after the answer."""

    request: hook.Request
    origin: Origin
    envelope: bytes  # the block as received; the grammar is not checked yet
    message: Message
    deadline: Deadline  # the answer must be ready by then
    incident: str


class PendingMessage(msgspec.Struct, frozen=True):
    """A message that waits for its place, unopened. Who closes the connection closes ``fds``, too."""

    request: hook.Request
    fds: list[int]
    origin: Origin
    claim: Priority
    incident: str


class Waiter(Protocol):
    """A connection that waits for a place."""

    def begin(self) -> None:
        """It has one."""
        ...

    def shed_connection(self) -> None:
        """There is no room to wait in."""
        ...


class Handler(Protocol):
    """Decides about messages."""

    async def handle(self, job: AcceptedMessage) -> hook.Answer:
        """May raise anything: that defers the message."""
        ...

    def rejected_busy(self, offered: PendingMessage, why: str, answer: hook.Answer, seconds: float) -> None:
        """Note that a message got no place in ``seconds`` and was deferred. May raise anything, too."""
        ...


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """What holds for messages that come in from now on; replaced as a whole by a reload."""

    handler: Handler
    origin: ResolvedOrigin
    spool: Spool
    budget: float  # seconds for one message
    max_in_flight: int
    max_waiting: int = 1024
    max_volume: int = UNLIMITED  # bytes of large messages in flight
    max_message: int = UNLIMITED
    admission_wait: float = 30.0


@dataclass(slots=True)
class Counters:
    """What came in since the start."""

    accepted: int = 0
    answered: int = 0
    garbage: int = 0
    bad_messages: int = 0
    gone: int = 0
    errors: int = 0
    retries: int = 0  # offers with attempt > 0
    crowded: int = 0  # offers that found no room to wait in
    busy: int = 0  # messages deferred because no place was free in time


class IntakeState:
    """Made once for each worker."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        log: Logger,
        terms: IntakeLimits,
        closed: Callable[[Any], None],
        emit: Callable[[str, dict[str, Any]], None],
    ) -> None:
        """``emit``: takes an event with its fields, for whoever keeps them."""
        self.loop, self.log, self.terms, self.closed, self.emit = loop, log, terms, closed, emit
        self.own_uid = os.geteuid()
        self.counters = Counters()
        self.garbage_log = RateLimiter(1.0)
        self.line: AdmissionQueue[Waiter] = AdmissionQueue(terms.max_in_flight, terms.max_waiting, terms.max_volume)
        self.short = ""  # what there is too little of: nobody gets a place meanwhile
        self._seats: Counter[int] = Counter()

    def change(self, terms: IntakeLimits) -> None:
        self.terms = terms
        self.line.places, self.line.room, self.line.volume = terms.max_in_flight, terms.max_waiting, terms.max_volume
        self.hand_out()

    def shut(self, short: str) -> None:
        """Give nobody a place while there is too little of something, named for people; empty: go on."""
        self.short = short
        self.line.closed = bool(short)
        self.hand_out()

    def leave(self, claim: Priority) -> None:
        self.line.leave(claim)
        self.hand_out()

    def hand_out(self) -> None:
        """Give free places to those who wait."""
        while (ticket := self.line.next()) is not None:
            ticket.waiter.begin()

    def reject_busy(self, offered: PendingMessage, seconds: float) -> hook.Answer:
        """The answer for who waited ``seconds`` for nothing."""
        self.counters.busy += 1
        code = "4.3.1" if self.short else "4.3.2"
        why = f"content filter is short of {self.short}" if self.short else "content filter busy"
        answer = deferral(why, offered.incident, code)
        try:
            self.terms.handler.rejected_busy(offered, why, answer, seconds)
        except Exception:  # the message is deferred anyway
            self.counters.errors += 1
            self.log.exception("intake.internal-error", id=offered.incident)
        return answer

    # Connections without a request

    def sit(self, uid: int) -> bool:
        """A seat for a connection of ``uid`` that has sent nothing yet. Hooks of the system's users always get one."""
        if self.terms.origin.system(uid, self.own_uid):
            return True
        if self._seats[uid] >= MAX_IDLE or self._seats.total() >= MAX_IDLE_TOTAL:
            return False
        self._seats[uid] += 1
        return True

    def rise(self, uid: int) -> None:
        """Give the seat back."""
        if self._seats[uid] > 1:
            self._seats[uid] -= 1
        else:
            del self._seats[uid]  # uids that are gone, and those that need no seats, leave nothing behind


def new_incident() -> str:
    """Sixteen letters and digits that sort by time: 45 bits of milliseconds, 35 random ones, in base32hex."""
    number = time.time_ns() // 1_000_000 << 35 | getrandbits(35)
    return b32hexencode(number.to_bytes(10, "big")).decode("ascii").lower()


def deferral(what: str, incident: str, code: str = "4.3.0") -> hook.Answer:
    text = f"{what}, please try again [{incident}] (#{code})"
    return hook.Answer(Action.DEFER, text=text)
