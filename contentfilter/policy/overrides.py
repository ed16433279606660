"""Overrides: exceptions that an operator orders, each with an author, a reason and an end.

Pure. A bypass skips a scanner, and its mail passes *unchecked*; an allow entry lets one signature pass as *clean*; a
drain accepts no mail. Each is compared with the clock for every message, so that it ends on time. clamd reports only
the first signature that matches: other signatures in the same message stay undetected while that one is allowed.
"""

from dataclasses import replace
from datetime import UTC, datetime
from typing import ClassVar

import msgspec

from contentfilter.errors import Cause
from contentfilter.model import Check, OriginKind, Scanner, ScanOutcome, ScanStatus, readable
from contentfilter.policy.plan import ScanPlan
from contentfilter.settings import Settings
from contentfilter.wire.clamd import SignatureClass, signature_class

DAY = 86_400.0  # seconds
SLACK = 3600.0
"""Seconds by which the clock may be set back without ending the longest override."""
REASON_MAX = 200  # characters
SCANNERS = (Scanner.SIGNATURES, Scanner.CLAMD, Scanner.SPAMD)
"""Scanners that can be bypassed. SIGNATURES includes the loader types: both lists are searched in one pass."""
UNOFFICIAL = ".UNOFFICIAL"


class Override(msgspec.Struct, frozen=True):
    """Base of all overrides. Times are seconds since 1970."""

    since: float
    until: float | None  # None: until it is ended by an order
    reason: str
    by: str

    SHORTEST: ClassVar[float] = 60.0  # seconds
    LONGEST: ClassVar[float] = 7 * DAY
    LIMITS: ClassVar[str] = "it must last from 1 minute to 7 days"

    def active(self, now: float) -> bool:
        """Return True if it is in force at ``now``. A clock that was set far back prolongs no override."""
        return self.until is None or now < self.until <= now + self.LONGEST + SLACK

    @classmethod
    def objection(cls, seconds: float | None, reason: str) -> str:
        """Reason for refusing this duration and reason text; empty: both are valid."""
        if seconds is not None and not cls.SHORTEST <= seconds <= cls.LONGEST:
            return cls.LIMITS
        if len(reason) > REASON_MAX or not reason.isprintable():
            return f"the reason must be one line of at most {REASON_MAX} printable characters"
        return ""


class Drain(Override, frozen=True):
    """An order to accept no mail."""


class Bypass(Override, frozen=True):
    """One scanner is skipped for mail of these origins (empty: all)."""

    scanner: Scanner  # one of SCANNERS
    since: float
    until: float
    reason: str
    by: str
    origins: tuple[OriginKind, ...] = ()

    def covers(self, scanner: Scanner, origin: OriginKind, now: float) -> bool:
        """Return True if ``scanner`` is skipped for mail of this origin at ``now``."""
        named = Scanner.SIGNATURES if scanner is Scanner.LOADERTYPES else scanner
        return named is self.scanner and self.active(now) and (not self.origins or origin in self.origins)


class AllowEntry(Override, frozen=True):
    """One signature that passes. The JSON names of its fields are those of ``allow list --json``."""

    signature: str
    by: str = msgspec.field(name="owner")
    reason: str
    since: float = msgspec.field(name="created")
    until: float = msgspec.field(name="expires")

    SHORTEST: ClassVar[float] = 0.0
    LONGEST: ClassVar[float] = 366 * DAY
    LIMITS: ClassVar[str] = "more than a year"

    def covers(self, name: str, now: float) -> bool:
        """Return True if the signature ``name`` passes at ``now``; the suffix .UNOFFICIAL makes no difference."""
        return self.same(name) and self.active(now)

    def same(self, name: str) -> bool:
        return self.signature.removesuffix(UNOFFICIAL) == name.removesuffix(UNOFFICIAL)


def find_bypass(bypasses: tuple[Bypass, ...], scanner: Scanner, origin: OriginKind, now: float) -> Bypass | None:
    """The bypass in force for this scanner and origin at ``now``."""
    return next((bypass for bypass in bypasses if bypass.covers(scanner, origin, now)), None)


def bypassed_outcomes(bypass: Bypass, scanner: Scanner, plan: ScanPlan) -> tuple[ScanOutcome, ...]:
    """Outcomes that replace those of ``scanner``: one, or for spamd one for each owner of preferences."""
    if not plan.runs(scanner):
        return ()
    detail = readable(f"by {bypass.by} until {utc(bypass.until)}: {bypass.reason}".encode())
    unchecked = ScanStatus.UNCHECKED
    owners = [owner for owner, _ in plan.users] if scanner.check is Check.SPAM else [b""]
    return tuple(ScanOutcome(scanner, unchecked, "", detail, Cause.BYPASSED, owner=owner) for owner in owners)


def apply_allowlist(
    outcome: ScanOutcome, settings: Settings, allowed: tuple[AllowEntry, ...], now: float
) -> ScanOutcome:
    """``outcome``, or *clean* if an allow entry or ``[classes]`` lets its detection pass at ``now``."""
    if outcome.status is not ScanStatus.FOUND or outcome.scanner.check is Check.SPAM:
        return outcome
    for entry in allowed:
        if entry.covers(outcome.name, now):
            return _passed(outcome, f"allowed by {entry.by}: {entry.reason}")
    if outcome.scanner is Scanner.CLAMD:
        kind = signature_class(outcome.name)
        if class_action(kind, settings) == "pass":
            return _passed(outcome, f"[classes] {kind.value} = pass")
    return outcome


def class_action(kind: SignatureClass, settings: Settings) -> str:
    """Action that the configuration sets for a class; empty: the class is treated as malware."""
    if kind in (SignatureClass.MALWARE, SignatureClass.LIMITS):  # limits are a fault: see [failure]
        return ""
    action: str = getattr(settings.classes, kind.value)
    return action


def _passed(outcome: ScanOutcome, why: str) -> ScanOutcome:
    return replace(outcome, status=ScanStatus.CLEAN, name="", detail=f"{outcome.name} passed, {why}")


def utc(at: float) -> str:
    """Seconds since 1970 as an RFC 3339 time."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
