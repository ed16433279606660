"""Time budget of a message: the time-out of one attempt, and the time reserved for later scanners.

No scanner uses up the time that a later one needs, so a slow clamd leaves spamd its time, and
both leave enough to keep and answer the message.

Theory. Each step has an estimate: its maximum number of attempts, each at its own time-out. If all
estimates fit into what is left, a step may use everything but the estimates of the later ones. If they do not
fit, every step gets the same part of its estimate: left / (all estimates). So however slow the
steps are, each one can have min(1, left / all estimates) of its own. Times are seconds.
"""

from collections.abc import Sequence

from contentfilter.model import Scanner
from contentfilter.policy.plan import ScanPlan
from contentfilter.settings import ClamdSettings, Settings, SpamdSettings

MEGABYTE = 1_000_000
TRIES = 2  # the second one on another backend (scanners/limiter.py)
SIGNATURES = 10.0  # for both lists; they take milliseconds, but the largest messages some seconds
REPLY_RESERVE = 5.0  # after the last scanner: to decide, to keep what is not delivered, to answer


def attempt_timeout(size: int, scanner: ClamdSettings | SpamdSettings) -> float:
    """Seconds that one backend may take for a message of ``size`` bytes, connecting included."""
    return min(scanner.timeout_base + size / MEGABYTE * scanner.timeout_per_megabyte, scanner.timeout)


def estimate(scanner: Scanner, size: int, settings: Settings) -> float:
    """Seconds that a scanner needs for a message of ``size`` bytes in the worst case."""
    if scanner in (Scanner.SIGNATURES, Scanner.LOADERTYPES):
        return SIGNATURES
    section = settings.clamd if scanner is Scanner.CLAMD else settings.spamd
    return min(TRIES, len(section.backends)) * attempt_timeout(size, section)


def reserve_for_later(left: float, scanner: Scanner, plan: ScanPlan, size: int, settings: Settings) -> float:
    """Seconds of ``left`` that ``scanner`` must leave to the later scanners of the plan."""
    order = tuple(Scanner)
    later = [estimate(each, size, settings) for each in order[order.index(scanner) + 1 :] if plan.runs(each)]
    return reserve(left, estimate(scanner, size, settings), later)


def reserve(left: float, own: float, later: Sequence[float]) -> float:
    """Seconds of ``left`` that a step with the estimate ``own`` must leave to the later ones and to the reply."""
    others = sum(later) + REPLY_RESERVE
    return min(left, others * min(1.0, left / (own + others)))  # rounding alone could make it more than there is
