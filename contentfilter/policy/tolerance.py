"""Findings that are let through: signatures on the allow-list, and classes that the configuration passes.

Pure. A tolerated finding is no finding: the outcome becomes *clean* and says in its detail what was seen and
why it passed. One limit is clamd's own: it names the first signature that matches, so what else
might be in the same message stays unseen while that signature is allowed.
"""

from dataclasses import dataclass, replace

from contentfilter.model import Check, Scanner, ScanOutcome, ScanStatus
from contentfilter.settings import Settings
from contentfilter.wire.clamd import SignatureClass, signature_class

UNOFFICIAL = ".UNOFFICIAL"


@dataclass(frozen=True, slots=True)
class AllowEntry:
    """One signature that passes for a while: who wanted it, why, and until when (seconds since 1970)."""

    signature: str
    owner: str
    reason: str
    created: float
    expires: float


def apply_allowlist(
    outcome: ScanOutcome, settings: Settings, allowed: tuple[AllowEntry, ...], now: float
) -> ScanOutcome:
    """``outcome``, or what is left of it at ``now`` when its finding is let through."""
    if outcome.status is not ScanStatus.FOUND or outcome.scanner.check is Check.SPAM:
        return outcome
    name = outcome.name.removesuffix(UNOFFICIAL)
    for allowance in allowed:
        if allowance.signature.removesuffix(UNOFFICIAL) == name and now < allowance.expires:
            return _passed(outcome, f"allowed by {allowance.owner}: {allowance.reason}")
    if outcome.scanner is Scanner.CLAMD:
        kind = signature_class(outcome.name)
        if class_action(kind, settings) == "pass":
            return _passed(outcome, f"[classes] {kind.value} = pass")
    return outcome


def class_action(kind: SignatureClass, settings: Settings) -> str:
    """What the configuration says of a class; empty: nothing of its own, it is treated as malware."""
    if kind in (SignatureClass.MALWARE, SignatureClass.LIMITS):  # limits are a fault: see [failure]
        return ""
    action: str = getattr(settings.classes, kind.value)
    return action


def _passed(outcome: ScanOutcome, why: str) -> ScanOutcome:
    return replace(outcome, status=ScanStatus.CLEAN, name="", detail=f"{outcome.name} passed, {why}")
