"""clamd client: scans a message with one clamd. Only its explicit OK is clean.

On a Unix socket a read-only descriptor of the message is passed (FILDES: no copy); on TCP, where
FILDES is refused, and without /proc, the mapped bytes are streamed (INSTREAM). Never SCAN: a clamd that is stopped
while it scans a path answers OK. Faults are :class:`BackendError`, and so is "not scanned to the
end" (cause LIMITS): such a message is unchecked, not clean.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from typing import Any

from contentfilter import settings
from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, Cause
from contentfilter.model import Message, Scanner, ScanOutcome, ScanStatus
from contentfilter.policy.admission import Priority
from contentfilter.policy.budget import attempt_timeout
from contentfilter.scanners.health import PATIENCE, ProbeResult
from contentfilter.scanners.limiter import NEUTRAL, ScannerLimiter
from contentfilter.scanners.stream import Batch, Conclude, Owner, Progress, StreamContext, query, request
from contentfilter.wire import clamd

VERSION_WAIT = 2.0  # seconds; clamd answers VERSION immediately, even while all its threads scan


class ClamdScanner:
    """clamd behind a limiter of its backends. ``config`` is [clamd]; ``shed``, ``patience``: see ScannerLimiter."""

    def __init__(
        self,
        config: settings.ClamdSettings,
        *,
        shed: Counter[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        patience: float = PATIENCE,
    ) -> None:
        addresses = tuple(Address.parse(text) for text in config.backends)
        self.limiter = ScannerLimiter(
            Scanner.CLAMD,
            addresses,
            config.concurrency,
            max_wait=config.max_wait,
            shed=shed,
            clock=clock,
            patience=patience,
        )
        self._context = StreamContext(config.connect_timeout)
        self._config = config
        self._no_fildes: set[Address] = set()  # where FILDES was refused
        self._self_tests = {address: SelfTest(config.proof, clock) for address in addresses}
        self._databases = dict.fromkeys(addresses, "")  # by the last probe

    def scan(
        self,
        message: Message,
        deadline: Deadline,
        priority: Priority = NEUTRAL,
        owner: Owner | None = None,
    ) -> Coroutine[Any, Any, ScanOutcome]:
        """CLEAN or FOUND, with a database that the backend had before the scan. Raises BackendError without a verdict.

        ``owner``: see ScannerLimiter.run.
        """
        if self.too_big(message.size):
            # clamd answers OK above its own limit, without a look.
            raise BackendError(Cause.TOO_BIG, "clamd", f"{message.size} bytes, max_size is {self._config.max_size}")
        ask = partial(self._ask, message)
        return self.limiter.run(priority, ask, attempt_timeout(message.size, self._config), deadline, owner)

    async def _ask(self, message: Message, address: Address, progress: Progress) -> ScanOutcome:
        """One attempt at one backend."""
        database = self._databases[address]
        try:
            if address.path and address not in self._no_fildes:
                conclude = partial(self._proven, address, progress, database)
                answer, complete = await self._fildes(address, message.fd, progress, conclude)
                if not (isinstance(answer, clamd.Failed) and answer.refused):
                    return await conclude(answer, complete)
                self._no_fildes.add(address)
                progress.sent = False
            return await self._instream(address, message, progress, partial(self._outcome, address, progress, database))
        except BackendError as error:
            if error.cause is Cause.DOWN:
                self._no_fildes.discard(address)  # it may come back with another configuration
            raise

    async def _proven(
        self, address: Address, progress: Progress, database: str, answer: clamd.ScanAnswer, complete: bool
    ) -> ScanOutcome:
        """The outcome of an answer about a descriptor: OK counts only from a clamd that has passed the self-test."""
        test = self._self_tests[address]
        if isinstance(answer, clamd.Clean) and not test.passed():
            await test.run(address, partial(self._fildes, address))
        return await self._outcome(address, progress, database, answer, complete)

    async def _outcome(
        self, address: Address, progress: Progress, database: str, answer: clamd.ScanAnswer, complete: bool
    ) -> ScanOutcome:
        """The outcome of an answer. Raises BackendError if it is no verdict."""
        backend, name, status = str(address), "", ScanStatus.CLEAN
        if isinstance(answer, clamd.Failed):
            raise BackendError(answer.cause, backend, answer.text)
        if isinstance(answer, clamd.Found):
            name, status = answer.name, ScanStatus.FOUND
            if clamd.signature_class(name) is clamd.SignatureClass.LIMITS:
                raise BackendError(Cause.LIMITS, backend, name)
        elif not complete:
            raise BackendError(Cause.BAD_REPLY, backend, "OK before it had the whole message")
        seconds = time.monotonic() - progress.began
        return ScanOutcome(Scanner.CLAMD, status, name, backend=backend, seconds=seconds, database=database)

    def too_big(self, size: int) -> bool:
        return 0 < self._config.max_size < size

    async def database(self, backend: str, deadline: Deadline) -> str:
        """The database that it has now; empty if it does not say so in time."""
        address = Address.parse(backend)
        if address not in self._databases:
            return ""
        try:
            found = await self.version(address, deadline.within(VERSION_WAIT))
        except BackendError:
            return ""
        return database_of(found)

    def learn(self, result: ProbeResult) -> None:
        """Take a result of the prober."""
        for address in self._databases:
            if str(address) == result.backend and result.cause is None:
                self._databases[address] = result.database
        self.limiter.learn(result)

    async def version(self, address: Address, deadline: Deadline, progress: Progress | None = None) -> clamd.Version:
        """Health, version and database age of one backend; needs no slot. Raises BackendError.

        clamd answers immediately, even while all its threads scan.
        """
        reader = clamd.version_reader()
        found = await query(address, clamd.command("VERSION"), reader, self._context, deadline, progress)
        if found.product.endswith("ERROR"):
            raise BackendError(Cause.DOWN, str(address), found.product)
        return found

    async def _fildes(
        self, address: Address, fd: int, progress: Progress, conclude: Conclude[clamd.ScanAnswer] | None = None
    ) -> tuple[clamd.ScanAnswer, bool]:
        passed = _read_only(fd)
        if passed < 0:
            return clamd.Failed(Cause.DOWN, "no descriptor to pass", refused=True), True
        batches, reader = iter([(clamd.fildes(),)]), clamd.scan_reader()
        try:
            return await request(
                address, batches, reader, self._context, progress, descriptor=passed, conclude=conclude
            )
        finally:
            os.close(passed)

    async def _instream(
        self, address: Address, message: Message, progress: Progress, conclude: Conclude[clamd.ScanAnswer]
    ) -> ScanOutcome:
        if len(message.data) != message.size:
            raise BackendError(Cause.TIMEOUT, str(address), "no descriptor accepted before the message was closed")
        batches, reader = _stream(message), clamd.scan_reader()
        try:
            answer, complete = await request(address, batches, reader, self._context, progress, conclude=conclude)
        finally:
            batches.close()
        return await conclude(answer, complete)


def database_of(version: clamd.Version) -> str:
    """Identifies the database; empty if there is none."""
    return "" if version.database is None else f"{version.product}/{version.database}/{version.built}"


def _stream(message: Message) -> Generator[Batch, None, None]:
    """INSTREAM of the message. It holds a view of the message until all of it is sent."""
    with memoryview(message.data) as view:
        yield from clamd.instream(view)


def _read_only(fd: int) -> int:
    """Another descriptor of the same file, or -1: clamd gets no right to write, and no position or flags of ours.

    It is readable in any case, because clamd answers OK to a descriptor that it cannot read.
    """
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # no /proc, the message has been closed, or a limit
        return -1


# EICAR, in parts: no virus scanner shall stop at this file.
TEST_VIRUS = b"".join((b"X5O!P%@AP[4\\PZX54(P^)7CC)7}$", b"EICAR", b"-STANDARD-ANTIVIRUS-TEST-FILE!", b"$H+H*"))


class SelfTest:
    """EICAR self-test: does a clamd that takes descriptors still look at them?

    A clamd whose TemporaryDirectory is gone or not writable answers OK to every descriptor, whatever is in it
    (measured with 1.4). So its OK counts only for ``interval`` seconds after it has found the test virus.
    """

    def __init__(self, interval: float, clock: Callable[[], float]) -> None:
        self._interval = interval  # 0: no self-test
        self._clock = clock
        self._until = 0.0
        self._lock = asyncio.Lock()  # one test serves everyone who waits for it

    def passed(self) -> bool:
        """True if its OK counts now."""
        return not self._interval or self._clock() < self._until

    async def run(
        self, address: Address, ask: Callable[[int, Progress], Awaitable[tuple[clamd.ScanAnswer, bool]]]
    ) -> None:
        """Return if ``address`` passes. Raises BackendError if it does not."""
        async with self._lock:
            if self.passed():
                return
            fd = os.memfd_create("test-virus")
            try:
                os.write(fd, TEST_VIRUS)
                answer, _ = await ask(fd, Progress(address))
            finally:
                os.close(fd)
            if not isinstance(answer, clamd.Found):
                text = "it does not find the test virus: can it write to its TemporaryDirectory, has it its database?"
                raise BackendError(Cause.BAD_REPLY, str(address), text)
            self._until = self._clock() + self._interval
