"""The hook's door: the state machine of one connection, from the request to the answer or the report.

A request is one packet with two descriptors; every descriptor that arrives is owned or closed. Garbage closes the
connection. A sound request gets an answer: whatever goes wrong while it is handled becomes a deferral, never a
rejection. If the hook goes away, the handling is cancelled. Callbacks on the descriptor instead of streams, because
every message passes here. Packets: doors/hook_socket.py; formats: wire/hook.py.
"""

import asyncio
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum

from contentfilter.deadline import Deadline
from contentfilter.doors.admission import (
    AcceptedMessage,
    Handler,
    IntakeState,
    PendingMessage,
    Waiter,
    deferral,
    new_incident,
)
from contentfilter.doors.hook_socket import (
    PreparedAnswer,
    peer_credentials,
    prepare_answer,
    receive_report,
    receive_request,
    unexpected_event,
)
from contentfilter.doors.hook_work import INLINE_BYTES, answer_with, close_all, open_offered, parse_envelope
from contentfilter.doors.message import ENVELOPE_LIMIT, read_envelope
from contentfilter.doors.origin import classify, represented
from contentfilter.errors import EnvelopeError, LocalProtocolError, MessageError, ProtocolError
from contentfilter.model import Envelope
from contentfilter.policy.admission import QueueEntry, priority_of
from contentfilter.verdict.disposition import Disposition
from contentfilter.wire import envelope as envelope_format
from contentfilter.wire import hook

REQUEST_WAIT = 5.0  # seconds from connecting to the request packet; hooks send it immediately
HOOK_BUDGET_MAX = 3600.0  # seconds, in queue.conf
HOOK_GRACE, HOOK_ABORT = 30.0, 10.0  # seconds that a hook may take to commit, and to give up (queue_hook/commit.c)
RESERVE = 1.0  # seconds between the handler's deadline and the end of the budget; half of it to decide about a timeout
FAST = 0.05  # seconds; only a handling that takes longer is watched for a client that goes away


class Stage(Enum):
    """Stage of a connection. The values appear in ``status`` and in the log."""

    REQUEST = "request"  # connected; no request yet
    WAITING = "waiting"  # in the admission queue
    STARTING = "starting"  # has a slot; its task has not made its first step
    OPENING = "opening"  # the message is being mapped or copied
    HANDLING = "handling"  # the handler decides
    ANSWERING = "answering"
    REPORT = "report"  # the hook commits the parts of a split message
    CLOSED = "closed"


TRANSITIONS: Mapping[Stage, frozenset[Stage]] = {
    Stage.REQUEST: frozenset((Stage.WAITING, Stage.STARTING, Stage.ANSWERING, Stage.CLOSED)),
    Stage.WAITING: frozenset((Stage.STARTING, Stage.ANSWERING, Stage.CLOSED)),
    Stage.STARTING: frozenset((Stage.OPENING,)),  # not even a cancellation goes another way, see cancel()
    Stage.OPENING: frozenset((Stage.HANDLING, Stage.ANSWERING, Stage.CLOSED)),
    Stage.HANDLING: frozenset((Stage.ANSWERING, Stage.CLOSED)),
    Stage.ANSWERING: frozenset((Stage.REPORT, Stage.CLOSED)),
    Stage.REPORT: frozenset((Stage.CLOSED,)),
    Stage.CLOSED: frozenset(),
}


class Connection:
    """Owns the accepted socket, and ends by calling the ``closed`` callback of its :class:`IntakeState`."""

    __slots__ = (
        "_budget_end",
        "_cancel_reason",
        "_entry",
        "_fds",
        "_hook_end",
        "_pending",
        "_socket",
        "_state",
        "_task",
        "_timer",
        "_watching",
        "began",
        "incident",
        "size",
        "stage",
    )

    def __init__(self, state: IntakeState, accepted: socket.socket) -> None:
        self._state = state
        self._socket = accepted
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watching = False
        self._cancel_reason = ""
        self._pending: tuple[PendingMessage, hook.Request] | None = None
        self._fds: list[int] = []  # until the message is opened
        self._entry: QueueEntry[Waiter] | None = None  # while in the admission queue
        self.began = time.monotonic()
        self._budget_end = self._hook_end = self.began  # once there is a request: of the message, of the hook
        self.incident = ""
        self.size = 0  # bytes of the message
        self.stage = Stage.REQUEST

    def _enter(self, stage: Stage) -> None:
        """Raises LocalProtocolError for a transition that is not in the table: a defect."""
        if stage not in TRANSITIONS[self.stage]:
            raise LocalProtocolError(f"connection cannot go from {self.stage.value} to {stage.value}")
        self.stage = stage

    def start(self) -> None:
        """Take the request, which is usually here already, or wait a short time for it."""
        if self._take_request():
            return
        self._watch(self._take_request)
        self._set_timer(self._state.loop.time() + REQUEST_WAIT, self._reject_garbage, "no request in time")

    def cancel(self, reason: str) -> None:
        """Stop immediately; the hook sees a closed connection and offers the message again."""
        self._cancel_reason = self._cancel_reason or reason
        if self.stage is Stage.STARTING:
            return  # a task that is cancelled before its first step never runs: that step finds the reason instead
        if self._task is not None:
            self._task.cancel()
            return
        if self.stage is Stage.WAITING:
            self._cancelled()
        self._close()

    # Stage REQUEST

    def _take_request(self) -> bool:
        """False if nothing has arrived yet."""
        try:
            received = receive_request(self._socket)
        except BlockingIOError:
            return False
        except OSError as error:
            self._reject_garbage(error.strerror or "cannot receive")
            return True
        except ProtocolError as error:
            self._reject_garbage(str(error))
            return True
        self._unwatch()
        if received is None:  # a probe: it connected and closed
            self._close()
            return True
        request, self._fds = received
        self.incident, self.size = new_incident(), request.message_size
        pid, uid = peer_credentials(self._socket)
        uid, pid = represented(uid, pid, request.environ, self._state.own_uid)
        origin = classify(uid, pid, request.environ, self._state.limits.origin)
        priority = priority_of(origin, self.size, request.envelope_size)
        self._pending = PendingMessage(self.incident, origin, priority, self.size, request.attempt), request
        self._admit(*self._pending)
        return True

    def _admit(self, pending: PendingMessage, request: hook.Request) -> None:
        """Begin if there is a free slot; otherwise wait for one, which may shed a connection."""
        state, limits = self._state, self._state.limits
        self._hook_end = hook_end(request, self.began, time.monotonic())
        self._budget_end = min(self.began + limits.budget, self._hook_end)
        if self.size > limits.max_message or request.envelope_size > ENVELOPE_LIMIT:
            what = "message" if self.size > limits.max_message else "envelope"
            why = f"{self.size} bytes" if what == "message" else f"envelope of {request.envelope_size} bytes"
            state.counters.bad_messages += 1
            state.log.warning("intake.bad-message", id=self.incident, why=why, uid=pending.origin.uid)
            self._defer(f"{what} is larger than the content filter takes")
            self._close()
        elif state.queue.try_acquire(pending.priority):
            self.begin()
        else:
            self._enter(Stage.WAITING)
            self._watch(self._peer_moved)
            self._set_timer(
                min(self.began + limits.admission_wait, self._deadline().at), self._waited_too_long, pending, request
            )
            self._entry = QueueEntry(pending.priority, self)
            if (shed := state.queue.enqueue(self._entry)) is not None:
                shed.waiter.shed_connection()

    def _reject_garbage(self, why: str) -> None:
        self._state.counters.garbage += 1
        if (held := self._state.garbage_log.allow()) is not None:
            pid, uid = peer_credentials(self._socket)
            self._state.log.warning("intake.garbage", why=why, uid=uid, pid=pid, not_logged=held)
        self._close()

    # Stage WAITING

    def begin(self) -> None:
        """Waiter: the connection has a slot."""
        assert self._pending is not None, "only a pending message waits"  # noqa: S101
        self._unwatch()
        self._entry = None
        self._enter(Stage.STARTING)
        self._task = self._state.loop.create_task(self._serve(*self._pending))
        self._set_timer(self._state.loop.time() + FAST, self._handling_is_slow)

    def shed_connection(self) -> None:
        """Waiter: the queue is full. The hook offers the message again, as long as its budget lasts."""
        self._state.counters.crowded += 1
        self._close()

    def _waited_too_long(self, pending: PendingMessage, request: hook.Request) -> None:
        envelope, size = Envelope(b"", ()), request.envelope_size
        if size <= INLINE_BYTES:
            with suppress(MessageError, EnvelopeError, IndexError):
                envelope = envelope_format.parse(read_envelope(self._fds[-1], size))
        self._send(self._state.reject_busy(pending, envelope, time.monotonic() - self.began))
        self._close()

    # Stages STARTING, OPENING and HANDLING

    async def _serve(self, pending: PendingMessage, request: hook.Request) -> None:
        state, origin = self._state, pending.origin
        answered = 0
        self._enter(Stage.OPENING)
        try:
            if self._cancel_reason:
                raise asyncio.CancelledError
            state.counters.retries += request.attempt > 0
            handler = state.limits.handler
            with handler.hold():  # also while the message is opened: a reload then closes only what nobody uses
                answered = await self._decide(handler, pending, request)
        except asyncio.CancelledError:
            self._cancelled()
        except MessageError as error:
            state.counters.bad_messages += 1
            state.log.warning("intake.bad-message", id=self.incident, why=str(error), uid=origin.uid, pid=origin.pid)
            self._defer("message could not be taken over")
        except EnvelopeError as error:  # the hook checks it too: the client is another program
            state.log.warning("intake.bad-envelope", id=self.incident, why=str(error))
            self._defer("the envelope is malformed")
        except Exception:  # the one boundary: a defect defers
            self._internal_error()
        finally:
            state.release(pending.priority)
        self._task = None
        if answered >= 2:
            self._await_report()
        else:
            self._close()

    async def _decide(self, handler: Handler, pending: PendingMessage, request: hook.Request) -> int:
        """Open the message, have it handled, answer. Returns the number of submissions in the answer that was sent."""
        fds, self._fds = self._fds, []
        sizes = (request.message_size, request.envelope_size)
        message, block = await open_offered(fds, sizes, self._state.opening)
        try:
            envelope = await parse_envelope(block, handler.recipient_limit(pending.origin.kind))
            del block
            self._enter(Stage.HANDLING)
            accepted = AcceptedMessage(
                self.incident, pending.origin, envelope, message, self._deadline(), request.attempt, request.environ
            )
            disposition = await handler.handle(accepted)
            try:
                prepared = await answer_with(disposition, message, request.envelope_size)
            except OSError as error:
                self._answer_failed(error)
                return 0
            return len(disposition.deliveries) if self._send_prepared(prepared) else 0
        finally:
            message.close()

    def _deadline(self, reserve: float = RESERVE) -> Deadline:
        """When the answer must be ready: the end of the budget, less a reserve for what follows."""
        return Deadline(self._budget_end - min(reserve, reserve * (self._budget_end - self.began) / 10))

    def _handling_is_slow(self) -> None:
        """From now on, notice a hook that goes away, and enforce the deadline."""
        self._watch(self._peer_moved)
        self._set_timer(self._deadline(RESERVE / 2).at, self.cancel, "overdue")

    def _peer_moved(self) -> None:
        if reason := unexpected_event(self._socket):
            self._unwatch()
            self.cancel(reason)

    def _cancelled(self) -> None:
        log, counters = self._state.log, self._state.counters
        if self._cancel_reason == "overdue":
            counters.errors += 1
            log.error("intake.internal-error", id=self.incident, why="the handling overran its deadline")
            self._defer("out of time")
            return
        counters.gone += self._cancel_reason == "gone"
        reason = self._cancel_reason or "cancelled"
        log.info("intake.client-gone", id=self.incident, why=reason, stage=self.stage.value)

    def _internal_error(self) -> None:
        """Defer because of the exception that is being handled, which is logged."""
        self._state.counters.errors += 1
        self._state.log.exception("intake.internal-error", id=self.incident)
        self._defer("internal error in the content filter")

    # Stages ANSWERING and REPORT

    def _defer(self, why: str) -> None:
        self._send(deferral(why, self.incident))

    def _send(self, disposition: Disposition) -> None:
        """Send a disposition without deliveries."""
        self._send_prepared(prepare_answer(hook.Answer(disposition.action, text=disposition.text)))

    def _send_prepared(self, prepared: PreparedAnswer) -> bool:
        """False if the hook is gone."""
        self._enter(Stage.ANSWERING)
        self._unwatch()
        try:
            prepared.send(self._socket)
        except OSError as error:
            self._answer_failed(error)
            return False
        finally:
            prepared.close()
        self._state.counters.answered += 1
        return True

    def _answer_failed(self, error: OSError) -> None:
        self._state.log.info("intake.answer-failed", id=self.incident, why=error.strerror)

    def _await_report(self) -> None:
        """For as long as the hook may take: it has its grace from the answer on, even when the budget is over."""
        self._enter(Stage.REPORT)
        self._watch(self._take_report)
        until = max(self._hook_end, self._state.loop.time() + HOOK_GRACE) + HOOK_ABORT
        self._set_timer(until, self._report, None)

    def _take_report(self) -> None:
        try:
            report = receive_report(self._socket)
        except BlockingIOError:
            return
        except (OSError, ProtocolError):
            self._report(None)
            return
        self._report([f"{result.status}{'+' if result.committed else ''}" for result in report.results])

    def _report(self, results: list[str] | None) -> None:
        """Log what became of a split message; None: the hook did not say."""
        log = self._state.log.warning if results is None else self._state.log.info
        log("mail.report", id=self.incident, results=results)
        self._state.callbacks.emit("mail.report", {"id": self.incident, "results": results})
        self._close()

    # Bookkeeping

    def _watch(self, callback: Callable[[], object]) -> None:
        self._state.loop.add_reader(self._socket.fileno(), callback)
        self._watching = True

    def _set_timer(self, at: float, callback: Callable[..., object], *arguments: object) -> None:
        self._timer = self._state.loop.call_at(at, callback, *arguments)

    def _unwatch(self) -> None:
        """Stop watching the socket, and stop the timer."""
        if self._watching:
            self._state.loop.remove_reader(self._socket.fileno())
            self._watching = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._enter(Stage.CLOSED)
        self._unwatch()
        self._socket.close()
        close_all(self._fds)
        self._fds, self._pending = [], None
        if self._entry is not None:
            self._state.queue.withdraw(self._entry)
            self._state.fill_slots()  # a large message may have kept others waiting
            self._entry = None
        self._state.callbacks.closed(self)


def hook_end(request: hook.Request, accepted: float, now: float) -> float:
    """When the hook's budget ends, which it counts from ``request.sent``: the time in the socket's queue is part of it.

    An older hook does not say when, and another clock makes no sense here: then it counts from ``accepted``.
    """
    budget = min(request.budget, HOOK_BUDGET_MAX)
    sent = request.sent
    return (accepted if sent is None or not now - budget <= sent <= now else sent) + budget
