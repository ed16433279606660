"""Asks clamd about a message. Nothing but its explicit OK is clean.

On a Unix socket the message's descriptor itself is passed (FILDES: no copy); on TCP, and where
FILDES is refused, the mapped bytes are streamed (INSTREAM). Never SCAN: a clamd that is stopped
while it scans a path answers OK. Faults are :class:`BackendError`, and so is "not scanned to the
end" (cause LIMITS): such a message is unchecked, not clean.
"""

import asyncio
import fcntl
import os
import threading
import time
import traceback
from collections.abc import Awaitable, Callable

import clamd as clamd_package

from contentfilter import settings
from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, Cause, RemoteProtocolError
from contentfilter.model import Message, Scanner, ScanOutcome, ScanStatus
from contentfilter.policy.budget import attempt_timeout
from contentfilter.scanners.health import USUAL, Patience
from contentfilter.scanners.pool import BackendPool
from contentfilter.scanners.resolve import Resolver
from contentfilter.scanners.stream import Late, Leave, Pending, StreamContext, StreamLimits, request
from contentfilter.wire import clamd
from contentfilter.wire.buffer import printable

VERSION_EVERY = 60.0  # seconds for which the database that a backend had is not asked for again
VERSION_WAIT = 2.0  # seconds; clamd answers VERSION at once, also while all its threads scan

Left = Callable[[Late[clamd.ScanAnswer]], None]


class ClamdScanner:
    """clamd behind a pool of backends. ``config`` is the [clamd] section."""

    def __init__(
        self,
        config: settings.ClamdSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        patience: Patience = USUAL,
    ) -> None:
        addresses = tuple(Address.parse(text) for text in config.backends)
        self.pool = BackendPool("clamd", addresses, config.concurrency, clock, Cause.RELOADING, patience)
        self._around = StreamContext(Resolver())
        self._limits = StreamLimits(config.connect_timeout, config.timeout)
        self._config = config
        self._no_fildes: set[Address] = set()  # where FILDES was refused
        self._proofs = {address: SelfTest(config.proof, clock) for address in addresses}
        self._probes = {address: Probe(address) for address in addresses}
        self._databases = {address: ("", float("-inf")) for address in addresses}  # and when it was asked for

    async def scan(self, message: Message, deadline: Deadline, leave: Leave | None = None) -> ScanOutcome:
        """CLEAN or FOUND. Raises BackendError when there is no verdict.

        ``leave`` gets a scan that goes on when we stop waiting for it; where it is given, the outcome names the
        database, too.
        """
        if 0 < self._config.max_size < message.size:
            # clamd answers OK above its own limit, without a look.
            raise BackendError(Cause.TOO_BIG, "clamd", f"{message.size} bytes, max_size is {self._config.max_size}")
        started = time.monotonic()
        seconds = attempt_timeout(message.size, self._config)

        async def ask(address: Address) -> ScanOutcome:
            database = "" if leave is None else await self._database_before(address, deadline)

            async def judged(answer: clamd.ScanAnswer, by_descriptor: bool, end: Deadline) -> ScanOutcome:
                sound = await self._sound(address, answer, by_descriptor, end)
                return _outcome(sound, str(address), time.monotonic() - started, database)

            def left(by_descriptor: bool) -> Left | None:
                def let_go(late: Late[clamd.ScanAnswer]) -> None:
                    assert leave is not None  # noqa: S101 - see below
                    leave(Pending(late, lambda answer, end: judged(answer, by_descriptor, end)))

                return None if leave is None else let_go

            one = deadline.within(seconds)
            if address.path and address not in self._no_fildes and _passable(message.fd):
                answer = await self._fildes(address, message.fd, one, left(True))
                if answer is not None:
                    return await judged(answer, True, one)
            return await judged(await self._instream(address, message, one, left(False)), False, one)

        return await self.pool.run(ask, deadline)

    async def database(self, backend: str, deadline: Deadline) -> str:
        """What database it has at this moment; empty when it does not say so at once."""
        address = Address.parse(backend)
        if address not in self._databases:
            return ""
        try:
            found = await self._version(address, deadline.within(VERSION_WAIT))
        except BackendError:
            return ""
        text = "" if found.database is None else f"{found.product}/{found.database}/{found.built}"
        self._databases[address] = text, time.monotonic()
        return text

    async def _database_before(self, address: Address, deadline: Deadline) -> str:
        """One that it had before now: an answer of a scan that begins now is by this one or a newer one."""
        known, asked = self._databases[address]
        if time.monotonic() - asked < VERSION_EVERY:
            return known
        self._databases[address] = known, time.monotonic()  # the others do not ask meanwhile
        await self.database(str(address), deadline)
        return self._databases[address][0]

    async def version(self, deadline: Deadline) -> clamd.Version:
        """The version of whichever backend is next. Raises BackendError."""
        return await self.pool.run(lambda address: self._version(address, deadline), deadline)

    async def probe(self, address: Address, deadline: Deadline) -> clamd.Version:
        """Is this one backend well, and how old is its database? Raises BackendError.

        Stands apart from the pool: a probe neither waits for scans nor takes a scan's place.
        """
        if address.path:
            return await self._probes[address].ask(deadline)
        return await self._version(address, deadline)

    async def watch(self) -> None:
        """Until it is cancelled: ask backends that are in doubt with PING, so that no mail has to."""
        await self.pool.watch(self._ping)

    async def _ping(self, address: Address, deadline: Deadline) -> None:
        limits = StreamLimits(self._limits.connect, deadline.left())
        batches = iter([(clamd.command("PING"),)])
        await request(address, batches, clamd.pong_reader(), limits, deadline, around=self._around)

    async def _version(self, address: Address, deadline: Deadline) -> clamd.Version:
        commands = iter([(clamd.command("VERSION"),)])
        reader = clamd.version_reader()
        version, _ = await request(address, commands, reader, self._limits, deadline, around=self._around)
        return version

    async def _sound(
        self, address: Address, answer: clamd.ScanAnswer, by_descriptor: bool, deadline: Deadline
    ) -> clamd.Clean | clamd.Found:
        """An answer that can be believed. Raises BackendError."""
        if by_descriptor and isinstance(answer, clamd.Clean):
            await self._proofs[address].give(address, lambda fd: self._fildes(address, fd, deadline), deadline)
        if isinstance(answer, clamd.Failed):
            raise BackendError(answer.cause, str(address), answer.text)
        if isinstance(answer, clamd.Found) and clamd.signature_class(answer.name) is clamd.SignatureClass.LIMITS:
            raise BackendError(Cause.LIMITS, str(address), answer.name)
        return answer

    async def _fildes(
        self, address: Address, fd: int, deadline: Deadline, left: Left | None = None
    ) -> clamd.ScanAnswer | None:
        """None where clamd does not take descriptors; that is remembered until it goes down."""
        try:
            batches, reader = iter([(clamd.fildes(),)]), clamd.scan_reader()
            answer, _ = await request(address, batches, reader, self._limits, deadline, descriptor=fd, leave=left)
        except BackendError as error:
            if error.cause is Cause.DOWN:
                self._no_fildes.discard(address)
            raise
        if isinstance(answer, clamd.Failed) and answer.refused:
            self._no_fildes.add(address)
            return None
        return answer

    async def _instream(
        self, address: Address, message: Message, deadline: Deadline, left: Left | None = None
    ) -> clamd.ScanAnswer:
        with memoryview(message.data) as view:
            batches = clamd.instream(view)
            try:
                reader, around = clamd.scan_reader(), self._around
                answer, complete = await request(
                    address, batches, reader, self._limits, deadline, around=around, leave=left
                )
            except BackendError as error:
                if error.cause is Cause.DOWN:
                    self._no_fildes.discard(address)  # it may come back with another configuration
                raise
            finally:
                batches.close()
        if isinstance(answer, clamd.Clean) and not complete:
            raise BackendError(Cause.BAD_REPLY, str(address), "OK before it had the whole message")
        return answer


def _outcome(answer: clamd.Clean | clamd.Found, backend: str, seconds: float, database: str) -> ScanOutcome:
    found = isinstance(answer, clamd.Found)
    return ScanOutcome(
        Scanner.CLAMD,
        ScanStatus.FOUND if found else ScanStatus.CLEAN,
        name=answer.name if isinstance(answer, clamd.Found) else "",
        backend=backend,
        seconds=seconds,
        database=database,
    )


def _passable(fd: int) -> bool:
    """clamd answers OK to a descriptor that it cannot read, so only a readable one is passed."""
    if fd < 0:
        return False
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    return flags & os.O_ACCMODE != os.O_WRONLY and not flags & os.O_PATH


# EICAR, in parts: no virus scanner shall stop at this file.
TEST_VIRUS = b"".join((b"X5O!P%@AP[4\\PZX54(P^)7CC)7}$", b"EICAR", b"-STANDARD-ANTIVIRUS-TEST-FILE!", b"$H+H*"))


class SelfTest:
    """Whether one clamd that takes descriptors still looks at them.

    A clamd whose TemporaryDirectory is gone or not writable answers OK to every descriptor, whatever is in it
    (measured with 1.4). So its OK counts only for ``interval`` seconds after it has found the test virus.
    """

    def __init__(self, interval: float, clock: Callable[[], float]) -> None:
        self._interval = interval  # 0: no proof is wanted
        self._clock = clock
        self._until = 0.0
        self._turn = asyncio.Lock()  # one proof serves all who wait for it

    async def give(
        self, address: Address, ask: Callable[[int], Awaitable[clamd.ScanAnswer | None]], deadline: Deadline
    ) -> None:
        """Return while the OK of ``address`` counts. Raises BackendError when it does not."""
        if not self._interval or self._clock() < self._until:
            return
        try:
            async with deadline.timeout():
                await self._turn.acquire()
        except TimeoutError:
            raise BackendError(Cause.TIMEOUT, str(address), "no proof in time that it scans") from None
        try:
            if self._clock() < self._until:
                return
            fd = os.memfd_create("test-virus")
            try:
                os.write(fd, TEST_VIRUS)
                answer = await ask(fd)
            finally:
                os.close(fd)
            if not isinstance(answer, clamd.Found):
                text = "it does not find the test virus: can it write to its TemporaryDirectory, has it its database?"
                raise BackendError(Cause.BAD_REPLY, str(address), text)
            self._until = self._clock() + self._interval
        finally:
            self._turn.release()


class Probe:
    """Health, version and database age of one clamd on a Unix socket, by the ``clamd`` package.

    The package connects before it sets its time-out, so a full listen queue can hold it for ever. It
    therefore runs in a thread of its own that nobody joins; while one hangs, no second is started.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._under_way = False

    async def ask(self, deadline: Deadline) -> clamd.Version:
        """Raises BackendError."""
        backend = str(self._address)
        if self._under_way:
            raise BackendError(Cause.TIMEOUT, backend, "the previous probe still hangs")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[tuple[str, str]] = loop.create_future()
        patience = max(deadline.left(), 0.001)

        def settle(result: tuple[str, str]) -> None:
            if not answer.done():
                answer.set_result(result)

        def work() -> None:
            try:
                result = (clamd_package.ClamdUnixSocket(self._address.path, timeout=patience).version(), "")
            except Exception as error:
                result = ("", str(error) or type(error).__name__)
                traceback.clear_frames(error.__traceback__)  # a cycle in there would keep the socket open
            self._under_way = False
            try:
                loop.call_soon_threadsafe(settle, result)
            except RuntimeError:
                pass  # the loop is closed: nobody asks any more

        self._under_way = True
        try:
            threading.Thread(target=work, name=f"probe {backend}", daemon=True).start()
        except RuntimeError as error:
            self._under_way = False
            raise BackendError(Cause.BUSY, backend, "no thread for the probe") from error
        try:
            async with deadline.timeout():
                version, problem = await answer
            if problem:
                raise BackendError(Cause.DOWN, backend, printable(problem.encode("ascii", "replace")))
            return clamd.parse_version(version.encode("ascii", "replace"))
        except TimeoutError:
            raise BackendError(Cause.TIMEOUT, backend, "no answer to the probe in time") from None
        except RemoteProtocolError as error:
            raise BackendError(Cause.BAD_REPLY, backend, str(error)) from error
