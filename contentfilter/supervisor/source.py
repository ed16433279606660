"""What the supervisor gets its configuration from, and what it says about tables that are not current."""

from dataclasses import dataclass
from typing import Protocol

from contentfilter.doors.admission import Rarely
from contentfilter.errors import Problem
from contentfilter.log import Logger
from contentfilter.monitor.samples import Sample
from contentfilter.settings import Settings
from contentfilter.tables.keeper import State

TELL_AGAIN = 600.0  # seconds after which tables that are still not current are told again


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration that may go live."""

    settings: Settings
    blob: bytes  # all that a worker needs; only the application knows what is in it
    problems: tuple[Problem, ...] = ()  # bad lines that were left out
    samples: tuple[Sample, ...] = ()  # of the canary
    sysfacility: str = ""  # of a log in syslog


class Source(Protocol):
    """Where configurations come from. Loading raises ConfigError."""

    async def load(self) -> Loaded:
        """Read everything anew."""

    async def refresh(self) -> Loaded | None:
        """Look at the tables only; None when nothing changed."""

    def tables(self) -> State | None:
        """How the tables in force stand; None where there is no such thing."""


class Staleness:
    """Tells the log when the tables fall behind, now and then while they are, and when they are current again."""

    def __init__(self, log: Logger) -> None:
        self._log = log
        self._told = ""
        self._again = Rarely(TELL_AGAIN)

    def tell(self, state: State | None) -> None:
        """To be called after each look at the tables."""
        if state is None or not (state.trouble or self._told):
            return
        rows = {"loaded": state.loaded, "clamav_rows": state.clamav_rows, "spamd_rows": state.spamd_rows}
        if not state.trouble:
            self._log.info("tables.current", **rows)
        else:
            if state.trouble != self._told:
                self._again = Rarely(TELL_AGAIN)
            if self._again.allow() is not None:
                self._log.warning("tables.stale", why=state.trouble, age=state.age, **rows)
        self._told = state.trouble
