"""Monitoring in the supervisor: counts, measures, probes, and serves /metrics, /live, /ready.

Mail never waits for any of it. The disk is measured in a thread of its own that may hang, the text is rendered in
another, the probe has a deadline, and an address that is in use is logged and tried again.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from contentfilter.bus.messages import Event, EventBatch, Heartbeat, Status
from contentfilter.deadline import Deadline
from contentfilter.doors.watermarks import RESOURCES
from contentfilter.endpoint import parse_listen
from contentfilter.errors import JournalError
from contentfilter.log import Logger, RateLimiter
from contentfilter.model import Scanner
from contentfilter.monitor.backends import backend_statuses
from contentfilter.monitor.canary import measured
from contentfilter.monitor.history import MINUTES, History
from contentfilter.monitor.history import RECENT as RECENT_SHOWN
from contentfilter.monitor.http import Application, Page, Response
from contentfilter.monitor.measure import Measurement, backlog, measure, socket_problem
from contentfilter.monitor.metrics import Metrics, Registry
from contentfilter.monitor.page import PATHS, make_pages
from contentfilter.monitor.probe import UP, Prober
from contentfilter.policy.overrides import SCANNERS
from contentfilter.scanners.health import ProbeResult
from contentfilter.settings import Settings
from contentfilter.store.journal import Journal, Query, journal_path
from contentfilter.threads import in_thread

if TYPE_CHECKING:
    from contentfilter.monitor.http_server import HttpServer

MEASURE_EVERY = 30.0  # seconds between two measurements of the disk
WINDOW, RECENT = 900.0, 120.0  # seconds that the status covers
WATCH_EVERY = 1.0  # seconds between two looks at the backends' states
RESTORED_MAX = 50_000  # messages of the journal that are counted after a start
RESTORE_WAIT = 30.0  # seconds for reading them
PROBE_AGAIN = 30.0  # seconds until a prober that failed begins again
LISTEN_AGAIN = 30.0  # seconds until an address that is in use is tried again


class Monitor:
    """:meth:`run` once, in the background; the rest is called from the event loop and takes microseconds."""

    def __init__(
        self,
        log: Logger,
        settings: Callable[[], Settings],
        status: Callable[[], Status],
        listener: socket.socket,
        publish: Callable[[tuple[ProbeResult, ...]], None] = lambda results: None,
    ) -> None:
        """``listener`` may be closed while this runs. ``publish`` gets the prober's results."""
        self._log = log
        self._settings = settings
        self._supervisor_status = status
        self._listener = listener
        self._metrics = Metrics(Registry())
        self.history = History()
        self._waiting: list[Event] | None = []  # until the history has the journal's messages
        self._failing: dict[tuple[str, str], float] = {}  # backends that are down, since when
        self._renderer = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._started = time.time()
        self._measured: tuple[Measurement, ...] = ()
        self._prober = Prober(settings, publish)
        self._end = threading.Event()
        self._defects = RateLimiter(60.0)
        self._adopt()

    # Input

    def heard(self, report: Heartbeat | EventBatch) -> None:
        """Count a report of a worker. Raises nothing."""
        try:
            if isinstance(report, EventBatch):
                for event in report.events:
                    self._metrics.event(event.name, event.fields)
                    if event.name == "mail.done":
                        self._count(event)
            else:
                self._metrics.worker(report.pid, report.lag, report.counters)
                for backend in report.backends:
                    self._prober.heard(backend)
        except Exception:
            if (held := self._defects.allow()) is not None:
                self._log.exception("monitor.failed", not_logged=held)

    def _count(self, event: Event) -> None:
        if self._waiting is None:
            self.history.event(event.fields, event.account, time.monotonic())
        elif len(self._waiting) < RESTORED_MAX:
            self._waiting.append(event)

    def loaded(self, result: Literal["changed", "unchanged", "failed"]) -> None:
        """Configuration or tables were checked; the settings are in force already."""
        self._metrics.loaded(result)
        if result == "changed":
            self._adopt()

    def _adopt(self) -> None:
        settings = self._settings()
        self._metrics.backends({Scanner.CLAMD: settings.clamd.backends, Scanner.SPAMD: settings.spamd.backends})
        self._prober.changed()

    # In the background

    async def run(self) -> None:
        """Until it is cancelled. Without HTTP the disk is not measured."""
        where = parse_listen(self._settings().http.listen)
        works = [self._restore(), self._watch_backends(), self._probe()]
        if where is not None:
            works.append(self._serve(*where))
            threading.Thread(target=self._measure, name="measure", daemon=True).start()
        try:
            await asyncio.gather(*map(self._alone, works))
        finally:
            self._end.set()
            self._renderer.shutdown(wait=False, cancel_futures=True)

    async def _probe(self) -> None:
        """After a defect it begins again."""
        while True:
            try:
                await self._prober.run()
            except Exception:
                self._log.exception("backends.watch-failed")
            await asyncio.sleep(PROBE_AGAIN)

    async def _alone(self, work: Coroutine[Any, Any, None]) -> None:
        """A defect ends ``work`` and nothing else."""
        try:
            await work
        except Exception:
            self._log.exception("monitor.failed")

    async def _restore(self) -> None:
        """Take the history before the start from the journal, then what was decided meanwhile."""
        path, loop = journal_path(self._settings()), asyncio.get_running_loop()
        known: asyncio.Future[None] = loop.create_future()
        threading.Thread(
            target=_read_journal, args=(path, self.history, partial(_resolve, loop, known)), daemon=True
        ).start()
        await asyncio.wait((known,), timeout=RESTORE_WAIT)
        if not known.done():
            self.history = History()  # the disk hangs: the thread may still fill the other one
        waiting, self._waiting = self._waiting or [], None
        for event in waiting:
            self._count(event)

    async def _watch_backends(self) -> None:
        """Log when a backend goes down and when it is back."""
        while True:
            await asyncio.sleep(WATCH_EVERY)
            status = self._supervisor_status()
            for backend in backend_statuses(status.workers, self._prober.results, self._settings()):
                key = backend.scanner, backend.backend
                fields = {"scanner": backend.scanner, "backend": backend.backend}
                if backend.state == "failing" and backend.wanted and key not in self._failing:
                    self._failing[key] = backend.since
                    self._log.warning("backend.down", **fields, why=f"{backend.cause} {backend.detail}".rstrip())
                elif backend.state == "well" and key in self._failing:
                    self._log.info("backend.up", **fields, seconds=round(time.time() - self._failing.pop(key), 1))

    def _measure(self) -> None:
        """In a daemon thread, which is not joined: a disk may hang."""
        while not self._end.is_set():
            self._measured = measure(self._settings())
            self._end.wait(MEASURE_EVERY)

    async def _serve(self, host: str, port: int) -> None:
        server_class = await in_thread(_http_server)
        pages: dict[str, Page] = {"/metrics": self._page_metrics, "/live": self._page_live, "/ready": self._page_ready}
        if self._settings().http.page == "on":
            pages |= make_pages(self._look, self.history)
        server = server_class(Application(pages, self._log, private=PATHS, names=(host,)))
        reported = False
        try:
            while True:
                try:
                    address = await server.start(host, port)
                    break
                except OSError as error:
                    if not reported:
                        why = error.strerror or str(error)
                        self._log.error("http.failed", listen=f"{host}:{port}", why=why)
                        reported = True
                await asyncio.sleep(LISTEN_AGAIN)
            self._log.info("http.ready", address=address)
            await asyncio.get_running_loop().create_future()  # until cancelled
        finally:
            await server.close()

    # Status

    async def look(self, deadline: Deadline) -> None:
        """Probe the scanners before a status is reported, unless that was just done."""
        await self._prober.fresh(deadline)

    def status(self) -> Status:
        """The status with backends, queue and the last minutes."""
        queue, now = backlog(self._listener.fileno()), time.monotonic()
        status = self._supervisor_status()
        problem, remedy = socket_problem(self._settings().listen) if status.state != "draining" else ("", "")
        return msgspec.structs.replace(
            status,
            backends=backend_statuses(status.workers, self._prober.results, self._settings()),
            socket_problem=problem,
            socket_remedy=remedy,
            waiting=queue[0] if queue else None,
            waiting_limit=queue[1] if queue else None,
            window=self.history.window(WINDOW, now),
            recent=self.history.window(RECENT, now),
        )

    # Pages

    async def _page_metrics(self, accept: str) -> Response:
        status = self.status()
        unwanted = {(backend.backend,) for backend in status.backends if not backend.wanted}
        probed = (s for s in self._prober.samples if s[0] != UP[Scanner.SPAMD] or s[1] not in unwanted)
        samples = (*self._now(status), *self._measured, *probed)
        values: dict[str, list[tuple[tuple[str, ...], float]]] = {}
        for name, labels, value in samples:
            values.setdefault(name, []).append((labels, value))
        self._metrics.present(values)
        loop = asyncio.get_running_loop()
        return Response(*await loop.run_in_executor(self._renderer, self._metrics.render, accept))

    async def _page_live(self, accept: str) -> Response:
        return _plain(accept, "live", ())

    async def _page_ready(self, accept: str) -> Response:
        return _plain(accept, "ready", self._unready(self.status()))

    def _look(self) -> tuple[Status, tuple[str, ...]]:
        """For the status page."""
        status = self.status()
        return status, self._unready(status)

    def _unready(self, status: Status) -> tuple[str, ...]:
        """The reasons why the daemon is not ready; empty if it is."""
        found = []
        if status.state == "draining":
            found.append("draining: no new mail is accepted")
        if status.drain is not None:
            found.append(f"draining: no new mail is accepted, drained by {status.drain.by}: contentfilter resume")
        able = {
            w.slot for w in status.workers if w.state == "ready" and w.silent < self._settings().service.stuck_after
        }
        if len(able) < status.wanted:
            found.append(f"{len(able)} of {status.wanted} workers accept mail")
        short = sorted({worker.short for worker in status.workers if worker.short})
        found += [f"not enough {resource}: mail waits" for resource in short]
        if status.tables is not None and not status.tables.loaded:
            found.append(f"no recipient tables: {status.tables.trouble}")
        return tuple(found)

    def _now(self, status: Status) -> Iterable[Measurement]:
        """Samples of what is known already."""
        settings = self._settings()
        workers = status.workers
        yield from measured(status.canary)
        yield "contentfilter_build_info", (status.version,), 1
        yield "contentfilter_start_timestamp_seconds", (), self._started
        yield "contentfilter_ready", (), not self._unready(status)
        for state in ("starting", "ready", "retiring"):
            yield "contentfilter_workers", (state,), sum(worker.state == state for worker in workers)
        yield "contentfilter_workers_wanted", (), status.wanted
        for reason, count in status.deaths.items():
            yield "contentfilter_worker_restarts_total", (reason,), count
        for slot in sorted({worker.slot for worker in workers}):  # two in one slot during a replacement
            opened = sum(worker.open for worker in workers if worker.slot == slot)
            yield "contentfilter_in_flight", (str(slot),), opened
            waiting = sum(worker.waiting for worker in workers if worker.slot == slot)
            yield "contentfilter_admission_waiting", (str(slot),), waiting
        for resource in RESOURCES:
            yield "contentfilter_short", (resource,), any(worker.short == resource for worker in workers)
        yield "contentfilter_in_flight_limit", (), settings.service.max_in_flight * status.wanted
        yield "contentfilter_in_flight_bytes", (), sum(worker.bytes for worker in workers)
        ages = [busy.seconds + worker.silent for worker in workers for busy in worker.in_flight]
        yield "contentfilter_in_flight_oldest_seconds", (), max(ages, default=0.0)
        if status.waiting is not None and status.waiting_limit is not None:
            yield "contentfilter_waiting", (), status.waiting
            yield "contentfilter_waiting_limit", (), status.waiting_limit
        yield "contentfilter_frames_malformed_total", (), status.malformed
        yield "contentfilter_generation", (), status.generation
        ends = {bypass.scanner: bypass.until for bypass in status.bypasses}
        for scanner in SCANNERS:
            yield "contentfilter_bypass_active", (scanner.value,), scanner in ends
            if scanner in ends:
                yield "contentfilter_bypass_until_timestamp_seconds", (scanner.value,), ends[scanner]
        yield "contentfilter_drained", (), status.drain is not None
        yield "contentfilter_configuration_problems", (), len(status.problems)
        if (tables := status.tables) is not None and tables.loaded:
            yield "contentfilter_table_rows", ("clamavclients",), tables.clamav_rows
            yield "contentfilter_table_rows", ("spamdclients",), tables.spamd_rows
            yield "contentfilter_tables_checked_timestamp_seconds", (), time.time() - tables.age
        yield "contentfilter_quarantine_quota_bytes", (), settings.quarantine.quota
        yield "contentfilter_refused_connections_total", (), status.refused_total
        yield "contentfilter_journal_lost_total", (), status.not_recorded


def _http_server() -> "type[HttpServer]":
    """Load uvicorn, which is large, only for those who use it, and off the loop."""
    from contentfilter.monitor.http_server import HttpServer

    return HttpServer


def _read_journal(path: Path, history: History, done: Callable[[], None]) -> None:
    """Count the messages of the last three hours. In a thread that nobody joins: a disk may hang."""
    try:
        with Journal.reading(path) as journal:
            found = journal.find(Query(since=time.time() - MINUTES * 60), RESTORED_MAX)
    except JournalError:
        found = []  # off, new or damaged
    wall, now = time.time(), time.monotonic()
    for position, mail in enumerate(reversed(found), 1 - len(found)):
        detail = msgspec.json.encode(mail.account) if position > -RECENT_SHOWN else b""
        if mail.time <= wall:
            history.event(mail.fields, detail, now - (wall - mail.time))
    done()


def _resolve(loop: asyncio.AbstractEventLoop, known: "asyncio.Future[None]") -> None:
    """From a thread. The loop may have ended."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(_set, known)


def _set(known: "asyncio.Future[None]") -> None:
    if not known.done():
        known.set_result(None)


def _plain(accept: str, name: str, problems: tuple[str, ...]) -> Response:
    """A line for each problem, or JSON if the client asks for it."""
    status = HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK
    if "application/json" in accept:
        body = msgspec.json.encode({name: not problems, "problems": problems})
        return Response(body, "application/json", status)
    return Response("".join(f"{line}\n" for line in problems or (name,)).encode(), status=status)
