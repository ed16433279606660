"""The life of a worker: accept messages, follow the supervisor's commands, send heartbeats, drain at the end.

The heartbeat comes from the event loop itself, so a stuck loop falls silent. The worker drains on SIGTERM, and when
the lifeline closes, which means that the supervisor is gone; a second signal ends it immediately.
"""

import asyncio
import gc
import os
import signal
import socket
from dataclasses import asdict, dataclass

from contentfilter.bus.messages import (
    OVERRIDES,
    BackendNews,
    CacheUpdate,
    Configure,
    Event,
    Heartbeat,
    InFlight,
    Overrides,
    decode,
)
from contentfilter.bus.sockets import BATCH_DELAY, WorkerBus
from contentfilter.deadline import Deadline
from contentfilter.doors.listener import Listener
from contentfilter.doors.listening_socket import inherited_socket
from contentfilter.doors.origin import resolve
from contentfilter.doors.watermarks import ResourceMonitor
from contentfilter.errors import BackendError, RemoteProtocolError
from contentfilter.log import Logger
from contentfilter.model import ScanOutcome
from contentfilter.policy.overrides import AllowEntry, Bypass
from contentfilter.scanners.cache import ScanCache
from contentfilter.threads import DaemonExecutor, in_thread
from contentfilter.worker.crashes import CrashAttribution, SlotPlace, WorkerSlot
from contentfilter.worker.lease import ApplicationLease, Build, WorkerContext
from contentfilter.worker.load import Load

SHOWN = 8  # messages in flight that a heartbeat names
ABORT_WAIT = 2.0  # seconds for cancelled handlings to end
DISK_THREADS = 8
DISK_PATIENCE = 10.0  # seconds without progress after which calls for a hung disk fail immediately


@dataclass(frozen=True, slots=True)
class Options:
    """From the command line; the last six are inherited descriptors."""

    run: str  # directory of the bus
    generation: int  # of the configuration
    place: SlotPlace
    listen: int
    lifeline: int
    runtime: int  # the configuration
    orders: int  # overrides
    suspects: int  # the crash table
    receiver: int  # socket that connections of untrusted users are handed over on


class StopRequest:
    """Set by the first signal or by the end of the supervisor; ``immediate`` by a second signal."""

    def __init__(self, loop: asyncio.AbstractEventLoop, lifeline: int, log: Logger) -> None:
        self._loop, self._lifeline, self._log = loop, lifeline, log
        self.requested, self.immediate = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        loop.add_reader(lifeline, self._orphaned)

    def _signalled(self) -> None:
        if self.requested.is_set():
            self.immediate.set()
        self.requested.set()

    def _orphaned(self) -> None:
        self._loop.remove_reader(self._lifeline)
        self._log.warning("worker.orphaned")
        self.requested.set()


class EventSender:
    """Sends events to the supervisor in batches, each at most BATCH_DELAY seconds late."""

    def __init__(self, bus: WorkerBus, loop: asyncio.AbstractEventLoop) -> None:
        self._bus, self._loop = bus, loop
        self._timer: asyncio.TimerHandle | None = None

    def emit(self, event: Event) -> None:
        if self._bus.add(event):
            self._bus.flush()
        elif self._timer is None:
            self._timer = self._loop.call_later(BATCH_DELAY, self._flush)

    def _flush(self) -> None:
        self._timer = None
        self._bus.flush()


class ApplicationFactory:
    """Builds an application from each configuration, and holds what all of them share."""

    def __init__(self, options: Options, build: Build, log: Logger, bus: WorkerBus) -> None:
        loop = asyncio.get_running_loop()
        self._log = log
        self._build = build
        self._slot = WorkerSlot(options.suspects, options.place)
        self._attribution = CrashAttribution(self._slot, loop)
        self._disk = self._attribution.executor(DaemonExecutor("disk", DISK_THREADS, DISK_PATIENCE))
        self.events = EventSender(bus, loop)
        self.load = Load(log)
        self.cache = ScanCache(lambda key, kept: bus.send(CacheUpdate(key, kept)), self._late_scan)
        self.news = BackendNews()
        self.overrides: Overrides = decode(read_all(options.orders), OVERRIDES)

    async def lease(self, generation: int, blob: bytes) -> ApplicationLease:
        """Raises anything that a build may raise."""
        shared = WorkerContext(
            self._log, self.events.emit, self._bypasses, self._allowed, self.cache, self.load.shed, self._disk
        )
        application = await self._build(blob, shared)
        application.learn(self.news.results)
        rules = application.settings.origin
        origin, _ = await in_thread(lambda: resolve(rules))  # the supervisor has reported unknown names
        return ApplicationLease(application, generation, self._slot, self._attribution, origin)

    def _bypasses(self) -> tuple[Bypass, ...]:
        return self.overrides.bypasses

    def _allowed(self) -> tuple[AllowEntry, ...]:
        return self.overrides.allowed

    def _late_scan(self, result: ScanOutcome | BackendError, seconds: float) -> None:
        """The end of a scan whose message was given up."""
        value = result.cause.value if isinstance(result, BackendError) else result.status.value
        self._log.info("scan.late", backend=result.backend, result=value, seconds=round(seconds, 3))


class Worker:
    """From the first accepted connection to the last answer."""

    def __init__(
        self, log: Logger, bus: WorkerBus, factory: ApplicationFactory, lease: ApplicationLease, options: Options
    ):
        self._loop = asyncio.get_running_loop()
        self._log, self._bus, self._factory, self._lease = log, bus, factory, lease
        self._refused = 0  # generation of the newest configuration that could not be used
        self._offered = Configure(0, b"")  # the newest configuration from the supervisor
        self._new_offer = asyncio.Event()
        self._listener = Listener(
            inherited_socket(options.listen),
            lease.limits(),
            log,
            lambda name, fields: factory.events.emit(Event(name, fields)),
            socket.socket(fileno=options.receiver),
        )
        self._resources = ResourceMonitor(
            lambda: self._lease.watermarks(),
            lambda resource: self._loop.call_soon_threadsafe(self._resource_changed, resource),
        )

    async def run(self, stop: StopRequest) -> None:
        self._listener.hold(self._factory.overrides.drain is not None)
        self._listener.start()
        self._resources.start()
        try:
            async with asyncio.TaskGroup() as group:
                work = (self._send_heartbeats(), self._follow(), self._reconfigure_on_offer(group))
                background = [group.create_task(each) for each in work]
                await stop.requested.wait()
                await self._drain(stop)
                for task in background:
                    task.cancel()
            await self._factory.cache.aclose()
            await self._lease.application.close()
            self._bus.send(self._heartbeat(0.0))  # the final counters
        finally:
            self._resources.stop()

    async def _drain(self, stop: StopRequest) -> None:
        """Finish the messages in progress, within the limit; drop the rest, which the hooks offer again."""
        listener, settings = self._listener, self._lease.application.settings
        listener.stop()
        self._log.info("worker.drain", open=len(listener.connections))
        hurry = asyncio.ensure_future(stop.immediate.wait())
        done = asyncio.ensure_future(listener.drained(Deadline.after(settings.service.drain)))
        await asyncio.wait({hurry, done}, return_when=asyncio.FIRST_COMPLETED)
        for future in (hurry, done):
            future.cancel()
        await listener.abort("shutdown", Deadline.after(ABORT_WAIT))

    # Heartbeats

    async def _send_heartbeats(self) -> None:
        lag = 0.0
        while True:
            self._factory.load.look(self._loop.time(), self._listener.counters.busy)
            self._bus.send(self._heartbeat(lag))
            interval = self._lease.application.settings.service.heartbeat
            due = self._loop.time() + interval
            await asyncio.sleep(interval)
            lag = self._loop.time() - due

    def _heartbeat(self, lag: float) -> Heartbeat:
        now = self._loop.time()
        connections = self._listener.connections
        oldest = sorted(connections, key=lambda c: c.began)[:SHOWN]
        load = self._factory.load.counters()
        return Heartbeat(
            pid=os.getpid(),
            generation=self._lease.generation,
            refused=self._refused,
            lag=max(0.0, lag),
            in_flight=tuple(InFlight(c.incident, c.stage.value, now - c.began) for c in oldest),
            open=len(connections),
            counters=asdict(self._listener.counters) | load | {"events_lost": self._bus.lost},
            bytes=sum(c.size for c in connections),
            backends=self._lease.application.backends(),
            orders=self._factory.overrides.number,
            waiting=self._listener.waiting,
            short=self._listener.exhausted,
        )

    def _resource_changed(self, exhausted: str) -> None:
        if exhausted:
            self._log.error("load.short", why=exhausted)
        else:
            self._log.warning("load.enough", why=self._listener.exhausted)
        self._listener.set_exhausted(exhausted)
        self._bus.send(self._heartbeat(0.0))

    # Commands of the supervisor

    async def _follow(self) -> None:
        while True:
            try:
                command = await self._bus.command()
            except RemoteProtocolError as error:
                self._log.warning("bus.malformed", why=str(error))
                continue
            if isinstance(command, Overrides):
                self._override(command)
            elif isinstance(command, CacheUpdate):
                self._factory.cache.learn(command.key, command.kept)
            elif isinstance(command, BackendNews):
                self._factory.news = command
                self._lease.application.learn(command.results)
            else:
                self._offered = command
                self._new_offer.set()

    def _override(self, overrides: Overrides) -> None:
        """In force from the next message on, and across configurations."""
        if overrides.number > self._factory.overrides.number:
            self._factory.overrides = overrides
            self._listener.hold(overrides.drain is not None)
            self._bus.send(self._heartbeat(0.0))

    async def _reconfigure_on_offer(self, group: asyncio.TaskGroup) -> None:
        """Take the newest configuration, one at a time. On a disk that does not answer it waits; all else goes on."""
        while True:
            await self._new_offer.wait()
            self._new_offer.clear()
            if self._offered.generation > max(self._lease.generation, self._refused):
                await self._reconfigure(self._offered.generation, self._offered.blob, group)

    async def _reconfigure(self, generation: int, blob: bytes, group: asyncio.TaskGroup) -> None:
        try:
            lease = await self._factory.lease(generation, blob)
            limits = lease.limits()
        except Exception:  # whatever is wrong with it, the old configuration stays in force
            self._refused = generation
            self._log.exception("worker.reload-failed", generation=generation)
        else:
            old, self._lease = self._lease, lease
            self._listener.apply(limits)
            group.create_task(old.release())
            self._log.info("worker.reload", generation=generation)
        self._bus.send(self._heartbeat(0.0))


async def run_worker(options: Options, build: Build, log: Logger) -> None:
    """Build the application, work until asked to stop, and drain."""
    stop = StopRequest(asyncio.get_running_loop(), options.lifeline, log)
    bus = WorkerBus(options.run, os.getpid())
    try:
        factory = ApplicationFactory(options, build, log, bus)
        building = asyncio.ensure_future(factory.lease(options.generation, read_all(options.runtime)))
        stopping = asyncio.ensure_future(stop.requested.wait())
        await asyncio.wait({building, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not building.done():  # a disk that does not answer; nothing has been accepted yet
            building.cancel()
            return
        lease = building.result()
        worker = Worker(log, bus, factory, lease, options)
        gc.collect()
        gc.freeze()  # modules and configuration stay; collections need not visit them
        await worker.run(stop)
    finally:
        bus.close()
    log.info("worker.stop")


def read_all(fd: int) -> bytes:
    """The content of an inherited file, which is then closed."""
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return file.read()
