"""Load shedding: how long a message may wait for a scanner when the scanners cannot keep up.

The order: spamd for large messages, then spamd for all, then clamd. Never the signatures: they need only the worker.
A scan that is shed is ``busy`` in the failure table, which lets it pass unchecked or defers it. Times are seconds.
"""

from contentfilter.model import Scanner

LARGE_SHARE = 0.25  # of its max_wait a large message may wait for spamd
WEIGHT = 0.1  # of the newest answer in the mean
SHED = ("spamd-large", "spamd", "clamd", "waiting")
"""What may be shed; ``waiting``: a message that got no place in time and was deferred."""


def patience(scanner: Scanner, *, large: bool, max_wait: float) -> float:
    """Seconds that a message may wait for a slot at ``scanner``."""
    return max_wait * LARGE_SHARE if large and scanner is Scanner.SPAMD else max_wait


def what_is_shed(scanner: Scanner, *, large: bool) -> str:
    """One word of SHED."""
    return "spamd-large" if large and scanner is Scanner.SPAMD else scanner.value


def expected_wait(ahead: int, places: int, mean: float) -> float:
    """Expected wait behind ``ahead`` others, if ``places`` requests run concurrently and take ``mean`` seconds each."""
    return (ahead + 1) * mean / places


def mean_with(mean: float | None, seconds: float) -> float:
    """The running mean after one more answer."""
    return seconds if mean is None else mean + WEIGHT * (seconds - mean)
