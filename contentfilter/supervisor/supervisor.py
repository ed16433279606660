"""The supervisor: opens the sockets, keeps the workers going, and puts together what runs beside them.

One process with one event loop; no message ever passes through it. SIGTERM drains, a second signal ends
at once, SIGHUP reads the configuration again (supervisor/configuration.py).
"""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Literal

import zmq

from contentfilter import __version__
from contentfilter.bus import messages, sockets
from contentfilter.config.runtime import worker_count
from contentfilter.deadline import Deadline
from contentfilter.doors.listening_socket import OwnSocket, SocketError, hold_lock, inherited_socket, open_socket
from contentfilter.errors import RemoteProtocolError
from contentfilter.files import memory_file
from contentfilter.log import Logger, RateLimiter, adopt_standard_logging, make_logger
from contentfilter.log_target import open_target
from contentfilter.monitor.canary import Canary
from contentfilter.monitor.monitor import Monitor
from contentfilter.monitor.samples import Sample
from contentfilter.settings import Settings
from contentfilter.supervisor.configuration import Configuration
from contentfilter.supervisor.control import ControlHandler, answer_questions
from contentfilter.supervisor.maintenance import MaintenanceJob, run_maintenance
from contentfilter.supervisor.overrides import OverrideManager
from contentfilter.supervisor.pool import WorkerPool
from contentfilter.supervisor.process import Process
from contentfilter.supervisor.recorder import Recorder
from contentfilter.supervisor.source import ConfigSource, Loaded
from contentfilter.supervisor.systemd import Notifier, listen_fds, watchdog_interval
from contentfilter.worker.crashes import CrashTable
from contentfilter.worker.main import command_line

SOCKET_NAME = "queue"  # FileDescriptorName= in the socket unit; a single unnamed socket will do too
DRAIN_GRACE = 5.0  # seconds on top of service.drain before workers are killed
LAST_WORDS = 0.1  # seconds of silence after which workers that have ended have said everything
RECORD_WAIT = 5.0  # seconds for the journal to be written at the end
LOOK_WAIT = 1.0  # seconds that who asks for the status waits for the scanners' answers


class Supervisor:
    """The daemon's first process. :meth:`run` returns the exit status."""

    def __init__(
        self,
        source: ConfigSource,
        worker: Sequence[str],
        environ: MutableMapping[str, str],
        chores: Sequence[MaintenanceJob] = (),
    ) -> None:
        self._source = source
        self._chores = tuple(chores)
        self._worker = worker  # the beginning of a worker's command line
        self._environ = environ
        self._state = "starting"
        self._began = time.monotonic()
        self._stop = asyncio.Event()
        self._at_once = asyncio.Event()
        self._moved = asyncio.Event()  # a worker got ready, took a generation, or ended
        self._reload_wanted = asyncio.Event()
        self._bad_frames = RateLimiter(10.0)

    async def run(self) -> int:
        """Raises ConfigError or SocketError when the daemon cannot start."""
        pid = os.getpid()
        passed = listen_fds(self._environ, pid)
        self._watchdog = watchdog_interval(self._environ, pid)
        self._notify = Notifier.from_environment(self._environ)
        first = await self._source.load()
        settings = first.settings
        target = open_target(settings.log.to, settings.log.socket, first.sysfacility, self._environ)
        self._log: Logger = make_logger(settings.log.format, settings.log.level, target, pid=pid)
        adopt_standard_logging(self._log)
        lock = hold_lock(f"{settings.service.run}/contentfilter.lock")
        own: OwnSocket | None = None
        try:
            own, self._listener = _listen(passed, settings)
            return await self._serve(own, first)
        finally:
            if own is not None:
                own.close()
            os.close(lock)
            self._notify.close()

    async def _serve(self, own: OwnSocket | None, first: Loaded) -> int:
        settings = first.settings
        self._lifeline, self._lifeline_held = os.pipe2(os.O_CLOEXEC)
        self._bus = sockets.SupervisorBus(settings.service.run)
        self._suspects = CrashTable(self._log)
        self._pool = WorkerPool(self._spawn, self._log, self._moved.set)
        self._recorder = recorder = Recorder(self._log, settings)
        workers = (lambda: self._pool.processes), self._moved
        self._configuration = Configuration(
            self._source,
            first,
            self._log,
            self._bus.command,
            *workers,
            self._adopt,
            lambda how: self._monitor.loaded(how),
        )
        self._monitor = Monitor(self._log, lambda: self._settings, self.status, self._listener)
        self._glass = OverrideManager(self._log, lambda: self._settings, self._bus.command, self._ordered, *workers)
        self._canary = Canary(self._log, self._in_force, lambda: self.status().state)
        chores = (*self._chores, MaintenanceJob("journal", lambda _, aged: {"messages": recorder.expire(aged)}))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._signalled)
        loop.add_signal_handler(signal.SIGINT, self._signalled)
        loop.add_signal_handler(signal.SIGHUP, self._reload_wanted.set)
        self._log.info("service.start", version=__version__, socket=settings.listen.socket, activated=own is None)
        try:
            self._pool.resize(worker_count(settings))
            async with asyncio.TaskGroup() as group:
                background = [
                    group.create_task(work)
                    for work in (
                        self._hear(),
                        answer_questions(self._bus, self._answers(), self._log, self._malformed),
                        self._check(),
                        self._say_ready(),
                        self._reload_on_demand(),
                        self._configuration.watch_tables(),
                        self._keep_watchdog(),
                        self._monitor.run(),
                        self._glass.run(),
                        self._canary.run(),
                        run_maintenance(chores, lambda: self._settings, self._log),
                    )
                ]
                await self._stop.wait()
                await self._drain(own)
                for task in background:
                    task.cancel()
            while await self._bus.waiting(LAST_WORDS):
                await self._hear_one()
        finally:
            self._pool.kill()
            recorder.close(RECORD_WAIT)
            self._bus.close()
            self._suspects.close()
            os.close(self._lifeline)
            os.close(self._lifeline_held)
        self._log.info("service.stop")
        return 0

    def _spawn(self, slot: int, ended: Callable[[Process], None]) -> Process:
        loaded, generation = self._configuration.loaded, self._configuration.generation
        runtime, orders = memory_file("configuration", loaded.blob), self._glass.inherited()
        try:
            fds = {"listen": self._listener.fileno(), "lifeline": self._lifeline, "runtime": runtime, "orders": orders}
            fds["suspects"] = self._suspects.fd
            place = self._suspects.enlist()
            words = command_line(self._worker, loaded.settings, loaded.sysfacility, slot, generation, place, fds)

            def buried(process: Process) -> None:
                self._suspects.record_death(place, expected=process.expected, child=process.pid)
                ended(process)

            try:
                return Process(slot, words, tuple(fds.values()), buried)
            except OSError:
                self._suspects.record_death(place, expected=True, child=0)
                raise
        finally:
            os.close(runtime)
            os.close(orders)

    # The end

    def _signalled(self) -> None:
        if self._stop.is_set():
            self._at_once.set()
        self._stop.set()

    async def _drain(self, own: OwnSocket | None) -> None:
        self._state = "draining"
        self._notify.stopping()
        self._log.info("service.drain")
        if own is not None:
            own.close()  # hooks find nobody and try again until the next daemon is there
        limit = Deadline.after(self._settings.service.drain + DRAIN_GRACE)
        hurry = asyncio.create_task(self._at_once.wait())
        hurry.add_done_callback(lambda done: None if done.cancelled() else self._pool.kill())
        await self._pool.drain(limit)
        hurry.cancel()

    # Configuration

    @property
    def _settings(self) -> Settings:
        return self._configuration.loaded.settings

    def _in_force(self) -> tuple[Settings, tuple[Sample, ...]]:
        loaded = self._configuration.loaded
        return loaded.settings, loaded.samples(self._glass.allowed())

    def _adopt(self, loaded: Loaded) -> None:
        self._recorder.change(loaded.settings)
        self._pool.resize(worker_count(loaded.settings))

    def _looked(self, result: Literal["changed", "unchanged", "failed"]) -> None:
        self._monitor.loaded(result)

    def _renew(self) -> None:
        self._suspects.forget()  # perhaps it was a defect of the version that goes now
        self._pool.replace_all()

    async def _reload(self, *, restart: bool = False) -> tuple[str, ...]:
        self._notify.reloading()
        problems = await self._configuration.reload(self._renew if restart else None)
        self._notify.ready(self._summary())
        return problems

    async def _reload_on_demand(self) -> None:
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            await self._reload()

    # What runs besides

    async def _hear(self) -> None:
        while True:
            await self._hear_one()

    async def _hear_one(self) -> None:
        try:
            report = await self._bus.report()
        except RemoteProtocolError as error:
            self._malformed("reports", error)
            return
        if isinstance(report, messages.CacheUpdate):
            await self._bus.command(report, lossy=True)
            return
        self._monitor.heard(report)
        if isinstance(report, messages.EventBatch):
            for event in self._canary.others(report.events):
                self._recorder.put(event)
                self._publish(event)
        elif (process := self._pool.heard(report)) is not None:
            self._moved.set()
            await self._glass.heard(process)
            await self._configuration.heard(process)

    def _publish(self, event: messages.Event) -> None:
        self._monitor.remote.publish(event)
        try:
            self._bus.publish(event)
        except zmq.Again:
            pass  # a slow reader of the feed loses events

    async def _ordered(self, event: messages.Event) -> None:
        self._publish(event)
        if self._state == "ready":
            self._notify.status(self._summary())

    def _answers(self) -> Mapping[type, ControlHandler]:
        """What the command line may ask, and what answers it."""

        async def ping(question: messages.Question, uid: int) -> messages.Reply:
            return messages.Done(True, self._configuration.generation)

        async def status(question: messages.Question, uid: int) -> messages.Reply:
            await self._monitor.look(Deadline.after(LOOK_WAIT))
            return self.status()

        async def canary(question: messages.Question, uid: int) -> messages.Reply:
            return await self._canary.round()

        async def failures(question: messages.Question, uid: int) -> messages.Reply:
            return messages.Failures(self._configuration.generation, self._settings.failure)

        async def reload(question: messages.Question, uid: int) -> messages.Reply:
            assert isinstance(question, messages.AskReload)  # noqa: S101 - it stands for this type below
            problems = await self._reload(restart=question.restart)
            state = self._source.tables()
            trouble = (f"tables: {state.trouble}",) if state and state.trouble else ()
            return messages.Done(not problems, self._configuration.generation, (*problems, *trouble))

        return {
            messages.Ping: ping,
            messages.AskStatus: status,
            messages.AskReload: reload,
            **self._glass.answers(),
            messages.AskCanary: canary,
            messages.AskFailures: failures,
        }

    def _malformed(self, where: str, error: RemoteProtocolError) -> None:
        if (held := self._bad_frames.allow()) is not None:
            self._log.warning("bus.malformed", where=where, why=str(error), not_logged=held)

    async def _check(self) -> None:
        while True:
            service = self._settings.service
            self._pool.check(service.stuck_after)
            self._mend_bus()
            await asyncio.sleep(min(service.heartbeat, service.stuck_after / 4))

    def _mend_bus(self) -> None:
        """Somebody may have emptied the run directory; a worker that starts now would find nobody."""
        try:
            paths = self._bus.mend()
        except OSError as error:  # ZeroMQ's errors are of this kind
            if (held := self._bad_frames.allow()) is not None:
                self._log.error("bus.not-mended", why=error.strerror or str(error), not_logged=held)
        else:
            if paths:
                self._log.error("bus.mended", paths=paths)

    async def _say_ready(self) -> None:
        while not self._pool.full():
            self._moved.clear()
            await self._moved.wait()
        self._state = "ready"
        self._log.info("service.ready", workers=len(self._pool.processes))
        self._notify.ready(self._summary())

    async def _keep_watchdog(self) -> None:
        """A sign of life to systemd, but only while mail can be accepted."""
        while self._watchdog:
            if self._state != "ready" or self._pool.alive(self._settings.service.stuck_after):
                self._notify.alive()
            await asyncio.sleep(self._watchdog)

    def _summary(self) -> str:
        workers, generation = worker_count(self._settings), self._configuration.generation
        return f"{workers} workers, configuration {generation}{self._glass.summary()}"

    def status(self) -> messages.Status:
        status = messages.Status(
            version=__version__,
            pid=os.getpid(),
            state="drained" if self._glass.orders.drain and self._state == "ready" else self._state,
            generation=self._configuration.generation,
            uptime=round(time.monotonic() - self._began, 3),
            socket=self._settings.listen.socket,
            restarts=self._pool.restarts,
            malformed=self._bus.malformed,
            not_recorded=self._recorder.dropped,
            wanted=worker_count(self._settings),
            deaths=dict(self._pool.deaths),
            problems=self._configuration.problems,
            workers=tuple(process.describe() for process in self._pool.processes),
            tables=self._source.tables(),
            bypasses=self._glass.bypasses(),
            drain=self._glass.orders.drain,
            orders_problem=self._glass.problem,
            canary=self._canary.results,
            poison=self._suspects.isolated(),
        )
        return self._monitor.complete(status)


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
