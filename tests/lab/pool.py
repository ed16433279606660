"""A scanner limiter for questions that are plain coroutines of an address."""

import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.model import Scanner
from contentfilter.scanners.health import PATIENCE
from contentfilter.scanners.limiter import NEUTRAL, ScannerLimiter
from contentfilter.scanners.stream import Progress

LONG = 1e6  # seconds for one attempt: only the deadline ends it


class Pool(ScannerLimiter):
    """``await pool.ask(question, deadline)``."""

    def __init__(
        self,
        addresses: Sequence[Address],
        concurrency: int,
        clock: Callable[[], float] = time.monotonic,
        patience: float = PATIENCE,
    ) -> None:
        super().__init__(Scanner.CLAMD, addresses, concurrency, clock=clock, patience=patience)

    async def ask(self, question: Callable[[Address], Coroutine[Any, Any, Any]], deadline: Deadline) -> Any:
        return await self.run(NEUTRAL, partial(_asked, question), LONG, deadline)


async def _asked(question: Callable[[Address], Coroutine[Any, Any, Any]], address: Address, progress: Progress) -> Any:
    progress.connected = True
    return await question(address)
