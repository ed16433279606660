"""Values of bench/attack.py: bounds, observations, and the row of one attack."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Row:
    """Result of one attack. Times in milliseconds, memory in MiB."""

    name: str
    messages: int = 0
    before: tuple[float, float] = (0.0, 0.0)  # p50 and p99
    attacked: tuple[float, float] = (0.0, 0.0)
    after: tuple[float, float] = (0.0, 0.0)
    longest: float = 0.0
    deferred: int = 0
    lost: int = 0
    doubled: int = 0
    named: bool | None = None  # None: nobody to name
    metric: str = ""
    cpu: tuple[float, float] = (0.0, 0.0)  # of the daemon in a second, before and during
    memory: dict[str, int] = field(default_factory=dict)  # of the largest process of each role
    together: int = 0  # all processes
    processes: dict[str, int] = field(default_factory=dict)  # of each role at the same time
    broken: list[str] = field(default_factory=list)  # bounds

    def text(self) -> str:
        memory = " ".join(f"{role} {size}" for role, size in sorted(self.memory.items()))
        times = " ".join(f"{p50:.0f}/{p99:.0f}" for p50, p99 in (self.before, self.attacked, self.after))
        named = {None: "-", True: "named", False: "unnamed"}[self.named]
        cells = (
            f"{self.name:26} {times:24} {self.longest:6.0f}  {self.deferred}/{self.lost}/{self.doubled}",
            f"{named:8} {self.metric or '-':30} {self.cpu[0]:.2f} {self.cpu[1]:.2f}",
            f"{memory} (all {self.together})",
            "; ".join(self.broken) or "ok",
        )
        return "  ".join(cells)


HEADING = (
    "attack; p50/p99 of honest mail before, during, after, and the longest, ms; deferred/lost/doubled; status; metric; "
    "CPU before and during; largest process, MiB; result"
)


@dataclass(frozen=True, slots=True)
class Bounds:
    floor: float  # milliseconds
    memory: int  # MiB


@dataclass(frozen=True, slots=True)
class Course:
    seconds: float  # of the attack; each quiet phase lasts half of it
    rate: float  # honest messages per second


@dataclass(frozen=True, slots=True)
class Sample:
    """One honest message."""

    due: float
    seconds: float
    status: int
    number: int


@dataclass(slots=True)
class Seen:
    """Observations at the edges of the phases."""

    quiet: list[tuple[float, float]] = field(default_factory=list)  # from, to
    attacked: tuple[float, float] = (0.0, 0.0)
    pids: set[int] = field(default_factory=set)
    descriptors: dict[str, int] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    status: str = ""
