"""What a worker does with each message."""

import asyncio
import os
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from contentfilter.bus.messages import CANARY_SEEN, CanarySeen, Event
from contentfilter.config.runtime import Runtime
from contentfilter.doors.admission import AcceptedMessage, PendingMessage, deferral
from contentfilter.doors.canary import ASKED, CanaryMark, answer_for, recognise
from contentfilter.doors.message import read_envelope
from contentfilter.errors import EnvelopeError, MessageError
from contentfilter.model import Action, Envelope
from contentfilter.scanners.pool import BackendHealth
from contentfilter.store.poison import isolate
from contentfilter.store.release import load_secret
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
from contentfilter.worker.main import WorkerContext

NOTED_ENVELOPE = 65_536  # bytes; a larger one is not read for a message that is turned away


class Application:
    """What a worker does with each message."""

    def __init__(self, runtime: Runtime, surroundings: WorkerContext) -> None:
        self.settings = runtime.settings
        self._smtplog = runtime.smtplog
        self._context = surroundings
        self._secret, self._uid = self._load_secret(), os.geteuid()
        around = surroundings
        self._bundle = PipelineBundle(
            runtime, self._secret, around.bypasses, around.allowed, around.recall, around.shed
        )
        surroundings.recall.change(self.settings.reuse)
        self._watching = asyncio.create_task(self._watch())

    def _load_secret(self) -> bytes:
        try:
            return load_secret(Path(self.settings.service.state))
        except OSError as error:
            self._context.log.warning("quarantine.no-secret", why=str(error))
            return b""

    async def handle(self, job: AcceptedMessage) -> hook.Answer:
        """The answer, and one line in the log and on the bus; the whole story where smtplog asks for it."""
        try:
            envelope = envelope_format.parse(job.envelope)
        except EnvelopeError as error:  # the hook checks it too: this is somebody else's program
            self._context.log.warning("intake.bad-envelope", id=job.incident, why=str(error))
            return deferral("the envelope is malformed", job.incident)
        if (mark := self._canary(job)) is not None:
            return await self._answer_canary(mark, job)
        return await self._bundle.pipeline.handle(
            job.incident, envelope, job.message, job.origin, job.deadline, self._emit, job.request.attempt
        )

    async def isolate(self, job: AcceptedMessage, fingerprint: str) -> hook.Answer:
        """The answer for a message that killed workers. It is kept, and logged as any other."""
        try:
            envelope = envelope_format.parse(job.envelope)
        except EnvelopeError:
            return deferral("the envelope is malformed", job.incident)
        facts = (job.incident, envelope, job.message, job.origin, job.request.attempt, fingerprint)
        done = await isolate(*facts, self.settings, self._bundle.pipeline.switches)
        log, record = self._context.log, done.record
        if done.trouble:
            log.error("poison.not-kept", id=record.id, why=done.trouble)
        log.error("poison.isolated", id=record.id, fingerprint=fingerprint, decision=record.decision, kept=done.kept)
        self._context.emit(Event("poison.isolated", {"id": record.id}))
        self._emit(record, done.account)
        return done.answer

    def rejected_busy(self, offered: PendingMessage, why: str, answer: hook.Answer, seconds: float) -> None:
        """Like mail that was decided, so that its incident is found; it was not opened, only its envelope is read."""
        envelope, size = Envelope(b"", ()), offered.request.envelope_size
        if size <= NOTED_ENVELOPE:
            with suppress(MessageError, EnvelopeError, IndexError):
                envelope = envelope_format.parse(read_envelope(offered.fds[-1], size))
        rule = f"busy: {why}, {seconds:.0f} s without a free place"
        pipeline, size = self._bundle.pipeline, offered.request.message_size
        case = pipeline.unopened(offered.incident, envelope, offered.origin, size, rule)
        self._emit(make_record(case, offered.request.attempt, seconds), make_detail(case, answer.text))

    def _canary(self, job: AcceptedMessage) -> CanaryMark | None:
        """The mark of a sample that our own supervisor sent; None: this is mail."""
        if job.origin.uid != self._uid or job.origin.remote_ip:
            return None
        return recognise(job.request.environ, self._secret, job.message.data, time.time())

    async def _answer_canary(self, mark: CanaryMark, job: AcceptedMessage) -> hook.Answer:
        """Look at a sample as at mail. It is not queued, kept, logged or counted; the supervisor gets the account."""
        outcomes = await self._bundle.pipeline.probe(job.message, ASKED[mark.sample], job.deadline)
        seen = CanarySeen(mark.nonce, mark.sample, make_scans(outcomes))
        self._context.emit(Event(CANARY_SEEN, msgspec.to_builtins(seen)))
        action = answer_for(seen.scans)
        text = "" if action is Action.DROP else f"canary {mark.sample} [{job.incident}]"
        return hook.Answer(action, text=text)

    def backends(self) -> tuple[BackendHealth, ...]:
        return self._bundle.backends()

    def _emit(self, record: MailRecord, account: MailDetail) -> None:
        plain, log = fields(record), self._context.log
        if troubled(record):
            log.warning("mail.done", **plain)
        else:
            log.info("mail.done", **plain)
        if self._smtplog > 1 or (self._smtplog and not ordinary(record)):
            for stage, text in steps(account):
                log.info("mail.step", id=record.id, stage=stage, text=text)
        self._context.emit(Event("mail.done", plain, msgspec.json.encode(account)))

    async def _watch(self) -> None:
        """Mail goes on without it: then mail finds out which backend is well."""
        try:
            await self._bundle.watch()
        except Exception:
            self._context.log.exception("backends.watch-failed")

    async def close(self) -> None:
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self._bundle.aclose()


async def build(blob: bytes, surroundings: WorkerContext) -> Application:
    """The configuration blob becomes an application."""
    return Application(msgspec.msgpack.decode(blob, type=Runtime), surroundings)
