"""The journal: everything is found again by index, nothing outside can break it, and it stays within its limits."""

import multiprocessing
import os
import signal
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contentfilter.errors import JournalError
from contentfilter.store.journal import (
    CHUNK,
    FILE,
    SET_ASIDE,
    VERSION,
    Journal,
    JournalEvent,
    Query,
    outcome_of,
    set_aside,
    statement,
)
from contentfilter.verdict.record import MailDetail

NOON = 1_700_000_000.0
NO_LIMIT = 1 << 40
HOSTILE = ["'; DROP TABLE mail; --", "*", "?", "[a-z]", "%", "\0", "\x1b[2J", "é\U0001f4a9", '"', "<>", "", "x" * 5000]


def done(number: int = 1, at: float = NOON, **more: Any) -> JournalEvent:
    """A ``mail.done`` event. ``message_id`` and ``more_recipients`` go into its account."""
    account = {name: more.pop(name) for name in ("message_id", "more_recipients", "story") if name in more}
    fields: dict[str, Any] = {
        "id": f"{number:016x}",
        "sender": "Joe@Example.net",
        "recipients": ["a@b.example", "c@b.example"],
        "recipient_count": 2,
        "remote": "192.0.2.7",
        "decision": "queue",
        "rule": "clean",
        "scans": [{"scanner": "clamd", "status": "clean", "ms": 1.0}],
    }
    return at, "mail.done", fields | more, msgspec.json.encode(MailDetail(**account))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / FILE


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with Journal.open(path) as opened:
        yield opened


def found(journal: Journal, *words: tuple[str, str], limit: int = 100, **more: Any) -> list[int]:
    """The numbers of the messages that match, in the order given."""
    return [int(mail.incident, 16) for mail in journal.find(Query(words, **more), limit)]


def count(path: Path, table: str) -> int:
    with sqlite3.connect(path) as connection:
        return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


# Searching


SCANS = [{"scanner": "clamd", "status": "found", "name": "Eicar-Test", "ms": 1.0}]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("incident", "0000000000000002"),
        ("incident", "0*2"),
        ("sender", "JANE@example.org"),
        ("sender", "*@example.org"),
        ("recipient", "x@y.example"),
        ("recipient", "?@y.*"),
        ("recipient", "r999@many.example"),
        ("message-id", "<One@Host>"),
        ("message-id", "one@host"),
        ("message-id", "*ONE@*"),
        ("signature", "eicar-test"),
        ("signature", "clamd: Eicar*"),
        ("decision", "reject"),
        ("remote", "2001:DB8::1"),
    ],
)
def test_a_message_is_found_by_everything_that_identifies_it(journal: Journal, kind: str, value: str) -> None:
    told: dict[str, Any] = {
        "sender": "jane@Example.org", "recipients": ["X@y.example"], "remote": "2001:db8::1", "decision": "reject",
        "rule": "clamd: Eicar-Test", "scans": SCANS, "message_id": "<one@host>",
        "more_recipients": tuple(f"r{i}@many.example" for i in range(1000)),
    }  # fmt: skip
    assert journal.append([done(1), done(2, **told), done(3)]) == 0
    assert found(journal, (kind, value)) == [2]
    assert found(journal, (kind, value + "~")) == []


def test_several_conditions_must_all_hold(journal: Journal) -> None:
    journal.append([done(1, decision="reject"), done(2, sender="x@y"), done(3, decision="reject", sender="x@y")])
    assert found(journal, ("decision", "reject"), ("sender", "x@y")) == [3]
    assert found(journal, ("decision", "reject"), ("sender", "x@*")) == [3]
    assert found(journal, ("decision", "reject"), ("recipient", "c@b.example")) == [3, 1]


def test_the_newest_come_first_and_no_more_than_asked_for(journal: Journal) -> None:
    journal.append([done(n, NOON + n) for n in (3, 1, 2, 5, 4)])
    assert found(journal, limit=3) == [5, 4, 3]
    assert found(journal, since=NOON + 2, until=NOON + 4) == [3, 2]
    assert found(journal, ("sender", "joe@example.net"), since=NOON + 4) == [5, 4]
    assert found(journal, since=-1e300, until=1e300) == [5, 4, 3, 2, 1]


def test_messages_of_one_microsecond_are_all_kept(journal: Journal) -> None:
    journal.append([done(n) for n in range(50)])
    journal.append([done(50)])
    assert sorted(found(journal)) == list(range(51))


def test_all_that_was_told_comes_back(journal: Journal) -> None:
    story = (("message", "5 bytes"), ("decision", "queue: é \0 'x'"))
    event = done(7, NOON + 0.25, story=story, message_id="<m>", more_recipients=("z@z",))
    journal.append([event])
    (mail,) = journal.find(Query(), 10)
    assert mail.fields == event[2]
    assert mail.account == MailDetail(story, "", "<m>", ("z@z",))
    assert mail.time == pytest.approx(NOON + 0.25)
    assert mail.report is None


@pytest.mark.parametrize(
    ("results", "kept", "words"),
    [
        (["0+", "0+"], ("0+", "0+"), "all 2 submissions were queued"),
        (["0+", "53+"], ("0+", "53+"), "partly queued, 1 of 2 submissions (exit statuses 0, 53)"),
        (["54", "-1000"], ("54", "-1000"), "nothing was queued (exit statuses 54, -1000)"),
        (None, (), "none: the hook ended"),
    ],
)
def test_a_report_completes_its_message(
    journal: Journal, results: list[str] | None, kept: tuple[str, ...], words: str
) -> None:
    journal.append([done(1), done(2)])
    bad = journal.append([(NOON, "mail.report", {"id": done(2)[2]["id"], "results": results}, b"")])
    reports = {int(mail.incident, 16): mail.report for mail in journal.find(Query(), 10)}
    assert (bad, reports) == (0, {1: None, 2: kept})
    assert outcome_of(kept).startswith(words)


# Cost


@pytest.fixture
def large(path: Path) -> sqlite3.Connection:
    """100,000 messages of as many senders, a second apart, all to one recipient."""
    Journal.open(path).close()
    connection = sqlite3.connect(path, isolation_level=None)
    numbers = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 99999)"
    key = f"{int(NOON)} * 1000000 + i * 1000000"
    connection.executescript(
        f"BEGIN; INSERT INTO mail {numbers} SELECT {key}, CAST('{{\"id\":\"x\"}}' AS BLOB), x'', NULL FROM n;"
        f"INSERT INTO word {numbers} SELECT {key}, 'sender', 's' || i || '@x' FROM n;"
        f"INSERT INTO word {numbers} SELECT {key}, 'recipient', 'r@x' FROM n; COMMIT;"
    )
    return connection


def steps(connection: sqlite3.Connection, query: Query, limit: int = 50) -> tuple[int, int]:
    """How many messages a search finds, and the thousands of SQLite's instructions that it takes."""
    thousands = 0

    def tick() -> int:
        nonlocal thousands
        thousands += 1
        return 0

    connection.set_progress_handler(tick, 1000)
    rows = connection.execute(*statement(query, limit)).fetchall()
    connection.set_progress_handler(None, 0)
    return len(rows), thousands


SEARCHES = [
    Query(((kind, value),), since=since)
    for kind in ("incident", "sender", "recipient", "message-id", "signature", "decision", "remote")
    for value in ("exact", "begin*", "*part*")
    for since in (0.0, NOON)
] + [Query(), Query(since=NOON, until=NOON + 9), Query((("sender", "a"), ("decision", "reject"), ("recipient", "*b")))]


@pytest.mark.parametrize("query", SEARCHES, ids=str)
def test_no_search_reads_the_whole_table(journal: Journal, path: Path, query: Query) -> None:
    sql, values = statement(query, 50)
    with sqlite3.connect(path) as connection:
        plan = [row[3] for row in connection.execute("EXPLAIN QUERY PLAN " + sql, values)]
    assert plan
    for step in plan:
        assert not step.startswith("SCAN"), plan
        assert "TEMP B-TREE" not in step, plan
    by_value = [step for step in plan if "word_by_value" in step]
    assert len(by_value) == len(query.words), plan
    for (_, value), step in zip(query.words, sorted(by_value), strict=True) if len(query.words) == 1 else ():
        wanted = "value=?" if "*" not in value else "value>?" if value[0] != "*" else "kind=?"
        assert wanted in step


def test_a_search_among_100_000_messages_costs_what_it_finds(large: sqlite3.Connection) -> None:
    assert steps(large, Query((("sender", "s77777@x"),))) < (1, 2)
    assert steps(large, Query((("sender", "s7777*"),))) < (11, 3)  # the one itself and ten longer ones
    assert steps(large, Query(since=NOON + 500, until=NOON + 510)) < (10, 2)
    assert steps(large, Query()) < (50, 5)
    found, thousands = steps(large, Query((("recipient", "r@x"),), since=NOON + 90_000))
    assert (found, thousands < 300) == (50, True)  # reads the 10,000 of that time, not the others


def test_expiry_among_100_000_messages_costs_what_it_removes(large: sqlite3.Connection, path: Path) -> None:
    for sql in ("DELETE FROM word WHERE key <= 5", "DELETE FROM mail WHERE key <= 5"):
        (plan,) = (row[3] for row in large.execute("EXPLAIN QUERY PLAN " + sql))
        assert plan.startswith("SEARCH")
        assert "PRIMARY KEY (" in plan
    large.close()
    with Journal.open(path) as journal:
        assert journal.expire(NOON + 1000, NO_LIMIT) == 1000
        assert journal.expire(NOON + 1000, NO_LIMIT) == 0
    assert (count(path, "mail"), count(path, "word")) == (99_000, 198_000)


# Limits


def test_what_is_too_old_goes_with_all_its_words(journal: Journal, path: Path) -> None:
    journal.append([done(n, NOON + n) for n in range(3 * CHUNK)])
    words = count(path, "word") // (3 * CHUNK)
    assert journal.expire(NOON + CHUNK + 10, NO_LIMIT) == CHUNK + 10
    assert found(journal, limit=5000) == list(range(3 * CHUNK - 1, CHUNK + 9, -1))
    assert count(path, "word") == words * (2 * CHUNK - 10)


def test_the_oldest_go_when_it_grows_too_large(journal: Journal) -> None:
    limit = 1 << 20
    for start in range(0, 3000, 100):
        journal.append([done(n, NOON + n, message_id="m" * 200) for n in range(start, start + 100)])
        journal.expire(0.0, limit)
        assert journal.size() <= limit
    left = found(journal, limit=5000)
    assert left[0] == 2999
    assert left == list(range(2999, left[-1] - 1, -1))
    assert len(left) > 300


def test_a_smaller_limit_makes_the_file_smaller(journal: Journal, path: Path) -> None:
    journal.append([done(n, NOON + n, message_id="m" * 200) for n in range(4000)])
    journal.expire(0.0, 1 << 20)
    assert journal.expire(0.0, NO_LIMIT) == 0
    journal.close()
    assert path.stat().st_size <= 1 << 20


# Trouble


@given(st.dictionaries(st.sampled_from(["id", "sender", "recipients", "scans", "rule", "remote"]), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)), st.binary(max_size=60))  # fmt: skip
def test_no_event_can_break_it(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any], account: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.sqlite"
    with Journal.open(path) as journal:
        before = len(journal.find(Query(), 10_000))
        events = [done(1), (NOON, "mail.done", fields, account), (NOON, "mail.report", fields, account)]
        bad = journal.append([*events, done(2)])
        assert len(journal.find(Query(), 10_000)) == before + 3 - (bad if "results" in fields else bad - 1)
        journal.expire(NOON + 1, NO_LIMIT)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_kept_and_found_like_any_other(journal: Journal, text: str) -> None:
    told: dict[str, Any] = {"sender": text, "recipients": [text], "remote": text, "rule": text, "message_id": text}
    assert journal.append([done(1), done(2, story=((text, text),), **told), done(3)]) == 0
    (mail,) = (mail for mail in journal.find(Query(), 10) if mail.incident.endswith("2"))
    assert mail.fields["sender"] == text
    assert mail.account.story == ((text, text),)
    for kind in ("sender", "recipient", "message-id", "signature", "remote"):
        if text.strip("<> ") or kind in ("sender", "recipient"):
            assert 2 in found(journal, (kind, text))


def test_an_unknown_or_malformed_event_is_counted(journal: Journal) -> None:
    bad: list[JournalEvent] = [
        (NOON, "mail.done", {}, b""),
        (NOON, "mail.done", {"id": 5}, b""),
        (NOON, "mail.done", {"id": "x"}, b"{"),
        (NOON, "mail.report", {"id": "x"}, b""),
    ]
    assert journal.append([done(1), *bad, done(2)]) == len(bad)
    assert sorted(found(journal)) == [1, 2]


@pytest.mark.parametrize("damage", ["text", "cut", "page", "version", "schema"])
def test_a_file_that_cannot_be_used_says_so_and_makes_room(path: Path, damage: str) -> None:
    with Journal.open(path) as journal:
        journal.append([done(n) for n in range(500)])
    data = bytearray(path.read_bytes())
    if damage == "text":
        path.write_bytes(b"no database at all\n" * 1000)
    elif damage == "cut":
        path.write_bytes(data[:5000])
    elif damage == "page":
        data[4096:] = b"\xa5" * (len(data) - 4096)
        path.write_bytes(data)
    else:
        with sqlite3.connect(path) as connection:
            statements = {"version": f"PRAGMA user_version = {VERSION + 1}", "schema": "DROP TABLE word"}
            connection.execute(statements[damage])
    with pytest.raises(JournalError) as trouble, Journal.open(path) as journal:  # noqa: PT012 - wherever it shows first
        journal.append([done(1)])
        journal.find(Query(), 1000)
    assert trouble.value.unusable
    assert str(path) in str(trouble.value)
    aside = set_aside(path)
    assert (aside.name, aside.exists(), path.exists()) == (SET_ASIDE, True, False)
    with Journal.open(path) as journal:
        journal.append([done(9)])
        assert found(journal) == [9]


def test_another_fault_does_not_ask_for_a_new_file(path: Path) -> None:
    with pytest.raises(JournalError) as trouble:
        Journal.open(path / "below" / "a file")
    assert not trouble.value.unusable
    with Journal.open(path) as journal, sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        journal._connection.execute("PRAGMA busy_timeout = 1")
        with pytest.raises(JournalError, match="locked") as trouble:
            journal.append([done(1)])
        assert not trouble.value.unusable
        other.execute("ROLLBACK")
        assert journal.append([done(1)]) == 0  # nothing of the transaction is left open


def test_a_batch_that_breaks_off_leaves_nothing(journal: Journal) -> None:
    def breaks_off() -> Iterator[JournalEvent]:
        yield done(1)
        raise InterruptedError

    with pytest.raises(JournalError):
        journal.append(breaks_off())
    assert found(journal) == []
    assert journal.append([done(2)]) == 0
    assert found(journal) == [2]


def test_nobody_else_can_read_it(path: Path) -> None:
    before = os.umask(0)
    try:
        with Journal.open(path) as journal:
            journal.append([done(1)])
            modes = {name.name: stat.S_IMODE(name.stat().st_mode) for name in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert len(modes) == 3
    assert set(modes.values()) == {0o600}
    path.chmod(0o644)
    Journal.open(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_only_a_regular_file_is_opened(path: Path, kind: str) -> None:
    other = path.with_name("other")
    make = {"link": lambda: path.symlink_to(other), "pipe": lambda: os.mkfifo(path), "directory": path.mkdir}
    make[kind]()
    with pytest.raises(JournalError):
        Journal.open(path)
    assert not other.exists()


# Others at the same time


def test_reading_needs_no_daemon_and_changes_nothing(path: Path) -> None:
    with Journal.open(path) as journal:
        journal.append([done(1)])
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    with Journal.reading(path) as reader:
        assert found(reader) == [1]
        with pytest.raises(JournalError):
            reader.append([done(2)])
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_reading_says_that_there_is_none(path: Path) -> None:
    with pytest.raises(JournalError, match="no journal yet"):
        Journal.reading(path)
    assert not path.exists()


PAIR = 2


def _write(path: Path, ready: Any, stop: Any) -> None:
    with Journal.open(path) as journal:
        number = 0
        while not stop.is_set():
            journal.append([done(number + i, time.time(), message_id=f"<{number}>") for i in range(PAIR)])
            number += PAIR
            ready.set()


def _read(path: Path, stop: Any, results: Any) -> None:
    rounds, newest = 0, -1
    try:
        with Journal.reading(path) as journal:
            while not stop.is_set() or not rounds:
                (last,) = journal.find(Query(), 1)
                twins = journal.find(Query((("message-id", last.account.message_id),)), 10)
                assert len(twins) == PAIR, "half a transaction"
                assert int(last.incident, 16) >= newest, "went back"
                newest, rounds = int(last.incident, 16), rounds + 1
        results.put(rounds)
    except BaseException as error:
        results.put(repr(error))


def test_two_read_whole_transactions_while_one_writes(path: Path) -> None:
    context = multiprocessing.get_context("fork")  # a spawned child could not import this module
    ready, stop, results = context.Event(), context.Event(), context.Queue()
    writer = context.Process(target=_write, args=(path, ready, stop))
    writer.start()
    assert ready.wait(30)
    readers = [context.Process(target=_read, args=(path, stop, results)) for _ in range(2)]
    for reader in readers:
        reader.start()
    with Journal.reading(path) as journal:
        end = time.monotonic() + 30
        while max(found(journal)) < 400 and time.monotonic() < end:
            pass
    stop.set()
    said = [results.get(timeout=30) for _ in readers]
    for process in (writer, *readers):
        process.join(30)
    assert all(isinstance(rounds, int) and rounds > 0 for rounds in said), said


def test_a_writer_killed_in_the_middle_leaves_whole_transactions(path: Path) -> None:
    context = multiprocessing.get_context("fork")  # a spawned child could not import this module
    ready, stop = context.Event(), context.Event()
    writer = context.Process(target=_write, args=(path, ready, stop))
    writer.start()
    assert ready.wait(30)
    with Journal.reading(path) as journal:
        while not found(journal, ("incident", f"{200:016x}")):
            assert writer.is_alive()
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(30)
    with Journal.open(path) as journal:
        numbers = found(journal, limit=1_000_000)
        assert len(numbers) % PAIR == 0
        assert sorted(numbers) == list(range(len(numbers)))
        journal.append([done(len(numbers), time.time() + 9)])
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
