"""Numbers through the whole system: exact after known messages, whole after deaths, and no trouble for mail."""

import json
import os
import re
import signal
import socket
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from e2e.mails import PLAIN, SPAM, VIRUS, with_program
from e2e.trouble import waiting_in
from lab.clamd import Clamd
from lab.daemon import Daemon
from lab.hook import until
from lab.peers import Peer, read_clamd, says_and_stays
from lab.scrape import HTTP, Prometheus, address, get, promtool, scrape, scrape_until
from lab.spamd import Spamd

ETC = Path(__file__).parents[2] / "etc"
OTHER = b"a@elsewhere.example"
VIRUS_ONLY, SPAM_ONLY = b"virus-only@mixed.example", b"spam-only@mixed.example"


def test_counts_are_exact_after_known_messages(make_system, clamd: Clamd, spamd: Spamd) -> None:
    system = make_system(clamd=clamd, spamd=spamd, settings=HTTP)
    for message, recipients in (
        (PLAIN, (OTHER,)),
        (PLAIN, ()),
        (PLAIN, ()),
        (SPAM, ()),
        (VIRUS, ()),
        (with_program(), ()),
        (VIRUS, (VIRUS_ONLY, SPAM_ONLY)),  # quarantined for one, delivered to the other
        (PLAIN, (VIRUS_ONLY, SPAM_ONLY)),  # in two parts
    ):
        system.deliver(message, *recipients)
    samples = scrape_until(
        system.daemon,
        lambda s: s.total("messages_total") >= 8 and s.value("answers_total") >= 8 and not s.total("in_flight"),
    )
    assert samples.counts("messages_total", "decision", "rule", "origin") == {
        ("queue", "nothing-to-check", "stranger"): 1,
        ("queue", "clean", "stranger"): 3,
        ("queue", "spamd", "stranger"): 1,
        ("reject", "clamd", "stranger"): 1,
        ("reject", "signatures", "stranger"): 1,
        ("queue", "clamd", "stranger"): 1,
    }
    assert samples.counts("message_seconds_count", "decision") == {("queue",): 6, ("reject",): 2}
    assert samples.counts("commits_total", "result") == {("all",): 1}
    assert samples.value("quarantined_total") == 1
    assert samples.value("connections_total") == samples.value("answers_total") == 8

    records = system.daemon.wait_for("mail.done", 8)
    scans = Counter(
        (scan["scanner"], scan.get("backend", ""), scan["status"], scan.get("cause", ""))
        for record in records
        for scan in record["scans"]
    )
    assert samples.counts("scans_total", "scanner", "backend", "status", "cause") == scans
    assert scans["clamd", clamd.backend, "found", ""] == 2
    assert scans["spamd", spamd.backend, "found", ""] == 1
    spent = sum(scan["ms"] for record in records for scan in record["scans"]) / 1000
    assert samples.total("scan_seconds_sum") == pytest.approx(spent)
    assert samples.value("message_bytes_total") == sum(record["size"] for record in records)
    assert samples.value("waiting") == samples.value("in_flight_bytes") == 0
    for name in ("unchecked_total", "hook_retries_total", "internal_errors_total", "events_lost_total"):
        assert samples.total(name) == 0
    for name in ("garbage_total", "events_malformed_total", "frames_malformed_total", "journal_lost_total"):
        assert samples.total(name) == 0


def test_a_sick_scanner_shows_in_the_numbers(make_system, lab_directory: Path) -> None:
    with Clamd(lab_directory / "sick") as clamd:
        system = make_system(clamd=clamd, settings=HTTP | {"spamd": {"backends": ["tcp:127.0.0.1:1"]}})
        samples = scrape_until(system.daemon, lambda s: s.total("clamd_up") > 0)
        assert dict(next(labels for name, labels in samples if name == "contentfilter_clamd_info"))[
            "version"
        ].startswith("ClamAV ")
        system.deliver(PLAIN)  # without spamd: unchecked
        clamd.stop()
        system.deliver(PLAIN, VIRUS_ONLY)  # without clamd: deferred
        system.daemon.reload()
        samples = scrape_until(
            system.daemon, lambda s: s.total("messages_total") == 2 and s.value("clamd_up", backend=clamd.backend) == 0
        )
    assert samples.counts("unchecked_total", "scanner", "cause") == {("spamd", "down"): 1}
    assert samples.counts("messages_total", "decision", "rule") == {("queue", "unchecked"): 1, ("defer", "fault"): 1}
    assert samples.counts("scans_total", "scanner", "status", "cause")["clamd", "unchecked", "down"] == 1
    assert not [name for name, _ in samples if name == "contentfilter_clamd_info"]


def test_counters_go_on_when_a_worker_is_replaced(make_system) -> None:
    system = make_system(settings=HTTP)
    for _ in range(3):
        system.deliver(PLAIN, OTHER)
    before = scrape_until(system.daemon, lambda s: s.value("answers_total") == 3 and s.total("messages_total") == 3)
    os.kill(system.daemon.workers()[0], signal.SIGKILL)
    system.daemon.wait_for("worker.ready", 2)
    assert scrape(system.daemon).value("answers_total") == 3
    for _ in range(2):
        system.deliver(PLAIN, OTHER)
    after = scrape_until(system.daemon, lambda s: s.value("answers_total") == 5 and s.total("messages_total") == 5)
    assert after.counts("worker_restarts_total", "reason") == {("signal",): 1}
    for (name, labels), value in before.items():
        if re.search(r"_(total|count|bucket|sum)$", name):
            assert after[name, labels] >= value, name


def test_a_worker_that_goes_in_order_leaves_no_count_behind(make_system) -> None:
    system = make_system(settings=HTTP | {"service": {"heartbeat": 10.0}})  # only its last words can tell in time
    (first,) = system.daemon.workers()
    for _ in range(3):
        system.deliver(PLAIN, OTHER)
    os.kill(first, signal.SIGTERM)
    until(lambda: first not in system.daemon.workers(), "the old worker stays")
    samples = scrape_until(system.daemon, lambda s: s.total("messages_total") == 3)
    assert samples.value("answers_total") == 3
    assert samples.counts("worker_restarts_total", "reason") == {("exit",): 1}


def test_the_configuration_in_force_is_seen(make_system) -> None:
    system = make_system(settings=HTTP)
    system.daemon.signal(signal.SIGHUP)
    system.daemon.wait_for("worker.reload")
    samples = scrape_until(system.daemon, lambda s: s.value("loads_total", result="changed") == 1)
    assert (samples.value("generation"), samples.value("configuration_problems")) == (2, 0)
    system.daemon.write_config("[nonsense]\n")
    system.daemon.reload()
    samples = scrape_until(system.daemon, lambda s: s.value("configuration_problems") == 1)
    assert (samples.value("generation"), samples.value("loads_total", result="failed")) == (2, 1)
    assert samples.value("table_rows", table="clamavclients") == 3
    assert abs(time.time() - samples.value("tables_checked_timestamp_seconds")) < 60


def test_what_waits_for_a_worker_is_seen(make_system) -> None:
    system = make_system(settings=HTTP)
    (worker,) = system.daemon.workers()
    os.kill(worker, signal.SIGSTOP)
    try:
        waiting = [system.start_hook(PLAIN, (OTHER,)) for _ in range(3)]
        samples = scrape_until(system.daemon, lambda s: s.value("waiting") == 3)
        assert samples.value("waiting_limit") > 3
    finally:
        os.kill(worker, signal.SIGCONT)
    assert [system.delivered(process.wait(), standin).status for process, standin in waiting] == [0, 0, 0]


def test_ready_says_what_is_wrong(make_system, tmp_path: Path) -> None:
    with Peer(tmp_path, says_and_stays(b""), read_clamd) as peer:
        system = make_system(settings=HTTP | {"spamd": {"backends": []}}, clamd=peer)
        where = address(system.daemon)
        assert get(where, "/live") == (200, "live\n")
        assert get(where, "/ready") == (200, "ready\n")
        assert scrape(system.daemon).value("ready") == 1
        process, _ = system.start_hook(PLAIN, (VIRUS_ONLY,))
        waiting_in(system.daemon, peer)
        samples = scrape_until(system.daemon, lambda s: s.value("in_flight", worker="0") == 1)
        assert samples.value("in_flight_bytes") == len(PLAIN)
        assert samples.value("in_flight_oldest_seconds") > 0
        system.daemon.signal(signal.SIGTERM)
        system.daemon.wait_for("service.drain")
        status, text = get(where, "/ready")
        assert status == 503
        assert text.startswith("draining")
        status, text = get(where, "/ready", Accept="application/json")
        assert (status, json.loads(text)["ready"]) == (503, False)
        assert get(where, "/live") == (200, "live\n")
        peer.stop()
    system.daemon.wait_exit()
    process.kill()
    with pytest.raises(OSError, match="refused"):
        get(where, "/live")


def test_a_spamd_that_no_recipient_wants_rings_no_alert(make_system) -> None:
    settings = HTTP | {"spamd": {"backends": ["tcp:127.0.0.1:1"]}}
    wanted = make_system(settings=settings)
    down = ("contentfilter_spamd_up", frozenset({("backend", "tcp:127.0.0.1:1")}))
    scrape_until(wanted.daemon, lambda s: s.get(down) == 0)
    unwanted = make_system(settings=settings, controls={"clamavclients": "@protected.example\n"})
    scrape_until(unwanted.daemon, lambda s: s.total("workers", state="ready") == 1 and down not in s)


def test_a_port_in_use_is_an_error_in_the_log_and_mail_goes_on(make_system) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        system = make_system(settings={"http": {"listen": listen}})
        (line,) = system.daemon.wait_for("http.failed")
        assert (line["listen"], line["level"]) == (listen, "error")
        assert "in use" in line["why"]
        assert system.deliver(PLAIN, OTHER).status == 0


def test_rude_clients_disturb_neither_mail_nor_the_next_scrape(make_system) -> None:
    system = make_system(settings=HTTP)
    host, _, port = address(system.daemon).rpartition(":")
    with ExitStack() as stack:
        for rude in (b"", b"GET /metrics", b"\x16\x03\x01" * 5000, b"GET /metrics HTTP/1.1\r\n\r\n") * 15:
            client = stack.enter_context(socket.create_connection((host, int(port))))
            client.settimeout(5)
            try:
                client.sendall(rude)
            except OSError:
                pass  # cut off already
        assert system.deliver(PLAIN, OTHER).status == 0
        scrape_until(system.daemon, lambda s: s.total("messages_total") == 1)
    assert system.daemon.log("monitor.failed") == system.daemon.log("http.error") == []


def expressions() -> list[str]:
    """Every query that we ship."""
    board = json.loads((ETC / "grafana" / "contentfilter.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    return [expr.replace("$__rate_interval", "1m").replace("$instance", ".*") for expr in found]


def test_a_real_prometheus_scrapes_it_and_understands_every_query(
    make_system, clamd: Clamd, spamd: Spamd, lab_directory: Path
) -> None:
    system = make_system(clamd=clamd, spamd=spamd, settings=HTTP)
    where = address(system.daemon)
    assert promtool("check", "metrics", text=get(where, "/metrics")[1]) == ""
    with Prometheus(lab_directory / "prometheus", where, ETC / "prometheus" / "alerts.yml") as prometheus:
        prometheus.wait_for("up", 1)
        for message in (PLAIN, VIRUS, SPAM):
            system.deliver(message)
        prometheus.wait_for("sum(contentfilter_messages_total)", 3)
        prometheus.wait_for('sum(contentfilter_messages_total{decision="reject",rule="clamd"})', 1)
        prometheus.wait_for("sum(contentfilter_clamd_up)", 1)
        prometheus.wait_for("sum(contentfilter_spamd_up)", 1)
        slowest = prometheus.value("max(histogram_quantile(1, contentfilter_scan_seconds_bucket))")
        assert slowest is not None
        assert 0 < slowest <= 240
        (target,) = prometheus.ask("targets")["activeTargets"]
        assert (target["health"], target["lastError"]) == ("up", "")
        for expression in expressions():
            prometheus.ask("query", query=expression)
        until(
            lambda: all(
                rule["health"] == "ok" for group in prometheus.ask("rules")["groups"] for rule in group["rules"]
            ),
            "a rule could not be evaluated",
        )
        alerts = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
        assert len(alerts) == (ETC / "prometheus" / "alerts.yml").read_text().count("- alert: ")
        assert [rule["lastError"] for rule in alerts if rule.get("lastError")] == []
        assert [rule["name"] for rule in alerts if rule["state"] == "firing"] == []


def test_with_http_off_nothing_listens(make_system, tmp_path: Path) -> None:
    with Peer(tmp_path, says_and_stays(b""), read_clamd) as peer:
        system = make_system(clamd=peer)
        assert system.deliver(PLAIN, OTHER).status == 0
        assert system.daemon.log("http.ready") == []
        assert listening(system.daemon) == 0


def listening(daemon: Daemon) -> int:
    """TCP sockets of the supervisor."""
    inodes = {os.readlink(entry) for entry in Path(f"/proc/{daemon.pid}/fd").iterdir()}
    tables = [Path(f"/proc/{daemon.pid}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    return sum(f"socket:[{line.split()[9]}]" in inodes for table in tables for line in table)
