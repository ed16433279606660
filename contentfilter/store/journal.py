"""The journal: what happened to which message and why, in one SQLite file, searched by index.

One process writes, any number read at the same time (WAL, https://sqlite.org/wal.html). A row's key is its time in
microseconds, so that age and order are ranges of the key. All that is searched for are *words*, a kind and
a value in lower case, the incident among them. The file is readable by its owner only.

Every fault is raised as JournalError.
"""

import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from contentfilter.errors import JournalError
from contentfilter.model import ScanStatus
from contentfilter.settings import Settings
from contentfilter.verdict.record import MailDetail

VERSION = 1
FILE = "journal.sqlite"
SET_ASIDE = FILE + ".set-aside"
"""Name for a file that cannot be used. Only one is kept: it may be large."""
VALUE_MAX = 300
"""Characters of a value that are compared."""
CHUNK = 50
"""Messages that are removed in one transaction."""

_LAST = 1 << 62
_WAIT = 5.0  # seconds for another process to let go of the file
_WAL_KEPT = 4 << 20  # bytes
_UNUSABLE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_INSERT = "INSERT OR IGNORE INTO mail (key, fields, account) VALUES (?, ?, ?)"
_REPORT = "UPDATE mail SET report = ? WHERE key IN (SELECT key FROM word WHERE kind = 'incident' AND value = ?)"
_EXACT = " AND key IN (SELECT key FROM word WHERE kind = ? AND value = ? AND key BETWEEN ? AND ?)"
_WILD = _EXACT.replace("value =", "value GLOB")
_SCHEMA = f"""
    BEGIN IMMEDIATE;
    CREATE TABLE mail (key INTEGER PRIMARY KEY, fields BLOB NOT NULL, account BLOB NOT NULL, report BLOB);
    CREATE TABLE word (key INTEGER, kind TEXT, value TEXT, PRIMARY KEY (key, kind, value)) WITHOUT ROWID;
    CREATE INDEX word_by_value ON word (kind, value);
    PRAGMA user_version = {VERSION};
    COMMIT;
"""


JournalEvent = tuple[float, str, dict[str, Any], bytes]
"""When (seconds since 1970), name, fields of the log line, account in JSON."""


@dataclass(frozen=True, slots=True)
class Query:
    """Conditions that a message must meet.

    ``words``: pairs of a kind (incident, sender, recipient, message-id, signature, decision, remote) and a value,
    in which ``*`` and ``?`` are wild.
    """

    words: tuple[tuple[str, str], ...] = ()
    since: float = 0.0  # seconds since 1970
    until: float = float("inf")


@dataclass(frozen=True, slots=True)
class Mail:
    """One message of the journal."""

    time: float  # when it was decided; seconds since 1970
    fields: dict[str, Any]  # those of the log line
    account: MailDetail
    report: tuple[str, ...] | None  # exit status of each submission, + if committed; empty: no report

    @property
    def incident(self) -> str:
        return str(self.fields["id"])


def outcome_of(report: tuple[str, ...]) -> str:
    """Describe the hook's report about its qmail-queue submissions."""
    queued = report.count("0+")
    if not report:
        return "none: the hook ended without saying what became of the submissions"
    if queued == len(report):
        return f"all {queued} submissions were queued"
    statuses = ", ".join(status.rstrip("+") for status in report)
    what = f"partly queued, {queued} of {len(report)} submissions" if queued else "nothing was queued"
    return f"{what} (exit statuses {statuses}); the client was told to try again later"


def journal_path(settings: Settings) -> Path:
    return Path(settings.service.state) / FILE


class Journal:
    """An open journal, to be used by the thread that opened it."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    def open(cls, path: Path) -> "Journal":
        """Open for writing; create a missing file. Raises JournalError."""
        with _own_errors(path):
            _make_private(path)
            journal = cls(path, sqlite3.connect(path, timeout=_WAIT, isolation_level=None))
            try:
                journal._prepare()
            except BaseException:
                journal.close()
                raise
        return journal

    @classmethod
    def reading(cls, path: Path) -> "Journal":
        """For searching only, whether a daemon writes or none runs. Raises JournalError."""
        with _own_errors(path):
            if not path.exists():
                raise JournalError(f"{path}: there is no journal yet")
            address = f"file:{quote(str(path))}?mode=ro"
            if not os.access(path.parent, os.W_OK) and not path.with_name(FILE + "-wal").exists():
                address += "&immutable=1"  # a copy on a read-only file system
            journal = cls(path, sqlite3.connect(address, timeout=_WAIT, isolation_level=None, uri=True))
            try:
                journal._check_version()
            except BaseException:
                journal.close()
                raise
        return journal

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _prepare(self) -> None:
        new = not self._number("PRAGMA schema_version")
        if new:
            self._connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only before the first table
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may cost the last batches, never the file
        self._connection.execute(f"PRAGMA journal_size_limit = {_WAL_KEPT}")
        if new:
            self._connection.executescript(_SCHEMA)
        self._check_version()

    def _check_version(self) -> None:
        version = self._number("PRAGMA user_version")
        if version != VERSION:
            raise JournalError(f"{self.path}: format {version}, this version reads {VERSION}", unusable=True)

    def _number(self, question: str) -> int:
        return int(self._connection.execute(question).fetchone()[0])

    # Writing

    def append(self, events: Iterable[JournalEvent]) -> int:
        """Store events in one transaction; returns how many were malformed.

        ``mail.done`` makes a row and its words, ``mail.report`` completes one.
        """
        bad = 0
        with _own_errors(self.path), self._transaction() as cursor:
            for at, name, fields, account in events:
                try:
                    if name == "mail.report":
                        report = _encode(fields["results"] or ()), _folded(fields["id"])
                    else:
                        words = words_of(fields, _account(account))
                        key, row = _key(at), (_encode(fields), account)
                except (KeyError, TypeError, AttributeError, ValueError, msgspec.MsgspecError):
                    bad += 1
                    continue
                if name == "mail.report":
                    cursor.execute(_REPORT, report)
                else:
                    while not cursor.execute(_INSERT, (key, *row)).rowcount:
                        key += 1  # two in one microsecond
                    cursor.executemany("INSERT INTO word VALUES (?, ?, ?)", [(key, *word) for word in words])
        return bad

    def expire(self, before: float, max_size: int) -> int:
        """Remove what came in before ``before`` (seconds since 1970), and the oldest while the file holds more
        than ``max_size`` bytes. In short transactions: readers and writers need not wait. Returns the count.
        """
        removed = 0
        with _own_errors(self.path):
            while True:
                newest = self._connection.execute(
                    "SELECT max(key) FROM (SELECT key FROM mail ORDER BY key LIMIT ?)", (CHUNK,)
                ).fetchone()[0]
                if newest is None:
                    break
                upto = newest if self.size() > max_size else min(newest, _key(before) - 1)
                with self._transaction() as cursor:
                    cursor.execute("DELETE FROM word WHERE key <= ?", (upto,))
                    gone = cursor.execute("DELETE FROM mail WHERE key <= ?", (upto,)).rowcount
                removed += gone
                if gone < CHUNK:
                    break
            if self._number("PRAGMA page_count") * self._number("PRAGMA page_size") > max_size:
                self._connection.executescript("PRAGMA incremental_vacuum")  # execute() would free a single page
        return removed

    def size(self) -> int:
        """Bytes of the file that hold something."""
        pages = self._number("PRAGMA page_count") - self._number("PRAGMA freelist_count")
        return pages * self._number("PRAGMA page_size")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Cursor]:
        cursor = self._connection.cursor()
        cursor.execute("BEGIN IMMEDIATE")
        try:
            yield cursor
            cursor.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                cursor.execute("ROLLBACK")
            raise

    # Reading

    def find(self, query: Query, limit: int) -> list[Mail]:
        """Yield matching messages, newest first. Raises JournalError."""
        with _own_errors(self.path):
            return [_mail(*row) for row in self._connection.execute(*statement(query, limit))]


def statement(query: Query, limit: int) -> tuple[str, tuple[object, ...]]:
    """The SQL of a search, and its values."""
    low, high = _key(query.since), _key(query.until) - 1
    sql = "SELECT key, fields, account, report FROM mail WHERE key BETWEEN ? AND ?"
    parameters: list[object] = [low, high]
    for kind, wanted in query.words:
        value = _folded(wanted)
        wild = "*" in value or "?" in value
        sql += _WILD if wild else _EXACT
        parameters += [kind, value.replace("[", "[[]") if wild else value, low, high]
    return sql + " ORDER BY key DESC LIMIT ?", (*parameters, limit)


def words_of(fields: dict[str, Any], account: MailDetail) -> set[tuple[str, str]]:
    """Return the words under which a message is indexed."""
    found = {("incident", fields["id"]), ("sender", fields.get("sender", "")), ("decision", fields.get("decision", ""))}
    found |= {("recipient", address) for address in (*fields.get("recipients", ()), *account.more_recipients)}
    names = [scan.get("name") for scan in fields.get("scans", ()) if scan.get("status") == ScanStatus.FOUND.value]
    found |= {("signature", name) for name in (*names, fields.get("rule")) if name}
    found |= {("remote", fields["remote"])} if fields.get("remote") else set()
    found |= {("message-id", account.message_id)} if account.message_id else set()
    return {(kind, _folded(value)) for kind, value in found}


def set_aside(path: Path) -> Path:
    """Move a file that cannot be used out of the way, over the one that lies there. Raises JournalError."""
    aside = path.with_name(SET_ASIDE)
    with _own_errors(path):
        os.replace(path, aside)
        for end in ("-wal", "-shm"):  # they belong to that file, and would spoil the new one
            path.with_name(FILE + end).unlink(missing_ok=True)
    return aside


def _folded(value: str) -> str:
    return value.strip("<> ").lower()[:VALUE_MAX]


def _key(moment: float) -> int:
    """The first key of that moment."""
    return int(min(max(moment, 0.0) * 1e6, _LAST))


def _encode(value: object) -> bytes:
    return msgspec.json.encode(value)


def _account(data: bytes) -> MailDetail:
    return msgspec.json.decode(data, type=MailDetail) if data else MailDetail()


def _mail(key: int, fields: bytes, account: bytes, report: bytes | None) -> Mail:
    try:
        told = msgspec.json.decode(report, type=tuple[str, ...]) if report else None
        return Mail(key / 1e6, msgspec.json.decode(fields, type=dict[str, Any]), _account(account), told)
    except (msgspec.MsgspecError, TypeError, ValueError) as error:
        raise JournalError(f"damaged row {key}: {error}") from None


def _make_private(path: Path) -> None:
    """The file, for nobody else. SQLite gives its companions the same mode."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise JournalError(f"{path}: not a regular file")
        if found.st_mode & 0o077:
            os.fchmod(fd, 0o600)
    finally:
        os.close(fd)


@contextmanager
def _own_errors(path: Path) -> Iterator[None]:
    """Raise faults of SQLite and the system as JournalError."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_MISUSE) & 0xFF
        raise JournalError(f"{path}: {error}", unusable=code in _UNUSABLE) from error
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror or error}") from error
