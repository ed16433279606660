"""Canary: sends samples through the real hook at intervals and checks the results.

Success means that a worker got the sample from the hook, asked the scanner, and gave the expected answer; a daemon that
only runs is not enough. No sample can be delivered, whatever goes wrong, for three reasons of which each is sufficient:

1. its envelope names no recipient;
2. its hook runs under a configuration of its own in which `queue` is /dev/null, which cannot be executed;
   before each round the hook's `--check` must confirm it;
3. a worker answers it with drop, reject or defer, never with queue.

The worker reports the scans over the bus, with the sample's nonce. The hook's exit status must agree.
"""

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from contentfilter.bus import messages
from contentfilter.bus.messages import CANARY_SEEN, CanarySeen
from contentfilter.deadline import Deadline
from contentfilter.doors import canary
from contentfilter.doors.canary import answer_for
from contentfilter.errors import Cause, RefusedError
from contentfilter.log import Logger, RateLimiter
from contentfilter.model import Action, ScanStatus
from contentfilter.monitor.canary_hook import (
    AGAIN_WAIT,
    ANSWER_WAIT,
    NOT_STARTED,
    CanaryError,
    Ended,
    hand_over,
    prepare,
)
from contentfilter.monitor.measure import Measurement as Measured
from contentfilter.monitor.samples import Sample
from contentfilter.qmail import QmailPaths, packaged_hook, version_of
from contentfilter.settings import Settings
from contentfilter.store.release import load_secret
from contentfilter.threads import in_thread
from contentfilter.verdict.record import ScanRecord

EVENT_WAIT = 3.0  # seconds for the worker's report, when the hook has ended
AGAIN = 2.0  # seconds between rounds after a failure, so that recovery shows soon
READY_WAIT = 1.0  # seconds until a daemon that is not ready is checked again
LOG_AGAIN = 600.0  # seconds after which a failure that lasts is logged again
STATUSES = {Action.DROP: 0, Action.REJECT: 31, Action.DEFER: 71}
"""Exit statuses of the hook in the dialect `stock`."""


_Outcome = tuple[str, str, float]
"""Result, its text for people, seconds."""


def judge(sample: Sample, ended: Ended, seen: CanarySeen | None) -> tuple[str, str]:
    """One word of metrics.CANARY_RESULTS, and its text for people."""
    if ended.status == NOT_STARTED:
        return "unknown", "the daemon on the hook's socket took it for ordinary mail: another daemon, or another key"
    if ended.status not in STATUSES.values():
        return "failed", f"the hook ended with status {ended.status}: {ended.said or 'no output'}"
    if seen is None:
        return "no-answer", f"no worker of this daemon got it in time: {ended.said}".rstrip()
    expected = STATUSES[answer_for(seen.scans)]
    if ended.status != expected:
        return "failed", f"the hook ended with status {ended.status}, the worker's answer means {expected}"
    if not seen.scans:
        return "unchecked", "the worker asked no scanner"
    for scan in seen.scans:
        if scan.cause == Cause.BYPASSED.value:
            return "bypassed", f"{scan.scanner}: {scan.detail}"
    for scan in seen.scans:
        if scan.status == ScanStatus.FOUND.value:
            score = "" if scan.score is None else f"{scan.score:g} points of {scan.threshold or 0:g}"
            return "caught", " ".join(filter(None, (f"{scan.scanner}:", scan.name, score, _at(scan))))
    for scan in seen.scans:
        if scan.status != ScanStatus.CLEAN.value:
            return "unchecked", f"{scan.scanner}: {scan.cause or scan.status} {scan.detail} {_at(scan)}".rstrip()
    let_through = [f"; {scan.detail}" for scan in seen.scans if " passed, " in scan.detail]  # policy.overrides
    return "passed", f"{', '.join(scan.scanner for scan in seen.scans)} found nothing{''.join(let_through)}"


def _at(scan: ScanRecord) -> str:
    return f"({scan.backend})" if scan.backend else ""


def find_hook(settings: Settings) -> Path | None:
    """The hook that mail goes through; None if there is none."""
    if settings.canary.hook:
        return Path(settings.canary.hook)
    installed = QmailPaths(Path(settings.service.control).parent).queue
    if version_of(installed) is not None:
        return installed
    try:
        return packaged_hook(None)
    except RefusedError:
        return None


class Canary:
    """:meth:`run` once, in the background. One round at a time."""

    def __init__(
        self,
        log: Logger,
        in_force: Callable[[], tuple[Settings, tuple[Sample, ...]]],
        state: Callable[[], str],
    ) -> None:
        """``in_force``: the settings, and the samples made for them.

        ``state``: as messages.Status has it; samples are sent only in ``ready``.
        """
        self._log = log
        self._in_force = in_force
        self._state = state
        self._one = asyncio.Lock()
        self._expected: dict[str, asyncio.Future[CanarySeen]] = {}
        self._again = RateLimiter(LOG_AGAIN)
        self._logged: Mapping[str, str] = {}
        self._off = ""
        self.results: tuple[messages.CanaryResult, ...] = ()

    def others(self, events: Iterable[messages.Event]) -> Iterable[messages.Event]:
        """Events that are not about samples; those about samples are consumed here."""
        for event in events:
            if event.name != CANARY_SEEN:
                yield event
                continue
            with suppress(msgspec.ValidationError):
                seen = msgspec.convert(event.fields, CanarySeen)
                future = self._expected.pop(seen.nonce, None)
                if future is not None and not future.done():
                    future.set_result(seen)

    async def run(self) -> None:
        """A round at each interval. Does not return."""
        while True:
            began = time.monotonic()
            wanted, ready = self._in_force()[0].canary, self._state() == "ready"
            if not wanted.enabled:
                self.results, self._logged = (), {}
            elif ready:
                try:
                    await self.round()
                except Exception:  # a defect here is no reason to end the daemon
                    self._log.exception("canary.defect")
            every = min(wanted.every, AGAIN) if self._failed() else wanted.every
            every = every if ready else READY_WAIT
            await asyncio.sleep(max(0.0, began + every - time.monotonic()))

    def _failed(self) -> bool:
        return any(result.ok is False and result.result != "bypassed" for result in self.results)

    async def round(self) -> messages.CanaryRound:
        """Send every sample once, all simultaneously."""
        async with self._one:
            if (state := self._state()) != "ready":
                return messages.CanaryRound(self.results, f"the daemon is {state}: nothing was sent")
            settings, samples = self._in_force()
            program = await in_thread(lambda: find_hook(settings))
            if program is None:
                self.results = ()
                self._log_off("no hook on this server: `contentfilter hook install`, or name it in [canary] hook")
                return messages.CanaryRound((), self._off)
            self._off = ""
            sent = [sample for sample in samples if not sample.skip]
            self._keep(samples, await self._send(sent, program, settings) if sent else {})
            return messages.CanaryRound(self.results)

    async def _send(self, samples: list[Sample], program: Path, settings: Settings) -> dict[str, _Outcome]:
        """The outcome for each sample."""
        try:
            state = Path(settings.service.state)
            secret = await in_thread(lambda: load_secret(state))
            silent = any(result.result == "no-answer" for result in self.results)
            conf = await prepare(program, settings.canary.conf, AGAIN_WAIT if silent else ANSWER_WAIT)
        except (OSError, CanaryError) as error:
            return {sample.name: ("failed", str(error), 0.0) for sample in samples}
        try:
            said = await asyncio.gather(*(self._try(sample, program, conf, secret) for sample in samples))
        finally:
            os.close(conf)
        return {sample.name: outcome for sample, outcome in zip(samples, said, strict=True)}

    async def _try(self, sample: Sample, program: Path, conf: int, secret: bytes) -> _Outcome:
        began = time.monotonic()
        nonce, now = secrets.token_hex(16), time.time()
        message = sample.message(nonce, now)
        mark = canary.sign(secret, sample.name, nonce, int(now) + canary.LIFETIME, message)
        seen = self._expected[nonce] = asyncio.get_running_loop().create_future()
        try:
            ended = await hand_over(program, conf, mark, message)
            seconds = time.monotonic() - began
            if ended.status in STATUSES.values():
                with suppress(TimeoutError):
                    async with Deadline.after(EVENT_WAIT).timeout():
                        await asyncio.wait((seen,))
        except (OSError, CanaryError) as error:
            return "failed", str(error), time.monotonic() - began
        finally:
            self._expected.pop(nonce, None)
        result, text = judge(sample, ended, seen.result() if seen.done() else None)
        return result, text, seconds

    def _keep(self, samples: Iterable[Sample], judged: Mapping[str, _Outcome]) -> None:
        before = {result.sample: result for result in self.results}
        results = []
        now = time.time()
        for sample in samples:
            old = before.get(sample.name)
            runs = dict(old.runs) if old else {}
            success = old.last_success if old else None
            result, text, seconds = judged.get(sample.name, ("skipped", sample.skip, 0.0))
            ok = None if sample.skip else result == sample.wanted
            if not sample.skip:
                runs[result] = runs.get(result, 0) + 1
            found = messages.CanaryResult(
                sample.name, result, ok, text, round(seconds, 4), now, now if ok else success, runs
            )
            results.append(found)
        self.results = tuple(results)
        self._log_results()

    def _log_results(self) -> None:
        """Log changes, and repeatedly a failure that lasts; not each round."""
        words = {result.sample: result.result for result in self.results}
        bad = [result for result in self.results if result.ok is False]
        if words != self._logged:
            self._again = RateLimiter(LOG_AGAIN)
        elif not bad:
            self._log.debug("canary.done", results=words)
            return
        if bad and self._again.allow() is None:
            return
        self._logged = words
        for result in bad:
            self._log.warning("canary.failed", sample=result.sample, result=result.result, why=result.text)
        if not bad:
            self._log.info("canary.done", results=words)

    def _log_off(self, why: str) -> None:
        if why != self._off:
            self._log.warning("canary.off", why=why)
        self._off, self._logged = why, {}


def measured(results: Iterable[messages.CanaryResult]) -> Iterable[Measured]:
    """For /metrics. What is skipped or bypassed has no result: somebody wanted it so, and other metrics tell."""
    for result in results:
        labels = (result.sample,)
        if result.ok is not None and result.result != "bypassed":
            yield "contentfilter_canary_result", labels, result.ok
            yield "contentfilter_canary_seconds", labels, result.seconds
            if result.last_success is not None:
                yield "contentfilter_canary_last_success_timestamp_seconds", labels, result.last_success
        for word, count in result.runs.items():
            yield "contentfilter_canary_runs_total", (result.sample, word), count
