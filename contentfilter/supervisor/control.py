"""Control socket: answers the command line's questions, one for each connection.

The kernel tells who asks (SO_PEERCRED); whoever may only look gets no answer to what changes something. Question, time
and number of connections for each uid are bounded. Nothing that a peer sends reaches anything but its own connection.
"""

import asyncio
import os
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from contentfilter.bus import messages
from contentfilter.bus.messages import QUESTIONS
from contentfilter.bus.sockets import addresses, path_of, socket_mode
from contentfilter.deadline import Deadline
from contentfilter.errors import RemoteProtocolError
from contentfilter.log import Logger

QUESTION_MAX = 65_536  # bytes
QUESTION_WAIT = 5.0  # seconds for the question
REPLY_WAIT = 10.0  # seconds for the asker to take the reply
CONNECTIONS_MAX = 16  # for each uid
MODE = 0o660
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid

ControlHandler = Callable[[messages.Question, int], Awaitable[messages.Reply]]
"""From a question and the uid of who asks to the reply."""

Malformed = Callable[[str, RemoteProtocolError], None]


class ControlServer:
    """Answers questions from :meth:`start` to :meth:`close`. ``handlers``: by the question's type."""

    def __init__(self, run: str, handlers: Mapping[type, ControlHandler], log: Logger, malformed: Malformed) -> None:
        self._path = path_of(addresses(run)["control"])
        self._handlers = handlers
        self._log = log
        self._malformed = malformed
        self._servers: list[asyncio.Server] = []  # the last one is on the path
        self._open: Counter[int] = Counter()  # connections by uid
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Raises OSError."""
        with socket_mode(MODE):
            self._servers.append(await asyncio.start_unix_server(self._accept, self._path))

    async def mend(self) -> tuple[str, ...]:
        """Listen again if the path was removed; returns it then. Raises OSError."""
        if self._bound():
            return ()
        while self._servers:
            self._servers.pop().close()
        await self.start()
        return (self._path,)

    def _bound(self) -> bool:
        return os.path.exists(self._path)

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer: socket.socket = writer.get_extra_info("socket")
        _, uid, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        self._open[uid] += 1
        try:
            if self._open[uid] > CONNECTIONS_MAX:
                return
            async with Deadline.after(QUESTION_WAIT).timeout():
                data = await _read(reader)
            if data:  # otherwise a look if somebody listens
                reply = messages.encode(await self._reply(data, uid))
                async with Deadline.after(REPLY_WAIT).timeout():
                    writer.write(reply)
                    writer.close()
                    await writer.wait_closed()
        except (OSError, TimeoutError):
            pass  # the asker is gone, or too slow
        finally:
            writer.transport.abort()
            self._open[uid] -= 1
            if not self._open[uid]:
                del self._open[uid]

    async def _reply(self, data: bytes, uid: int) -> messages.Reply:
        try:
            if len(data) > QUESTION_MAX:
                raise RemoteProtocolError(f"more than {QUESTION_MAX} bytes")
            question = messages.decode(data, QUESTIONS)
        except RemoteProtocolError as error:
            self._malformed("control", error)
            return messages.Refused(f"the daemon does not understand the question: {error}")
        name = type(question).__name__
        if isinstance(question, messages.CHANGES) and uid not in (0, os.geteuid()):
            self._log.warning("control.refused", uid=uid, question=name)
            return messages.Refused(f"only root and the daemon's user may do that, not uid {uid}")
        try:
            return await self._handlers[type(question)](question, uid)
        except Exception:
            self._log.exception("control.failed", question=name)
            return messages.Refused("a defect in the daemon; its log has it as control.failed")


async def _read(reader: asyncio.StreamReader) -> bytes:
    """Everything until the asker has no more to say, or more than a question may have."""
    data = b""
    while len(data) <= QUESTION_MAX and (part := await reader.read(QUESTION_MAX + 1 - len(data))):
        data += part
    return data
