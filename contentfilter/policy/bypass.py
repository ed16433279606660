"""Bypasses: for a while a scanner is not asked, and what it would have looked at passes *unchecked*.

Pure. A bypass has an end, a reason and a name, and is looked at anew for each message, so that it ends on time
whatever else stands still. ``signatures`` stands for both lists of our own, which are searched in one pass.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from contentfilter.errors import Cause
from contentfilter.model import Check, OriginKind, Scanner, ScanOutcome, ScanStatus, readable
from contentfilter.policy.plan import ScanPlan

SHORTEST, LONGEST = 60.0, 7 * 86_400.0  # seconds
SLACK = 3600.0
"""Seconds by which the clock may be set back without ending the longest bypass."""
REASON_MAX = 200  # characters
SCANNERS = (Scanner.SIGNATURES, Scanner.CLAMD, Scanner.SPAMD)
"""What a bypass may name."""


@dataclass(frozen=True, slots=True)
class Bypass:
    """One scanner that is left out, for mail of these origins (none named: all)."""

    scanner: Scanner  # one of SCANNERS
    since: float  # seconds since 1970, as until
    until: float
    reason: str
    by: str
    origins: tuple[OriginKind, ...] = ()

    def active(self, now: float) -> bool:
        """Whether it holds at ``now``. A clock that was set far back makes no bypass last."""
        return now < self.until <= now + LONGEST + SLACK

    def covers(self, scanner: Scanner, origin: OriginKind, now: float) -> bool:
        named = Scanner.SIGNATURES if scanner is Scanner.LOADERTYPES else scanner
        return named is self.scanner and self.active(now) and (not self.origins or origin in self.origins)


def find_bypass(bypasses: tuple[Bypass, ...], scanner: Scanner, origin: OriginKind, now: float) -> Bypass | None:
    """The bypass that holds for this scanner and origin at ``now``."""
    return next((bypass for bypass in bypasses if bypass.covers(scanner, origin, now)), None)


def bypassed_outcomes(bypass: Bypass, scanner: Scanner, plan: ScanPlan) -> tuple[ScanOutcome, ...]:
    """What takes the place of the answers of ``scanner``: one, or for spamd one for each owner of preferences."""
    if not plan.runs(scanner):
        return ()
    detail = readable(f"by {bypass.by} until {utc(bypass.until)}: {bypass.reason}".encode())
    unchecked = ScanStatus.UNCHECKED
    owners = [owner for owner, _ in plan.users] if scanner.check is Check.SPAM else [b""]
    return tuple(ScanOutcome(scanner, unchecked, "", detail, Cause.BYPASSED, owner=owner) for owner in owners)


def objection(seconds: float | None, reason: str) -> str:
    """Why a bypass (or a drain, which may be without end or reason) of this kind is refused; empty: it is not."""
    if seconds is not None and not SHORTEST <= seconds <= LONGEST:
        return "it must last from 1 minute to 7 days"
    if len(reason) > REASON_MAX or not reason.isprintable():
        return f"the reason must be one line of at most {REASON_MAX} printable characters"
    return ""


def utc(at: float) -> str:
    """Seconds since 1970 as people read them."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
