"""The supervisor's parts, constructed in the order in which they depend on each other."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from contentfilter.bus import messages
from contentfilter.bus.sockets import SupervisorBus
from contentfilter.config.runtime import worker_count
from contentfilter.deadline import Deadline
from contentfilter.files import memory_file
from contentfilter.log import Logger
from contentfilter.monitor.canary import Canary
from contentfilter.monitor.monitor import Monitor
from contentfilter.supervisor.configuration import Configuration, Result
from contentfilter.supervisor.control import ControlHandler, ControlServer
from contentfilter.supervisor.feed import EventFeed
from contentfilter.supervisor.overrides import OverrideManager
from contentfilter.supervisor.pool import WorkerPool
from contentfilter.supervisor.process import WorkerProcess
from contentfilter.supervisor.receiver import Inherited, ReceiverProcess
from contentfilter.supervisor.recorder import Recorder
from contentfilter.supervisor.source import ConfigSource, Loaded
from contentfilter.supervisor.status import Lifecycle, MalformedMessages, StatusReporter, effective_state
from contentfilter.supervisor.systemd import Notifier
from contentfilter.supervisor.workers import Workers
from contentfilter.worker.crashes import CrashTable, SlotPlace
from contentfilter.worker.main import command_line

LOOK_WAIT = 1.0  # seconds that a question for the status waits for the scanners' answers
RESTART_WAIT = 30.0  # seconds for every slot to have its new worker


class Spawner:
    """Starts workers under the configuration and the overrides in force."""

    def __init__(
        self,
        inherited: Inherited,
        crashes: CrashTable,
        configuration: Configuration,
        overrides: OverrideManager,
        receiver: ReceiverProcess,
    ) -> None:
        self._inherited = inherited
        self._receiver = receiver
        self._crashes = crashes
        self._configuration = configuration
        self._overrides = overrides

    def spawn(self, slot: int, ended: Callable[[WorkerProcess], None]) -> WorkerProcess:
        """See pool.Spawn."""
        loaded, generation = self._configuration.loaded, self._configuration.generation
        runtime, orders = memory_file("configuration", loaded.blob), self._overrides.inherited()
        try:
            fds = {
                "listen": self._inherited.listener.fileno(),
                "lifeline": self._inherited.lifeline,
                "runtime": runtime,
                "orders": orders,
                "suspects": self._crashes.fd,
                "receiver": self._receiver.worker_end.fileno(),
            }
            place = self._crashes.enlist()
            argv = command_line(
                self._inherited.worker, loaded.settings, loaded.sysfacility, slot, generation, place, fds
            )
            try:
                return WorkerProcess(slot, argv, tuple(fds.values()), partial(self._ended, place, ended))
            except OSError:
                self._crashes.record_death(place, expected=True, child=0)
                raise
        finally:
            os.close(runtime)
            os.close(orders)

    def _ended(self, place: SlotPlace, ended: Callable[[WorkerProcess], None], process: WorkerProcess) -> None:
        self._crashes.record_death(place, expected=process.expected, child=process.pid)
        ended(process)


@dataclass(frozen=True, slots=True)
class Operations:
    """What operators can ask the supervisor for, overrides apart."""

    source: ConfigSource
    notify: Notifier
    crashes: CrashTable
    workers: Workers
    configuration: Configuration
    pool: WorkerPool
    canary: Canary
    reporter: StatusReporter
    monitor: Monitor

    async def reload(self, *, restart: bool = False) -> messages.Done:
        """Read the configuration again; with ``restart`` also replace every worker, unless the new one is bad."""
        self.notify.reloading()
        problems = list(await self.configuration.reload())
        bad = self.configuration.problems
        if restart and not bad:
            self.crashes.forget()  # perhaps it was a defect of the version that is replaced now
            self.pool.replace_all()
            await self.workers.wait_until(self._replaced, Deadline.after(RESTART_WAIT))
            slots = self.pool.unreplaced()
            problems += (f"worker {slot} could not be replaced yet; it is tried again" for slot in slots)
        self.notify.ready(self.reporter.summary())
        state = self.source.tables()
        if state and state.trouble:
            problems.append(f"tables: {state.trouble}")
        return messages.Done(not bad, self.configuration.generation, (*bad, *problems))

    def handlers(self) -> Mapping[type, ControlHandler]:
        """By type of the question."""
        return {
            messages.Ping: self._ping,
            messages.AskStatus: self._status,
            messages.AskReload: self._reload,
            messages.AskCanary: self._round,
            messages.AskFailures: self._failures,
        }

    def _replaced(self) -> bool:
        return not self.pool.unreplaced()

    async def _ping(self, question: messages.Question, uid: int) -> messages.Reply:
        return messages.Done(True, self.configuration.generation)

    async def _status(self, question: messages.Question, uid: int) -> messages.Reply:
        await self.monitor.look(Deadline.after(LOOK_WAIT))
        return self.monitor.status()

    async def _reload(self, question: messages.Question, uid: int) -> messages.Reply:
        return await self.reload(restart=isinstance(question, messages.AskReload) and question.restart)

    async def _round(self, question: messages.Question, uid: int) -> messages.Reply:
        return await self.canary.round()

    async def _failures(self, question: messages.Question, uid: int) -> messages.Reply:
        return messages.Failures(self.configuration.generation, self.configuration.settings().failure)


@dataclass(frozen=True, slots=True)
class Parts:
    """All that runs in the supervisor's process."""

    bus: SupervisorBus
    malformed: MalformedMessages
    crashes: CrashTable
    workers: Workers
    configuration: Configuration
    overrides: OverrideManager
    recorder: Recorder
    pool: WorkerPool
    canary: Canary
    reporter: StatusReporter
    monitor: Monitor
    feed: EventFeed
    receiver: ReceiverProcess
    operations: Operations
    control: ControlServer

    def looked(self, result: Result) -> None:
        """The configuration's observer."""
        self.monitor.loaded(result)
        if result == "changed":
            settings = self.configuration.settings()
            self.recorder.change(settings)
            self.pool.resize(worker_count(settings))
            self.feed.changed()


def compose(
    source: ConfigSource, first: Loaded, log: Logger, notify: Notifier, lifecycle: Lifecycle, inherited: Inherited
) -> Parts:
    """Everything is constructed, nothing runs yet. Raises OSError."""
    bus = SupervisorBus(first.settings.service.run)
    malformed = MalformedMessages(log)
    crashes = CrashTable(log)
    workers = Workers(bus)
    configuration = Configuration(source, first, log, workers)
    feed = EventFeed(log, configuration.settings)
    overrides = OverrideManager(log, configuration.settings, workers, feed.publish)
    recorder = Recorder(log, first.settings)
    receiver = ReceiverProcess(log, configuration.settings, inherited)
    spawner = Spawner(inherited, crashes, configuration, overrides, receiver)
    pool = WorkerPool(spawner.spawn, log, workers)
    canary = Canary(
        log, lambda: configuration.canary(overrides.allowed()), partial(effective_state, lifecycle, overrides)
    )
    reporter = StatusReporter(
        lifecycle, malformed, source, crashes, workers, configuration, overrides, recorder, pool, canary, receiver
    )
    monitor = Monitor(
        log,
        configuration.settings,
        reporter.status,
        inherited.listener,
        lambda results: workers.send(messages.BackendNews(results)),
    )
    operations = Operations(source, notify, crashes, workers, configuration, pool, canary, reporter, monitor)
    handlers = {**operations.handlers(), **overrides.answers()}
    control = ControlServer(first.settings.service.run, handlers, log, malformed.note)
    parts = Parts(
        bus, malformed, crashes, workers, configuration, overrides, recorder, pool, canary, reporter, monitor, feed,
        receiver, operations, control,
    )  # fmt: skip
    configuration.observe(parts.looked)
    return parts
