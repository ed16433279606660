"""A worker process: one event loop that accepts hooks, hands their messages to the application, and
tells the supervisor that it lives.

Started by exec with the listening socket, the lifeline, the configuration and the operators' orders as
inherited descriptors. The heartbeat comes from the event loop itself, so a stuck loop falls silent. It drains on
SIGTERM and when the lifeline closes, which means that the supervisor is gone; a second signal ends it at once.
"""

import argparse
import asyncio
import gc
import os
import resource
import select
import selectors
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from contentfilter.bus.messages import OVERRIDES, CacheUpdate, Event, Heartbeat, InFlight, Overrides, decode
from contentfilter.bus.sockets import BATCH_DELAY, WorkerBus
from contentfilter.deadline import Deadline
from contentfilter.doors.admission import AcceptedMessage, IntakeLimits, PendingMessage
from contentfilter.doors.listener import Listener
from contentfilter.doors.listening_socket import inherited_socket
from contentfilter.doors.message import Spool
from contentfilter.doors.origin import resolve
from contentfilter.doors.watermarks import ResourceMonitor, Watermarks
from contentfilter.errors import BackendError, RemoteProtocolError
from contentfilter.hardening import give_up_privileges
from contentfilter.log import Logger, adopt_standard_logging, make_logger
from contentfilter.log_target import open_target
from contentfilter.model import ScanOutcome
from contentfilter.policy.overrides import AllowEntry, Bypass
from contentfilter.scanners.cache import ScanCache
from contentfilter.scanners.pool import BackendHealth
from contentfilter.settings import Settings
from contentfilter.wire import hook
from contentfilter.worker.crashes import DEATH_LIMIT, SlotPlace, WorkerSlot, fingerprint
from contentfilter.worker.load import Load

SHOWN = 8  # messages in flight that a heartbeat tells about
ABORT_WAIT = 2.0  # seconds for cancelled handlings to end


class Application(Protocol):
    """What is done with messages under one configuration."""

    settings: Settings

    async def handle(self, job: AcceptedMessage) -> hook.Answer: ...

    async def isolate(self, job: AcceptedMessage, fingerprint: str) -> hook.Answer:
        """In place of :meth:`handle`, for a message that killed workers: decide without a look at it."""
        ...

    def rejected_busy(self, offered: PendingMessage, why: str, answer: hook.Answer, seconds: float) -> None:
        """See intake.room.Handler."""
        ...

    def backends(self) -> tuple[BackendHealth, ...]:
        """How the scanners that it asks stand, for the heartbeat."""
        ...

    async def close(self) -> None:
        """Called once, when the last message under this configuration is answered."""


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What an application may use of its worker."""

    log: Logger
    emit: Callable[[Event], None]  # to the supervisor and the event feed; never waits
    bypasses: Callable[[], tuple[Bypass, ...]] = tuple  # in force at this moment
    allowed: Callable[[], tuple[AllowEntry, ...]] = tuple  # in force at this moment
    recall: ScanCache = field(default_factory=ScanCache)  # the worker's, whatever the configuration
    shed: Counter[str] = field(default_factory=Counter)  # what was left out for want of time, to be counted there


Build = Callable[[bytes, WorkerContext], Awaitable[Application]]
"""The configuration blob becomes an application. Raises anything when it cannot."""


class ApplicationLease:
    """An application with a count of what it is working on, so that it is closed when it is idle.

    Keeps messages that killed workers away from it.
    """

    def __init__(self, application: Application, generation: int, lane: WorkerSlot) -> None:
        self.application = application
        self._lane = lane
        self.generation = generation
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def handle(self, job: AcceptedMessage) -> hook.Answer:
        self._running += 1
        self._idle.clear()
        try:
            key = fingerprint(job.message.data)
            if self._lane.deaths(key) >= DEATH_LIMIT:
                return await self.application.isolate(job, key.hex())
            return await self._lane.handled(self.application.handle(job), key, job.incident)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    def rejected_busy(self, offered: PendingMessage, why: str, answer: hook.Answer, seconds: float) -> None:
        self.application.rejected_busy(offered, why, answer, seconds)

    async def retire(self) -> None:
        await self._idle.wait()
        await self.application.close()

    def terms(self) -> IntakeLimits:
        settings, service = self.application.settings, self.application.settings.service
        origin, _ = resolve(settings.origin)  # the supervisor has told about unknown names
        return IntakeLimits(
            self,
            origin,
            Spool(service.state),
            service.budget,
            service.max_in_flight,
            service.max_waiting,
            service.max_in_flight_bytes,
            service.max_message,
            service.admission_wait,
        )

    def floors(self) -> Watermarks:
        service = self.application.settings.service
        return Watermarks(service.memory_floor, service.disk_floor, service.state)


class Worker:
    """The life of the process, from configuration to the last answer."""

    def __init__(self, options: argparse.Namespace, build: Build, log: Logger) -> None:
        self._options = options
        self._build = build
        self._log = log
        self._load = Load(log)
        self._stop = asyncio.Event()
        self._at_once = asyncio.Event()
        self._refused = 0
        self._flush: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        self._loop = loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        loop.add_reader(self._options.lifeline, self._orphaned)
        self._bus = WorkerBus(self._options.run, os.getpid())
        self._lane = WorkerSlot(self._options.suspects, SlotPlace(self._options.lane, self._options.life))
        self._lane.attend(loop)
        self._cache = ScanCache(lambda key, kept: self._bus.send(CacheUpdate(key, kept)), self._late)
        blob = read_all(self._options.runtime)
        self._orders = decode(read_all(self._options.orders), OVERRIDES)
        self._serving = await self._built(self._options.generation, blob)
        self._listener = Listener(
            inherited_socket(self._options.listen),
            self._serving.terms(),
            self._log,
            lambda name, fields: self._emit(Event(name, fields)),
        )
        gc.collect()
        gc.freeze()  # modules and configuration are for good; collections need not visit them
        self._listener.hold(self._orders.drain is not None)
        self._listener.start()
        lookout = ResourceMonitor(
            lambda: self._serving.floors(), lambda short: loop.call_soon_threadsafe(self._short, short)
        )
        lookout.start()
        try:
            async with asyncio.TaskGroup() as group:
                background = [group.create_task(self._beat()), group.create_task(self._obey(group))]
                await self._stop.wait()
                await self._drain()
                for task in background:
                    task.cancel()
            await self._cache.aclose()
            await self._serving.application.close()
            self._bus.send(self._heartbeat(0.0))  # its last counts
        finally:
            lookout.stop()
            self._bus.close()
        self._log.info("worker.stop")

    async def _built(self, generation: int, blob: bytes) -> ApplicationLease:
        around = WorkerContext(self._log, self._emit, self._bypasses, self._allowed, self._cache, self._load.shed)
        application = await self._build(blob, around)
        return ApplicationLease(application, generation, self._lane)

    def _bypasses(self) -> tuple[Bypass, ...]:
        return self._orders.bypasses

    def _allowed(self) -> tuple[AllowEntry, ...]:
        return self._orders.allowed

    def _late(self, said: ScanOutcome | BackendError, seconds: float) -> None:
        """The end of a scan whose message was given up."""
        if isinstance(said, BackendError):
            self._log.info("scan.late", backend=said.backend, result=said.cause.value, seconds=round(seconds, 3))
        else:
            result = said.status.value
            self._log.info("scan.late", backend=said.backend, result=result, seconds=round(seconds, 3))

    def _short(self, short: str) -> None:
        """There is too little of something, or enough again."""
        if short:
            self._log.error("load.short", why=short)
        else:
            self._log.warning("load.enough", why=self._listener.short)
        self._listener.shut(short)
        self._bus.send(self._heartbeat(0.0))

    def _emit(self, event: Event) -> None:
        if self._bus.add(event):
            self._bus.flush()
        elif self._flush is None:
            self._flush = self._loop.call_later(BATCH_DELAY, self._flush_events)

    def _flush_events(self) -> None:
        self._flush = None
        self._bus.flush()

    # The end

    def _signalled(self) -> None:
        if self._stop.is_set():
            self._at_once.set()
        self._stop.set()

    def _orphaned(self) -> None:
        self._loop.remove_reader(self._options.lifeline)
        self._log.warning("worker.orphaned")
        self._stop.set()

    async def _drain(self) -> None:
        """Finish what is under way, within the limit; drop the rest, which the hooks offer again."""
        listener, settings = self._listener, self._serving.application.settings
        listener.stop()
        self._log.info("worker.drain", open=len(listener.connections))
        hurry = asyncio.ensure_future(self._at_once.wait())
        done = asyncio.ensure_future(listener.drained(Deadline.after(settings.service.drain)))
        await asyncio.wait({hurry, done}, return_when=asyncio.FIRST_COMPLETED)
        for future in (hurry, done):
            future.cancel()
        await listener.abort("shutdown", Deadline.after(ABORT_WAIT))

    # What runs besides

    async def _beat(self) -> None:
        late = 0.0
        while True:
            self._load.look(self._loop.time(), self._listener.counters.busy)
            self._bus.send(self._heartbeat(late))
            interval = self._serving.application.settings.service.heartbeat
            due = self._loop.time() + interval
            await asyncio.sleep(interval)
            late = self._loop.time() - due

    def _heartbeat(self, lag: float) -> Heartbeat:
        now = self._loop.time()
        connections = self._listener.connections
        oldest = sorted(connections, key=lambda c: c.began)[:SHOWN]
        return Heartbeat(
            pid=os.getpid(),
            generation=self._serving.generation,
            refused=self._refused,
            lag=max(0.0, lag),
            in_flight=tuple(InFlight(c.incident, c.stage, now - c.began) for c in oldest),
            open=len(connections),
            counters=asdict(self._listener.counters) | self._load.counters() | {"events_lost": self._bus.lost},
            bytes=sum(c.size for c in connections),
            backends=self._serving.application.backends(),
            orders=self._orders.number,
            waiting=self._listener.waiting,
            short=self._listener.short,
        )

    async def _obey(self, group: asyncio.TaskGroup) -> None:
        while True:
            try:
                command = await self._bus.command()
            except RemoteProtocolError as error:
                self._log.warning("bus.malformed", why=str(error))
                continue
            if isinstance(command, Overrides):
                self._follow(command)
            elif isinstance(command, CacheUpdate):
                self._cache.learn(command.key, command.kept)
            elif command.generation > max(self._serving.generation, self._refused):
                await self._configure(command.generation, command.blob, group)

    def _follow(self, orders: Overrides) -> None:
        """From the next message on. They hold whatever becomes of the configuration."""
        if orders.number > self._orders.number:
            self._orders = orders
            self._listener.hold(orders.drain is not None)
            self._bus.send(self._heartbeat(0.0))

    async def _configure(self, generation: int, blob: bytes, group: asyncio.TaskGroup) -> None:
        try:
            serving = await self._built(generation, blob)
            terms = serving.terms()
        except Exception:  # whatever is wrong with it, the old configuration goes on
            self._refused = generation
            self._log.exception("worker.reload-failed", generation=generation)
        else:
            old, self._serving = self._serving, serving
            self._listener.change(terms)
            group.create_task(old.retire())
            self._log.info("worker.reload", generation=generation)
        self._bus.send(self._heartbeat(0.0))


class Exclusive(selectors.EpollSelector):
    """Wakes one idle worker per connection instead of all: EPOLLEXCLUSIVE, epoll_ctl(2), for the listening socket."""

    def __init__(self, listener: int) -> None:
        super().__init__()
        self._listener = listener

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = super().register(fileobj, events, data)
        if key.fd == self._listener:
            epoll: select.epoll = self._selector  # type: ignore[attr-defined]
            epoll.unregister(key.fd)
            epoll.register(key.fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)
        return key


def read_all(fd: int) -> bytes:
    """The whole of an inherited file, which is then closed."""
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return file.read()


def command_line(
    worker: Sequence[str],
    settings: Settings,
    facility: str,
    slot: int,
    generation: int,
    place: SlotPlace,
    fds: dict[str, int],
) -> list[str]:
    """How the supervisor starts a worker; ``worker`` is the program and its first words."""
    options: dict[str, Any] = {
        "run": settings.service.run,
        "log": settings.log.format,
        "level": settings.log.level,
        "to": settings.log.to,
        "syslog": settings.log.socket,
        "facility": facility,
        "slot": slot,
        "generation": generation,
        "lane": place.lane,
        "life": place.life,
        **fds,
    }
    return [*worker, *(f"--{name}={value}" for name, value in options.items())]


def main(build: Build, arguments: Sequence[str] | None = None) -> None:
    """The whole life of a worker process. ``arguments``: in place of the process's own."""
    parser = argparse.ArgumentParser(prog="contentfilter worker", description="Started by contentfilter serve only.")
    for name in ("run", "log", "level", "to", "syslog", "facility"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("slot", "generation", "lane", "life", "listen", "lifeline", "runtime", "orders", "suspects"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args(arguments)
    give_up_privileges()
    with suppress(OSError):  # the service's unit forbids it, and has set enough
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # messages have several; nothing uses select(2)
    for fd in (options.listen, options.lifeline, options.runtime, options.orders, options.suspects):
        os.set_inheritable(fd, False)
    target = open_target(options.to, options.syslog, options.facility, os.environ)
    log = make_logger(options.log, options.level, target, worker=options.slot, pid=os.getpid())
    adopt_standard_logging(log)
    selector = Exclusive(options.listen)
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(Worker(options, build, log).run())
