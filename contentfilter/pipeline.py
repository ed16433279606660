"""The one file that knows the order: plan, scanners (cheapest first), decision, answer.

``examine`` decides and has no effect outside; ``explain`` uses it too. ``handle`` does what the
decision asks for: it keeps what is not delivered, makes the hook's answer and the one record. The
daemon never queues a message by itself.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial

import msgspec

from contentfilter.deadline import Deadline
from contentfilter.errors import BackendError, Cause
from contentfilter.model import (
    Action,
    Envelope,
    Message,
    Origin,
    OriginKind,
    Reason,
    Scanner,
    ScanOutcome,
    ScanStatus,
    Want,
)
from contentfilter.policy.admission import Priority, priority_of
from contentfilter.policy.budget import attempt_timeout, reserve_for_later
from contentfilter.policy.decide import Decision, decide, needed, open_owners
from contentfilter.policy.failure import failure_action
from contentfilter.policy.overrides import AllowEntry, Bypass, apply_allowlist, bypassed_outcomes, find_bypass
from contentfilter.policy.plan import Lookup, Owners, PlanStep, ScanPlan, Switches, make_plan
from contentfilter.scanners.cache import ScanCache, ScanRequest
from contentfilter.scanners.clamd import ClamdScanner
from contentfilter.scanners.limiter import ScannerLimiter
from contentfilter.scanners.signatures.engine import Engine
from contentfilter.scanners.spamd import SpamdScanner
from contentfilter.scanners.stream import Leave
from contentfilter.settings import Settings
from contentfilter.store.quarantine import Quarantine
from contentfilter.store.release import released
from contentfilter.verdict.context import MessageContext
from contentfilter.verdict.record import MailDetail, MailRecord, fields, make_detail, make_record
from contentfilter.verdict.reply import answer
from contentfilter.wire import hook

MANY_RECIPIENTS = 2_000
"""Above this the table look-ups leave the event loop."""


@dataclass(frozen=True, slots=True)
class Scanners:
    """All of them, ready to be asked."""

    programs: Engine | None  # signatures and loader types; None where both are switched off
    clamd: ClamdScanner
    spamd: SpamdScanner
    clamd_turns: ScannerLimiter
    spamd_turns: ScannerLimiter


class Pipeline:
    """What is done with each message under one configuration and one table snapshot."""

    def __init__(
        self,
        settings: Settings,
        switches: Switches,
        lookup: Lookup | None,
        scanners: Scanners,
        quarantine: Quarantine,
        secret: bytes = b"",
        allowed: Callable[[], tuple[AllowEntry, ...]] = tuple,
        owners: Owners | None = None,
        bypasses: Callable[[], tuple[Bypass, ...]] = lambda: (),
        recall: ScanCache | None = None,
    ) -> None:
        """``lookup``: None while there are no tables. ``owners``: None where nobody has preferences.

        ``bypasses`` and ``allowed`` are called for each message: the overrides in force at this moment.
        ``recall`` knows answers about equal messages; None: every scan is made.
        ``secret`` proves what was released from quarantine; empty: nothing is taken as released.
        """
        self.settings = settings
        self.switches = switches
        self.lookup = lookup
        self.scanners = scanners
        self.quarantine = quarantine
        self.secret = secret
        self.allowed = allowed
        self.owners = owners
        self.bypasses = bypasses
        self.recall = recall
        self._kinds = {
            Scanner.CLAMD: hashlib.sha256(msgspec.msgpack.encode(settings.clamd)).digest(),
            Scanner.SPAMD: hashlib.sha256(msgspec.msgpack.encode(settings.spamd)).digest(),
        }
        self._shared: dict[OriginKind, ScanPlan] = {}  # for one recipient without a row, where that means no check
        # A scan goes on when its message is given up, but not where that lets the message pass: nobody comes again.
        self._comes_again = {
            scanner: failure_action(scanner, Cause.TIMEOUT, OriginKind.STRANGER, settings) == "defer"
            for scanner in self._kinds
        }

    async def handle(
        self,
        incident: str,
        envelope: Envelope,
        message: Message,
        origin: Origin,
        deadline: Deadline,
        emit: Callable[[MailRecord, MailDetail], None],
        attempt: int = 0,
    ) -> hook.Answer:
        """The answer for one message, and exactly one record of it, with its account."""
        started = time.monotonic()
        case = await self.examine(incident, envelope, message, origin, deadline)
        if case.decision.quarantined:
            case = await self._kept(case, deadline)
        reply = answer(case)
        emit(make_record(case, attempt, time.monotonic() - started), make_detail(case, reply.text))
        return reply

    async def examine(
        self, incident: str, envelope: Envelope, message: Message, origin: Origin, deadline: Deadline
    ) -> MessageContext:
        """Plan, ask the scanners that can still change the decision, decide."""
        plan = await self._plan(envelope, message, origin)
        if not origin.remote_ip and (by := await self._released(message)):  # the token does not count over SMTP
            plan = plan.released_by(by)
        outcomes: tuple[ScanOutcome, ...] = ()
        for together, ask in self._stages(self.recall) if any(step.run for step in plan.steps) else ():
            if not any(needed(scanner, plan, outcomes, origin.kind, self.settings) for scanner in together):
                continue
            still = self._open(plan, outcomes, origin)
            bypass = find_bypass(self.bypasses(), together[0], origin.kind, time.time())
            if bypass is not None:
                outcomes += tuple(
                    outcome for scanner in together for outcome in bypassed_outcomes(bypass, scanner, still)
                )
                continue
            kept = reserve_for_later(deadline.left(), together[-1], plan, message.size, self.settings)
            said = await ask(message, still, priority_of(origin, message.size), deadline.before(kept))
            outcomes += tuple(apply_allowlist(outcome, self.settings, self.allowed(), time.time()) for outcome in said)
        decision = decide(plan, outcomes, origin.kind, len(envelope.recipients), self.settings)
        return MessageContext(
            incident, origin, envelope, message, self.settings, self.switches, plan, outcomes, decision
        )

    async def probe(
        self, message: Message, scanners: tuple[Scanner, ...], deadline: Deadline
    ) -> tuple[ScanOutcome, ...]:
        """What ``scanners`` say about a canary, as far as they are configured; nobody's tables or switches count."""
        on = {
            Scanner.SIGNATURES: self.switches.chksignature,
            Scanner.LOADERTYPES: self.switches.chkloadertype,
            Scanner.CLAMD: bool(self.settings.clamd.backends),
            Scanner.SPAMD: bool(self.settings.spamd.backends),
        }
        steps = tuple(PlanStep(scanner, scanner in scanners and on[scanner], "canary") for scanner in Scanner)
        plan = ScanPlan((), steps, users=((b"", b""),))
        outcomes: tuple[ScanOutcome, ...] = ()
        for together, ask in self._stages(None):  # a canary asks what holds now
            if not any(map(plan.runs, together)):
                continue
            now = time.time()
            bypass = next((b for b in self.bypasses() if b.scanner is together[0] and b.active(now)), None)
            if bypass is not None:
                outcomes += tuple(
                    outcome for scanner in together for outcome in bypassed_outcomes(bypass, scanner, plan)
                )
                continue
            said = await ask(message, plan, _CANARY, deadline)
            outcomes += tuple(apply_allowlist(outcome, self.settings, self.allowed(), now) for outcome in said)
        return outcomes

    def unopened(self, incident: str, envelope: Envelope, origin: Origin, size: int, why: str) -> MessageContext:
        """A message of ``size`` bytes that is deferred without a look into it; ``why`` is the rule."""
        message, plan = Message(-1, size, b""), ScanPlan((), ())
        decision = Decision(Action.DEFER, Reason.NONE, why)
        return MessageContext(incident, origin, envelope, message, self.settings, self.switches, plan, (), decision)

    def _open(self, plan: ScanPlan, outcomes: tuple[ScanOutcome, ...], origin: Origin) -> ScanPlan:
        """The plan without the owners of preferences for whom it is decided by now."""
        if len(plan.users) < 2:
            return plan
        owners = open_owners(Scanner.SPAMD, plan, outcomes, origin.kind, self.settings)
        return msgspec.structs.replace(plan, users=tuple(user for user in plan.users if user[0] in owners))

    async def _plan(self, envelope: Envelope, message: Message, origin: Origin) -> ScanPlan:
        facts = (envelope, message.size, origin, self.settings, self.switches, self.lookup, self.owners)
        if len(envelope.recipients) > MANY_RECIPIENTS:
            return await asyncio.to_thread(make_plan, *facts)
        if self.lookup is None or len(envelope.recipients) != 1 or 0 < self.switches.databytes < message.size:
            return make_plan(*facts)
        # Most mail of most servers: without row and check the plan is the same for all clients of a kind.
        shared = self._shared.get(origin.kind)
        if shared is not None and self.lookup(envelope.recipients[0]) == (None, None):
            return shared
        plan = make_plan(*facts)
        (treatment, _), *_ = plan.groups
        if not (treatment.virus or treatment.spam) and self.lookup(envelope.recipients[0]) == (None, None):
            self._shared[origin.kind] = plan
        return plan

    async def _released(self, message: Message) -> str | None:
        """The incident of a message that an operator let go, whoever forwards it now."""
        facts = (message.data, self.secret, time.time())
        if message.size > self.settings.signatures.thread_above:
            return await asyncio.to_thread(released, *facts)
        return released(*facts)

    def _stages(self, recall: ScanCache | None) -> tuple[tuple[tuple[Scanner, ...], "_Ask"], ...]:
        """Who is asked together, cheapest first."""
        return (
            ((Scanner.SIGNATURES, Scanner.LOADERTYPES), self._programs),
            ((Scanner.CLAMD,), partial(self._clamd, recall)),
            ((Scanner.SPAMD,), partial(self._spamd, recall)),
        )

    async def _programs(
        self, message: Message, plan: ScanPlan, claim: Priority, deadline: Deadline
    ) -> tuple[ScanOutcome, ...]:
        """Both lists in one pass. What is found decides; otherwise both lists say clean."""
        asked = [scanner for scanner in (Scanner.SIGNATURES, Scanner.LOADERTYPES) if plan.runs(scanner)]
        engine = self.scanners.programs
        if engine is None:
            return tuple(ScanOutcome(scanner, ScanStatus.SKIPPED, detail="no rules") for scanner in asked)
        started = time.monotonic()
        try:
            if message.size > self.settings.signatures.thread_above:
                async with deadline.timeout():
                    finding = await asyncio.to_thread(engine.scan, message.data)
            else:
                finding = engine.scan(message.data)
        except TimeoutError:
            spent = time.monotonic() - started
            return (_unchecked(asked[0], BackendError(Cause.TIMEOUT, "", "out of time"), spent),)
        except BackendError as limit:
            return (_unchecked(asked[0], limit, time.monotonic() - started),)
        spent = time.monotonic() - started
        if finding is not None:
            where = f"{finding.description}, {finding.part}"
            return (ScanOutcome(finding.scanner, ScanStatus.FOUND, finding.rule, where, seconds=spent),)
        first, *others = (ScanOutcome(scanner, ScanStatus.CLEAN, seconds=spent) for scanner in asked)
        return (first, *(replace(other, seconds=0.0, detail="in the same pass") for other in others))

    async def _clamd(
        self, recall: ScanCache | None, message: Message, plan: ScanPlan, claim: Priority, deadline: Deadline
    ) -> tuple[ScanOutcome, ...]:
        clamd, turns = self.scanners.clamd, self.scanners.clamd_turns

        def scan(leave: Leave | None = None) -> Awaitable[ScanOutcome]:
            return turns.run(claim, lambda: clamd.scan(message, deadline, leave), deadline)

        if recall is None or 0 < self.settings.clamd.max_size < message.size:  # what is too big is not looked up
            return (await _asked(Scanner.CLAMD, scan()),)
        question = ScanRequest(
            b"clamd " + self._kinds[Scanner.CLAMD],
            message,
            attempt_timeout(message.size, self.settings.clamd),
            goes_on=self._comes_again[Scanner.CLAMD],
            database=clamd.database,
        )
        return (await _asked(Scanner.CLAMD, recall.ask(question, scan, deadline)),)

    async def _spamd(
        self, recall: ScanCache | None, message: Message, plan: ScanPlan, claim: Priority, deadline: Deadline
    ) -> tuple[ScanOutcome, ...]:
        """One question for each owner of preferences, all in line at once; there are as many places as children."""
        async with asyncio.TaskGroup() as group:
            scores = [self._score(recall, message, user, plan.want, claim, deadline) for _, user in plan.users]
            tasks = [group.create_task(_asked(Scanner.SPAMD, score)) for score in scores]
        said = [replace(task.result(), owner=owner) for (owner, _), task in zip(plan.users, tasks, strict=True)]
        bypassed_outcomes = (
            f"also for {plan.left_out} with preferences: [spamd] max_users={self.settings.spamd.max_users}"
        )
        return tuple(
            o if o.owner or o.detail or not plan.left_out else replace(o, detail=bypassed_outcomes) for o in said
        )

    async def _score(
        self, recall: ScanCache | None, message: Message, user: bytes, want: Want, claim: Priority, deadline: Deadline
    ) -> ScanOutcome:
        spamd, turns = self.scanners.spamd, self.scanners.spamd_turns

        def scan(leave: Leave | None = None) -> Awaitable[ScanOutcome]:
            return turns.run(claim, lambda: spamd.scan(message, deadline, leave, user=user, want=want), deadline)

        if recall is None or want is Want.PROCESS:  # a rewritten message holds the Received lines of its own try
            return await scan()
        question = ScanRequest(
            b"spamd %s %s %s" % (self._kinds[Scanner.SPAMD], want.value.encode(), user),
            message,
            attempt_timeout(message.size, self.settings.spamd),
            by_client=True,
            goes_on=self._comes_again[Scanner.SPAMD],
        )
        return await recall.ask(question, scan, deadline)

    async def _kept(self, case: MessageContext, deadline: Deadline) -> MessageContext:
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
            return msgspec.structs.replace(case, decision=failed)
        return case


async def _asked(scanner: Scanner, scan: Awaitable[ScanOutcome]) -> ScanOutcome:
    """The outcome of a backend; its faults become *unchecked* with a cause."""
    started = time.monotonic()
    try:
        return await scan
    except BackendError as error:
        return _unchecked(scanner, error, time.monotonic() - started)


def _unchecked(scanner: Scanner, error: BackendError, spent: float) -> ScanOutcome:
    return ScanOutcome(scanner, ScanStatus.UNCHECKED, "", error.detail, error.cause, error.backend, spent)


_Ask = Callable[[Message, ScanPlan, Priority, Deadline], Awaitable[tuple[ScanOutcome, ...]]]
_CANARY = Priority(("canary", b""), 0, 0)
