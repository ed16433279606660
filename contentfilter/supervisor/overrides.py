"""Override manager: puts bypasses, allow entries and drains in force in every worker, saves them and ends them.

Overrides are apart from the configuration on purpose: they must work while it is bad, while its database
hangs and while the disk is full. An order is in force first and saved then; the answer waits for both. Bypasses
and allow entries survive a restart. A drain does not: who drained in order to restart wants mail to flow
afterwards, and a daemon that comes back after a crash and silently accepts nothing would be a trap.
"""

import asyncio
import pwd
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from contentfilter.bus import messages
from contentfilter.deadline import Deadline
from contentfilter.files import memory_file
from contentfilter.log import Logger
from contentfilter.model import readable
from contentfilter.policy.overrides import SCANNERS, AllowEntry, Bypass, Drain, Override, utc
from contentfilter.settings import Settings
from contentfilter.store.overrides import ALLOW_FILE, read_usable, save
from contentfilter.supervisor.control import ControlHandler
from contentfilter.supervisor.workers import Workers
from contentfilter.threads import in_thread

TAKE_WAIT = 10.0  # seconds for all workers to follow
SAVE_WAIT = 5.0  # seconds for the disk
REMIND = 300.0  # seconds between two lines in the log about what is still in force
TICK = 1.0  # seconds; the clock may be set


class OverrideManager:
    """The orders in force. :meth:`run` once, in the background."""

    def __init__(
        self,
        log: Logger,
        settings: Callable[[], Settings],
        workers: Workers,
        publish: Callable[[messages.Event], None],
    ) -> None:
        """``publish``: to the event feed."""
        self._log = log
        self._settings = settings
        self._publish = publish
        self._workers = workers
        self._changed = asyncio.Event()
        self._writing = asyncio.Lock()  # so that the newest is written last
        self._remind_at = 0.0
        self._unreadable: dict[str, str] = {}  # by field of Overrides, until its file is replaced
        self._dirty: set[str] = set()  # fields of Overrides whose files are to be written
        self._unsaved = ""
        self.orders = self._stored()

    def _stored(self) -> messages.Overrides:
        """Overrides from before the start; none of a kind whose file cannot be used."""
        bypasses, allowed, problems = read_usable(self._settings().service.state)
        for problem in problems:
            self._log.error("service.problem", path=problem.path, line=problem.line, text=problem.text)
            self._unreadable["allowed" if problem.path.endswith(ALLOW_FILE) else "bypasses"] = str(problem)
        return messages.Overrides(1, bypasses, None, allowed)

    # What the supervisor needs

    @property
    def problem(self) -> str:
        """``orders_problem`` of messages.Status."""
        return "; ".join(filter(None, (self._unsaved, *self._unreadable.values())))

    def inherited(self) -> int:
        """A descriptor with the orders, for a worker that starts."""
        return memory_file("orders", messages.encode(self.orders))

    def bypasses(self) -> tuple[Bypass, ...]:
        """Those that hold now."""
        now = time.time()
        return tuple(bypass for bypass in self.orders.bypasses if bypass.active(now))

    def allowed(self) -> tuple[AllowEntry, ...]:
        """Allow entries in force now."""
        now = time.time()
        return tuple(entry for entry in self.orders.allowed if entry.active(now))

    def summary(self) -> str:
        """For the service manager's line of state; empty where nothing is out of the ordinary."""
        told = "; DRAINED, no mail is accepted" if self.orders.drain else ""
        return told + "".join(f"; BYPASSED: {b.scanner.value} until {utc(b.until)}" for b in self.bypasses())

    def answers(self) -> Mapping[type, ControlHandler]:
        """What operators may ask for."""
        return {
            messages.AskBypass: self._bypass,
            messages.AskBypassEnd: self._bypass_end,
            messages.AskDrain: self._drain,
            messages.AskResume: self._resume,
            messages.AskAllow: self._allow,
            messages.AskAllowEnd: self._allow_end,
        }

    async def run(self) -> None:
        """End what is over, and remind the log of what is not. Does not return."""
        while True:
            self._changed.clear()
            now = time.time()
            await self._end_what_is_over(now)
            if self._ends() and time.monotonic() >= self._remind_at:
                self._remind_at = time.monotonic() + REMIND
                self._remind(now)
            wait = min((TICK, *(end - now for end in self._ends()))) if self._ends() else None
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                pass

    # Orders

    async def _bypass(self, question: messages.Question, uid: int) -> messages.Reply:
        assert isinstance(question, messages.AskBypass)  # noqa: S101 - see answers()
        why = Bypass.objection(question.seconds, question.reason)
        why = why or ("" if question.reason.strip() else "a bypass needs a reason")
        why = why or ("" if question.scanner in SCANNERS else f"{question.scanner.value} goes with signatures")
        if why:
            return messages.Refused(why)
        now, by = time.time(), _actor(uid, question.claimed)
        origins = tuple(dict.fromkeys(question.origins))
        until = now + question.seconds
        new = Bypass(scanner=question.scanner, since=now, until=until, reason=question.reason, by=by, origins=origins)
        old = [bypass for bypass in self.orders.bypasses if bypass.scanner is new.scanner]
        kept = [bypass for bypass in self.orders.bypasses if bypass.scanner is not new.scanner]
        events = [_bypass_event("bypass.end", bypass, ended=f"replaced by {by}") for bypass in old]
        events.append(_bypass_event("bypass.begin", new))
        return await self._change(events, bypasses=(*kept, new))

    async def _bypass_end(self, question: messages.Question, uid: int) -> messages.Reply:
        assert isinstance(question, messages.AskBypassEnd)  # noqa: S101 - see answers()
        over = [b for b in self.orders.bypasses if question.scanner in (None, b.scanner)]
        if not over:
            return messages.Refused("there is no such bypass")
        by = _actor(uid, question.claimed)
        events = [_bypass_event("bypass.end", bypass, ended=f"by {by}") for bypass in over]
        kept = tuple(b for b in self.orders.bypasses if b not in over)
        return await self._change(events, bypasses=kept)

    async def _drain(self, question: messages.Question, uid: int) -> messages.Reply:
        assert isinstance(question, messages.AskDrain)  # noqa: S101 - see answers()
        if why := Drain.objection(question.seconds, question.reason):
            return messages.Refused(why)
        now, old = time.time(), self.orders.drain
        until = None if question.seconds is None else now + question.seconds
        new = Drain(now, until, question.reason, _actor(uid, question.claimed))
        events = [_drain_event("drain.end", old, ended=f"replaced by {new.by}")] if old else []
        return await self._change([*events, _drain_event("drain.begin", new)], drain=new)

    async def _resume(self, question: messages.Question, uid: int) -> messages.Reply:
        assert isinstance(question, messages.AskResume)  # noqa: S101 - see answers()
        drain = self.orders.drain
        if drain is None:
            return messages.Refused("mail is being accepted; nothing is drained")
        event = _drain_event("drain.end", drain, ended=f"by {_actor(uid, question.claimed)}")
        return await self._change([event], drain=None)

    async def _allow(self, question: messages.Question, uid: int) -> messages.Reply:
        assert isinstance(question, messages.AskAllow)  # noqa: S101 - see answers()
        if why := AllowEntry.objection(question.seconds, question.reason):
            return messages.Refused(why)
        now = time.time()
        until = now + question.seconds
        new = AllowEntry(
            signature=question.signature, by=question.owner, reason=question.reason, since=now, until=until
        )
        kept = (entry for entry in self.orders.allowed if not entry.same(question.signature))
        event = _allow_event("allow.begin", new, by=_actor(uid, question.owner))
        return await self._change([event], allowed=(*kept, new))

    async def _allow_end(self, question: messages.Question, uid: int) -> messages.Reply:
        assert isinstance(question, messages.AskAllowEnd)  # noqa: S101 - see answers()
        over = [entry for entry in self.allowed() if entry.same(question.signature)]
        if not over:
            return messages.Refused(f"{question.signature} is not on the list")
        by = _actor(uid, question.claimed)
        events = [_allow_event("allow.end", entry, by=by, ended=f"by {by}") for entry in over]
        return await self._change(events, allowed=tuple(entry for entry in self.orders.allowed if entry not in over))

    async def _change(self, events: Sequence[messages.Event], **changed: Any) -> messages.Reply:
        """Put the ``changed`` fields of ``orders`` in force in every worker, log and save them.

        The reply contains what could not be done.
        """
        if not self._ends():
            self._remind_at = time.monotonic() + REMIND
        self._dirty |= changed.keys() & {"bypasses", "allowed"}  # a file of the other kind may be damaged: it stays
        changed = {"allowed": self.allowed()} | changed  # without expired ones
        self.orders = msgspec.structs.replace(self.orders, number=self.orders.number + 1, **changed)
        self._changed.set()
        self._workers.send(self.orders)
        for event in events:
            if not event.name.startswith("allow."):  # in the audit trail only
                self._log.warning(event.name, **event.fields)
                self._publish(event)
        await self._save(events)
        late = await self._workers.followed(self._taken, Deadline.after(TAKE_WAIT))
        problems = [self._unsaved] if self._unsaved else []
        problems += (f"worker {p.slot} (pid {p.pid}) has not taken it yet" for p in late)
        in_flight = sum(p.beat.open for p in self._workers.processes if p.beat is not None)
        return messages.Ordered(self.bypasses(), self.orders.drain, tuple(problems), in_flight)

    def _taken(self, beat: messages.Heartbeat) -> bool:
        return beat.orders >= self.orders.number

    async def _save(self, events: Sequence[messages.Event]) -> None:
        """Save the overrides, or set ``problem`` to the reason. A disk that hangs delays it by SAVE_WAIT only."""
        lines = [{"time": utc(time.time()), "event": event.name, **event.fields} for event in events]
        state = self._settings().service.state
        writing = asyncio.ensure_future(self._write(state, lines))
        done, _ = await asyncio.wait({writing}, timeout=SAVE_WAIT)
        why = writing.result() if done else "the disk does not answer"
        self._unsaved = f"{state}: orders cannot be written down ({why}): a restart forgets what changed" if why else ""
        if why:
            self._log.error("orders.not-saved", path=state, why=why)

    async def _write(self, state: str, lines: Sequence[Mapping[str, Any]]) -> str:
        """Return the reason of a failure; empty when it is on the disk."""
        async with self._writing:
            orders, dirty, self._dirty = self.orders, self._dirty, set()
            bypasses = orders.bypasses if "bypasses" in dirty else None
            allowed = orders.allowed if "allowed" in dirty else None
            try:
                await in_thread(lambda: save(state, bypasses, allowed, lines))
            except OSError as error:
                self._dirty |= dirty
                return error.strerror or str(error)
            for kind in dirty:
                self._unreadable.pop(kind, None)
        return ""

    # In the background

    def _ends(self) -> list[float]:
        """When each order ends; far in the future for one without end."""
        drain = self.orders.drain
        ends = [bypass.until for bypass in self.orders.bypasses]
        return ends if drain is None else [*ends, drain.until if drain.until is not None else float("inf")]

    async def _end_what_is_over(self, now: float) -> None:
        over = [bypass for bypass in self.orders.bypasses if not bypass.active(now)]
        events = [_bypass_event("bypass.end", bypass, ended="expired") for bypass in over]
        drain = self.orders.drain
        if drain is not None and drain.until is not None and drain.until <= now:
            events.append(_drain_event("drain.end", drain, ended="expired"))
            drain = None
        if events:
            kept = {"bypasses": tuple(b for b in self.orders.bypasses if b not in over)} if over else {}
            await self._change(events, drain=drain, **kept)

    def _remind(self, now: float) -> None:
        for bypass in self.orders.bypasses:
            event = _bypass_event("bypass.active", bypass, left=round(bypass.until - now))
            self._log.warning(event.name, **event.fields)
        if (drain := self.orders.drain) is not None:
            self._log.warning("drain.active", **_drain_event("drain.active", drain).fields)


def _bypass_event(name: str, bypass: Bypass, **more: Any) -> messages.Event:
    return _event(name, bypass, bypass.until, scanner=bypass.scanner.value, **more)


def _drain_event(name: str, drain: Drain, **more: Any) -> messages.Event:
    return _event(name, drain, drain.until, **more)


def _allow_event(name: str, entry: AllowEntry, **more: Any) -> messages.Event:
    fields = {"signature": entry.signature, "owner": entry.by, "reason": entry.reason, "until": utc(entry.until)}
    return messages.Event(name, fields | more)


def _event(name: str, order: Override, until: float | None, **more: Any) -> messages.Event:
    fields = msgspec.to_builtins(order) | {"since": utc(order.since), "until": utc(until) if until else ""}
    return messages.Event(name, fields | more)


def _actor(uid: int, claimed: str) -> str:
    """The name of a uid that the kernel vouches for, and who is said to be behind it."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = f"uid {uid}"
    claim = readable(claimed.encode("utf-8", "replace")).strip()[:64]
    return f"{name} (says it is {claim})" if claim and claim != name else name
