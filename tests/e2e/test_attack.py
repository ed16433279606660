"""bench/attack.py: its table is complete, and a short attack beside honest mail is judged."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
PARTIES = (
    "Local user", "Forty local users", "Anybody at the HTTP port", "Member of the group", "Collector with a key",
    "Another program of the daemon's user", "Compromised clamd", "Compromised spamd", "Hostile MariaDB", "Sender",
    "State disk", "Control directory", "clamd", "Administrator",
)  # fmt: skip


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCH)
    import attacks.table

    yield attacks.table
    for name in [name for name in sys.modules if name.partition(".")[0] == "attacks"]:
        del sys.modules[name]


def test_every_attack_names_its_party_and_its_kind(table: ModuleType) -> None:
    for name, attack in table.ATTACKS.items():
        party = attack.kind.partition(":")[0].partition(" together")[0]
        assert party in PARTIES, f"{name}: {attack.kind}"
        assert attack.kind.endswith("."), name
        assert len(attack.kind) < 160, name


def test_every_attack_that_is_written_is_in_the_table(table: ModuleType) -> None:
    from attacks import local_users, others

    for module in (local_users, others):
        written = {
            n for n, f in vars(module).items() if callable(f) and getattr(f, "__module__", "") == module.__name__
        }
        acts = {n.replace("_", "-") for n in written if not n.startswith("_")}
        assert acts <= set(table.ATTACKS), acts - set(table.ATTACKS)


def run(*options: str) -> tuple[int, list[dict[str, Any]]]:
    words = [sys.executable, str(BENCH / "attack.py"), "--seconds", "3", "--json", *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=110, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(os.geteuid() != 0, reason="the attackers run as another user")
def test_a_short_attack_is_measured_and_no_honest_mail_is_harmed() -> None:
    """Times are not judged here: the machine runs other tests."""
    status, rows = run("--only", "linger-nested", "--floor", "1e9")
    assert [row["broken"] for row in rows] == [[]]
    assert status == 0
    (row,) = rows
    assert row["messages"] > 100
    assert row["named"]
    assert row["metric"].startswith("refused_connections_total +")
    assert {"supervisor", "worker", "receiver"} <= set(row["memory"])


@pytest.mark.skipif(os.geteuid() != 0, reason="the attackers run as another user")
def test_a_bound_that_is_broken_is_the_exit_status() -> None:
    status, rows = run("--only", "half-closed", "--floor", "1e9", "--memory", "1")
    assert status == 1
    assert any(bound.endswith(" MiB") for bound in rows[0]["broken"])


def test_the_list_needs_no_privilege() -> None:
    words = [sys.executable, str(BENCH / "attack.py"), "--list"]
    listed = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
    assert listed.count("\n") > 50
