"""How the seconds of a message are shared out: what one try of a scanner may take, and what is left for those after it.

No scanner uses up what another one that comes later needs, so a slow clamd leaves spamd its time, and
both leave enough to keep and answer the message.

Theory. Each step *wants* some seconds: as many tries as it may make, each at its own time-out. Where all
wants fit into what is left, a step may use everything but the wants of those after it. Where they do not
fit, those get the same part of their wants as everybody: left / (all wants). So however slow the
steps are, each one can have min(1, left / all wants) of what it wants. Times are seconds.
"""

from collections.abc import Sequence

from contentfilter.model import Scanner
from contentfilter.policy.plan import ScanPlan
from contentfilter.settings import ClamdSettings, Settings, SpamdSettings

MEGABYTE = 1_000_000
TRIES = 2  # the second one on another backend (scanners/pool.py)
SIGNATURES = 10.0  # for both lists; they take milliseconds, but the largest messages some seconds
REPLY_RESERVE = 5.0  # after the last scanner: to decide, to keep what is not delivered, to answer


def attempt_timeout(size: int, scanner: ClamdSettings | SpamdSettings) -> float:
    """What one backend may take for a message of ``size`` bytes, connecting included."""
    return min(scanner.timeout_base + size / MEGABYTE * scanner.timeout_per_megabyte, scanner.timeout)


def estimate(scanner: Scanner, size: int, settings: Settings) -> float:
    """What a scanner needs for a message of ``size`` bytes when nothing goes well."""
    if scanner in (Scanner.SIGNATURES, Scanner.LOADERTYPES):
        return SIGNATURES
    section = settings.clamd if scanner is Scanner.CLAMD else settings.spamd
    return min(TRIES, len(section.backends)) * attempt_timeout(size, section)


def reserve_for_later(left: float, scanner: Scanner, plan: ScanPlan, size: int, settings: Settings) -> float:
    """The part of ``left`` that ``scanner`` must leave to the scanners of the plan that come after it."""
    order = tuple(Scanner)
    later = [estimate(each, size, settings) for each in order[order.index(scanner) + 1 :] if plan.runs(each)]
    return reserve(left, estimate(scanner, size, settings), later)


def reserve(left: float, own: float, later: Sequence[float]) -> float:
    """The part of ``left`` that a step which wants ``own`` must leave to those after it, and to the finish."""
    others = sum(later) + REPLY_RESERVE
    return min(left, others * min(1.0, left / (own + others)))  # rounding alone could make it more than there is
