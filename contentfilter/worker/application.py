"""Application of a worker: handles each message, logs it, and emits its record."""

import asyncio
import os
import time
from pathlib import Path

import msgspec

from contentfilter.bus.messages import CANARY_SEEN, CanarySeen, Event
from contentfilter.config.runtime import Runtime
from contentfilter.doors.admission import AcceptedMessage, PendingMessage
from contentfilter.doors.canary import ASKED, CanaryMark, answer_for, recognise
from contentfilter.model import Action, Envelope, OriginKind
from contentfilter.policy.plan import recipient_limit
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
from contentfilter.worker.build import PipelineBundle
from contentfilter.worker.lease import WorkerContext


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

    def recipient_limit(self, kind: OriginKind) -> int:
        return recipient_limit(kind, self._bundle.pipeline.switches)

    async def handle(self, accepted: AcceptedMessage) -> Disposition:
        """The result for one message, with one record of it in the log and on the bus."""
        if (mark := self._canary(accepted)) is not None:
            return await self._answer_canary(mark, accepted)
        disposition, record, detail = await self._bundle.pipeline.handle(
            accepted.incident,
            accepted.envelope,
            accepted.message,
            accepted.origin,
            accepted.deadline,
            accepted.attempt,
        )
        self._emit(record, detail)
        return disposition

    async def isolate(self, accepted: AcceptedMessage, fingerprint: str) -> Disposition:
        """The result for a message that killed workers. A copy is kept, and it is logged like any other."""
        facts = (accepted.incident, accepted.envelope, accepted.message, accepted.origin, accepted.attempt, fingerprint)
        (disposition, record, detail), copy, error = await self._bundle.pipeline.isolate(*facts)
        log = self._context.log
        if error:
            log.error("poison.not-kept", id=record.id, why=error)
        log.error("poison.isolated", id=record.id, fingerprint=fingerprint, decision=record.decision, kept=copy)
        self._context.emit(Event("poison.isolated", {"id": record.id}))
        self._emit(record, detail)
        return disposition

    def rejected_busy(self, pending: PendingMessage, envelope: Envelope, why: str, text: str, seconds: float) -> None:
        """Log a message that was deferred unopened like decided ones, so that its incident can be found."""
        rule = f"busy: {why}, {seconds:.0f} s without a free slot"
        context = self._bundle.pipeline.unopened(pending.incident, envelope, pending.origin, pending.size, rule)
        self._emit(make_record(context, pending.attempt, seconds), make_detail(context, text))

    def _canary(self, accepted: AcceptedMessage) -> CanaryMark | None:
        """The mark of a sample that our own supervisor sent; None for mail."""
        if accepted.origin.uid != self._uid or accepted.origin.remote_ip:
            return None
        return recognise(accepted.environ, self._secret, accepted.message.data, time.time())

    async def _answer_canary(self, mark: CanaryMark, accepted: AcceptedMessage) -> Disposition:
        """Scan a sample. It is not queued, kept, logged or counted; the supervisor gets the result."""
        outcomes = await self._bundle.pipeline.probe(accepted.message, ASKED[mark.sample], accepted.deadline)
        seen = CanarySeen(mark.nonce, mark.sample, make_scans(outcomes))
        self._context.emit(Event(CANARY_SEEN, msgspec.to_builtins(seen)))
        action = answer_for(seen.scans)
        return Disposition(action, text="" if action is Action.DROP else f"canary {mark.sample} [{accepted.incident}]")

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


async def build(blob: bytes, context: WorkerContext) -> Application:
    """Build the application from an encoded configuration. Raises ConfigError for an unusable snapshot."""
    return Application(msgspec.msgpack.decode(blob, type=Runtime), context)
