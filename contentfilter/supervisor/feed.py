"""Event feed: listens for subscribers, and passes events to the process that publishes them (bus/publisher.py).

The process is started with the first subscriber, or immediately if collectors on other machines may connect. Neither
mail nor the supervisor depends on it: events that it does not take are lost, and when it dies it is started again. The
listening sockets stay here, so subscribers that connect meanwhile wait. A key that is taken from the list is refused
from the next reload on, because the process is replaced then.
"""

import asyncio
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from contentfilter.bus.messages import Event
from contentfilter.bus.publisher import pack_event, pack_keys
from contentfilter.bus.sockets import addresses, path_of, socket_mode
from contentfilter.config.keys import Keys, load_keys
from contentfilter.deadline import Deadline
from contentfilter.errors import ConfigError
from contentfilter.files import memory_file
from contentfilter.log import Logger
from contentfilter.settings import Settings
from contentfilter.supervisor.process import HelperProcess
from contentfilter.threads import in_thread

PROGRAM = (sys.executable, "-P", "-m", "contentfilter.bus.publisher")
MODE = 0o660
BACKLOG = 100
BUFFER_MAX = 8 << 20  # bytes of events that the process has not read yet
RETRY = 30.0  # seconds until an address that is in use is tried again
FOREVER = float("inf")


class _Source:
    """The supervisor's end of the stream of events to the process."""

    def __init__(self, made: socket.socket) -> None:
        made.setblocking(False)
        self._socket = made
        self._loop = asyncio.get_running_loop()
        self._unsent = bytearray()

    def write(self, packed: bytes) -> None:
        """Send or queue an event, or lose it if the process has not read BUFFER_MAX bytes."""
        if len(self._unsent) + len(packed) > BUFFER_MAX:
            return
        waiting = bool(self._unsent)
        self._unsent += packed
        if not waiting:
            self._loop.add_writer(self._socket, self._flush)
            self._flush()

    def _flush(self) -> None:
        try:
            del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:  # the process has ended; its end is reported elsewhere
            self._unsent.clear()
        if not self._unsent:
            self._loop.remove_writer(self._socket)

    def close(self) -> None:
        self._loop.remove_writer(self._socket)
        self._socket.close()


class EventFeed:
    """:meth:`start`, then :meth:`run` in the background, then :meth:`close`."""

    def __init__(self, log: Logger, settings: Callable[[], Settings]) -> None:
        self._log = log
        self._settings = settings
        self._path = path_of(addresses(settings().service.run)["events"])
        self._process = HelperProcess(self._command, self._started, self._died)
        self._source: _Source | None = None
        self._local: socket.socket | None = None
        self._changed = asyncio.Event()
        self._in_force: tuple[str, Keys] | None = None
        self._listener: socket.socket | None = None  # for collectors; a process that is replaced leaves it to the next
        self._listening = ""  # its address
        self._reported = ""

    @property
    def pid(self) -> int | None:
        """The process; None while it does not run."""
        return self._process.pid

    def collectors(self) -> frozenset[bytes] | None:
        """Public keys that may connect over TCP; None while that is off."""
        return None if self._in_force is None else self._in_force[1].clients

    def start(self) -> None:
        """Listen for local subscribers. Needs the lock on the run directory. Raises OSError."""
        with suppress(FileNotFoundError):
            os.unlink(self._path)
        self._local = socket.socket(socket.AF_UNIX)
        self._local.setblocking(False)
        with socket_mode(MODE):
            self._local.bind(self._path)
        self._local.listen(BACKLOG)
        self._replace()

    def mend(self) -> tuple[str, ...]:
        """Listen again if the path was removed; returns it then. Raises OSError."""
        if self._local is None or os.path.exists(self._path):
            return ()
        self._stop()
        self._local.close()
        self.start()
        return (self._path,)

    def publish(self, event: Event) -> None:
        """The topic is the event's name. Never waits."""
        if self._source is not None:
            self._source.write(pack_event(event))

    def changed(self) -> None:
        """The settings, or the files that they name, may have changed."""
        self._changed.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self._changed.clear()
            wait = await self._apply()
            try:
                async with Deadline.after(wait).timeout():
                    await self._changed.wait()
            except TimeoutError:
                pass

    def close(self) -> None:
        self._stop()
        for each in (self._local, self._listener):
            if each is not None:
                each.close()
        if self._local is not None:
            with suppress(OSError):
                os.unlink(self._path)
        self._local = self._listener = None

    async def _apply(self) -> float:
        """Open, close or keep the feed over TCP as the settings want it. Returns the seconds until the next attempt."""
        config = self._settings().events
        try:
            keys = await in_thread(partial(load_keys, config))
            wanted = None if keys is None else (config.listen, keys)
            if wanted != self._in_force:
                self._switch(wanted)
        except (ConfigError, OSError) as error:
            text = str(error) if isinstance(error, ConfigError) or not error.errno else os.strerror(error.errno)
            if text != self._reported:
                self._log.error("events.failed", listen=config.listen, why=text)
            self._reported = text
            return RETRY
        self._reported = ""
        return FOREVER

    def _switch(self, wanted: tuple[str, Keys] | None) -> None:
        """Raises OSError; then only local subscribers are served."""
        if self._in_force is not None:
            self._in_force = None
            self._replace()
        if self._listener is not None and (wanted is None or wanted[0] != self._listening):
            self._listener.close()
            self._listener = None
        if wanted is not None:
            if self._listener is None:
                self._listener, self._listening = _listen(wanted[0]), wanted[0]
            self._in_force = wanted
            self._replace()

    # The process

    def _replace(self) -> None:
        """Start the process, or another one in its place."""
        self._stop()
        if self._local is not None:
            self._process.start(self._local.fileno() if self._in_force is None else None)

    def _stop(self) -> None:
        self._process.stop()
        self._disconnect()

    def _disconnect(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()

    @contextmanager
    def _command(self) -> Iterator[tuple[Sequence[str], Sequence[int]]]:
        assert self._local is not None  # noqa: S101 - the process runs from start() to close()
        ours, theirs = socket.socketpair()
        fds = [theirs.fileno(), self._local.fileno()]
        words = [*map(str, fds), self._path]
        if self._in_force is not None and self._listener is not None:
            keys = memory_file("keys", pack_keys(self._in_force[1]))
            fds += [self._listener.fileno(), keys]
            words += [str(self._listener.fileno()), self._listening, str(keys)]
        self._source = _Source(ours)
        try:
            yield (*PROGRAM, *words), fds
        finally:
            theirs.close()
            for fd in fds[3:]:
                os.close(fd)

    def _started(self, pid: int) -> None:
        if self._in_force is not None:
            self._log.info("events.ready", address=self._listening, keys=len(self._in_force[1].clients))

    def _died(self, why: str) -> None:
        self._disconnect()
        self._log.error("events.failed", listen=self._listening or self._path, why=f"its process ended, {why}")


def _listen(address: str) -> socket.socket:
    """``tcp://address:port``, as [events] listen has it (config.keys). Raises OSError."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    where = "" if host == "*" else host.strip("[]"), int(port)
    listener = socket.create_server(where, family=family, backlog=BACKLOG, dualstack_ipv6=host == "[::]")
    listener.setblocking(False)
    return listener
