"""The supervisor: opens the sockets, keeps the workers going, and runs everything beside them (supervisor/parts.py).

One process with one event loop; no message ever passes through it. SIGTERM drains, a second signal ends
immediately, SIGHUP reads the configuration again (supervisor/configuration.py).
"""

import asyncio
import os
import signal
import socket
from collections.abc import MutableMapping, Sequence

from contentfilter import __version__
from contentfilter.bus import messages
from contentfilter.config.runtime import worker_count
from contentfilter.deadline import Deadline
from contentfilter.doors.listening_socket import OwnSocket, SocketError, hold_lock, inherited_socket, open_socket
from contentfilter.errors import RemoteProtocolError
from contentfilter.log import Logger, RateLimiter, adopt_standard_logging, make_logger
from contentfilter.log_target import open_target
from contentfilter.settings import Settings
from contentfilter.supervisor.maintenance import MaintenanceJob, run_maintenance
from contentfilter.supervisor.parts import Parts, compose
from contentfilter.supervisor.receiver import Inherited
from contentfilter.supervisor.source import ConfigSource
from contentfilter.supervisor.status import Lifecycle
from contentfilter.supervisor.systemd import Notifier, listen_fds, watchdog_interval

SOCKET_NAME = "queue"  # FileDescriptorName= in the socket unit; a single unnamed socket will do too
DRAIN_GRACE = 5.0  # seconds on top of service.drain before workers are killed
LAST_REPORTS = 0.1  # seconds of silence after which workers that have ended have reported everything
REPORTS_IN_A_ROW = 20  # before others get their turn on the event loop
RECORD_WAIT = 5.0  # seconds for the journal to be written at the end
FOREVER = Deadline(float("inf"))


class Supervisor:
    """The daemon's first process. :meth:`run` returns the exit status."""

    def __init__(
        self,
        source: ConfigSource,
        worker: Sequence[str],
        environ: MutableMapping[str, str],
        maintenance: Sequence[MaintenanceJob] = (),
    ) -> None:
        """``worker``: the first words of a worker's command line."""
        self._source = source
        self._worker = worker
        self._environ = environ
        self._maintenance = tuple(maintenance)

    async def run(self) -> int:
        """Raises ConfigError or SocketError when the daemon cannot start."""
        pid = os.getpid()
        passed = listen_fds(self._environ, pid)
        watchdog = watchdog_interval(self._environ, pid)
        notify = Notifier.from_environment(self._environ)
        first = await self._source.load()
        settings = first.settings
        target = open_target(settings.log.to, settings.log.socket, first.sysfacility, self._environ)
        log = make_logger(settings.log.format, settings.log.level, target, pid=pid)
        adopt_standard_logging(log)
        lock = hold_lock(f"{settings.service.run}/contentfilter.lock")
        lifeline, held = os.pipe2(os.O_CLOEXEC)
        own: OwnSocket | None = None
        try:
            own, listener = _listen(passed, settings)
            log.info("service.start", version=__version__, socket=settings.listen.socket, activated=own is None)
            lifecycle, inherited = Lifecycle(), Inherited(self._worker, listener, lifeline)
            parts = compose(self._source, first, log, notify, lifecycle, inherited)
            await Daemon(log, notify, lifecycle, parts, own, watchdog).run(self._maintenance)
        finally:
            if own is not None:
                own.close()
            os.close(lifeline)
            os.close(held)
            os.close(lock)
            notify.close()
        log.info("service.stop")
        return 0


class Daemon:
    """Runs the parts, from the first worker to the last report."""

    def __init__(
        self,
        log: Logger,
        notify: Notifier,
        lifecycle: Lifecycle,
        parts: Parts,
        own: OwnSocket | None,
        watchdog: float,
    ) -> None:
        """``own``: the listening socket, unless the service manager has passed it. ``watchdog``: see systemd.py."""
        self._log = log
        self._notify = notify
        self._lifecycle = lifecycle
        self._parts = parts
        self._own = own
        self._watchdog = watchdog
        self._reload_wanted = asyncio.Event()
        self._mend_errors = RateLimiter(10.0)

    async def run(self, maintenance: tuple[MaintenanceJob, ...]) -> None:
        parts, settings = self._parts, self._parts.configuration.settings
        jobs = (*maintenance, MaintenanceJob("journal", lambda _, aged: {"messages": parts.recorder.expire(aged)}))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._lifecycle.signalled)
        loop.add_signal_handler(signal.SIGINT, self._lifecycle.signalled)
        loop.add_signal_handler(signal.SIGHUP, self._reload_wanted.set)
        try:
            await parts.control.start()
            parts.feed.start()
            parts.receiver.start()
            parts.pool.resize(worker_count(settings()))
            async with asyncio.TaskGroup() as group:
                background = [
                    group.create_task(work)
                    for work in (
                        self._read_reports(),
                        self._check(),
                        self._report_ready(),
                        self._reload_on_demand(),
                        self._keep_watchdog(),
                        parts.configuration.watch_tables(),
                        parts.monitor.run(),
                        parts.feed.run(),
                        parts.overrides.run(),
                        parts.canary.run(),
                        run_maintenance(jobs, settings, self._log),
                    )
                ]
                await self._lifecycle.stop.wait()
                await self._drain()
                for task in background:
                    task.cancel()
            while await parts.bus.waiting(LAST_REPORTS):
                await self._read_report()
                await asyncio.sleep(0)
        finally:
            parts.pool.kill()
            parts.receiver.close()
            parts.feed.close()
            await parts.control.close()
            parts.recorder.close(RECORD_WAIT)
            parts.bus.close()
            parts.crashes.close()

    async def _drain(self) -> None:
        self._lifecycle.state = "draining"
        self._notify.stopping()
        self._log.info("service.drain")
        if self._own is not None:
            self._own.close()  # hooks find no socket and retry until the next daemon is there
        limit = Deadline.after(self._parts.configuration.settings().service.drain + DRAIN_GRACE)
        hurry = asyncio.create_task(self._kill_when_hurried())
        await self._parts.pool.drain(limit)
        hurry.cancel()

    async def _kill_when_hurried(self) -> None:
        await self._lifecycle.hurry.wait()
        self._parts.pool.kill()

    # Background

    async def _reload_on_demand(self) -> None:
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            await self._parts.operations.reload()

    async def _read_reports(self) -> None:
        while True:
            for _ in range(REPORTS_IN_A_ROW):
                await self._read_report()
            await asyncio.sleep(0)  # reports that are there already are read without a wait

    async def _read_report(self) -> None:
        parts = self._parts
        try:
            report = await parts.bus.report()
        except RemoteProtocolError as error:
            parts.malformed.note("workers", error)
            return
        if isinstance(report, messages.CacheUpdate):
            parts.workers.share(report)
            return
        parts.monitor.heard(report)
        if isinstance(report, messages.EventBatch):
            for event in parts.canary.others(report.events):
                parts.recorder.put(event)
                parts.feed.publish(event)
        else:
            parts.pool.heard(report)

    async def _check(self) -> None:
        overrides = ""
        while True:
            service = self._parts.configuration.settings().service
            self._parts.pool.check(service.stuck_after)
            await self._mend_sockets()
            if self._lifecycle.state == "ready" and overrides != (overrides := self._parts.overrides.summary()):
                self._notify.status(self._parts.reporter.summary())
            await asyncio.sleep(min(service.heartbeat, service.stuck_after / 4))

    async def _mend_sockets(self) -> None:
        """The run directory may have been emptied; a worker that starts then would find no supervisor."""
        try:
            paths = (*self._parts.bus.mend(), *self._parts.feed.mend(), *await self._parts.control.mend())
        except OSError as error:  # ZeroMQ's errors are of this kind
            if (held := self._mend_errors.allow()) is not None:
                self._log.error("bus.not-mended", why=error.strerror or str(error), not_logged=held)
        else:
            if paths:
                self._log.error("bus.mended", paths=paths)

    async def _report_ready(self) -> None:
        workers, pool = self._parts.workers, self._parts.pool
        await workers.wait_until(pool.full, FOREVER)
        self._lifecycle.state = "ready"
        self._log.info("service.ready", workers=len(workers.processes))
        self._notify.ready(self._parts.reporter.summary())

    async def _keep_watchdog(self) -> None:
        """A sign of life to systemd, but only while mail can be accepted."""
        while self._watchdog:
            stuck_after = self._parts.configuration.settings().service.stuck_after
            if self._lifecycle.state != "ready" or self._parts.pool.alive(stuck_after):
                self._notify.alive()
            await asyncio.sleep(self._watchdog)


def _listen(passed: list[tuple[str, int]], settings: Settings) -> tuple[OwnSocket | None, socket.socket]:
    """The socket that systemd passed, else one of our own."""
    if passed:
        by_name = [fd for name, fd in passed if name == SOCKET_NAME]
        if not by_name and len(passed) > 1:
            raise SocketError(f"none of the {len(passed)} sockets passed is named {SOCKET_NAME!r}")
        return None, inherited_socket((by_name or [passed[0][1]])[0])
    listen = settings.listen
    own = open_socket(listen.socket, int(listen.mode, 8), listen.backlog)
    return own, own.socket
