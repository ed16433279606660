"""The failure table: what a scanner's fault does to a message.

A fault never refuses a message for good. It defers it, or lets it pass marked *unchecked*. Bounces
from qmail-send always pass: a deferral would make qmail-send try again for ever (domain-spec 1.3).
"""

from contentfilter.config.settings import FaultAction, Settings
from contentfilter.errors import Cause
from contentfilter.model import OriginKind, Scanner


def on_fault(scanner: Scanner, cause: Cause, origin: OriginKind, settings: Settings) -> FaultAction:
    """One cell of the table."""
    if origin is OriginKind.BOUNCE:
        return "pass"
    if cause is Cause.TOO_BIG:
        return settings.failure.too_big
    if cause is Cause.LIMITS:
        return settings.failure.limits
    if scanner is Scanner.CLAMD:
        return settings.failure.clamd
    if scanner is Scanner.SPAMD:
        return settings.failure.spamd
    return settings.failure.signatures
