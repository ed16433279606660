"""spamd client: the verdict about a message, and on request the rewritten headers or message.

A rewritten body counts only if all of it arrived. spamd scores an empty message like spam, so
it is never asked about one. Faults are :class:`BackendError`.
"""

import asyncio
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator
from functools import partial

from contentfilter import settings
from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, Cause
from contentfilter.model import Message, Scanner, ScanOutcome, ScanStatus, Want
from contentfilter.policy.admission import Priority
from contentfilter.policy.budget import attempt_timeout
from contentfilter.scanners import tls
from contentfilter.scanners.health import PATIENCE, ProbeResult
from contentfilter.scanners.limiter import NEUTRAL, ScannerLimiter
from contentfilter.scanners.resolve import Resolver
from contentfilter.scanners.stream import Batch, Owner, Progress, StreamContext, query, request
from contentfilter.wire import spamd

GROWTH = 1_048_576  # bytes that spamd's report may add to a message
COMPRESS_STEP = 262_144  # bytes deflated before the event loop gets its turn


class SpamdScanner:
    """spamd behind a limiter of its backends.

    ``config`` is the [spamd] section, ``children`` H-Sphere's spamdchildren, ``shed``: see ScannerLimiter. spamd has
    no queue but its listen backlog, so each backend gets at most ``children`` requests at once.
    Raises ConfigError for certificates that cannot be used.
    """

    def __init__(
        self,
        config: settings.SpamdSettings,
        children: int,
        *,
        shed: Counter[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        patience: float = PATIENCE,
    ) -> None:
        addresses = tuple(Address.parse(text) for text in config.backends)
        self.limiter = ScannerLimiter(
            Scanner.SPAMD,
            addresses,
            max(1, children),
            max_wait=config.max_wait,
            shed=shed,
            clock=clock,
            patience=patience,
        )
        self._context = StreamContext(config.connect_timeout, Resolver(), tls.tls_for(config))
        self._config = config

    async def scan(
        self,
        message: Message,
        deadline: Deadline,
        priority: Priority = NEUTRAL,
        owner: Owner | None = None,
        *,
        user: bytes = b"",
        want: Want = Want.CHECK,
    ) -> ScanOutcome:
        """CLEAN or FOUND with score and threshold; SKIPPED for an empty message.

        ``rewritten`` holds the header block (HEADERS) or the whole message (PROCESS). A ``user``
        that is not valid in a header is omitted: spamd then uses its defaults. Raises BackendError.
        """
        if not message.size:
            return ScanOutcome(Scanner.SPAMD, ScanStatus.SKIPPED, detail="empty message")
        ask = partial(self._ask, message, user if spamd.usable_user(user) else b"", want)
        return await self.limiter.run(priority, ask, attempt_timeout(message.size, self._config), deadline, owner)

    async def _ask(
        self, message: Message, user: bytes, want: Want, address: Address, progress: Progress
    ) -> ScanOutcome:
        """One attempt at one backend."""
        body: memoryview = memoryview(message.data)
        # Over TLS the end of our direction is data: unread by spamd it makes the kernel reset the connection, and the
        # answer may be lost. spamd reads that far only what is compressed, and after a last line without its end.
        half_close = self._config.compress or bytes(body[-1:]) != b"\n" or not address.tls
        if self._config.compress:
            body = await _compressed(body)
        head = spamd.request(want.value, len(body), user=user, compress=self._config.compress)
        batches = _once(head, body)
        del body  # the batches hold it until it is sent
        reader = spamd.ResponseReader(want.value, 2 * message.size + GROWTH)  # line ends may double
        conclude = partial(_outcome, want, progress)
        try:
            response, complete = await request(
                address, batches, reader, self._context, progress, half_close=half_close, conclude=conclude
            )
        finally:
            batches.close()
        return await conclude(response, complete)

    def learn(self, result: ProbeResult) -> None:
        """Take a result of the prober."""
        self.limiter.learn(result)

    async def probe(self, address: Address, deadline: Deadline, progress: Progress | None = None) -> None:
        """PING; needs no slot. Raises BackendError.

        spamd's children answer it: one that has none free does not answer in time.
        """
        command, reader = spamd.request("PING", 0), spamd.ResponseReader("PING", 0)
        half_close = not address.tls
        response = await query(address, command, reader, self._context, deadline, progress, half_close=half_close)
        if response.code:
            raise BackendError(
                spamd.cause(response.code, response.text), str(address), f"{response.code} {response.text}"
            )


def _once(head: bytes, body: memoryview) -> Generator[Batch, None, None]:
    with body:
        yield head, body


async def _compressed(view: memoryview) -> memoryview:
    """The deflated message. That is our own work, in steps that give other tasks their turn."""
    with view:
        deflate = zlib.compressobj(1)
        parts = []
        for start in range(0, len(view), COMPRESS_STEP):
            with view[start : start + COMPRESS_STEP] as step:
                parts.append(deflate.compress(step))
            await asyncio.sleep(0)
    return memoryview(b"".join((*parts, deflate.flush())))


async def _outcome(want: Want, progress: Progress, response: spamd.Response, complete: bool) -> ScanOutcome:
    """The outcome of a response. Raises BackendError if it is no verdict."""
    backend = str(progress.address)
    if response.code:
        raise BackendError(spamd.cause(response.code, response.text), backend, f"{response.code} {response.text}")
    if not complete:
        raise BackendError(Cause.BAD_REPLY, backend, "a verdict before it had the whole message")
    return ScanOutcome(
        Scanner.SPAMD,
        ScanStatus.FOUND if response.spam else ScanStatus.CLEAN,
        backend=backend,
        seconds=time.monotonic() - progress.began,
        score=response.score,
        threshold=response.threshold,
        rewritten=b"" if want is Want.CHECK else response.body,
    )
