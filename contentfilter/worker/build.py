"""Builds the pipeline of a configuration, with everything that it holds open."""

import asyncio
import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Callable

from contentfilter.config.controls import read_controls
from contentfilter.config.load import load_settings
from contentfilter.config.runtime import Runtime, make_runtime, worker_count
from contentfilter.errors import ConfigError
from contentfilter.model import Scanner
from contentfilter.pipeline import Pipeline, Scanners
from contentfilter.policy.overrides import AllowEntry, Bypass
from contentfilter.scanners.cache import ScanCache
from contentfilter.scanners.clamd import ClamdScanner
from contentfilter.scanners.limiter import ScannerLimiter
from contentfilter.scanners.pool import BackendHealth
from contentfilter.scanners.signatures.engine import (
    Engine,
)
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
    ) -> None:
        """``secret``, ``bypasses``, ``allowed``, ``recall``: see Pipeline; ``shed``: see Turns.

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
            ScannerLimiter(Scanner.CLAMD, len(clamd.backends) * clamd.concurrency, clamd.max_wait, shed),
            ScannerLimiter(Scanner.SPAMD, len(spamd.backends) * children, spamd.max_wait, shed),
        )
        lookup, owners = (self.snapshot.lookup, self.snapshot.owners) if self.snapshot else (None, None)
        self.pipeline = Pipeline(
            settings,
            runtime.switches,
            lookup,
            scanners,
            Quarantine.of(settings),
            secret,
            allowed,
            owners,
            bypasses,
            recall,
        )

    @classmethod
    async def open(cls, config_path: str) -> "PipelineBundle":
        """Straight from the sources, for a single look: with a temporary snapshot.

        Tables that cannot be read are those that the daemon goes on with, if there are any.
        """
        settings = load_settings(config_path)
        bypasses, allowed, _ = read_usable(settings.service.state)  # the daemon logs the problems
        controls, _ = await read_controls(settings.service.control)
        try:
            found = await read_source(settings)
        except ConfigError:
            kept = os.path.join(settings.service.state, SNAPSHOT)
            if not os.path.exists(kept):  # noqa: ASYNC240 - one look, and nobody else is on this loop
                raise
            return cls(make_runtime(settings, controls, kept)[0], bypasses=lambda: bypasses, allowed=lambda: allowed)
        assert found is not None, "nothing was known"  # noqa: S101
        with tempfile.TemporaryDirectory(prefix="contentfilter-") as directory:
            runtime, _ = make_runtime(settings, controls, os.path.join(directory, SNAPSHOT))
            compile_snapshot(found[0], runtime.snapshot)
            return cls(runtime, bypasses=lambda: bypasses, allowed=lambda: allowed)

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
