"""The registry: counts are exact, labels closed, counters never fall; documents, alerts and graphs agree with it."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.scrape import OPENMETRICS, Samples, promtool

from contentfilter.doors.admission import Counters
from contentfilter.model import Scanner
from contentfilter.monitor import metrics
from contentfilter.monitor.metrics import METRICS, Metrics, Registry
from contentfilter.policy.shedding import SHED
from contentfilter.worker.load import PREFIX

ROOT = Path(__file__).parents[2]
CLAMD, SPAMD = "unix:/run/clamd", "tcp:127.0.0.1:783"
MAIL: dict[str, Any] = {
    "id": "a" * 16, "origin": "stranger", "uid": 1, "remote": "", "user": "", "sender": "s@x.example",
    "recipients": ("r@y.example",), "recipient_count": 1, "size": 100, "scans": (), "decision": "queue",
    "reason": "none", "rule": "clean", "submissions": 1, "quarantined": 0, "attempt": 0, "ms": 2.0,
}  # fmt: skip
CLOSED = {
    "decision": metrics.DECISIONS | {metrics.OTHER},
    "rule": metrics.RULES,
    "origin": metrics.ORIGINS | {metrics.OTHER},
    "scanner": metrics.SCANNERS | {metrics.OTHER},
    "status": metrics.STATUSES | {metrics.OTHER},
    "cause": metrics.CAUSES | {metrics.OTHER},
    "backend": {CLAMD, SPAMD, ""},
    "how": metrics.REUSED | {metrics.OTHER},
    "result": metrics.COMMITS | metrics.LOADS,
    "what": frozenset(SHED),
}


@pytest.fixture
def counted() -> Metrics:
    return made()


def made() -> Metrics:
    made = Metrics(Registry())
    made.backends({Scanner.CLAMD: [CLAMD], Scanner.SPAMD: [SPAMD]})
    return made


def read(counted: Metrics) -> Samples:
    return Samples.of(counted.render(OPENMETRICS)[0].decode())


def scan(scanner: str, status: str = "clean", ms: float = 3.0, **more: Any) -> dict[str, Any]:
    return {"scanner": scanner, "status": status, "ms": ms, **more}


# Counting


def test_a_message_is_counted_once_with_each_of_its_scans(counted: Metrics) -> None:
    scans = (scan("signatures"), scan("loadertypes", ms=0.0), scan("clamd", "found", 30.0, backend=CLAMD))
    refused = {"decision": "reject", "reason": "virus", "rule": "clamd: Some.Name", "scans": scans}
    counted.event("mail.done", MAIL | refused)
    counted.event("mail.done", MAIL)
    samples = read(counted)
    assert samples.counts("messages_total", "decision", "rule", "origin") == {
        ("reject", "clamd", "stranger"): 1,
        ("queue", "clean", "stranger"): 1,
    }
    assert samples.counts("scans_total", "scanner", "backend", "status", "cause") == {
        ("signatures", "", "clean", ""): 1,
        ("loadertypes", "", "clean", ""): 1,
        ("clamd", CLAMD, "found", ""): 1,
    }
    assert samples.counts("scan_seconds_count", "scanner") == {("signatures",): 1, ("clamd",): 1}
    assert samples.value("scan_seconds_sum", scanner="clamd", backend=CLAMD) == pytest.approx(0.03)
    assert samples.value("scan_seconds_bucket", scanner="clamd", backend=CLAMD, le="0.025") == 0
    assert samples.value("scan_seconds_bucket", scanner="clamd", backend=CLAMD, le="0.05") == 1
    assert samples.value("message_seconds_sum", decision="reject") == pytest.approx(0.002)
    assert samples.value("message_bytes_total") == 200


def test_unchecked_is_what_was_delivered_without_a_check(counted: Metrics) -> None:
    fault = scan("spamd", "unchecked", cause="timeout", backend=SPAMD)
    counted.event("mail.done", MAIL | {"scans": (fault,), "rule": "passed unchecked: spamd"})
    counted.event("mail.done", MAIL | {"scans": (fault,), "decision": "defer", "rule": "spamd: timeout"})
    samples = read(counted)
    assert samples.counts("unchecked_total", "scanner", "cause") == {("spamd", "timeout"): 1}
    assert samples.counts("messages_total", "rule") == {("unchecked",): 1, ("fault",): 1}


@pytest.mark.parametrize(
    ("rule", "reason", "word"),
    [
        ("clamd: Eicar", "virus", "clamd"),
        ("clamd: clean", "virus", "clamd"),
        ("signatures: name", "banned", "signatures"),
        ("spamd: 12.5 / 5", "spam", "spamd"),
        ("spamd: 12.5 >= reject_score=12 (bounce)", "spam", "spamd"),
        ("clamd: down", "none", "fault"),
        ("databytes=10", "size", "size"),
        ("clean", "none", "clean"),
        ("passed unchecked: clamd, spamd", "none", "unchecked"),
        ("nothing to check", "none", "nothing-to-check"),
        ("no recipients", "none", "no-recipients"),
        ("released from quarantine (0abc)", "none", "released"),
        ("quarantine: No space left on device", "none", "quarantine"),
        ("a rule of tomorrow", "none", "other"),
    ],
)
def test_a_rule_becomes_one_of_a_few_words(rule: str, reason: str, word: str) -> None:
    assert metrics.rule_class(rule, reason) == word


@pytest.mark.parametrize(
    ("results", "word"),
    [(["0+", "0+"], "all"), (["0+", "53"], "some"), (["-9", "-1000"], "none"), (None, "unknown"), ([], "unknown")],
)
def test_what_became_of_several_parts(counted: Metrics, results: Any, word: str) -> None:
    counted.event("mail.report", {"id": "x", "results": results})
    assert read(counted).counts("commits_total", "result") == {(word,): 1}


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1, 10**400, "1", None, True, [1]])
@pytest.mark.parametrize("key", ["ms", "size", "quarantined"])
def test_a_number_that_is_none_is_counted_as_malformed_only(counted: Metrics, key: str, wrong: Any) -> None:
    counted.event("mail.done", MAIL | {key: wrong})
    samples = read(counted)
    assert samples.value("events_malformed_total") == 1
    assert samples.total("messages_total") == 0


_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_word = (
    st.sampled_from(["clamd", "clamd: x", "none", "queue", "clean", "found", "unchecked", "down", CLAMD]) | st.text()
)
_number = st.floats(0, 1e9) | st.integers(0, 10**9)
_scan = st.fixed_dictionaries(
    {"scanner": _word, "status": _word, "ms": _number}, optional={"cause": _word, "backend": _word}
)
_mail = st.fixed_dictionaries(
    dict.fromkeys(("origin", "decision", "reason", "rule"), _word)
    | dict.fromkeys(("size", "ms", "quarantined"), _number)
    | {"scans": st.lists(_scan, max_size=3)}
)
_hostile = st.dictionaries(st.sampled_from(sorted(MAIL)) | st.text(max_size=8), _anything, max_size=8)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["mail.done", "mail.report", "x"]), _mail | _hostile), max_size=8))
def test_whatever_comes_labels_are_from_closed_sets(events: list[tuple[str, dict[str, Any]]]) -> None:
    counted = made()
    for name, fields in events:
        counted.event(name, fields)
    for (name, labels), value in read(counted).items():
        assert value >= 0, name
        for label, word in labels:
            assert label == "le" or word in CLOSED[label], (name, label, word)


def test_a_reused_answer_is_no_scan_that_took_time(counted: Metrics) -> None:
    scans = (scan("clamd", backend=CLAMD) | {"reused": "kept"}, scan("spamd", backend=SPAMD) | {"reused": "shared"})
    counted.event("mail.done", MAIL | {"scans": scans})
    samples = read(counted)
    assert samples.counts("scans_reused_total", "scanner", "how") == {("clamd", "kept"): 1, ("spamd", "shared"): 1}
    assert samples.total("scan_seconds_count") == 0
    assert samples.total("scans_total") == 2


def test_a_backend_that_is_no_longer_configured_is_forgotten(counted: Metrics) -> None:
    counted.event("mail.done", MAIL | {"scans": (scan("clamd", backend=CLAMD),)})
    counted.backends({Scanner.CLAMD: ["unix:/new"], Scanner.SPAMD: [SPAMD]})
    counted.event("mail.done", MAIL | {"scans": (scan("clamd", backend=CLAMD), scan("spamd", backend=SPAMD))})
    samples = read(counted)
    found = {dict(labels)["backend"] for (name, labels) in samples if "backend" in dict(labels)}
    assert found == {"", "unix:/new", SPAMD}
    assert samples.counts("scans_total", "scanner", "backend") == {("clamd", ""): 1, ("spamd", SPAMD): 1}


def test_a_backend_that_comes_back_is_counted_again(counted: Metrics) -> None:
    mail = MAIL | {"scans": (scan("clamd", backend=CLAMD),)}
    counted.event("mail.done", mail)
    counted.backends({Scanner.CLAMD: ["unix:/new"], Scanner.SPAMD: [SPAMD]})
    counted.backends({Scanner.CLAMD: [CLAMD], Scanner.SPAMD: [SPAMD]})
    counted.event("mail.done", mail)
    assert read(counted).counts("scans_total", "scanner", "backend") == {("clamd", CLAMD): 1}


# Workers


def test_every_counter_of_a_worker_is_added_up_somewhere() -> None:
    ours = {field.name for field in dataclasses.fields(Counters)} | {"events_lost"}
    summed = set(metrics.FROM_WORKERS) | set(metrics.SHED_FROM_WORKERS)
    assert {name for name in summed if not name.startswith(PREFIX)} == ours
    assert set(metrics.FROM_WORKERS.values()) <= set(METRICS)


def test_what_workers_left_out_is_counted_by_its_name() -> None:
    counted = made()
    counted.worker(1, 0.0, {"busy": 2, PREFIX + "spamd-large": 5})
    counted.worker(1, 0.0, {"busy": 3, PREFIX + "spamd-large": 5, PREFIX + "clamd": 1, PREFIX + "nonsense": 9})
    expected = {("waiting",): 3, ("spamd-large",): 5, ("clamd",): 1}
    assert read(counted).counts("shed_total", "what") == expected


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.booleans()), max_size=40))
def test_counters_are_the_sum_over_all_workers_that_ever_were(beats: list[tuple[int, int, bool]]) -> None:
    counted, pids, counts, total = made(), [1, 2, 3], [0, 0, 0], 0
    for slot, grown, replaced in beats:
        if replaced:
            pids[slot], counts[slot] = max(pids) + 1, 0
        counts[slot] += grown
        total += grown
        counted.worker(pids[slot], 0.0, {"answered": counts[slot]})
        assert read(counted).value("answers_total") == total


def test_a_replaced_workers_count_starts_from_zero_and_the_sum_goes_on(counted: Metrics) -> None:
    for pid, answered in ((1, 5), (2, 7), (1, 9), (3, 1), (1, 9), (2, 8), (3, 4)):
        counted.worker(pid, 0.0, {"answered": answered})
    assert read(counted).value("answers_total") == 9 + 8 + 4
    counted.worker(1, 0.0, {"answered": 2})  # the pid was given out again
    assert read(counted).value("answers_total") == 9 + 8 + 4 + 2


def test_dead_workers_are_not_remembered_for_ever(counted: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "REMEMBERED", 10)
    for pid in range(100):
        counted.worker(pid, 0.0, {"answered": 1})
    assert read(counted).value("answers_total") == 100
    assert len(counted._last) == 10


@pytest.mark.parametrize("lag", [math.nan, math.inf, -1.0])
def test_a_lag_that_is_none_is_left_out(counted: Metrics, lag: float) -> None:
    counted.worker(1, lag, {})
    counted.worker(1, 0.3, {})
    assert read(counted).value("loop_lag_seconds_sum") == pytest.approx(0.3)


# The text


@pytest.mark.parametrize("accept", ["", "text/plain", OPENMETRICS])
def test_the_text_is_what_prometheus_reads(counted: Metrics, accept: str) -> None:
    counted.event("mail.done", MAIL)
    counted.present({"contentfilter_clamd_info": [((CLAMD, 'ClamAV "1"\n\\'), 1)]})
    data, content_type = counted.render(accept)
    text = data.decode()
    assert content_type.startswith("application/openmetrics-text" if accept == OPENMETRICS else "text/plain")
    assert text.endswith("# EOF\n") == (accept == OPENMETRICS)
    assert "_created" not in text
    if accept != OPENMETRICS:  # promtool of Debian reads the older form only
        assert promtool("check", "metrics", text=text) == ""
    assert r'version="ClamAV \"1\"\n\\"' in text


def test_every_metric_is_there_from_the_start(counted: Metrics) -> None:
    text = counted.render("")[0].decode()
    assert set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)) == set(METRICS)


# What others say of it


def test_the_document_tells_every_metric_as_it_is() -> None:
    rows = re.findall(r"^\| `(contentfilter_\w+)` \| (\w+) \| (.*?) \| (.+) \|$", document("metrics.md"), re.MULTILINE)
    told = {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows}
    assert told == {metric.name: (metric.kind, metric.labels) for metric in METRICS.values()}
    assert len(rows) == len(told)
    explained = set(re.findall(r"^\| `(\w+)` \| (?!\w+ \|)", document("metrics.md"), re.MULTILINE))
    assert explained == {label for metric in METRICS.values() for label in metric.labels}


@pytest.mark.parametrize("label", ["decision", "origin", "scanner", "status", "cause", "rule"])
def test_the_document_tells_every_value_of_a_label(label: str) -> None:
    (row,) = re.findall(rf"^\| `{label}` \| (.+) \|$", document("metrics.md"), re.MULTILINE)
    told = set(re.findall(r"`([\w-]+)`", row))
    if label == "cause":
        told -= {"unchecked"}  # says when there is one
    assert told == CLOSED[label] - {"", *({metrics.OTHER} if label != "rule" else ())}


def document(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def alerts() -> list[dict[str, Any]]:
    """The rules file is read by promtool; for us a few lines of it are enough."""
    text = (ROOT / "etc" / "prometheus" / "alerts.yml").read_text()
    found = []
    for part in text.split("- alert: ")[1:]:
        expression = re.search(r"expr: (?:\|\n((?: {10}.*\n)+)|(.+)\n)", part)
        (runbook,) = re.findall(r'runbook: "(.+)"', part)
        assert expression is not None
        found.append({"name": part.split("\n")[0], "expr": expression[1] or expression[2], "runbook": runbook})
    return found


def test_promtool_finds_the_rules_and_the_sample_right() -> None:
    directory = ROOT / "etc" / "prometheus"
    assert f"SUCCESS: {len(alerts())} rules found" in promtool("check", "rules", directory / "alerts.yml")
    assert "is valid prometheus config" in promtool("check", "config", directory / "prometheus.yml")


def test_every_alert_rings_when_it_should_and_not_otherwise() -> None:
    directory = ROOT / "etc" / "prometheus"
    assert "SUCCESS" in promtool("test", "rules", directory / "alerts_test.yml")
    tested = (directory / "alerts_test.yml").read_text()
    assert [alert["name"] for alert in alerts() if f'{{alertname="{alert["name"]}"}}' not in tested] == []


def test_every_alert_names_its_heading_in_the_runbook_and_is_named_there() -> None:
    sections = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n?)*)", document("runbook.md"), re.MULTILINE))
    by_anchor = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"): text for title, text in sections.items()}
    for alert in alerts():
        name, _, anchor = alert["runbook"].partition("#")
        assert name == "docs/runbook.md"
        assert f"Alert: `{alert['name']}`." in by_anchor[anchor], alert["name"]
    for text in by_anchor.values():
        for part in ("**You see:**", "**Mail now:**", "**Do:**", "**Over when:**"):
            assert text.count(part) == 1, text[:80]
    named = re.findall(r"Alert: `(\w+)`", document("runbook.md"))
    assert sorted(named) == sorted(alert["name"] for alert in alerts())


def dashboard() -> list[str]:
    board = json.loads((ROOT / "etc" / "grafana" / "contentfilter.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]


OUTSIDE = {"instance", "job"}


@pytest.mark.parametrize("where", ["alerts", "dashboard", "runbook.md", "metrics.md"])
def test_queries_use_metrics_labels_and_values_that_exist(where: str) -> None:
    if where in ("alerts", "dashboard"):
        queries = [alert["expr"] for alert in alerts()] if where == "alerts" else dashboard()
    else:
        queries = re.findall(r"`([^`\n]*contentfilter_[^`\n]*)`", document(where))
    assert len(queries) > 8
    for query in queries:
        names = re.findall(r"contentfilter_\w+", query)
        allowed = set(OUTSIDE)
        for name in names:
            metric = known(name)
            allowed |= {*metric.labels, *(("le",) if name.endswith("_bucket") else ())}
        for name, selector in re.findall(r"(contentfilter_\w+)\{(.*?)\}", query):
            for label, value in re.findall(r'(\w+)!?=~?"(.*?)"', selector):
                assert label in {*known(name).labels, *OUTSIDE}, query
                assert label in OUTSIDE or set(value.split("|")) <= CLOSED[label], query
        for labels in re.findall(r"by \((.*?)\)", query):
            assert set(labels.split(", ")) <= allowed, query


def known(name: str) -> metrics.Metric:
    if name in METRICS:
        return METRICS[name]
    base, _, kind = name.rpartition("_")
    assert METRICS[base].kind == "histogram", name
    assert kind in ("bucket", "sum", "count"), name
    return METRICS[base]


def test_every_metric_of_the_dashboard_and_the_alerts_is_one_that_somebody_feeds() -> None:
    """What stands in SEEN is filled by the monitor; a name that nobody yields would be an empty graph."""
    package = ROOT / "contentfilter"
    feeders = [path for path in (package / "monitor").glob("*.py") if path.name not in ("metrics.py", "page.py")]
    sources = [path.read_text() for path in feeders]
    fed = set(re.findall(r'"(contentfilter_\w+)"', "".join(sources)))
    assert fed == {metric.name for metric in metrics.SEEN}
