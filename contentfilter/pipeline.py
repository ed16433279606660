"""The pipeline: plan, scanners in their order, decision, disposition. The one file that knows this order.

``examine`` decides and has no effect outside; ``explain`` uses it too. ``handle`` also does what the decision asks
for: it keeps the messages that are not delivered. It returns the disposition, the record for the log, and the
detail; the caller logs and answers. The daemon never queues a message by itself.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import msgspec

from contentfilter.deadline import Deadline
from contentfilter.errors import BackendError, Cause
from contentfilter.model import (
    STAGES,
    Action,
    Check,
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
from contentfilter.policy.decide import Decision, decide, open_checks
from contentfilter.policy.failure import failure_action
from contentfilter.policy.overrides import AllowEntry, Bypass, apply_allowlist, bypassed_outcomes, find_bypass
from contentfilter.policy.plan import Lookup, Owners, PlanStep, ScanPlan, Switches, disabled, make_plan, unscanned_plan
from contentfilter.scanners.cache import ScanCache, ScanRequest
from contentfilter.scanners.clamd import ClamdScanner
from contentfilter.scanners.signature_scan import scan_programs
from contentfilter.scanners.signatures.engine import Engine
from contentfilter.scanners.spamd import SpamdScanner
from contentfilter.settings import Settings
from contentfilter.store.poison import keep_poison
from contentfilter.store.quarantine import Quarantine
from contentfilter.store.release_token import UsedTokens
from contentfilter.verdict.context import MessageContext
from contentfilter.verdict.disposition import Disposition
from contentfilter.verdict.headers import HEADER_LIMIT, exceeds_limit, is_long
from contentfilter.verdict.record import MailDetail, MailRecord, fields, make_detail, make_record, quarantine_facts
from contentfilter.verdict.reply import make_disposition

MANY_RECIPIENTS = 500
"""Above this, work for each recipient leaves the event loop."""
"""Bytes of a header block above which its changes are computed off the event loop."""
POISON = "it killed two workers"

T = TypeVar("T")
P = ParamSpec("P")


class Handled(NamedTuple):
    """The result for one message."""

    disposition: Disposition
    record: MailRecord
    detail: MailDetail


class Isolated(NamedTuple):
    """The result for a message that killed workers, and its copy."""

    handled: Handled
    copy: str = ""  # path; empty: there is none
    error: str = ""  # why it could not be written


@dataclass(frozen=True, slots=True)
class Scanners:
    """All scanners of one configuration."""

    programs: Engine | None  # signatures and loader types; None where both are switched off
    clamd: ClamdScanner
    spamd: SpamdScanner


class Pipeline:
    """Handles each message under one configuration and one table snapshot."""

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
        cache: ScanCache | None = None,
        disk: Executor | None = None,
    ) -> None:
        """``lookup``: None while there are no tables. ``owners``: None where no recipient has preferences.

        ``bypasses`` and ``allowed`` return those in force. ``cache`` has results of equal messages; None: no reuse.
        ``disk``: threads for calls that a hung disk may block; None: the event loop's.
        ``secret`` verifies release tokens; empty: none is valid.
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
        self.cache, self._reuse = cache or ScanCache(), cache is not None
        self._disk = disk
        self._used = UsedTokens(Path(settings.service.state))
        self._kinds = {
            Scanner.CLAMD: hashlib.sha256(msgspec.msgpack.encode(settings.clamd)).digest(),
            Scanner.SPAMD: hashlib.sha256(msgspec.msgpack.encode(settings.spamd)).digest(),
        }
        self._shared: dict[OriginKind, ScanPlan] = {}  # for one recipient without a row, where that means no check
        # A scan goes on when its message is given up, but not if that lets the message pass: there is no retry then.
        self._goes_on = {
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
        attempt: int = 0,
    ) -> Handled:
        """Examine the message, and keep it in quarantine where recipients do not get it."""
        started = time.monotonic()
        context = await self.examine(incident, envelope, message, origin, deadline)
        if context.decision.withheld:
            context = await self._keep(context, deadline)
        return await _concluded(context, attempt, started)

    async def isolate(
        self, incident: str, envelope: Envelope, message: Message, origin: Origin, attempt: int, fingerprint: str
    ) -> Isolated:
        """Decide about a message that killed workers, without reading it, and keep a copy.

        Each scanner counts as unchecked with the cause ``poison``, for an empty message of the same size, and
        each recipient as one with both checks. A copy that cannot be written changes nothing for the message.
        """
        started = time.monotonic()
        plan = unscanned_plan(envelope, origin.kind, self.switches, POISON)
        outcomes = tuple(
            [ScanOutcome(scanner, ScanStatus.UNCHECKED, detail=POISON, cause=Cause.POISON) for scanner in Scanner]
        )
        stand_in = Message(-1, message.size, b"")
        context = await self._decide(incident, envelope, stand_in, origin, plan, outcomes)
        handled = await _concluded(context, attempt, started)
        facts = (self.settings.service.state, fingerprint, message, fields(handled.record))
        try:
            return Isolated(
                handled, copy=await asyncio.get_running_loop().run_in_executor(self._disk, keep_poison, *facts)
            )
        except OSError as error:
            return Isolated(handled, error=str(error))

    async def examine(
        self, incident: str, envelope: Envelope, message: Message, origin: Origin, deadline: Deadline
    ) -> MessageContext:
        """Plan, ask the scanners that can still change the decision, decide."""
        plan = await self._plan(envelope, message, origin)
        if exceeds_limit(message.data) and origin.kind is not OriginKind.BOUNCE:
            plan = plan.exceeding(f"header above {HEADER_LIMIT} bytes")
        try:
            released = await self._released(envelope, message, origin, deadline)
        except (OSError, TimeoutError) as error:
            why = f"quarantine: the release token cannot be marked as used: {error or 'out of time'}"
            return self._undecided(incident, envelope, message, origin, plan, why)
        if released:
            plan = plan.released_by(released)
        outcomes: tuple[ScanOutcome, ...] = ()
        for stage, ask in self._stages() if any(step.run for step in plan.steps) else ():
            if not any(map(plan.runs, stage)):
                continue
            owners = await _for_recipients(envelope, open_checks, plan, outcomes, origin.kind, self.settings)
            if not any(plan.runs(scanner) and owners[scanner.check] for scanner in stage):
                continue
            open_plan = plan.for_owners(owners[Check.SPAM])
            bypass = find_bypass(self.bypasses(), stage[0], origin.kind, time.time())
            if bypass is not None:
                outcomes += _bypassed(bypass, stage, open_plan)
                continue
            reserve = reserve_for_later(deadline.left(), stage[-1], plan, message.size, self.settings)
            priority = priority_of(origin, message.size)
            outcomes += self._allowed(await ask(message, open_plan, priority, deadline.before(reserve), self._reuse))
        return await self._decide(incident, envelope, message, origin, plan, outcomes)

    async def _decide(
        self,
        incident: str,
        envelope: Envelope,
        message: Message,
        origin: Origin,
        plan: ScanPlan,
        outcomes: tuple[ScanOutcome, ...],
    ) -> MessageContext:
        facts = (plan, outcomes, origin.kind, len(envelope.recipients), self.settings)
        decision = await _for_recipients(envelope, decide, *facts)
        return MessageContext(
            incident, origin, envelope, message, self.settings, self.switches, plan, outcomes, decision
        )

    async def probe(
        self, message: Message, scanners: tuple[Scanner, ...], deadline: Deadline
    ) -> tuple[ScanOutcome, ...]:
        """The outcomes of ``scanners`` for a canary, as far as they are configured; tables do not matter."""
        off = dict(disabled(self.settings, self.switches))
        steps = tuple([PlanStep(scanner, scanner in scanners and not off[scanner], "canary") for scanner in Scanner])
        plan = ScanPlan((), steps, users=((b"", b""),))
        outcomes: tuple[ScanOutcome, ...] = ()
        for stage, ask in self._stages():
            if not any(map(plan.runs, stage)):
                continue
            now = time.time()
            bypass = next((b for b in self.bypasses() if b.scanner is stage[0] and b.active(now)), None)
            if bypass is not None:
                outcomes += _bypassed(bypass, stage, plan)
                continue
            # without the cache: a canary asks for the present state
            outcomes += self._allowed(await ask(message, plan, _CANARY, deadline, False))
        return outcomes

    def unopened(self, incident: str, envelope: Envelope, origin: Origin, size: int, rule: str) -> MessageContext:
        """A message of ``size`` bytes that is deferred by ``rule`` before it is opened."""
        return self._undecided(incident, envelope, Message(-1, size, b""), origin, ScanPlan((), ()), rule)

    def _undecided(
        self, incident: str, envelope: Envelope, message: Message, origin: Origin, plan: ScanPlan, rule: str
    ) -> MessageContext:
        decision = Decision(Action.DEFER, Reason.NONE, rule)
        return MessageContext(incident, origin, envelope, message, self.settings, self.switches, plan, (), decision)

    def _allowed(self, outcomes: tuple[ScanOutcome, ...]) -> tuple[ScanOutcome, ...]:
        """The outcomes after the allow-list."""
        now, allowed = time.time(), self.allowed()
        return tuple([apply_allowlist(outcome, self.settings, allowed, now) for outcome in outcomes])

    async def _plan(self, envelope: Envelope, message: Message, origin: Origin) -> ScanPlan:
        facts = (envelope, message.size, origin, self.settings, self.switches, self.lookup, self.owners)
        if self.lookup is None or len(envelope.recipients) != 1 or 0 < self.switches.databytes < message.size:
            return await _for_recipients(envelope, make_plan, *facts)
        # Most mail of most servers: without row and check the plan is the same for all clients of a kind.
        shared = self._shared.get(origin.kind)
        if shared is not None and self.lookup(envelope.recipients[0]) == (None, None):
            return shared
        plan = make_plan(*facts)
        (policy, _), *_ = plan.groups
        if not (policy.virus or policy.spam) and self.lookup(envelope.recipients[0]) == (None, None):
            self._shared[origin.kind] = plan
        return plan

    async def _released(self, envelope: Envelope, message: Message, origin: Origin, deadline: Deadline) -> str:
        """The incident whose release token is used now; empty: no valid token, or over SMTP."""
        if origin.remote_ip or origin.helo or origin.kind not in (OriginKind.LOCAL, OriginKind.STRANGER):
            return ""
        return await self._used.accept(message.data, self.secret, envelope.recipients, self._disk, deadline)

    def _stages(self) -> tuple[tuple[tuple[Scanner, ...], "_Ask"], ...]:
        """Each stage with the method that asks its scanners."""
        ask: dict[Scanner, _Ask] = {
            Scanner.SIGNATURES: self._programs,
            Scanner.CLAMD: self._clamd,
            Scanner.SPAMD: self._spamd,
        }
        return tuple([(stage, ask[stage[0]]) for stage in STAGES])

    async def _programs(
        self, message: Message, plan: ScanPlan, priority: Priority, deadline: Deadline, reuse: bool
    ) -> tuple[ScanOutcome, ...]:
        """Both lists in one pass. What is found decides; otherwise both lists say clean."""
        asked = [scanner for scanner in (Scanner.SIGNATURES, Scanner.LOADERTYPES) if plan.runs(scanner)]
        engine = self.scanners.programs
        if engine is None:
            return tuple(ScanOutcome(scanner, ScanStatus.SKIPPED, detail="no rules") for scanner in asked)
        started = time.monotonic()
        try:
            finding = await scan_programs(engine, message, self.settings.signatures.thread_above, deadline)
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
        self, message: Message, plan: ScanPlan, priority: Priority, deadline: Deadline, reuse: bool
    ) -> tuple[ScanOutcome, ...]:
        clamd = self.scanners.clamd
        request = ScanRequest(
            b"clamd " + self._kinds[Scanner.CLAMD],
            message,
            attempt_timeout(message.size, self.settings.clamd),
            reusable=reuse and not clamd.too_big(message.size),
            goes_on=self._goes_on[Scanner.CLAMD],
            database=clamd.database,
        )
        scan = partial(clamd.scan, message, deadline, priority)
        return (await _outcome_of(Scanner.CLAMD, self.cache.get(request, scan, deadline)),)

    async def _spamd(
        self, message: Message, plan: ScanPlan, priority: Priority, deadline: Deadline, reuse: bool
    ) -> tuple[ScanOutcome, ...]:
        """One request for each owner of preferences, all in the queue simultaneously."""
        async with asyncio.TaskGroup() as group:
            scores = [self._score(message, user, plan.want, priority, deadline, reuse) for _, user in plan.users]
            tasks = [group.create_task(_outcome_of(Scanner.SPAMD, score)) for score in scores]
        outcomes = [replace(task.result(), owner=owner) for (owner, _), task in zip(plan.users, tasks, strict=True)]
        if not plan.owners_ignored:
            return tuple(outcomes)
        detail = f"also for {plan.owners_ignored} with preferences: [spamd] max_users={self.settings.spamd.max_users}"
        return tuple(o if o.owner or o.detail else replace(o, detail=detail) for o in outcomes)

    async def _score(
        self, message: Message, user: bytes, want: Want, priority: Priority, deadline: Deadline, reuse: bool
    ) -> ScanOutcome:
        request = ScanRequest(
            b"spamd %s %s %s" % (self._kinds[Scanner.SPAMD], want.value.encode(), user),
            message,
            attempt_timeout(message.size, self.settings.spamd),
            reusable=reuse and want is not Want.PROCESS,  # a rewritten message has the Received fields of its own try
            by_client=True,
            goes_on=self._goes_on[Scanner.SPAMD],
        )
        scan = partial(self.scanners.spamd.scan, message, deadline, priority, user=user, want=want)
        return await self.cache.get(request, scan, deadline)

    async def _keep(self, context: MessageContext, deadline: Deadline) -> MessageContext:
        """Keep the message for those who do not get it. Where that fails, all is deferred: nothing is lost."""
        facts = await _for_recipients(context.envelope, quarantine_facts, context)
        try:
            await self.quarantine.keep(context.incident, context.message, facts, deadline)
        except (OSError, TimeoutError) as error:
            failed = Decision(Action.DEFER, Reason.NONE, f"quarantine: {error or 'out of time'}")
            return msgspec.structs.replace(context, decision=failed)
        return context


async def _for_recipients(envelope: Envelope, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of ``function``, whose work grows with the recipients: in a thread where there are many."""
    if len(envelope.recipients) > MANY_RECIPIENTS:
        return await asyncio.to_thread(function, *args, **kwargs)
    return function(*args, **kwargs)


async def _concluded(context: MessageContext, attempt: int, started: float) -> Handled:
    if is_long(context.message.data):
        return await asyncio.to_thread(_conclude, context, attempt, started)
    return await _for_recipients(context.envelope, _conclude, context, attempt, started)


def _conclude(context: MessageContext, attempt: int, started: float) -> Handled:
    disposition = make_disposition(context)
    record = make_record(context, attempt, time.monotonic() - started)
    return Handled(disposition, record, make_detail(context, disposition.text))


def _bypassed(bypass: Bypass, stage: tuple[Scanner, ...], plan: ScanPlan) -> tuple[ScanOutcome, ...]:
    return tuple([outcome for scanner in stage for outcome in bypassed_outcomes(bypass, scanner, plan)])


async def _outcome_of(scanner: Scanner, scan: Awaitable[ScanOutcome]) -> ScanOutcome:
    """The outcome of a backend; its faults become *unchecked* with a cause."""
    started = time.monotonic()
    try:
        return await scan
    except BackendError as error:
        return _unchecked(scanner, error, time.monotonic() - started)


def _unchecked(scanner: Scanner, error: BackendError, spent: float) -> ScanOutcome:
    return ScanOutcome(scanner, ScanStatus.UNCHECKED, "", error.detail, error.cause, error.backend, spent)


_Ask = Callable[[Message, ScanPlan, Priority, Deadline, bool], Awaitable[tuple[ScanOutcome, ...]]]
_CANARY = Priority(("canary", b""), 0, 0)
