"""Metrics: their names and meanings, one registry that counts events, and its text for Prometheus.

Every label is from a closed set: words of this program, or names from the configuration; never an address, a
domain, a signature or anything else from a message. A malformed event is only counted as such. Counting is cheap and
belongs to the event loop; :meth:`Metrics.render` takes milliseconds and is for a thread.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client import Metric as Family
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from contentfilter.errors import Cause
from contentfilter.model import Action, OriginKind, Reason, Scanner, ScanStatus
from contentfilter.policy.shedding import SHED

SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
    0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 240.0,
)  # fmt: skip
"""Upper bounds of the buckets: from a signature scan of a short message to the whole budget."""
LAG = (0.001, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)
OTHER = "other"
"""Replaces a word that this version does not know."""
REMEMBERED = 4096
"""Workers, dead ones too, whose last counts are kept: their last reports may come late."""

Values = Mapping[str, Iterable[tuple[tuple[str, ...], float]]]
"""Name of a metric -> its samples: label values in order, and the number."""


@dataclass(frozen=True, slots=True)
class Metric:
    kind: Literal["counter", "histogram", "gauge"]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_SCANS, _SCAN_SECONDS = ("scanner", "backend", "status", "cause"), ("scanner", "backend")

# Counted here, as it happens.
COUNTED = (
    Metric("counter", "contentfilter_messages_total", "Decided messages.", ("decision", "rule", "origin")),
    Metric("histogram", "contentfilter_message_seconds", "From intake to decision.", ("decision",), SECONDS),
    Metric("counter", "contentfilter_message_bytes_total", "Bytes of decided messages."),
    Metric("counter", "contentfilter_unchecked_total", "Messages let through without a check.", ("scanner", "cause")),
    Metric("counter", "contentfilter_quarantined_total", "Messages kept in quarantine for at least one recipient."),
    Metric("counter", "contentfilter_scans_total", "Scans.", _SCANS),
    Metric("histogram", "contentfilter_scan_seconds", "One scan, waiting included.", _SCAN_SECONDS, SECONDS),
    Metric("counter", "contentfilter_poison_total", "Offers of messages that killed two workers."),
    Metric("counter", "contentfilter_scans_reused_total", "Scans spared by an equal message's.", ("scanner", "how")),
    Metric("counter", "contentfilter_commits_total", "Messages that went on in several parts.", ("result",)),
    Metric("counter", "contentfilter_connections_total", "Connections that workers accepted."),
    Metric("counter", "contentfilter_answers_total", "Answers that were sent to hooks."),
    Metric("counter", "contentfilter_hook_retries_total", "Offers of a message that was offered before."),
    Metric("counter", "contentfilter_hooks_gone_total", "Hooks that went away before their answer."),
    Metric("counter", "contentfilter_garbage_total", "Connections that brought no sound request."),
    Metric("counter", "contentfilter_bad_messages_total", "Sound requests with descriptors that are no message."),
    Metric("counter", "contentfilter_crowded_total", "Hooks sent away for want of room; they come again."),
    Metric("counter", "contentfilter_shed_total", "What was left out for want of time.", ("what",)),
    Metric("counter", "contentfilter_internal_errors_total", "Messages deferred because of a defect."),
    Metric("counter", "contentfilter_events_lost_total", "Frames that workers could not send to the supervisor."),
    Metric("counter", "contentfilter_events_malformed_total", "Events that could not be counted."),
    Metric("histogram", "contentfilter_loop_lag_seconds", "By how much a worker's event loop was late.", (), LAG),
    Metric("counter", "contentfilter_loads_total", "Looks at configuration or tables.", ("result",)),
)

# Determined when they are read.
SEEN = (
    Metric("gauge", "contentfilter_build_info", "Always 1.", ("version",)),
    Metric("gauge", "contentfilter_start_timestamp_seconds", "When the daemon was started."),
    Metric("gauge", "contentfilter_ready", "1 while /ready says so."),
    Metric("gauge", "contentfilter_workers", "Worker processes.", ("state",)),
    Metric("gauge", "contentfilter_workers_wanted", "Worker processes that there should be."),
    Metric("counter", "contentfilter_worker_restarts_total", "Workers that ended unasked.", ("reason",)),
    Metric("gauge", "contentfilter_in_flight", "Connections that a worker has open.", ("worker",)),
    Metric("gauge", "contentfilter_in_flight_limit", "How many all workers together may have open."),
    Metric("gauge", "contentfilter_in_flight_bytes", "Bytes of the messages in flight."),
    Metric("gauge", "contentfilter_in_flight_oldest_seconds", "Age of the oldest message in flight."),
    Metric("gauge", "contentfilter_admission_waiting", "Messages that wait for a place.", ("worker",)),
    Metric("gauge", "contentfilter_short", "1 while mail waits for want of this.", ("resource",)),
    Metric("gauge", "contentfilter_waiting", "Hooks that wait for a worker to accept them."),
    Metric("gauge", "contentfilter_waiting_limit", "How many can wait; further ones have to come again."),
    Metric("counter", "contentfilter_frames_malformed_total", "Frames on the bus that could not be decoded."),
    Metric("gauge", "contentfilter_generation", "Number of the configuration in force, tables included."),
    Metric("gauge", "contentfilter_configuration_problems", "Problems that keep a newer configuration out."),
    Metric("gauge", "contentfilter_table_rows", "Rows of the recipient tables in force.", ("table",)),
    Metric("gauge", "contentfilter_tables_built_timestamp_seconds", "When the tables in force were read."),
    Metric("gauge", "contentfilter_tables_checked_timestamp_seconds", "When their source was last looked at."),
    Metric("gauge", "contentfilter_quarantine_entries", "Messages in quarantine."),
    Metric("gauge", "contentfilter_quarantine_bytes", "Bytes of the quarantine."),
    Metric("gauge", "contentfilter_quarantine_quota_bytes", "Bytes that it may take; 0: no limit."),
    Metric("gauge", "contentfilter_journal_bytes", "Bytes of the journal's files."),
    Metric(
        "counter",
        "contentfilter_refused_connections_total",
        "Connections of local users refused: limits, no request, too slow.",
    ),
    Metric("counter", "contentfilter_journal_lost_total", "Events that the journal could not take."),
    Metric("gauge", "contentfilter_state_free_bytes", "Free bytes where the state directory lies."),
    Metric("gauge", "contentfilter_state_size_bytes", "All bytes there."),
    Metric("gauge", "contentfilter_bypass_active", "1 while an operator has this scanner left out.", ("scanner",)),
    Metric("gauge", "contentfilter_bypass_until_timestamp_seconds", "When that ends.", ("scanner",)),
    Metric("gauge", "contentfilter_drained", "1 while no mail is accepted, by an operator's order."),
    Metric("gauge", "contentfilter_canary_result", "1 if the sample was treated as it should be.", ("sample",)),
    Metric(
        "gauge",
        "contentfilter_canary_last_success_timestamp_seconds",
        "When it last was, since the start.",
        ("sample",),
    ),
    Metric("gauge", "contentfilter_canary_seconds", "How long the sample took, hook included.", ("sample",)),
    Metric("counter", "contentfilter_canary_runs_total", "Samples sent through the hook.", ("sample", "result")),
    Metric("gauge", "contentfilter_clamd_up", "1 if clamd answered the last probe.", ("backend",)),
    Metric("gauge", "contentfilter_spamd_up", "1 if spamd answered the last probe.", ("backend",)),
    Metric("gauge", "contentfilter_clamd_info", "Always 1.", ("backend", "version")),
    Metric("gauge", "contentfilter_clamd_database_version", "Number of clamd's database.", ("backend",)),
    Metric("gauge", "contentfilter_clamd_database_timestamp_seconds", "When that was made.", ("backend",)),
)

METRICS = {metric.name: metric for metric in (*COUNTED, *SEEN)}

# A worker's own counters (its heartbeat has them since its start), and where they are added up.
FROM_WORKERS = {
    "accepted": "contentfilter_connections_total",
    "answered": "contentfilter_answers_total",
    "retries": "contentfilter_hook_retries_total",
    "gone": "contentfilter_hooks_gone_total",
    "garbage": "contentfilter_garbage_total",
    "bad_messages": "contentfilter_bad_messages_total",
    "errors": "contentfilter_internal_errors_total",
    "crowded": "contentfilter_crowded_total",
    "events_lost": "contentfilter_events_lost_total",
}
# The same for counters of one metric, by the value of its label.
SHED_FROM_WORKERS = {"busy": "waiting"} | {f"shed {what}": what for what in SHED if what != "waiting"}

DECISIONS = frozenset(action.value for action in Action)
ORIGINS = frozenset(kind.value for kind in OriginKind)
SCANNERS = frozenset(scanner.value for scanner in Scanner)
STATUSES = frozenset(status.value for status in ScanStatus)
CAUSES = frozenset(cause.value for cause in Cause) | {""}
RULES = SCANNERS | {
    "fault", "size", "clean", "unchecked", "nothing-to-check", "no-recipients", "released", "quarantine", "busy",
    OTHER
}  # fmt: skip
REUSED = frozenset(("kept", "shared"))  # scanners.cache
COMMITS = frozenset(("all", "none", "some", "unknown"))
CANARY_RESULTS = frozenset(
    ("passed", "caught", "unchecked", "bypassed", "no-answer", "unknown", "failed")
)  # monitor.canary.judge
LOADS = frozenset(("changed", "unchanged", "failed"))
_SHED = ("contentfilter_shed_total", SHED)

_PLAIN_RULES = (
    ("clean", "clean"),
    ("nothing to check", "nothing-to-check"),
    ("passed unchecked", "unchecked"),
    ("no recipients", "no-recipients"),
    ("released from quarantine", "released"),
    ("quarantine:", "quarantine"),
    ("busy:", "busy"),
)

_Number = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class _Scan(msgspec.Struct):
    """The parts of verdict.record.ScanRecord that are counted."""

    scanner: str
    status: str
    ms: _Number
    cause: str = ""
    backend: str = ""
    reused: str = ""


class _Mail(msgspec.Struct):
    """The parts of verdict.record.MailRecord that are counted."""

    origin: str
    decision: str
    reason: str
    rule: str
    size: _Number
    ms: _Number
    quarantined: _Number
    scans: tuple[_Scan, ...]


class _Report(msgspec.Struct):
    results: tuple[str, ...] | None


def rule_class(rule: str, reason: str) -> str:
    """One word of RULES for the rule that decided (policy.decide)."""
    scanner, colon, _ = rule.partition(":")
    if colon and scanner in SCANNERS:
        return "fault" if reason == Reason.NONE.value else scanner
    if reason == Reason.SIZE.value:
        return "size"
    return next((word for start, word in _PLAIN_RULES if rule.startswith(start)), OTHER)


def commit_result(results: Sequence[str] | None) -> str:
    """One word of COMMITS for the statuses that a hook reported (doors.queue); ``+`` means committed."""
    if not results:
        return "unknown"
    done = sum(result == "0+" for result in results)
    return "all" if done == len(results) else "some" if done else "none"


class Metrics:
    """Counts events in ``registry``, which belongs to the caller; nothing here is global."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        self._present = _Present()
        self._backends: frozenset[str] = frozenset()
        self._last: dict[int, Mapping[str, int]] = {}
        self._found: dict[tuple[str, ...], Any] = {}  # series by name and labels: labels() takes a lock and checks
        for metric in COUNTED:
            if metric.kind == "counter":
                self._counters[metric.name] = Counter(metric.name, metric.help, metric.labels, registry=registry)
            else:
                self._histograms[metric.name] = Histogram(
                    metric.name, metric.help, metric.labels, registry=registry, buckets=metric.buckets
                )
        registry.register(self._present)
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        """Series that alerts watch exist from the start: the first event must not be missed."""
        for scanner in sorted(SCANNERS):
            for cause in sorted(CAUSES - {""}):
                self._counters["contentfilter_unchecked_total"].labels(scanner, cause)
        for asked in (Scanner.CLAMD, Scanner.SPAMD):
            for how in sorted(REUSED):
                self._counters["contentfilter_scans_reused_total"].labels(asked.value, how)
        for name, words in (("contentfilter_commits_total", COMMITS), ("contentfilter_loads_total", LOADS), _SHED):
            for word in sorted(words):
                self._counters[name].labels(word)
        for decision in sorted(DECISIONS):
            self._histograms["contentfilter_message_seconds"].labels(decision)

    # Input

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Count an event of the feed, if it is one that counts. Raises nothing."""
        count: Callable[[Mapping[str, Any]], None] | None
        count = {"mail.done": self._mail, "mail.report": self._report}.get(name)
        if name == "poison.isolated":
            self._counters["contentfilter_poison_total"].inc()
        if count is None:
            return
        try:
            count(fields)
        except (msgspec.ValidationError, OverflowError):
            self._counters["contentfilter_events_malformed_total"].inc()

    def _mail(self, fields: Mapping[str, Any]) -> None:
        mail = msgspec.convert(fields, _Mail)
        counters, series = self._counters, self._series
        decision, rule = _known(mail.decision, DECISIONS), rule_class(mail.rule, mail.reason)
        series("contentfilter_messages_total", decision, rule, _known(mail.origin, ORIGINS)).inc()
        counters["contentfilter_message_bytes_total"].inc(mail.size)
        counters["contentfilter_quarantined_total"].inc(mail.quarantined > 0)
        series("contentfilter_message_seconds", decision).observe(mail.ms / 1000)
        for scan in mail.scans:
            scanner, status = _known(scan.scanner, SCANNERS), _known(scan.status, STATUSES)
            cause = _known(scan.cause, CAUSES)
            backend = scan.backend if scan.backend in self._backends else ""
            series("contentfilter_scans_total", scanner, backend, status, cause).inc()
            if scan.reused:
                series("contentfilter_scans_reused_total", scanner, _known(scan.reused, REUSED)).inc()
            elif scan.ms:  # 0: the time belongs to another scan, or nothing was done
                series("contentfilter_scan_seconds", scanner, backend).observe(scan.ms / 1000)
            if decision == Action.QUEUE.value and status == ScanStatus.UNCHECKED.value:
                series("contentfilter_unchecked_total", scanner, cause).inc()

    def _series(self, name: str, *labels: str) -> Any:
        """A counter or histogram with its labels, found once."""
        key = name, *labels
        if (found := self._found.get(key)) is None:
            metric: Counter | Histogram = self._counters.get(name) or self._histograms[name]
            found = self._found[key] = metric.labels(*labels)
        return found

    def _report(self, fields: Mapping[str, Any]) -> None:
        result = commit_result(msgspec.convert(fields, _Report).results)
        self._counters["contentfilter_commits_total"].labels(result).inc()

    def worker(self, pid: int, lag: float, counts: Mapping[str, int]) -> None:
        """A heartbeat: ``lag`` in seconds, ``counts`` since the worker's start."""
        last = self._last.pop(pid, {})
        counters = {name: self._counters[metric] for name, metric in FROM_WORKERS.items()}
        shed = self._counters["contentfilter_shed_total"]
        counters |= {name: shed.labels(what) for name, what in SHED_FROM_WORKERS.items()}
        for name, counter in counters.items():
            now = counts.get(name, 0)
            grown = now - last.get(name, 0)
            counter.inc(max(0, grown if grown >= 0 else now))  # less than before: the pid is another's
        self._last[pid] = counts
        while len(self._last) > REMEMBERED:
            del self._last[next(iter(self._last))]
        if 0 <= lag < float("inf"):
            self._histograms["contentfilter_loop_lag_seconds"].observe(lag)

    def loaded(self, result: Literal["changed", "unchanged", "failed"]) -> None:
        """Configuration or tables were checked."""
        self._counters["contentfilter_loads_total"].labels(result).inc()

    def backends(self, configured: Mapping[Scanner, Collection[str]]) -> None:
        """The only values that ``backend`` may have; the numbers of others are forgotten."""
        names = frozenset(name for backends in configured.values() for name in backends)
        scans, seconds = self._counters["contentfilter_scans_total"], self._histograms["contentfilter_scan_seconds"]
        for metric, labels in ((scans, _SCANS), (seconds, _SCAN_SECONDS)):
            for series in _series(metric, labels):
                if series[labels.index("backend")] not in names | {""}:
                    metric.remove(*series)
        for scanner, backends in configured.items():
            for backend in backends:
                seconds.labels(scanner.value, backend)
                scans.labels(scanner.value, backend, ScanStatus.CLEAN.value, "")
        self._backends = names
        self._found.clear()  # removed series must not be counted

    # Output

    def present(self, values: Values) -> None:
        """The samples of SEEN from now on."""
        self._present.values = values

    def render(self, accept: str) -> tuple[bytes, str]:
        """The text for Prometheus in the form that an Accept header asks for, and its type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class Registry(CollectorRegistry):
    """Omits the creation time of each series: it doubles the text, and Prometheus does not use it."""

    def collect(self) -> Iterator[Family]:
        for family in super().collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class _Present(Collector):
    """SEEN, with the values that were set last."""

    def __init__(self) -> None:
        self.values: Values = {}

    def collect(self) -> Iterator[Family]:
        values = self.values
        for metric in SEEN:
            make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = make(metric.name, metric.help, labels=metric.labels)
            for labels, value in values.get(metric.name, ()):
                family.add_metric(labels, value)
            yield family


def _known(word: str, words: frozenset[str]) -> str:
    return word if word in words else OTHER


def _series(metric: Counter | Histogram, labels: tuple[str, ...]) -> set[tuple[str, ...]]:
    """The label values of all series of a metric."""
    samples = (sample for family in metric.collect() for sample in family.samples)
    return {tuple(sample.labels[label] for label in labels) for sample in samples}
