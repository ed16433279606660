"""Asks the daemon's HTTP port, and a real Prometheus that does so."""

import http.client
import json
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import lab.daemon
from lab.process import Daemon, find_program, free_port
from prometheus_client.openmetrics.parser import text_string_to_metric_families

WAIT = 30.0
OPENMETRICS = "application/openmetrics-text;version=1.0.0"
HTTP = {"http": {"listen": "127.0.0.1:0"}}
"""Settings: any free port. The lab's daemons have no HTTP otherwise."""


def get(address: str, path: str, **headers: str) -> tuple[int, str]:
    """Status and body."""
    connection = http.client.HTTPConnection(address, timeout=WAIT)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def address(daemon: lab.daemon.Daemon) -> str:
    """Address of a daemon with HTTP."""
    where: str = daemon.wait_for("http.ready")[-1]["address"]
    return where


class Samples(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """One scrape."""

    @classmethod
    def of(cls, text: str) -> Self:
        return cls(
            ((sample.name, frozenset(sample.labels.items())), sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        )

    def value(self, name: str, **labels: str) -> float:
        """Of exactly that series."""
        return self[f"contentfilter_{name}", frozenset(labels.items())]

    def total(self, name: str, **labels: str) -> float:
        """Of all series with these labels."""
        wanted = frozenset(labels.items())
        return sum(v for (n, found), v in self.items() if n == f"contentfilter_{name}" and wanted <= found)

    def counts(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Values other than zero, by these labels."""
        found: dict[tuple[str, ...], float] = {}
        for (n, series), value in self.items():
            if n == f"contentfilter_{name}" and value:
                key = tuple(dict(series)[label] for label in labels)
                found[key] = found.get(key, 0) + value
        return found


def scrape(daemon: lab.daemon.Daemon) -> Samples:
    status, text = get(address(daemon), "/metrics", Accept=OPENMETRICS)
    assert status == 200, text
    return Samples.of(text)


def scrape_until(daemon: lab.daemon.Daemon, true: Callable[[Samples], bool]) -> Samples:
    """The first scrape for which ``true`` holds."""
    end = time.monotonic() + WAIT
    while not true(samples := scrape(daemon)):
        if time.monotonic() > end:
            raise TimeoutError(f"still not so: {dict(samples)}")
        time.sleep(0.05)
    return samples


def promtool(*arguments: str | Path, text: str | None = None) -> str:
    """Output of promtool. Raises AssertionError with it for a fault."""
    program = find_program("promtool", "prometheus")
    done = subprocess.run([program, *arguments], input=text, capture_output=True, text=True, timeout=60, check=False)
    said = done.stdout + done.stderr
    if done.returncode:
        raise AssertionError(said)
    return said


class Prometheus(Daemon):
    """``with Prometheus(directory, target) as prometheus:`` scrapes ``target`` five times a second."""

    def __init__(self, directory: Path, target: str, rules: Path) -> None:
        super().__init__(directory)
        self._address = f"127.0.0.1:{free_port()}"
        directory.mkdir()
        configuration = {
            "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"},
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": "contentfilter", "static_configs": [{"targets": [target]}]}],
        }
        (directory / "prometheus.yml").write_text(json.dumps(configuration))  # JSON is YAML

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its HTTP API."""
        status, body = get(self._address, f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        answer: Mapping[str, Any] = json.loads(body)
        assert status == 200, answer
        assert answer["status"] == "success", answer
        return answer["data"]

    def value(self, expression: str) -> float | None:
        """The one number that an expression gives."""
        result = self.ask("query", query=expression)["result"]
        assert len(result) <= 1, result
        return float(result[0]["value"][1]) if result else None

    def wait_for(self, expression: str, value: float) -> None:
        end = time.monotonic() + WAIT
        while (found := self.value(expression)) != value:
            if time.monotonic() > end:
                raise TimeoutError(f"{expression} is {found}, not {value}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            return get(self._address, "/-/ready")[0] == 200
        except OSError:
            return False

    def start(self) -> Self:
        options = {
            "config.file": self.directory / "prometheus.yml",
            "storage.tsdb.path": self.directory / "data",
            "web.listen-address": self._address,
        }
        command = [find_program("prometheus", "prometheus"), *(f"--{name}={value}" for name, value in options.items())]
        self.launch(command, self._answers)
        return self
