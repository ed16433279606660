"""The running daemon and a real MariaDB: changes arrive, faults do not stop the mail, and rows do what they ask for."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from lab.clamd import EICAR, Clamd
from lab.daemon import WAIT
from lab.mariadb import MariaDb
from lab.system import System

from contentfilter.bus import messages, sockets
from contentfilter.tables.keeper import TableState

VIRUS = b"From: a@example.net\nSubject: look\n\n" + EICAR + b"\n"
ROOT = str(Path(__file__).resolve().parents[2])

_numbers = itertools.count(1)


@pytest.fixture
def start(lab_directory: Path, clamd: Clamd) -> Iterator[Callable[..., System]]:
    """``start(db, refresh=…)``: a daemon whose tables are in ``db``; keys of [mariadb] may follow."""
    with ExitStack() as stack:

        def make(db: MariaDb, refresh: float = 3600.0, *, run: bool = True, **keys: Any) -> System:
            directory = lab_directory / f"live{next(_numbers)}"
            directory.mkdir()
            password = directory / "password"
            password.write_text("change me\n")
            password.chmod(0o600)
            section = {"socket": db.socket, "database": "mail", "password_file": str(password), "connect_timeout": 1.0}
            tables = {"source": "mariadb", "refresh": refresh, "shrink_rows": 3}
            settings = {"tables": tables, "mariadb": section | {"timeout": 1.0} | keys, "service": {"workers": 1}}
            system = System(directory, settings=settings, clamd=clamd, tracebacks_allowed=False)
            return stack.enter_context(system) if run else system

        yield make


def fate(system: System, recipient: str = "user@x.example") -> str:
    """What happens to a virus for this recipient."""
    d = system.deliver(VIRUS, recipient.encode(), budget=10)
    return {"D": "refused", "Z": "deferred", "": "delivered"}[d.text[:1]]


def tables(system: System) -> TableState:
    reply = sockets.ask(str(system.directory), messages.AskStatus(), WAIT)
    assert isinstance(reply, messages.Status)
    assert reply.tables is not None
    return reply.tables


def command(system: System, *words: str) -> "subprocess.CompletedProcess[str]":
    environ = {**os.environ, "PYTHONPATH": ROOT}
    line = [sys.executable, "-P", "-m", "contentfilter", "--config", str(system.daemon.config), *words]
    return subprocess.run(line, env=environ, capture_output=True, text=True, timeout=120)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end, "not in time"


def test_a_changed_row_is_in_force_after_a_refresh(db: MariaDb, start: Callable[..., System]) -> None:
    system = start(db, refresh=0.3)
    assert fate(system) == "delivered"
    db.run("INSERT INTO clamavclients (address) VALUES ('user@x.example')")
    system.daemon.wait_for("worker.reload", 1)
    assert fate(system) == "refused"
    db.run("UPDATE clamavclients SET exempt = 1")
    system.daemon.wait_for("worker.reload", 2)
    assert fate(system) == "delivered"


def test_a_changed_row_is_in_force_at_once_on_reload(db: MariaDb, start: Callable[..., System]) -> None:
    system = start(db)
    db.run("INSERT INTO clamavclients (address) VALUES ('@x.example')")
    assert fate(system) == "delivered"
    assert command(system, "reload").returncode == 0
    assert fate(system) == "refused"


def test_rows_actions_happen(db: MariaDb, start: Callable[..., System]) -> None:
    db.run("""INSERT INTO clamavclients (address, virus) VALUES ('@x.example', 'mark'),
        ('gone@x.example', 'remove'), ('strict@x.example', 'reject'), ('away@x.example', 'move:jail@x.example')""")
    system = start(db)
    people = [f"{name}@x.example".encode() for name in ("user", "gone", "away", "strict")]
    d = system.deliver(VIRUS, *people, b"free@y.example")
    assert d.status == 0
    forms = {q.envelope.recipients: q.message for q in d.queued}
    assert set(forms) == {(b"user@x.example",), (b"jail@x.example",), (b"free@y.example",)}
    assert b"X-Virus-Status: Infected" in forms[(b"user@x.example",)]
    assert b"X-Envelope-To: away@x.example\n" in forms[(b"jail@x.example",)]
    assert b"Infected" not in forms[(b"free@y.example",)]
    assert all(message.endswith(VIRUS) for message in forms.values())
    (entry,) = (system.directory / "state" / "quarantine" / "entries").glob("*.json")
    assert json.loads(entry.read_text())["withheld_from"] == [1, 3]


def test_a_dead_database_does_not_stop_the_mail_nor_a_restart(own_db: MariaDb, start: Callable[..., System]) -> None:
    own_db.run("DELETE FROM clamavclients; INSERT INTO clamavclients (address) VALUES ('user@x.example')")
    system = start(own_db, refresh=0.3)
    assert fate(system) == "refused"
    own_db.kill()
    line = system.daemon.wait_for("tables.stale")[0]
    assert "cannot connect" in line["why"]
    assert (line["level"], line["clamav_rows"]) == ("warning", 1)
    assert fate(system) == "refused"
    state = tables(system)
    assert (state.loaded, state.source, state.clamav_rows) == (True, "mariadb", 1)
    assert "cannot connect" in state.trouble
    said = command(system, "status")
    assert "OUT OF DATE" in said.stdout
    told = command(system, "reload")
    assert (told.returncode, "cannot connect" in told.stderr) == (1, True)
    assert fate(system) == "refused"

    system.daemon.stop()
    system.daemon.start()
    assert fate(system) == "refused"
    assert tables(system).age > state.age

    own_db.start()
    own_db.run("INSERT INTO clamavclients (address) VALUES ('other@x.example')")
    system.daemon.wait_for("tables.current")
    # The first look may have come before the new row.
    until(lambda: fate(system, "other@x.example") == "refused")
    assert tables(system).trouble == ""


def test_a_hanging_database_delays_no_mail(own_db: MariaDb, start: Callable[..., System]) -> None:
    own_db.run("DELETE FROM clamavclients; INSERT INTO clamavclients (address) VALUES ('user@x.example')")
    system = start(own_db, refresh=0.2, connect_timeout=20.0)
    own_db.signal(signal.SIGSTOP)
    try:
        for _ in range(5):
            began = time.monotonic()
            assert fate(system) == "refused"
            assert time.monotonic() - began < 10
    finally:
        own_db.signal(signal.SIGCONT)


def test_without_any_tables_mail_is_deferred_until_they_are_there(
    own_db: MariaDb, start: Callable[..., System]
) -> None:
    own_db.run("DELETE FROM clamavclients; INSERT INTO clamavclients (address) VALUES ('user@x.example')")
    own_db.kill()
    system = start(own_db, refresh=0.3)
    try:
        assert fate(system) == "deferred"
        assert fate(system, "nobody@elsewhere.example") == "deferred"
        assert not tables(system).loaded
        assert "no recipient tables" in command(system, "status").stdout
        system.control("options", "clamglobal 1\nspamglobal 1\n")
        command(system, "reload")
        assert fate(system) == "refused", "nobody needs the tables now"
        system.control("options", "")
        command(system, "reload")
        assert fate(system) == "deferred"
    finally:
        own_db.start()
    system.daemon.wait_for("tables.current")
    until(lambda: fate(system, "nobody@elsewhere.example") == "delivered")
    assert fate(system) == "refused"


def test_a_wrong_password_and_a_missing_table_keep_what_was_there(db: MariaDb, start: Callable[..., System]) -> None:
    db.run("INSERT INTO clamavclients (address) VALUES ('user@x.example')")
    system = start(db)
    password = system.directory / "password"
    password.write_text("wrong\n")
    assert "Access denied" in command(system, "reload").stderr
    assert fate(system) == "refused"
    password.write_text("change me\n")
    db.run("DROP TABLE clamavclients")
    assert "doesn't exist" in command(system, "reload").stderr
    assert fate(system) == "refused"
    assert "change me" not in json.dumps(system.daemon.log())


def test_most_rows_gone_is_refused_shown_and_accepted(db: MariaDb, start: Callable[..., System]) -> None:
    people = ", ".join(f"('user{number}@x.example')" for number in range(20))
    db.run(f"INSERT INTO clamavclients (address) VALUES {people}, ('user@x.example')")
    system = start(db, refresh=0.3)
    db.run("DELETE FROM clamavclients; INSERT INTO clamavclients (address) VALUES ('new@x.example')")
    line = system.daemon.wait_for("tables.stale")[0]
    assert "clamavclients would shrink from 21 to 1 rows" in line["why"]
    assert (fate(system), fate(system, "new@x.example")) == ("refused", "delivered")

    shown = command(system, "clients", "diff", "--json")
    facts = json.loads(shown.stdout)
    assert (shown.returncode, facts["tables"]["clamavclients"]["removed"]) == (1, 21)
    assert "+ new@x.example" in facts["tables"]["clamavclients"]["samples"]
    text = command(system, "clients", "diff").stdout
    assert "21 rows in force, 1 now: 21 removed, 1 added, 0 changed" in text
    assert f"clients accept {facts['checksum']}" in text

    assert command(system, "clients", "accept", "0" * 16).returncode == 1
    db.run("INSERT INTO clamavclients (address) VALUES ('more@x.example')")
    assert command(system, "clients", "accept", facts["checksum"]).returncode == 1, "the rows are others now"
    assert fate(system) == "refused"
    db.run("DELETE FROM clamavclients WHERE address = 'more@x.example'")
    done = command(system, "clients", "accept", facts["checksum"])
    assert (done.returncode, done.stderr) == (0, "")
    assert (fate(system), fate(system, "new@x.example")) == ("delivered", "refused")
    assert command(system, "clients", "diff").returncode == 0


def test_the_command_line_reads_the_database_and_changes_it_not(db: MariaDb, start: Callable[..., System]) -> None:
    db.run("INSERT INTO clamavclients (address, virus) VALUES ('@x.example', 'mark')")
    system = start(db, run=False)
    assert command(system, "clients", "list").stdout == "Table\tRow\nclamavclients\t@x.example virus=mark\n"
    assert "yes, by @x.example" in command(system, "clients", "lookup", "user@x.example").stdout
    said = command(system, "clients", "add", "new@x.example")
    assert said.returncode == 78
    assert 'source is "mariadb"' in said.stderr
    checked = command(system, "check").stdout
    assert "1 clamavclients rows" in checked
    assert "chmod 600" not in checked
    (system.directory / "password").chmod(0o644)
    assert "readable for every user; chmod 600" in command(system, "check").stdout
    db.run("DROP TABLE spamdclients")
    assert "doesn't exist" in command(system, "check").stdout
