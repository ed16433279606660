"""The one file that knows the order: plan, scanners (cheapest first), decision, answer.

``examine`` decides and has no effect outside; ``explain`` uses it too. ``handle`` does what the
decision asks for: it keeps what is not delivered, makes the hook's answer and the one record. The
daemon never queues a message by itself.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from contentfilter.config.settings import Settings
from contentfilter.deadline import Deadline
from contentfilter.errors import BackendError, Cause
from contentfilter.model import Envelope, Message, Origin, Scanner, ScanOutcome, ScanStatus
from contentfilter.policy.decide import Action, Decision, Reason, decide, needed
from contentfilter.policy.plan import Lookup, ScanPlan, Switches, make_plan
from contentfilter.scanners.clamd import ClamdScanner
from contentfilter.scanners.signatures import Engine
from contentfilter.scanners.spamd import SpamdScanner
from contentfilter.verdict.case import Case
from contentfilter.verdict.quarantine import Quarantine
from contentfilter.verdict.record import Account, Record, fields, make_account, make_record
from contentfilter.verdict.release import released
from contentfilter.verdict.reply import answer
from contentfilter.wire import hook

MANY_RECIPIENTS = 2_000
"""Above this the table look-ups leave the event loop."""


@dataclass(frozen=True, slots=True)
class Scanners:
    """The four, ready to be asked. An engine holds one list; None where the switch is off."""

    signatures: Engine | None
    loadertypes: Engine | None
    clamd: ClamdScanner
    spamd: SpamdScanner


class Pipeline:
    """What is done with each message under one configuration and one table snapshot."""

    def __init__(
        self,
        settings: Settings,
        switches: Switches,
        lookup: Lookup,
        scanners: Scanners,
        quarantine: Quarantine,
        secret: bytes = b"",
    ) -> None:
        """``secret`` proves what was released from quarantine; empty: nothing is taken as released."""
        self.settings = settings
        self.switches = switches
        self.lookup = lookup
        self.scanners = scanners
        self.quarantine = quarantine
        self.secret = secret

    async def handle(
        self,
        incident: str,
        envelope: Envelope,
        message: Message,
        origin: Origin,
        deadline: Deadline,
        emit: Callable[[Record, Account], None],
        attempt: int = 0,
    ) -> hook.Answer:
        """The answer for one message, and exactly one record of it, with its account."""
        started = time.monotonic()
        case = await self.examine(incident, envelope, message, origin, deadline)
        if case.decision.quarantined:
            case = await self._kept(case, deadline)
        reply = answer(case)
        emit(make_record(case, attempt, time.monotonic() - started), make_account(case, reply.text))
        return reply

    async def examine(
        self, incident: str, envelope: Envelope, message: Message, origin: Origin, deadline: Deadline
    ) -> Case:
        """Plan, ask the scanners that can still change the decision, decide."""
        plan = await self._plan(envelope, message, origin)
        if not origin.remote_ip and (by := await self._released(message)):  # the token does not count over SMTP
            plan = plan.released_by(by)
        outcomes: tuple[ScanOutcome, ...] = ()
        for scanner, ask in self._order():
            if needed(scanner, plan, outcomes, origin.kind, self.settings):
                outcomes += (await self._ask(scanner, ask, message, plan, deadline),)
        decision = decide(plan, outcomes, origin.kind, len(envelope.recipients), self.settings)
        return Case(incident, origin, envelope, message, self.settings, self.switches, plan, outcomes, decision)

    async def _plan(self, envelope: Envelope, message: Message, origin: Origin) -> ScanPlan:
        facts = (envelope, message.size, origin, self.settings, self.switches, self.lookup)
        if len(envelope.recipients) > MANY_RECIPIENTS:
            return await asyncio.to_thread(make_plan, *facts)
        return make_plan(*facts)

    async def _released(self, message: Message) -> str | None:
        """The incident of a message that an operator let go, whoever forwards it now."""
        facts = (message.data, self.secret, time.time())
        if message.size > self.settings.signatures.thread_above:
            return await asyncio.to_thread(released, *facts)
        return released(*facts)

    def _order(self) -> tuple[tuple[Scanner, "_Ask"], ...]:
        return (
            (Scanner.SIGNATURES, self._signatures),
            (Scanner.LOADERTYPES, self._loadertypes),
            (Scanner.CLAMD, self._clamd),
            (Scanner.SPAMD, self._spamd),
        )

    async def _ask(
        self, scanner: Scanner, ask: "_Ask", message: Message, plan: ScanPlan, deadline: Deadline
    ) -> ScanOutcome:
        """One scanner's outcome; its faults become *unchecked* with a cause."""
        started = time.monotonic()
        try:
            return await ask(message, plan, deadline)
        except BackendError as error:
            spent = time.monotonic() - started
            return ScanOutcome(scanner, ScanStatus.UNCHECKED, "", error.detail, error.cause, error.backend, spent)
        except TimeoutError:
            spent = time.monotonic() - started
            return ScanOutcome(scanner, ScanStatus.UNCHECKED, "", "out of time", Cause.TIMEOUT, "", spent)

    async def _signatures(self, message: Message, plan: ScanPlan, deadline: Deadline) -> ScanOutcome:
        return await self._scan_text(Scanner.SIGNATURES, self.scanners.signatures, message, deadline)

    async def _loadertypes(self, message: Message, plan: ScanPlan, deadline: Deadline) -> ScanOutcome:
        return await self._scan_text(Scanner.LOADERTYPES, self.scanners.loadertypes, message, deadline)

    async def _clamd(self, message: Message, plan: ScanPlan, deadline: Deadline) -> ScanOutcome:
        return await self.scanners.clamd.scan(message, deadline)

    async def _spamd(self, message: Message, plan: ScanPlan, deadline: Deadline) -> ScanOutcome:
        return await self.scanners.spamd.scan(message, deadline, user=plan.spam_user, want=plan.want)

    async def _scan_text(
        self, scanner: Scanner, engine: Engine | None, message: Message, deadline: Deadline
    ) -> ScanOutcome:
        if engine is None:
            return ScanOutcome(scanner, ScanStatus.SKIPPED, detail="no rules")
        started = time.monotonic()
        if message.size > self.settings.signatures.thread_above:
            async with deadline.timeout():
                finding = await asyncio.to_thread(engine.scan, message.data)
        else:
            finding = engine.scan(message.data)
        spent = time.monotonic() - started
        if finding is None:
            return ScanOutcome(scanner, ScanStatus.CLEAN, seconds=spent)
        return ScanOutcome(
            scanner, ScanStatus.FOUND, finding.rule, f"{finding.description}, {finding.part}", seconds=spent
        )

    async def _kept(self, case: Case, deadline: Deadline) -> Case:
        """Keep what some recipients do not get. Where that fails, everything is deferred: nothing is lost."""
        envelope = {"sender": case.envelope.sender.hex(), "recipients": [r.hex() for r in case.envelope.recipients]}
        facts = fields(make_record(case, 0, 0.0)) | {
            "envelope_hex": envelope,  # bytes as received: the printable fields may have lost some
            "withheld_from": list(case.decision.quarantined),
        }
        try:
            await self.quarantine.keep(case.incident, case.message, facts, deadline)
        except (OSError, TimeoutError) as error:
            failed = Decision(Action.DEFER, Reason.NONE, f"quarantine: {error or 'out of time'}")
            return replace(case, decision=failed)
        return case


_Ask = Callable[[Message, ScanPlan, Deadline], Awaitable[ScanOutcome]]
