"""One hook's connection: request, perhaps a wait for a free place, handling, answer, report, closed.

The request is one packet with two descriptors; all that arrive are owned or closed. Garbage closes the
connection. A sound request gets an answer: whatever goes wrong while it is handled becomes a
deferral, never a refusal. When the hook goes away the handling is cancelled. Callbacks on the
descriptor instead of streams: this is the path that every message takes. Wire format: wire/hook.py.
"""

import asyncio
import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable

from contentfilter.deadline import Deadline
from contentfilter.doors.admission import AcceptedMessage, IntakeState, PendingMessage, Waiter, deferral, new_incident
from contentfilter.doors.message import SEALS, Spool, open_pair
from contentfilter.doors.origin import classify
from contentfilter.errors import MessageError, ProtocolError
from contentfilter.model import Message
from contentfilter.policy.admission import QueueEntry, priority_of
from contentfilter.wire import hook

REQUEST_WAIT = 5.0  # seconds from connecting to the request packet; hooks send it at once
REPORT_WAIT = 300.0  # at most, for several real qmail-queues to finish
RESERVE = 1.0  # seconds between the handler's deadline and the end of the budget; half of it to decide about a timeout
FAST = 0.05  # seconds; only what takes longer is watched for a client that goes away
INLINE = 1024 * 1024  # bytes; more is read and copied off the event loop
_CREDENTIALS = struct.Struct("=iII")
_ANCILLARY = socket.CMSG_SPACE(2 * 4)
_RECEIVE = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
_TRUNCATED = socket.MSG_TRUNC | socket.MSG_CTRUNC


class Connection:
    """Owns the accepted socket from :meth:`start` on, and ends by calling ``room.closed``."""

    __slots__ = (
        "_fd",
        "_gone",
        "_idle_uid",
        "_offered",
        "_socket",
        "_state",
        "_task",
        "_ticket",
        "_timer",
        "_watching",
        "began",
        "incident",
        "size",
        "stage",
    )

    def __init__(self, room: IntakeState, accepted: socket.socket) -> None:
        self._state = room
        self._socket = accepted
        self._fd = accepted.fileno()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watching = False
        self._gone = ""  # why the handling is being cancelled
        self._idle_uid: int | None = None  # set while it counts as one without a request
        self._offered: PendingMessage | None = None  # owns the descriptors until the handling begins
        self._ticket: QueueEntry[Waiter] | None = None  # while it waits for a place
        self.began = time.monotonic()
        self.incident = ""
        self.size = 0  # bytes of the message
        self.stage = "request"

    def start(self) -> None:
        """Mostly the request is here already; otherwise wait a short while for it."""
        if self._take_request():
            return
        _, uid = self._peer()
        if not self._state.sit(uid):
            self._garbage("too many connections of this user without a request")
            return
        self._idle_uid = uid
        self._watch(self._take_request)
        self._timer = self._state.loop.call_later(REQUEST_WAIT, self._garbage, "no request in time")

    def cancel(self, why: str) -> None:
        """Give up at once; the hook sees a closed connection and offers the message again."""
        self._gone = self._gone or why
        if self._task is None:
            if self._ticket is not None:
                self._cancelled()
            self._close()
        elif self.stage != "starting":
            self._task.cancel()
        # else: cancelling a task before its first step would lose the descriptors; it looks at _gone by itself

    # The request

    def _take_request(self) -> bool:
        """False when nothing has arrived yet."""
        try:
            packet, ancillary, flags, _ = self._socket.recvmsg(hook.REQUEST_MAX + 1, _ANCILLARY, _RECEIVE)
        except BlockingIOError:
            return False
        except OSError as error:
            self._garbage(error.strerror or "cannot receive")
            return True
        self._unwatch()
        fds = descriptors(ancillary)
        try:
            if flags & _TRUNCATED:
                raise ProtocolError("oversized packet, or descriptors that did not fit")
            if not packet and not fds:  # connected and left: a probe
                self._close()
                return True
            request = hook.decode_request(packet)
        except ProtocolError as error:
            for fd in fds:
                os.close(fd)
            self._garbage(str(error))
            return True
        self._stand_up()
        self.incident, self.size = new_incident(), request.message_size
        pid, uid = self._peer()
        origin = classify(uid, pid, request.environ, self._state.terms.origin)
        self._offered = PendingMessage(request, fds, origin, priority_of(origin, self.size), self.incident)
        self._line_up(self._offered)
        return True

    def _stand_up(self) -> None:
        if self._idle_uid is not None:
            self._state.rise(self._idle_uid)
            self._idle_uid = None

    # The line

    def _line_up(self, offered: PendingMessage) -> None:
        """Begin at once where there is room; otherwise wait for a place, or make somebody come again."""
        room = self._state
        if self.size > room.terms.max_message:
            room.counters.bad_messages += 1
            room.log.warning("intake.bad-message", id=self.incident, why=f"{self.size} bytes", uid=offered.origin.uid)
            self._answer(deferral("message is larger than the content filter takes", self.incident))
            self._close()
        elif room.line.take(offered.claim):
            self.begin()
        else:
            self.stage = "waiting"
            end = min(self.began + room.terms.admission_wait, self._deadline(offered.request).at)
            self._watch(self._peer_moved)
            self._timer = room.loop.call_at(end, self._wait_over, offered)
            self._ticket = QueueEntry(offered.claim, self)
            if (leaving := room.line.join(self._ticket)) is not None:
                leaving.waiter.shed_connection()

    def begin(self) -> None:
        """The place is ours."""
        assert self._offered is not None, "only what was offered waits"  # noqa: S101
        self._unwatch()
        self._ticket, self.stage = None, "starting"
        self._task = self._state.loop.create_task(self._serve(self._offered))
        self._timer = self._state.loop.call_later(FAST, self._slow, self._offered.request)

    def shed_connection(self) -> None:
        """There is no room to wait in. The hook offers the message again, as long as its budget lasts."""
        self._state.counters.crowded += 1
        self._close()

    def _wait_over(self, offered: PendingMessage) -> None:
        self._timer = None
        self._answer(self._state.reject_busy(offered, time.monotonic() - self.began))
        self._close()

    def _garbage(self, why: str) -> None:
        self._state.counters.garbage += 1
        if (held := self._state.garbage_log.allow()) is not None:
            pid, uid = self._peer()
            self._state.log.warning("intake.garbage", why=why, uid=uid, pid=pid, not_logged=held)
        self._close()

    def _peer(self) -> tuple[int, int]:
        """pid and uid of the process that connected (SO_PEERCRED, unix(7))."""
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(raw)
        return pid, uid

    # The handling

    async def _serve(self, offered: PendingMessage) -> None:
        room, terms = self._state, self._state.terms
        request, origin = offered.request, offered.origin
        message: Message | None = None
        self.stage = "opening"
        try:
            if self._gone:
                raise asyncio.CancelledError
            room.counters.retries += request.attempt > 0
            fds, self._offered = offered.fds, None
            trusted = terms.origin.system(origin.uid, room.own_uid)
            message, envelope = await self._open(request, fds, trusted, terms.spool)
            self.stage = "handling"
            answer = await terms.handler.handle(
                AcceptedMessage(request, origin, envelope, message, self._deadline(request), self.incident)
            )
            sent = self._answer(answer)
        except asyncio.CancelledError:
            sent = self._cancelled()
        except MessageError as error:
            room.counters.bad_messages += 1
            room.log.warning("intake.bad-message", id=self.incident, why=str(error), uid=origin.uid, pid=origin.pid)
            sent = self._answer(deferral("message could not be taken over", self.incident))
        except Exception:  # the one boundary: a defect defers
            room.counters.errors += 1
            room.log.exception("intake.internal-error", id=self.incident)
            sent = self._answer(deferral("internal error in the content filter", self.incident))
        finally:
            if message is not None:
                message.close()
            room.leave(offered.claim)
        if sent is not None and len(sent.submissions) >= 2:
            self._await_report(request)
        else:
            self._close()

    def _deadline(self, request: hook.Request, reserve: float = RESERVE) -> Deadline:
        """When the answer must be ready: the smaller budget, less a reserve for what follows."""
        budget = min(self._state.terms.budget, request.budget)
        return Deadline(self.began + budget - min(reserve, reserve * budget / 10))

    async def _open(self, request: hook.Request, fds: list[int], trusted: bool, spool: Spool) -> tuple[Message, bytes]:
        sizes = (request.message_size, request.envelope_size)
        if max(sizes) <= INLINE:
            return open_pair(fds, sizes, trusted=trusted, spool=spool)
        opening = self._state.loop.run_in_executor(None, lambda: open_pair(fds, sizes, trusted=trusted, spool=spool))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_discard)
            raise

    def _slow(self, request: hook.Request) -> None:
        """The handling takes its time: notice a hook that goes away, and enforce the deadline."""
        self._watch(self._peer_moved)
        self._timer = self._state.loop.call_at(self._deadline(request, RESERVE / 2).at, self._overdue)

    def _peer_moved(self) -> None:
        try:
            packet = self._socket.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        self._unwatch()
        self.cancel("out of turn" if packet else "gone")

    def _overdue(self) -> None:
        self._timer = None
        self.cancel("overdue")

    def _cancelled(self) -> hook.Answer | None:
        log, counters = self._state.log, self._state.counters
        if self._gone == "overdue":
            counters.errors += 1
            log.error("intake.internal-error", id=self.incident, why="the handling overran its deadline")
            return self._answer(deferral("out of time", self.incident))
        counters.gone += self._gone == "gone"
        log.info("intake.client-gone", id=self.incident, why=self._gone or "cancelled", stage=self.stage)
        return None

    # The answer

    def _answer(self, answer: hook.Answer) -> hook.Answer | None:
        """Send ``answer``; returns what was sent, or None when nothing was."""
        self.stage = "answering"
        self._unwatch()
        try:
            encoded = hook.encode_answer(answer)
        except ProtocolError:
            self._state.counters.errors += 1
            self._state.log.exception("intake.internal-error", id=self.incident)
            answer = deferral("internal error in the content filter", self.incident)
            encoded = hook.encode_answer(answer)
        try:
            if encoded.body is None:
                self._socket.send(encoded.packet, socket.MSG_DONTWAIT)
            else:
                self._send_with_body(encoded.packet, encoded.body)
        except OSError as error:
            self._state.log.info("intake.answer-failed", id=self.incident, why=error.strerror)
            return None
        self._state.counters.answered += 1
        return answer

    def _send_with_body(self, packet: bytes, body: bytes) -> None:
        fd = os.memfd_create("answer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            view = memoryview(body)
            while view:
                view = view[os.write(fd, view) :]
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_SEAL)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", fd))
            self._socket.sendmsg([packet], [rights], socket.MSG_DONTWAIT)
        finally:
            os.close(fd)

    # The report

    def _await_report(self, request: hook.Request) -> None:
        self.stage = "report"
        self._task = None
        self._watch(self._take_report)
        self._timer = self._state.loop.call_at(self.began + min(request.budget, REPORT_WAIT), self._no_report)

    def _take_report(self) -> None:
        try:
            packet = self._socket.recv(hook.PACKET_MAX, socket.MSG_DONTWAIT)
            report = hook.decode_report(packet)
        except BlockingIOError:
            return
        except (OSError, ProtocolError):
            self._no_report()
            return
        results = [f"{r.status}{'+' if r.committed else ''}" for r in report.results]
        self._state.log.info("mail.report", id=self.incident, results=results)
        self._state.emit("mail.report", {"id": self.incident, "results": results})
        self._close()

    def _no_report(self) -> None:
        self._state.log.warning("mail.report", id=self.incident, results=None)
        self._state.emit("mail.report", {"id": self.incident, "results": None})
        self._close()

    # Bookkeeping

    def _watch(self, callback: Callable[[], object]) -> None:
        self._state.loop.add_reader(self._fd, callback)
        self._watching = True

    def _unwatch(self) -> None:
        if self._watching:
            self._state.loop.remove_reader(self._fd)
            self._watching = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._unwatch()
        self._stand_up()
        self._socket.close()
        if self._offered is not None:
            for fd in self._offered.fds:
                os.close(fd)
            self._offered = None
        if self._ticket is not None:
            self._state.line.quit(self._ticket)
            self._state.hand_out()  # where it was a large one that kept others waiting
            self._ticket = None
        self._task = None
        self.stage = "closed"
        self._state.closed(self)


def descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Every descriptor that a recvmsg brought."""
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.extend(fd for (fd,) in struct.iter_unpack("=i", data[: len(data) // 4 * 4]))
    return fds


def _discard(opening: "asyncio.Future[tuple[Message, bytes]]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result()[0].close()
