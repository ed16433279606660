"""Measured figures and their targets: a median with its range for each concurrency."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """Median, minimum and maximum of several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Summary":
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])

    def __str__(self) -> str:
        single = self.low == self.high
        return short(self.median) if single else f"{short(self.median)} [{short(self.low)}-{short(self.high)}]"


def ratio(above: Sequence[float], below: Sequence[float]) -> Summary:
    """Summary of the ratios within each round; times of different rounds are not compared."""
    return Summary.of(a / b for a, b in zip(above, below, strict=True))


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the report. ``values``: by concurrency, or a single one with an empty key."""

    what: str
    target: float | None  # None: no target, shown as an explanation
    values: Mapping[str, Summary]
    at_least: bool = False  # the target is a minimum, not a maximum
    unit: str = ""

    def meets(self, value: Summary) -> bool:
        if self.target is None:
            return True
        return value.median >= self.target if self.at_least else value.median <= self.target

    @property
    def verdict(self) -> str:
        """``met``, ``missed``, or the concurrencies at which it is met."""
        met = [name for name, value in self.values.items() if self.meets(value)]
        if self.target is None:
            return ""
        if len(met) in (0, len(self.values)):
            return "met" if met else "missed"
        return f"met at {', '.join(met)}"

    def cells(self) -> tuple[str, str, str, str]:
        target = ""
        if self.target is not None:
            target = f"{'>=' if self.at_least else '<='} {short(self.target)} {self.unit}".rstrip()
        return self.what, target, " / ".join(map(str, self.values.values())) + f" {self.unit}".rstrip(), self.verdict


def short(value: float) -> str:
    """Three significant digits."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"


def markdown(figures: Iterable[Figure]) -> str:
    """The table of docs/performance.md."""
    rows = (("what", "target", "measured", ""), ("---",) * 4, *(figure.cells() for figure in figures))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Exponent of the power law that fits the points (x, y) best: 1 is linear, 0 is flat."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    slope, _ = statistics.linear_regression(*zip(*logs, strict=True))
    return slope
