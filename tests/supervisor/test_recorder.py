"""The recorder: the journal is fed without anybody waiting for it, and no disk can disturb more than the journal."""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from contentfilter.bus.messages import Event
from contentfilter.errors import JournalError
from contentfilter.log import Logger, make_logger
from contentfilter.settings import JournalSettings as JournalSettings
from contentfilter.settings import ServiceSettings, Settings
from contentfilter.store.journal import FILE, SET_ASIDE, Journal, Query
from contentfilter.supervisor import recorder as module
from contentfilter.supervisor.recorder import Recorder

WAIT = 30.0


def settings(state: Path, **journal: Any) -> Settings:
    return Settings(service=ServiceSettings(state=str(state)), journal=JournalSettings(**journal))


def done(number: int, account: bytes = b"") -> Event:
    return Event("mail.done", {"id": f"{number:016x}", "sender": "a@b", "recipients": [], "decision": "queue"}, account)


def stored(state: Path) -> list[int]:
    """The numbers in the journal, oldest first."""
    with Journal.reading(state / FILE) as journal:
        return [int(mail.incident, 16) for mail in journal.find(Query(), 100_000)][::-1]


class Log:
    """A real logger into a file, read back as JSON."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.logger: Logger = make_logger("json", "debug", os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND))

    def lines(self, event: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self._path.read_text().splitlines()) if line["event"] == event]


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "log")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.mkdir()
    return path


@pytest.fixture
def record(log: Log) -> Iterator[Callable[[Settings], Recorder]]:
    made: list[Recorder] = []

    def make(settings: Settings) -> Recorder:
        made.append(Recorder(log.logger, settings))
        return made[-1]

    yield make
    for each in made:
        each.close(WAIT)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Somebody else holds the file: writing takes as long as the block."""
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        try:
            yield
        finally:
            other.execute("ROLLBACK")
    other.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.005)


def test_what_is_put_is_in_the_journal_after_closing(record: Callable[..., Recorder], state: Path) -> None:
    recorder = record(settings(state))
    for number in range(1300):  # more than one transaction takes
        recorder.put(done(number))
    recorder.put(Event("mail.report", {"id": f"{7:016x}", "results": ["0+", "0+"]}))
    recorder.put(Event("worker.start", {"pid": 1}))
    recorder.close(WAIT)
    assert stored(state) == list(range(1300))
    with Journal.reading(state / FILE) as journal:
        (mail,) = journal.find(Query((("incident", f"{7:016x}"),)), 2)
    assert mail.report == ("0+", "0+")
    assert recorder.dropped == 0


def test_a_message_is_found_soon_without_closing(record: Callable[..., Recorder], state: Path) -> None:
    recorder = record(settings(state))
    recorder.put(done(1))
    until((state / FILE).exists)
    until(lambda: _readable(state) == [1])
    recorder.put(done(2))
    until(lambda: _readable(state) == [1, 2])


def _readable(state: Path) -> list[int]:
    try:
        return stored(state)
    except JournalError:  # just being made
        return []


def test_a_slow_disk_makes_nobody_wait_and_memory_stays_bounded(
    record: Callable[..., Recorder], state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAITING_MAX", 100 * module.EVENT_BYTES)
    Journal.open(state / FILE).close()
    recorder = record(settings(state))
    with locked(state / FILE):
        began = time.monotonic()
        for number in range(5000):
            recorder.put(done(number))
        spent = time.monotonic() - began
        dropped = recorder.dropped
        assert dropped >= 5000 - 2 * 100  # at most one batch is with the writer
    assert spent < 2  # a single wait for the lock would take longer
    recorder.close(WAIT)
    assert len(stored(state)) == 5000 - dropped
    assert recorder.dropped == dropped


def test_what_is_written_makes_room(
    record: Callable[..., Recorder], state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAITING_MAX", 10 * module.EVENT_BYTES)
    recorder = record(settings(state))
    for start in range(0, 50, 10):
        for number in range(start, start + 10):
            recorder.put(done(number))
        until(lambda start=start: len(_readable(state)) == start + 10)  # type: ignore[misc]
    assert recorder.dropped == 0


def test_large_accounts_count_by_their_size(
    record: Callable[..., Recorder], state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAITING_MAX", 1 << 20)
    recorder = record(settings(state))
    recorder.put(done(1, b" " * (2 << 20)))
    recorder.put(done(2))
    recorder.close(WAIT)
    assert recorder.dropped == 1
    assert stored(state) == [2]


def test_a_refusing_disk_is_told_once_and_used_again_when_it_is_well(
    record: Callable[..., Recorder], state: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.0)
    (state / FILE).mkdir()  # cannot be opened as a file
    recorder = record(settings(state))
    for number in range(3):
        recorder.put(done(number))
        until(lambda number=number: recorder.dropped == number + 1)  # type: ignore[misc]
    assert [(line["level"], line["dropped"]) for line in log.lines("journal.failed")] == [("warning", 1)]
    (state / FILE).rmdir()
    recorder.put(done(3))
    recorder.close(WAIT)
    assert stored(state) == [3]


def test_a_disk_that_refused_is_left_alone_for_a_while(record: Callable[..., Recorder], state: Path) -> None:
    (state / FILE).mkdir()
    recorder = record(settings(state))
    recorder.put(done(0))
    until(lambda: recorder.dropped == 1)
    (state / FILE).rmdir()
    recorder.put(done(1))
    until(lambda: recorder.dropped == 2)
    assert not (state / FILE).exists()


def test_a_damaged_file_is_set_aside_and_nothing_is_lost(
    record: Callable[..., Recorder], state: Path, log: Log
) -> None:
    (state / FILE).write_bytes(b"rubbish" * 1000)
    recorder = record(settings(state))
    recorder.put(done(1))
    recorder.close(WAIT)
    assert stored(state) == [1]
    assert (state / SET_ASIDE).read_bytes() == b"rubbish" * 1000
    (line,) = log.lines("journal.set-aside")
    assert (line["level"], line["path"]) == ("warning", str(state / SET_ASIDE))
    assert recorder.dropped == 0


def test_damage_while_it_runs_is_noticed_too(record: Callable[..., Recorder], state: Path, log: Log) -> None:
    recorder = record(settings(state))
    recorder.put(done(1))
    until(lambda: _readable(state) == [1])
    with sqlite3.connect(state / FILE) as other:
        other.execute("DROP TABLE word")
    other.close()
    recorder.put(done(2))
    recorder.close(WAIT)
    assert stored(state) == [2]
    assert len(log.lines("journal.set-aside")) == 1


def test_malformed_events_are_counted_and_the_others_kept(
    record: Callable[..., Recorder], state: Path, log: Log
) -> None:
    recorder = record(settings(state))
    for event in (done(1), Event("mail.done", {}), Event("mail.done", {"id": 5}), done(2)):
        recorder.put(event)
    recorder.close(WAIT)
    assert stored(state) == [1, 2]
    assert recorder.dropped == 2
    assert sum(line["events"] for line in log.lines("journal.malformed")) == 2


def test_the_file_never_outgrows_its_limit(record: Callable[..., Recorder], state: Path) -> None:
    recorder = record(settings(state, max_size=1 << 20))
    account = json.dumps({"text": "x" * 10_000}).encode()
    for number in range(1000):
        recorder.put(done(number, account))
    recorder.close(WAIT)
    left = stored(state)
    assert 0 < len(left) < 200
    assert left[-1] == 999
    with Journal.open(state / FILE) as journal:
        assert journal.size() <= 1 << 20


def test_age_is_applied_on_demand(record: Callable[..., Recorder], state: Path) -> None:
    with Journal.open(state / FILE) as journal:
        old, young = time.time() - 3 * module.DAY, time.time() - 1 * module.DAY
        fields = done(0).fields
        journal.append([(at, "mail.done", fields | {"id": f"{n:016x}"}, b"") for n, at in enumerate((old, old, young))])
    recorder = record(settings(state, retention=2.0))
    recorder.put(done(3))
    assert recorder.expire(aged=False) == 0, "while the clock is doubted"
    assert recorder.expire() == 2
    recorder.close(WAIT)
    assert stored(state) == [2, 3]


def test_an_expiry_that_fails_says_why(record: Callable[..., Recorder], state: Path) -> None:
    (state / FILE).mkdir()
    with pytest.raises(JournalError, match=FILE):
        record(settings(state)).expire()


def test_switched_off_nothing_is_written(record: Callable[..., Recorder], state: Path) -> None:
    recorder = record(settings(state, enabled=False))
    recorder.put(done(1))
    assert recorder.expire() == 0
    recorder.close(WAIT)
    assert list(state.iterdir()) == []


def test_a_reload_switches_it_on_and_moves_it(record: Callable[..., Recorder], state: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    recorder = record(settings(state, enabled=False))
    recorder.put(done(1))
    recorder.change(settings(state))
    recorder.put(done(2))
    until(lambda: _readable(state) == [2])
    recorder.change(settings(other))
    recorder.put(done(3))
    recorder.close(WAIT)
    assert (stored(state), stored(other)) == ([2], [3])
