"""Application of a worker: handles each message, logs it, and emits its record."""

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec

from contentfilter.bus.messages import CANARY_SEEN, CanarySeen, Event
from contentfilter.config.runtime import Runtime
from contentfilter.doors.admission import AcceptedMessage, PendingMessage, deferral
from contentfilter.doors.canary import ASKED, CanaryMark, answer_for, recognise
from contentfilter.doors.hook_answer import render
from contentfilter.doors.message import read_envelope
from contentfilter.errors import EnvelopeError, MessageError
from contentfilter.model import Action, Envelope
from contentfilter.scanners.health import BackendHealth
from contentfilter.store.release import load_secret
from contentfilter.verdict.disposition import Disposition
from contentfilter.verdict.record import (
    MailDetail,
    MailRecord,
    fields,
    make_detail,
    make_record,
    make_scans,
    ordinary,
    steps,
    troubled,
)
from contentfilter.wire import envelope as envelope_format
from contentfilter.wire import hook
from contentfilter.worker.build import PipelineBundle
from contentfilter.worker.lease import WorkerContext

INLINE_ENVELOPE = 262_144  # bytes; a larger one is read and written off the event loop
MAX_LOGGED_ENVELOPE = 65_536  # bytes; a larger one is not read for a message that is rejected as busy


T = TypeVar("T")
P = ParamSpec("P")


class Application:
    """Handles the messages of a worker under one configuration, and logs and emits the results."""

    def __init__(self, runtime: Runtime, context: WorkerContext) -> None:
        self.settings = runtime.settings
        self._smtplog = runtime.smtplog
        self._context = context
        self._secret, self._uid = self._load_secret(), os.geteuid()
        self._bundle = PipelineBundle(
            runtime, self._secret, context.bypasses, context.allowed, context.recall, context.shed, context.disk
        )
        context.recall.change(self.settings.reuse)
        self._watching = asyncio.create_task(self._watch())

    def _load_secret(self) -> bytes:
        try:
            return load_secret(Path(self.settings.service.state))
        except OSError as error:
            self._context.log.warning("quarantine.no-secret", why=str(error))
            return b""

    async def handle(self, job: AcceptedMessage) -> hook.Answer:
        """The answer for one message, with one record of it in the log and on the bus."""
        try:
            envelope = await _for_envelope(job, envelope_format.parse, job.envelope)
        except EnvelopeError as error:  # the hook checks it too: the client is another program
            self._context.log.warning("intake.bad-envelope", id=job.incident, why=str(error))
            return deferral("the envelope is malformed", job.incident)
        if (mark := self._canary(job, envelope)) is not None:
            return await self._answer_canary(mark, job)
        disposition, record, detail = await self._bundle.pipeline.handle(
            job.incident, envelope, job.message, job.origin, job.deadline, job.request.attempt
        )
        self._emit(record, detail)
        return await _for_envelope(job, render, disposition, job.message)

    async def isolate(self, job: AcceptedMessage, fingerprint: str) -> hook.Answer:
        """The answer for a message that killed workers. A copy is kept, and it is logged like any other."""
        try:
            envelope = await _for_envelope(job, envelope_format.parse, job.envelope)
        except EnvelopeError:
            return deferral("the envelope is malformed", job.incident)
        facts = (job.incident, envelope, job.message, job.origin, job.request.attempt, fingerprint)
        (disposition, record, detail), copy, error = await self._bundle.pipeline.isolate(*facts)
        log = self._context.log
        if error:
            log.error("poison.not-kept", id=record.id, why=error)
        log.error("poison.isolated", id=record.id, fingerprint=fingerprint, decision=record.decision, kept=copy)
        self._context.emit(Event("poison.isolated", {"id": record.id}))
        self._emit(record, detail)
        return await _for_envelope(job, render, disposition, job.message)

    def rejected_busy(self, offered: PendingMessage, why: str, answer: hook.Answer, seconds: float) -> None:
        """Log a message that was deferred unopened like decided ones, so that its incident can be found."""
        envelope, size = Envelope(b"", ()), offered.request.envelope_size
        if size <= MAX_LOGGED_ENVELOPE:
            with suppress(MessageError, EnvelopeError, IndexError):
                envelope = envelope_format.parse(read_envelope(offered.fds[-1], size))
        rule = f"busy: {why}, {seconds:.0f} s without a free place"
        size = offered.request.message_size
        context = self._bundle.pipeline.unopened(offered.incident, envelope, offered.origin, size, rule)
        self._emit(make_record(context, offered.request.attempt, seconds), make_detail(context, answer.text))

    def _canary(self, job: AcceptedMessage, envelope: Envelope) -> CanaryMark | None:
        """The mark of a sample that our own supervisor sent; None for mail, which has a recipient."""
        if job.origin.uid != self._uid or job.origin.remote_ip or envelope.sender or envelope.recipients:
            return None
        return recognise(job.request.environ, self._secret, job.message.data, time.time())

    async def _answer_canary(self, mark: CanaryMark, job: AcceptedMessage) -> hook.Answer:
        """Scan a sample. It is not queued, kept, logged or counted; the supervisor gets the result."""
        outcomes = await self._bundle.pipeline.probe(job.message, ASKED[mark.sample], job.deadline)
        seen = CanarySeen(mark.nonce, mark.sample, make_scans(outcomes))
        self._context.emit(Event(CANARY_SEEN, msgspec.to_builtins(seen)))
        action = answer_for(seen.scans)
        text = "" if action is Action.DROP else f"canary {mark.sample} [{job.incident}]"
        return render(Disposition(action, text=text), job.message)

    def backends(self) -> tuple[BackendHealth, ...]:
        """The state of each backend of clamd and spamd."""
        return self._bundle.backends()

    def _emit(self, record: MailRecord, detail: MailDetail) -> None:
        """One record in the log and on the bus, and the trace in the log where smtplog asks for it."""
        plain, log = fields(record), self._context.log
        if troubled(record):
            log.warning("mail.done", **plain)
        else:
            log.info("mail.done", **plain)
        if self._smtplog > 1 or (self._smtplog and not ordinary(record)):
            for stage, text in steps(detail):
                log.info("mail.step", id=record.id, stage=stage, text=text)
        self._context.emit(Event("mail.done", plain, msgspec.json.encode(detail)))

    async def _watch(self) -> None:
        """A failure here does not stop mail: scans find out for themselves which backends are healthy."""
        try:
            await self._bundle.watch()
        except Exception:
            self._context.log.exception("backends.watch-failed")

    async def close(self) -> None:
        """Stop the background work. No message may be in progress."""
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self._bundle.aclose()


async def _for_envelope(job: AcceptedMessage, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of ``function``, whose work grows with the envelope: in a thread where that is large."""
    if len(job.envelope) > INLINE_ENVELOPE:
        return await asyncio.to_thread(function, *args, **kwargs)
    return function(*args, **kwargs)


async def build(blob: bytes, context: WorkerContext) -> Application:
    """Build the application from an encoded configuration. Raises ConfigError for an unusable snapshot."""
    return Application(msgspec.msgpack.decode(blob, type=Runtime), context)
