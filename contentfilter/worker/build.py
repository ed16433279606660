"""Composition root: builds the pipeline of a configuration, with everything that it holds open."""

import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Executor

from contentfilter.config.controls import read_controls
from contentfilter.config.load import load_settings
from contentfilter.config.runtime import Runtime, make_runtime, worker_count
from contentfilter.errors import ConfigError
from contentfilter.model import Scanner
from contentfilter.pipeline import Pipeline, Scanners
from contentfilter.policy.overrides import AllowEntry, Bypass
from contentfilter.scanners.cache import ScanCache
from contentfilter.scanners.clamd import ClamdScanner
from contentfilter.scanners.health import BackendHealth, ProbeResult
from contentfilter.scanners.signatures.engine import Engine
from contentfilter.scanners.spamd import SpamdScanner
from contentfilter.store.overrides import read_usable
from contentfilter.store.quarantine import Quarantine
from contentfilter.tables.keeper import read_source
from contentfilter.tables.snapshot import FILE as SNAPSHOT
from contentfilter.tables.snapshot import Snapshot, compile_snapshot


class PipelineBundle:
    """A pipeline with everything that it holds open."""

    def __init__(
        self,
        runtime: Runtime,
        secret: bytes = b"",
        bypasses: Callable[[], tuple[Bypass, ...]] = tuple,
        allowed: Callable[[], tuple[AllowEntry, ...]] = tuple,
        recall: ScanCache | None = None,
        shed: Counter[str] | None = None,
        disk: Executor | None = None,
    ) -> None:
        """``secret``, ``bypasses``, ``allowed``, ``recall``: see Pipeline; ``shed``: see ScannerLimiter.

        ``disk``: see Quarantine.

        Raises ConfigError for a snapshot that cannot be used.
        """
        shed = Counter() if shed is None else shed
        settings = runtime.settings
        self.snapshot = (
            Snapshot.open(runtime.snapshot, settings.tables.extension.encode()) if runtime.snapshot else None
        )
        lists = (runtime.signatures, runtime.loadertypes)
        # spamdchildren counts for the whole machine; each worker keeps to its share
        children = max(1, runtime.spamdchildren // worker_count(settings))
        scanners = Scanners(
            Engine(*lists, settings.signatures.mode, settings.signatures.formats) if any(lists) else None,
            ClamdScanner(settings.clamd, shed=shed, patience=settings.failure.patience),
            SpamdScanner(settings.spamd, children, shed=shed, patience=settings.failure.patience),
        )
        lookup, owners = (self.snapshot.lookup, self.snapshot.owners) if self.snapshot else (None, None)
        self.pipeline = Pipeline(
            settings,
            runtime.switches,
            lookup,
            scanners,
            Quarantine.of(settings, disk),
            secret,
            allowed,
            owners,
            bypasses,
            recall,
            disk,
        )

    @classmethod
    async def open(cls, config_path: str) -> "PipelineBundle":
        """Directly from the sources, with a temporary snapshot, for commands that examine one message.

        If the tables cannot be read, the snapshot that the daemon uses is taken, if there is one. Raises ConfigError.
        """
        settings = load_settings(config_path)
        bypasses, allowed, _ = read_usable(settings.service.state)  # the daemon logs the problems
        controls, _ = await read_controls(settings.service.control)
        try:
            found = await read_source(settings)
        except ConfigError:
            snapshot = os.path.join(settings.service.state, SNAPSHOT)
            if not os.path.exists(snapshot):  # noqa: ASYNC240 - a single call, and the loop has no other task
                raise
            return cls(
                make_runtime(settings, controls, snapshot)[0], bypasses=lambda: bypasses, allowed=lambda: allowed
            )
        assert found is not None, "there was no earlier state that could be unchanged"  # noqa: S101
        with tempfile.TemporaryDirectory(prefix="contentfilter-") as directory:
            runtime, _ = make_runtime(settings, controls, os.path.join(directory, SNAPSHOT))
            compile_snapshot(found[0], runtime.snapshot)
            return cls(runtime, bypasses=lambda: bypasses, allowed=lambda: allowed)

    def backends(self) -> tuple[BackendHealth, ...]:
        """State of clamd's and spamd's backends, and whether any mail needs them."""
        switches, header = self.pipeline.switches, self.snapshot.header if self.snapshot else None
        clamd = switches.clamglobal or header is None or header.clamav_rows > 0
        spamd = switches.spamglobal or header is None or header.spamd_rows > 0
        scanners = self.pipeline.scanners
        return tuple(
            dataclasses.replace(health, wanted=wanted)
            for limiter, wanted in ((scanners.clamd.limiter, clamd), (scanners.spamd.limiter, spamd))
            for health in limiter.describe()
        )

    def learn(self, results: Iterable[ProbeResult]) -> None:
        """Take results of the prober."""
        scanners = self.pipeline.scanners
        for result in results:
            (scanners.clamd if result.scanner is Scanner.CLAMD else scanners.spamd).learn(result)

    async def aclose(self) -> None:
        if self.snapshot:
            self.snapshot.close()
