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
from contentfilter.scanners.health import USUAL, Patience
from contentfilter.scanners.limiter import NEUTRAL, Attempts, ScannerLimiter
from contentfilter.scanners.stream import Batch, Progress, StreamContext, query, request
from contentfilter.scanners.watch import watch
from contentfilter.wire import clamd

VERSION_EVERY = 60.0  # seconds for which the database that a backend had is not asked for again
VERSION_WAIT = 2.0  # seconds; clamd answers VERSION immediately, even while all its threads scan


class ClamdScanner:
    """clamd behind a limiter of its backends. ``config`` is the [clamd] section; ``shed``: see ScannerLimiter."""

    def __init__(
        self,
        config: settings.ClamdSettings,
        *,
        shed: Counter[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        patience: Patience = USUAL,
    ) -> None:
        addresses = tuple(Address.parse(text) for text in config.backends)
        self.limiter = ScannerLimiter(
            Scanner.CLAMD,
            addresses,
            config.concurrency,
            max_wait=config.max_wait,
            shed=shed,
            clock=clock,
            silence=Cause.RELOADING,
            patience=patience,
        )
        self._context = StreamContext(config.connect_timeout)
        self._config = config
        self._no_fildes: set[Address] = set()  # where FILDES was refused
        self._proofs = {address: SelfTest(config.proof, clock) for address in addresses}
        self._databases = {address: ("", float("-inf")) for address in addresses}  # and when it was asked for

    def scan(
        self,
        message: Message,
        deadline: Deadline,
        priority: Priority = NEUTRAL,
        attempts: Attempts | None = None,
    ) -> Coroutine[Any, Any, ScanOutcome]:
        """CLEAN or FOUND. Raises BackendError when there is no verdict.

        With ``attempts`` the answer may be reused: the outcome names a database that the backend had before the scan.
        """
        if self.too_big(message.size):
            # clamd answers OK above its own limit, without a look.
            raise BackendError(Cause.TOO_BIG, "clamd", f"{message.size} bytes, max_size is {self._config.max_size}")
        ask = partial(self._ask, message, attempts is not None)
        return self.limiter.run(priority, ask, attempt_timeout(message.size, self._config), deadline, attempts)

    async def _ask(self, message: Message, with_database: bool, address: Address, progress: Progress) -> ScanOutcome:
        """One attempt at one backend."""
        database = await self._database_before(address) if with_database else ""
        answer: clamd.ScanAnswer | None = None
        if address.path and address not in self._no_fildes:
            answer = await self._fildes(address, message.fd, progress)
            if isinstance(answer, clamd.Clean):
                await self._proofs[address].check(address, partial(self._fildes, address))
        if answer is None:
            answer = await self._instream(address, message, progress)
        if isinstance(answer, clamd.Failed):
            raise BackendError(answer.cause, str(address), answer.text)
        name = answer.name if isinstance(answer, clamd.Found) else ""
        if name and clamd.signature_class(name) is clamd.SignatureClass.LIMITS:
            raise BackendError(Cause.LIMITS, str(address), name)
        status = ScanStatus.FOUND if isinstance(answer, clamd.Found) else ScanStatus.CLEAN
        seconds = time.monotonic() - progress.began
        return ScanOutcome(Scanner.CLAMD, status, name=name, backend=str(address), seconds=seconds, database=database)

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
        text = "" if found.database is None else f"{found.product}/{found.database}/{found.built}"
        self._databases[address] = text, time.monotonic()
        return text

    async def _database_before(self, address: Address) -> str:
        """A database that it had before now: a scan that begins now uses this one or a newer one."""
        known, asked = self._databases[address]
        if time.monotonic() - asked < VERSION_EVERY:
            return known
        self._databases[address] = known, time.monotonic()  # the others do not ask meanwhile
        await self.database(str(address), Deadline.after(VERSION_WAIT))
        return self._databases[address][0]

    async def version(self, address: Address, deadline: Deadline) -> clamd.Version:
        """Health, version and database age of one backend; needs no slot. Raises BackendError."""
        found = await query(address, clamd.command("VERSION"), clamd.version_reader(), self._context, deadline)
        if found.product.endswith("ERROR"):
            raise BackendError(Cause.DOWN, str(address), found.product)
        return found

    async def watch(self) -> None:
        """Until it is cancelled: keep what is known about the backends up to date."""
        await watch(self.limiter, self._ping)

    async def _ping(self, address: Address, deadline: Deadline) -> None:
        await query(address, clamd.command("PING"), clamd.pong_reader(), self._context, deadline)

    async def _fildes(self, address: Address, fd: int, progress: Progress) -> clamd.ScanAnswer | None:
        """None if clamd does not take descriptors, which is remembered until it goes down; or there is none to pass."""
        batches, reader = iter([(clamd.fildes(),)]), clamd.scan_reader()
        passed = _read_only(fd)
        if passed < 0:
            return None
        try:
            answer, _ = await request(address, batches, reader, self._context, progress, descriptor=passed)
        except BackendError as error:
            self._forget_refusal(address, error)
            raise
        finally:
            os.close(passed)
        if isinstance(answer, clamd.Failed) and answer.refused:
            self._no_fildes.add(address)
            return None
        return answer

    async def _instream(self, address: Address, message: Message, progress: Progress) -> clamd.ScanAnswer:
        progress.sent = False  # FILDES may have been refused
        if len(message.data) != message.size:
            raise BackendError(Cause.TIMEOUT, str(address), "no descriptor accepted before the message was closed")
        batches, reader = _stream(message), clamd.scan_reader()
        try:
            answer, complete = await request(address, batches, reader, self._context, progress)
        except BackendError as error:
            self._forget_refusal(address, error)
            raise
        finally:
            batches.close()
        if isinstance(answer, clamd.Clean) and not complete:
            raise BackendError(Cause.BAD_REPLY, str(address), "OK before it had the whole message")
        return answer

    def _forget_refusal(self, address: Address, error: BackendError) -> None:
        if error.cause is Cause.DOWN:
            self._no_fildes.discard(address)  # it may come back with another configuration


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

    async def check(self, address: Address, ask: Callable[[int, Progress], Awaitable[clamd.ScanAnswer | None]]) -> None:
        """Return if the OK of ``address`` counts. Raises BackendError if it does not."""
        if not self._interval or self._clock() < self._until:
            return
        async with self._lock:
            if self._clock() < self._until:
                return
            fd = os.memfd_create("test-virus")
            try:
                os.write(fd, TEST_VIRUS)
                answer = await ask(fd, Progress(address))
            finally:
                os.close(fd)
            if not isinstance(answer, clamd.Found):
                text = "it does not find the test virus: can it write to its TemporaryDirectory, has it its database?"
                raise BackendError(Cause.BAD_REPLY, str(address), text)
            self._until = self._clock() + self._interval
