"""Keeps the process of the remote event feed running (bus/remote_feed.py) under the settings in force.

Neither mail nor the supervisor depends on it: when it dies it is started again, with a growing delay. A key that is
taken from the list is refused from the next reload on, because the process is replaced then.
"""

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from functools import partial

from contentfilter.bus.remote_feed import pack_keys
from contentfilter.config.keys import Keys, load_keys
from contentfilter.deadline import Deadline
from contentfilter.errors import ConfigError
from contentfilter.files import memory_file
from contentfilter.log import Logger
from contentfilter.settings import Settings
from contentfilter.supervisor.process import Process, restart_delay
from contentfilter.threads import in_thread

PROGRAM = (sys.executable, "-P", "-m", "contentfilter.bus.remote_feed")
RETRY = 30.0  # seconds until an address that is in use is tried again
SETTLED = 10.0  # seconds after which a death no longer counts as a failed start
FOREVER = float("inf")


class RemoteFeed:
    """:meth:`run` once, in the background."""

    def __init__(self, log: Logger, settings: Callable[[], Settings], lifeline: int) -> None:
        """``lifeline``: a pipe's end that is at its end when the supervisor is gone."""
        self._log = log
        self._settings = settings
        self._lifeline = lifeline
        self._changed = asyncio.Event()
        self._in_force: tuple[str, Keys] | None = None
        self._listener: socket.socket | None = None  # a process that is replaced leaves it to the next one
        self._listening = ""  # its address
        self._process: Process | None = None
        self._failures = 0  # deaths in a row soon after the start
        self._reported = ""

    def changed(self) -> None:
        """The settings, or the files that they name, may have changed."""
        self._changed.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                self._changed.clear()
                wait = await self._apply()
                try:
                    async with Deadline.after(wait).timeout():
                        await self._changed.wait()
                except TimeoutError:
                    pass
        finally:
            self._close()

    async def _apply(self) -> float:
        """Open, close or keep the feed as the settings want it. Returns the seconds until the next attempt."""
        config = self._settings().events
        try:
            keys = await in_thread(partial(load_keys, config))
            wanted = None if keys is None else (config.listen, keys)
            if wanted != self._in_force:
                self._stop()
                if self._listener is not None and config.listen != self._listening:
                    self._listener.close()
                    self._listener = None
                if wanted is not None and self._listener is None:
                    self._listener, self._listening = _listen(config.listen), config.listen
                self._in_force, self._failures = wanted, 0
            if self._in_force is not None and self._process is None:
                self._start(*self._in_force)
        except (ConfigError, OSError) as error:
            text = str(error) if isinstance(error, ConfigError) or not error.errno else os.strerror(error.errno)
            if text != self._reported:
                self._log.error("events.failed", listen=config.listen, why=text)
            self._reported = text
            return RETRY
        self._reported = ""
        return FOREVER

    def _start(self, listen: str, keys: Keys) -> None:
        """Raises OSError."""
        assert self._listener is not None  # noqa: S101 - opened before
        packed = memory_file("keys", pack_keys(keys))
        fds = self._listener.fileno(), packed, self._lifeline
        argv = (*PROGRAM, self._settings().service.run, listen, *map(str, fds))
        try:
            process = Process(argv, fds, lambda: self._ended(process))
        finally:
            os.close(packed)
        self._process = process
        self._log.info("events.ready", address=listen, keys=len(keys.clients))

    def _ended(self, process: Process) -> None:
        if process is not self._process or self._in_force is None:
            return  # it was replaced
        self._process = None
        self._failures = 1 if process.age() > SETTLED else self._failures + 1
        self._log.error("events.failed", listen=self._in_force[0], why=f"its process ended, status {process.status}")
        asyncio.get_running_loop().call_later(restart_delay(self._failures), self._changed.set)

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()  # it has nothing to finish
        self._process = self._in_force = None

    def _close(self) -> None:
        self._stop()
        if self._listener is not None:
            self._listener.close()
            self._listener = None


def _listen(address: str) -> socket.socket:
    """``tcp://address:port``, as [events] listen has it (config.keys). Raises OSError."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    where = "" if host == "*" else host.strip("[]"), int(port)
    listener = socket.create_server(where, family=family, backlog=100, dualstack_ipv6=host == "[::]")
    listener.setblocking(False)
    return listener
