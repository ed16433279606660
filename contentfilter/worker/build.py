"""Where everything is put together: configuration is read in the supervisor, and built into a pipeline in each worker.

The supervisor reads settings, control files and tables, compiles the tables to a snapshot in the state
directory, and ships one blob. A worker turns the blob into a pipeline; it opens no configuration file but
the snapshot. ``explain`` does both in one process.
"""

import asyncio
import dataclasses
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from contentfilter.bus.messages import Event
from contentfilter.config.controls import Controls, read_controls
from contentfilter.config.keys import load_keys
from contentfilter.config.load import load_settings
from contentfilter.doors.admission import Job, Offered, deferral
from contentfilter.doors.message import read_envelope
from contentfilter.errors import ConfigError, EnvelopeError, MessageError, Problem
from contentfilter.model import Envelope, Scanner
from contentfilter.monitor.canary import SEEN, Seen, answer_for
from contentfilter.monitor.samples import ASKED, Mark, make_samples, recognise
from contentfilter.pipeline import Pipeline, Scanners
from contentfilter.policy.bypass import Bypass
from contentfilter.policy.plan import Switches
from contentfilter.policy.tolerance import Allowance
from contentfilter.scanners.cache import Recall
from contentfilter.scanners.clamd import ClamdScanner
from contentfilter.scanners.limiter import Turns
from contentfilter.scanners.pool import BackendHealth
from contentfilter.scanners.signatures.engine import (
    Engine,
    Rules,
    default_loadertypes,
    default_signatures,
    parse_loadertypes,
    parse_signatures,
)
from contentfilter.scanners.spamd import SpamdScanner
from contentfilter.scanners.tls import needed
from contentfilter.settings import Settings
from contentfilter.store.allow import read_allowed
from contentfilter.store.bypass import read_bypasses
from contentfilter.store.poison import isolate
from contentfilter.store.quarantine import Quarantine
from contentfilter.store.release import load_secret
from contentfilter.supervisor.source import Loaded
from contentfilter.supervisor.supervisor import worker_count
from contentfilter.tables.keeper import Keeper, State, read_source
from contentfilter.tables.snapshot import FILE as SNAPSHOT
from contentfilter.tables.snapshot import Snapshot, compile_snapshot
from contentfilter.verdict.record import (
    Account,
    Record,
    fields,
    make_account,
    make_record,
    make_scans,
    ordinary,
    steps,
    troubled,
)
from contentfilter.wire import envelope as envelope_format
from contentfilter.wire import hook
from contentfilter.worker.main import Surroundings

NOTED_ENVELOPE = 65_536  # bytes; a larger one is not read for a message that is turned away


class Runtime(msgspec.Struct, frozen=True):
    """All that a worker needs to know."""

    settings: Settings
    switches: Switches
    spamdchildren: int
    signatures: Rules | None  # None where the switch is off
    loadertypes: Rules | None
    snapshot: str  # empty: there are no tables yet
    allowed: tuple[Allowance, ...] = ()
    smtplog: int = 0
    sysfacility: str = ""


# The supervisor's side


class Files:
    """The configuration from files, for the supervisor. ``workers`` and ``socket`` override the settings."""

    def __init__(self, config_path: str, *, workers: int | None = None, socket: str | None = None) -> None:
        self._path = config_path
        self._workers = workers
        self._socket = socket
        self._keeper = Keeper()
        self._problems: tuple[Problem, ...] = ()
        self._runtime: Runtime | None = None

    async def load(self) -> Loaded:
        """Read everything anew. Raises ConfigError."""
        settings = load_settings(self._path)
        if self._workers is not None:
            settings = msgspec.structs.replace(
                settings, service=msgspec.structs.replace(settings.service, workers=self._workers)
            )
        if self._socket is not None:
            settings = msgspec.structs.replace(
                settings, listen=msgspec.structs.replace(settings.listen, socket=self._socket)
            )
        if wrong := unusable(settings):
            raise ConfigError(wrong)
        controls, problems = await read_controls(settings.service.control)
        runtime, more = make_runtime(settings, controls, "")
        _, table_problems = await self._keeper.update(settings, anew=True)
        self._runtime, self._problems = runtime, (*problems, *more)
        return self._loaded(runtime, table_problems)

    async def refresh(self) -> Loaded | None:
        """Look at the tables only."""
        runtime = self._runtime
        if runtime is None:
            return None
        changed, problems = await self._keeper.update(runtime.settings, anew=False)
        allowed, wrong = read_allowances(runtime.settings)
        if allowed != runtime.allowed:
            self._runtime = runtime = msgspec.structs.replace(runtime, allowed=allowed)
            changed = True
        return self._loaded(runtime, (*problems, *wrong)) if changed else None

    def tables(self) -> State:
        """How the tables in force stand."""
        return self._keeper.state()

    def _loaded(self, runtime: Runtime, table_problems: tuple[Problem, ...]) -> Loaded:
        runtime = msgspec.structs.replace(runtime, snapshot=self._keeper.path)
        blob = msgspec.msgpack.encode(runtime)
        samples = make_samples(runtime.settings, runtime.signatures, runtime.loadertypes, runtime.allowed)
        return Loaded(runtime.settings, blob, (*self._problems, *table_problems), samples, runtime.sysfacility)


def unusable(settings: Settings) -> tuple[Problem, ...]:
    """What is wrong with the certificates and keys that the settings name."""
    found: list[Problem] = []
    for load in (lambda: needed(settings.spamd), lambda: load_keys(settings.events)):
        try:
            load()
        except ConfigError as error:
            found += error.problems
        except ValueError:
            pass  # the settings' own check has told
    return tuple(found)


def read_allowances(settings: Settings) -> tuple[tuple[Allowance, ...], tuple[Problem, ...]]:
    """The allow-list. A damaged one allows nothing; mail does not wait for its repair."""
    try:
        return read_allowed(settings.service.state), ()
    except ConfigError as error:
        return (), error.problems


def make_runtime(settings: Settings, controls: Controls, snapshot: str) -> tuple[Runtime, tuple[Problem, ...]]:
    """Settings and control files as one value, and what is wrong in the signature lists."""
    switches = Switches(**{f.name: controls.values[f.name] for f in dataclasses.fields(Switches)})
    problems: list[Problem] = []

    def rules(text: bytes | None, name: str) -> Rules:
        if text is None:
            return default_signatures() if name == "badsignatures" else default_loadertypes()
        parse = parse_signatures if name == "badsignatures" else parse_loadertypes
        found, wrong = parse(text, os.path.join(settings.service.control, name))
        problems.extend(wrong)
        return found

    signatures, loadertypes = (
        rules(controls.badsignatures, "badsignatures"),
        rules(controls.badloadertypes, "badloadertypes"),
    )
    allowed, damaged = read_allowances(settings)
    runtime = Runtime(
        settings,
        switches,
        controls.values["spamdchildren"],
        signatures if switches.chksignature else None,
        loadertypes if switches.chkloadertype else None,
        snapshot,
        allowed,
        controls.values["smtplog"],
        controls.values["sysfacility"],
    )
    return runtime, (*problems, *damaged)


# The worker's side


class Workbench:
    """A pipeline with everything that it holds open."""

    def __init__(
        self,
        runtime: Runtime,
        secret: bytes = b"",
        bypasses: Callable[[], tuple[Bypass, ...]] = tuple,
        recall: Recall | None = None,
        shed: Counter[str] | None = None,
    ) -> None:
        """``secret``, ``bypasses``, ``recall``: see Pipeline; ``shed``: see Turns.

        Raises ConfigError for a snapshot that cannot be used.
        """
        shed = Counter() if shed is None else shed
        settings = runtime.settings
        self.snapshot = (
            Snapshot.open(runtime.snapshot, settings.tables.extension.encode()) if runtime.snapshot else None
        )
        lists = (runtime.signatures, runtime.loadertypes)
        # spamdchildren is for the machine; each worker keeps to its share
        children = max(1, runtime.spamdchildren // worker_count(settings))
        clamd, spamd = settings.clamd, settings.spamd
        scanners = Scanners(
            Engine(*lists, settings.signatures.mode) if any(lists) else None,
            ClamdScanner(clamd),
            SpamdScanner(spamd, children),
            Turns(Scanner.CLAMD, len(clamd.backends) * clamd.concurrency, clamd.max_wait, shed),
            Turns(Scanner.SPAMD, len(spamd.backends) * children, spamd.max_wait, shed),
        )
        lookup, owners = (self.snapshot.lookup, self.snapshot.owners) if self.snapshot else (None, None)
        self.pipeline = Pipeline(
            settings,
            runtime.switches,
            lookup,
            scanners,
            Quarantine.of(settings),
            secret,
            runtime.allowed,
            owners,
            bypasses,
            recall,
        )

    @classmethod
    async def open(cls, config_path: str) -> "Workbench":
        """Straight from the sources, for a single look: with a temporary snapshot.

        Tables that cannot be read are those that the daemon goes on with, if there are any.
        """
        settings = load_settings(config_path)
        bypasses: tuple[Bypass, ...] = ()
        with suppress(ConfigError):  # a damaged file bypasses nothing; the daemon tells about it
            bypasses = read_bypasses(settings.service.state)
        controls, _ = await read_controls(settings.service.control)
        try:
            found = await read_source(settings)
        except ConfigError:
            kept = os.path.join(settings.service.state, SNAPSHOT)
            if not os.path.exists(kept):  # noqa: ASYNC240 - one look, and nobody else is on this loop
                raise
            return cls(make_runtime(settings, controls, kept)[0], bypasses=lambda: bypasses)
        assert found is not None, "nothing was known"  # noqa: S101
        with tempfile.TemporaryDirectory(prefix="contentfilter-") as directory:
            runtime, _ = make_runtime(settings, controls, os.path.join(directory, SNAPSHOT))
            compile_snapshot(found[0], runtime.snapshot)
            return cls(runtime, bypasses=lambda: bypasses)

    def backends(self) -> tuple[BackendHealth, ...]:
        """How clamd and spamd stand, and whether there is mail that needs them."""
        switches, header = self.pipeline.switches, self.snapshot.header if self.snapshot else None
        clamd = switches.clamglobal or header is None or header.clamav_rows > 0
        spamd = switches.spamglobal or header is None or header.spamd_rows > 0
        scanners = self.pipeline.scanners
        return tuple(
            dataclasses.replace(health, wanted=wanted)
            for pool, wanted in ((scanners.clamd.pool, clamd), (scanners.spamd.pool, spamd))
            for health in pool.describe()
        )

    async def watch(self) -> None:
        """Until it is cancelled: keep what is known about the backends fresh."""
        scanners = self.pipeline.scanners
        await asyncio.gather(scanners.clamd.watch(), scanners.spamd.watch())

    async def aclose(self) -> None:
        if self.snapshot:
            self.snapshot.close()


class Application:
    """What a worker does with each message."""

    def __init__(self, runtime: Runtime, surroundings: Surroundings) -> None:
        self.settings = runtime.settings
        self._smtplog = runtime.smtplog
        self._surroundings = surroundings
        self._secret, self._uid = self._load_secret(), os.geteuid()
        around = surroundings
        self._workbench = Workbench(runtime, self._secret, around.bypasses, around.recall, around.shed)
        surroundings.recall.change(self.settings.reuse)
        self._watching = asyncio.create_task(self._watch())

    def _load_secret(self) -> bytes:
        try:
            return load_secret(Path(self.settings.service.state))
        except OSError as error:
            self._surroundings.log.warning("quarantine.no-secret", why=str(error))
            return b""

    async def handle(self, job: Job) -> hook.Answer:
        """The answer, and one line in the log and on the bus; the whole story where smtplog asks for it."""
        try:
            envelope = envelope_format.parse(job.envelope)
        except EnvelopeError as error:  # the hook checks it too: this is somebody else's program
            self._surroundings.log.warning("intake.bad-envelope", id=job.incident, why=str(error))
            return deferral("the envelope is malformed", job.incident)
        if (mark := self._canary(job)) is not None:
            return await self._sing(mark, job)
        return await self._workbench.pipeline.handle(
            job.incident, envelope, job.message, job.origin, job.deadline, self._emit, job.request.attempt
        )

    async def isolate(self, job: Job, fingerprint: str) -> hook.Answer:
        """The answer for a message that killed workers. It is kept, and logged as any other."""
        try:
            envelope = envelope_format.parse(job.envelope)
        except EnvelopeError:
            return deferral("the envelope is malformed", job.incident)
        facts = (job.incident, envelope, job.message, job.origin, job.request.attempt, fingerprint)
        done = await isolate(*facts, self.settings, self._workbench.pipeline.switches)
        log, record = self._surroundings.log, done.record
        if done.trouble:
            log.error("poison.not-kept", id=record.id, why=done.trouble)
        log.error("poison.isolated", id=record.id, fingerprint=fingerprint, decision=record.decision, kept=done.kept)
        self._surroundings.emit(Event("poison.isolated", {"id": record.id}))
        self._emit(record, done.account)
        return done.answer

    def turned_away(self, offered: Offered, why: str, answer: hook.Answer, seconds: float) -> None:
        """Like mail that was decided, so that its incident is found; it was not opened, only its envelope is read."""
        envelope, size = Envelope(b"", ()), offered.request.envelope_size
        if size <= NOTED_ENVELOPE:
            with suppress(MessageError, EnvelopeError, IndexError):
                envelope = envelope_format.parse(read_envelope(offered.fds[-1], size))
        rule = f"busy: {why}, {seconds:.0f} s without a free place"
        pipeline, size = self._workbench.pipeline, offered.request.message_size
        case = pipeline.unopened(offered.incident, envelope, offered.origin, size, rule)
        self._emit(make_record(case, offered.request.attempt, seconds), make_account(case, answer.text))

    def _canary(self, job: Job) -> Mark | None:
        """The mark of a sample that our own supervisor sent; None: this is mail."""
        if job.origin.uid != self._uid or job.origin.remote_ip:
            return None
        return recognise(job.request.environ, self._secret, job.message.data, time.time())

    async def _sing(self, mark: Mark, job: Job) -> hook.Answer:
        """Look at a sample as at mail. It is not queued, kept, logged or counted; the supervisor gets the account."""
        outcomes = await self._workbench.pipeline.probe(job.message, ASKED[mark.sample], job.deadline)
        seen = Seen(mark.nonce, mark.sample, make_scans(outcomes))
        self._surroundings.emit(Event(SEEN, msgspec.to_builtins(seen)))
        action = answer_for(seen.scans)
        text = "" if action is hook.Action.DROP else f"canary {mark.sample} [{job.incident}]"
        return hook.Answer(action, text=text)

    def backends(self) -> tuple[BackendHealth, ...]:
        return self._workbench.backends()

    def _emit(self, record: Record, account: Account) -> None:
        plain, log = fields(record), self._surroundings.log
        if troubled(record):
            log.warning("mail.done", **plain)
        else:
            log.info("mail.done", **plain)
        if self._smtplog > 1 or (self._smtplog and not ordinary(record)):
            for stage, text in steps(account):
                log.info("mail.step", id=record.id, stage=stage, text=text)
        self._surroundings.emit(Event("mail.done", plain, msgspec.json.encode(account)))

    async def _watch(self) -> None:
        """Mail goes on without it: then mail finds out which backend is well."""
        try:
            await self._workbench.watch()
        except Exception:
            self._surroundings.log.exception("backends.watch-failed")

    async def close(self) -> None:
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self._workbench.aclose()


async def build(blob: bytes, surroundings: Surroundings) -> Application:
    """The configuration blob becomes an application."""
    return Application(msgspec.msgpack.decode(blob, type=Runtime), surroundings)
