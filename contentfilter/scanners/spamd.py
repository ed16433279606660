"""Asks spamd about a message: the verdict, and where wanted the rewritten headers or message.

A rewritten body counts only when all of it arrived. spamd scores an empty message like spam, so
it is never asked about one. Faults are :class:`BackendError`.
"""

import asyncio
import time
import zlib
from collections.abc import Callable

from contentfilter import settings
from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, Cause
from contentfilter.model import Message, Scanner, ScanOutcome, ScanStatus, Want
from contentfilter.policy.budget import attempt_timeout
from contentfilter.scanners import tls
from contentfilter.scanners.health import USUAL, Patience
from contentfilter.scanners.pool import BackendPool
from contentfilter.scanners.resolve import Resolver
from contentfilter.scanners.stream import Late, Leave, Pending, StreamContext, StreamLimits, request
from contentfilter.wire import spamd

GROWTH = 1_048_576  # bytes that spamd's report may add to a message
COMPRESS_STEP = 262_144  # bytes deflated before the event loop gets its turn


class SpamdScanner:
    """spamd behind a pool of backends. ``config`` is the [spamd] section, ``children`` H-Sphere's spamdchildren.

    spamd has no queue but its listen backlog, so each backend gets at most ``children`` questions at once.
    Raises ConfigError for certificates that cannot be used.
    """

    def __init__(
        self,
        config: settings.SpamdSettings,
        children: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        patience: Patience = USUAL,
    ) -> None:
        addresses = tuple(Address.parse(text) for text in config.backends)
        self.pool = BackendPool("spamd", addresses, max(1, children), clock, Cause.TIMEOUT, patience)
        self._limits = StreamLimits(config.connect_timeout, config.timeout)
        self._around = StreamContext(Resolver(), tls.tls_for(config))
        self._config = config

    async def scan(
        self,
        message: Message,
        deadline: Deadline,
        leave: Leave | None = None,
        *,
        user: bytes = b"",
        want: Want = Want.CHECK,
    ) -> ScanOutcome:
        """CLEAN or FOUND with score and threshold; SKIPPED for an empty message.

        ``rewritten`` holds the header block (HEADERS) or the whole message (PROCESS). A ``user``
        that cannot stand in a header is left out: spamd then uses its defaults. ``leave`` gets a scan that
        goes on when we stop waiting for it. Raises BackendError.
        """
        if not message.size:
            return ScanOutcome(Scanner.SPAMD, ScanStatus.SKIPPED, detail="empty message")
        started = time.monotonic()
        user = user if spamd.usable_user(user) else b""
        body = await self._body(message, deadline)
        try:
            head = spamd.request(want.value, len(body), user=user, compress=self._config.compress)
            max_body = 2 * message.size + GROWTH  # line ends may double
            seconds = attempt_timeout(message.size, self._config)

            async def ask(address: Address) -> ScanOutcome:
                reader = spamd.ResponseReader(want.value, max_body)

                async def judged(response: spamd.Response, deadline: Deadline) -> ScanOutcome:
                    return _outcome(response, want, str(address), time.monotonic() - started)

                def left(late: Late[spamd.Response]) -> None:
                    assert leave is not None  # noqa: S101 - see below
                    leave(Pending(late, judged))

                end, let_go = deadline.within(seconds), None if leave is None else left
                return await judged(await self._ask(address, head, body, reader, end, let_go), end)

            return await self.pool.run(ask, deadline)
        finally:
            body.release()

    async def watch(self) -> None:
        """Until it is cancelled: ask backends that are in doubt with PING, so that no mail has to."""
        await self.pool.watch(self.probe)

    async def probe(self, address: Address, deadline: Deadline) -> None:
        """PING, apart from the pool: takes no scan's place. Raises BackendError.

        spamd's children answer it: one that has none free does not answer in time.
        """
        limits = StreamLimits(self._limits.connect, deadline.left())
        batches, reader = iter([(spamd.request("PING", 0),)]), spamd.ResponseReader("PING", 0)
        response, _ = await request(
            address, batches, reader, limits, deadline, half_close=not address.tls, around=self._around
        )
        if response.code:
            raise BackendError(
                spamd.cause(response.code, response.text), str(address), f"{response.code} {response.text}"
            )

    async def _ask(
        self,
        address: Address,
        head: bytes,
        body: memoryview,
        reader: spamd.ResponseReader,
        deadline: Deadline,
        left: Callable[[Late[spamd.Response]], None] | None,
    ) -> spamd.Response:
        # Over TLS our farewell is data: unread by spamd it makes the kernel reset the connection, and the answer
        # may be lost. spamd reads that far only what is compressed, and after a last line without its end.
        read_to_end = self._config.compress or bytes(body[-1:]) != b"\n"
        batches, half_close = iter([(head, body)]), read_to_end or not address.tls
        response, complete = await request(
            address, batches, reader, self._limits, deadline, half_close=half_close, around=self._around, leave=left
        )
        if not complete and not response.code:
            raise BackendError(Cause.BAD_REPLY, str(address), "a verdict before it had the whole message")
        return response

    async def _body(self, message: Message, deadline: Deadline) -> memoryview:
        """What follows the head. Compressing is our own work, in steps that leave others their turn."""
        view = memoryview(message.data)
        if not self._config.compress:
            return view
        with view:
            deflate = zlib.compressobj(1)
            parts = []
            for start in range(0, len(view), COMPRESS_STEP):
                if deadline.expired():
                    raise BackendError(Cause.TIMEOUT, "spamd", "no time left while compressing")
                with view[start : start + COMPRESS_STEP] as step:
                    parts.append(deflate.compress(step))
                await asyncio.sleep(0)
        return memoryview(b"".join((*parts, deflate.flush())))


def _outcome(response: spamd.Response, want: Want, backend: str, seconds: float) -> ScanOutcome:
    """Raises BackendError for an answer without a verdict."""
    if response.code:
        raise BackendError(spamd.cause(response.code, response.text), backend, f"{response.code} {response.text}")
    return ScanOutcome(
        Scanner.SPAMD,
        ScanStatus.FOUND if response.spam else ScanStatus.CLEAN,
        backend=backend,
        seconds=seconds,
        score=response.score,
        threshold=response.threshold,
        rewritten=b"" if want is Want.CHECK else response.body,
    )
