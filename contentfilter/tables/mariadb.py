"""The recipient tables from MariaDB or MySQL, read for a snapshot. No message waits for any of this.

Each refresh opens a connection of its own: no state of an earlier failure is left in it, and aiomysql's pool, which
can wait without a limit, is not needed. Unchanged tables cost one fingerprint query. All that is read comes from one
read-only transaction, so that the fingerprint belongs to exactly these rows. Every wait has a limit; whatever goes
wrong is a ConfigError that says what the server said.

The fingerprint is the number of rows and a checksum over ``updated_column``, which an index alone answers (a million
rows: a third of a second). The checksum sees what the newest time alone would miss: a transaction that ends after a
younger one. Rows that go away change the number. Without such a column the checksum is over the whole rows.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiomysql
from aiomysql.connection import CLIENT, FieldDescriptorPacket, MysqlPacket

from contentfilter.deadline import Deadline
from contentfilter.errors import ConfigError, Problem
from contentfilter.files import FileAccess, SourceState
from contentfilter.model import readable
from contentfilter.settings import MariaDbSettings, Settings
from contentfilter.tables.files import default_domain
from contentfilter.tables.owners import OwnerBuilder
from contentfilter.tables.result import Builder
from contentfilter.tables.rows import TABLES, Rows
from contentfilter.threads import in_thread

BATCH = 500  # rows that are taken together
BATCH_BYTES = 1 << 20  # the same, if the rows are large
MAX_PACKET = 8 << 20  # bytes of one packet, which has a row at most
MAX_RECEIVED = 1 << 30  # bytes of all packets of one refresh: several million rows …
PACKET_ALLOWANCE = 150  # … each of which counts for its bytes and for the memory of the row's objects
MAX_COLUMNS = 64
MAX_DESCRIPTION = 1 << 16  # bytes for the description of a column
PACKETS_IN_A_ROW = 500  # before others get their turn on the event loop
MAX_PASSWORD_FILE = 4096
MAX_SAID = 300  # characters of an error text
_SCRAMBLE = "mysql_native_password"
_PLUGINS = (_SCRAMBLE, "caching_sha2_password", "sha256_password")  # the first for everyone
_BINARY = "utf8mb4"  # addresses come as UTF-8, or as they are where the column is binary


def server_name(settings: MariaDbSettings) -> str:
    """Name of this source in problems and in a snapshot's header. Never with the password."""
    place = settings.socket or f"{settings.host}:{settings.port}"
    return f"mariadb {settings.user}@{place}/{settings.database}"


async def read_tables(
    settings: Settings, known: tuple[SourceState, ...] = (), files: FileAccess | None = None
) -> tuple[Rows, tuple[Problem, ...]] | None:
    """Both tables, and the rows that were skipped; None where nothing changed since the state ``known``.

    Raises ConfigError when they cannot be had within ``load_timeout``.
    """
    db, files = settings.mariadb, files or FileAccess()
    domain, states = await default_domain(settings.service.control, files)
    deadline = Deadline.after(db.load_timeout)
    async with _session(db, deadline, files) as session:
        fingerprint = await session.fingerprint()
        sources = (SourceState(server_name(db), fingerprint=fingerprint), *states)
        if fingerprint and sources == known:
            return None
        clamav, spamd = [await session.table(index) for index in (0, 1)]
        owners, odd = await session.owners()
    rows = Rows(clamav.table, spamd.table, domain, sources, owners, (*clamav.damage(), *spamd.damage()))
    return rows, (*clamav.report.problems(), *spamd.report.problems(), *odd)


@asynccontextmanager
async def _session(db: MariaDbSettings, deadline: Deadline, files: FileAccess) -> AsyncIterator["_Session"]:
    """A read-only transaction. Its end closes the connection, whatever happened; all errors become ConfigError."""
    failed = partial(_bad, server_name(db))
    password = await _password(db.password_file, files)
    try:
        tls = (
            None if db.tls == "off" else await files.run(db.tls_ca or db.tls_cert or "[mariadb] tls", partial(_tls, db))
        )
        connection = _Connection(
            host=db.host,
            port=db.port,
            unix_socket=db.socket or None,
            user=db.user,
            password=password,
            db=db.database,
            charset=_BINARY,
            use_unicode=False,
            conv={},  # values stay bytes
            local_infile=False,
            autocommit=None,
            ssl=tls,
            verified=db.tls == "verify",
        )
    except (OSError, ValueError) as e:
        raise failed(f"TLS: {e}") from e
    with closing(connection):
        try:
            async with deadline.within(db.connect_timeout).timeout():
                await connection.ping()  # connects
        except TimeoutError as e:
            raise failed(f"no connection and login within {db.connect_timeout:g} s") from e
        except Exception as e:  # aiomysql believes the server: nonsense from it can raise anything
            raise failed(f"cannot connect: {_said(e)}") from e
        session = _Session(connection, db, deadline)
        try:
            await session.begin()
            yield session
        except ConfigError:
            raise
        except TimeoutError as e:
            late = f"not done within {db.load_timeout:g} s" if deadline.expired() else f"silent for {db.timeout:g} s"
            raise failed(late) from e
        except Exception as e:  # as above
            raise failed(_said(e)) from e


class _Connection(aiomysql.Connection):  # type: ignore[misc]  # aiomysql has no types
    """aiomysql's, for a server that may be hostile: what it asks for is refused, and what it sends is limited.

    The password is only ever answered as a scramble of it, except to a server whose certificate was verified: that one
    may use MySQL's plugins, which get the password itself. TLS never falls back to plain text.
    """

    _next_seq_id: int

    def __init__(self, *, verified: bool, **options: Any) -> None:
        super().__init__(auth_plugin=_SCRAMBLE, **options)
        self._plugins = _PLUGINS if verified else _PLUGINS[:1]
        self._left = MAX_RECEIVED
        self._packets = self._columns = 0

    @property
    def received(self) -> int:
        """Bytes received so far, with an allowance for each packet."""
        return MAX_RECEIVED - self._left

    async def _request_authentication(self) -> None:
        if self._ssl_context and not self.server_capabilities & CLIENT.SSL:
            raise aiomysql.OperationalError(0, "the server offers no TLS")
        if self._server_auth_plugin in self._plugins:
            self._client_auth_plugin = self._server_auth_plugin
        await super()._request_authentication()

    async def _process_auth(self, plugin_name: bytes, auth_packet: object) -> object:
        plugin = plugin_name.decode("ascii", "replace")
        if plugin not in self._plugins:
            allowed = " and ".join(self._plugins)
            raise aiomysql.OperationalError(0, f"the server asks for authentication by {plugin!r}; allowed: {allowed}")
        return await super()._process_auth(plugin_name, auth_packet)

    async def _read_packet(self, packet_type: type[MysqlPacket] = MysqlPacket) -> MysqlPacket:
        """As aiomysql's, with limits, and a turn for others on the event loop although the next packet is here."""
        head = await self._read_bytes(4)
        size, number = int.from_bytes(head[:3], "little"), head[3]
        self._left -= size + PACKET_ALLOWANCE
        self._packets += 1
        described = packet_type is FieldDescriptorPacket
        self._columns = self._columns + 1 if described else 0
        if size > (limit := MAX_DESCRIPTION if described else MAX_PACKET):
            raise aiomysql.OperationalError(0, f"the server sends a packet of more than {limit} bytes")
        if self._left < 0:
            raise aiomysql.OperationalError(0, f"the server sends more than {MAX_RECEIVED} bytes")
        if self._columns > MAX_COLUMNS:
            raise aiomysql.OperationalError(0, f"the server sends more than {MAX_COLUMNS} columns")
        if number != self._next_seq_id:
            raise aiomysql.OperationalError(0, f"packet {number} from the server, expected {self._next_seq_id}")
        self._next_seq_id = (number + 1) % 256
        if self._packets % PACKETS_IN_A_ROW == 0:
            await asyncio.sleep(0)
        packet = packet_type(await self._read_bytes(size), self._encoding)
        packet.check_error()
        return packet


@dataclass(frozen=True, slots=True)
class _Session:
    """Queries to the server, each wait with its limit."""

    connection: _Connection
    db: MariaDbSettings
    deadline: Deadline

    def _limit(self) -> Deadline:
        return self.deadline.within(self.db.timeout)

    async def begin(self) -> None:
        for text in (
            "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ",
            "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY",
        ):
            async with self._limit().timeout():
                await self.connection.query(text)

    async def fingerprint(self) -> str:
        """A value that differs whenever the tables do; empty where there is no way to tell."""
        query = fingerprint_query(self.db)
        if not query:
            return ""
        cursor = await self._execute(query)
        async with self._limit().timeout():
            rows = await cursor.fetchmany(2)
            if len(rows) != 1 or all(value is None for value in rows[0]):
                raise _bad("[mariadb] fingerprint_query", "expected exactly one row that is not NULL")
            await cursor.close()
        return "|".join("" if value is None else readable(value[:256]) for value in rows[0])

    async def table(self, index: int) -> Builder:
        """The rows of clamavclients (0) or spamdclients (1)."""
        query = table_query(self.db, index)
        builder = Builder(TABLES[index])
        if query:
            await self._read(query, builder)
        return builder

    async def owners(self) -> tuple[Collection[bytes], tuple[Problem, ...]]:
        """Owners of preferences in SpamAssassin's table."""
        query = owners_query(self.db)
        owners = OwnerBuilder()
        if query:
            await self._read(query, owners)
        return owners.keys, owners.report.problems()

    async def _read(self, query: str, builder: Builder | OwnerBuilder) -> None:
        cursor = await self._execute(query)
        builder.begin([(name, kind) for name, kind, *_ in cursor.description or ()])
        while batch := await self._batch(cursor):
            await in_thread(partial(builder.add, batch))
        async with self._limit().timeout():
            await cursor.close()

    async def _batch(self, cursor: "aiomysql.SSCursor") -> list[tuple[bytes | None, ...]]:
        """The next rows, few enough that they need little memory; none at the end."""
        batch: list[tuple[bytes | None, ...]] = []
        most = self.connection.received + BATCH_BYTES
        async with self._limit().timeout():
            while len(batch) < BATCH and self.connection.received < most:
                row = await cursor.fetchone()
                if row is None:
                    break
                batch.append(row)
        return batch

    async def _execute(self, query: str) -> "aiomysql.SSCursor":
        cursor = await self.connection.cursor(aiomysql.SSCursor)
        async with self._limit().timeout():
            await cursor.execute(query)
        return cursor


def table_query(db: MariaDbSettings, index: int) -> str:
    """The SELECT for clamavclients (0) or spamdclients (1); empty where that table is switched off."""
    query, table, columns = (
        (db.clamav_query, db.clamav_table, db.clamav_columns),
        (db.spamd_query, db.spamd_table, db.spamd_columns),
    )[index]
    if query or not table:
        return query
    chosen = ", ".join(f"{quoted(name)} AS {quoted(meaning)}" for meaning, name in map(column, columns))
    return f"SELECT {chosen} FROM {quoted(table)}"  # noqa: S608 - quoted, and from the administrator


def owners_query(db: MariaDbSettings) -> str:
    """The SELECT for the owners of preferences; empty where nobody has any."""
    if db.prefs_query or not db.prefs_table:
        return db.prefs_query
    return f"SELECT DISTINCT {quoted(db.prefs_column)} AS owner FROM {quoted(db.prefs_table)}"  # noqa: S608 - as above


def fingerprint_query(db: MariaDbSettings) -> str:
    """One row that differs whenever the tables do; empty where only reading all can tell."""
    if db.fingerprint_query:
        return db.fingerprint_query
    if db.clamav_query or db.spamd_query or db.prefs_query:
        return ""
    parts = []
    for table, columns in ((db.clamav_table, db.clamav_columns), (db.spamd_table, db.spamd_columns)):
        if not table:
            continue
        if db.updated_column:
            summed = quoted(db.updated_column)
        else:  # with a mark for NULL, which CONCAT_WS leaves out
            names = ", ".join(f"IFNULL({quoted(name)}, '\\t')" for _, name in map(column, columns))
            summed = f"CONCAT_WS('\\n', {names})"
        parts.append(f"(SELECT CONCAT(COUNT(*), ':', IFNULL(SUM(CRC32({summed})), 0)) FROM {quoted(table)})")  # noqa: S608
    if db.prefs_table:  # who is there; what the preferences are changes all day, and is nothing to us
        summed = "CONCAT(COUNT(*), ':', IFNULL(SUM(CRC32(owner)), 0))"
        parts.append(f"(SELECT {summed} FROM ({owners_query(db)}) AS owners)")  # noqa: S608
    return "SELECT " + ", ".join(parts) if parts else ""


def column(entry: str) -> tuple[str, str]:
    """``meaning=name`` of clamav_columns and spamd_columns: what the column means, and its name in the table."""
    meaning, _, name = entry.partition("=")
    return meaning, name or meaning


def quoted(name: str) -> str:
    """An identifier, each of its parts where there is a dot, in back-quotes."""
    return ".".join("`" + part.replace("`", "``") + "`" for part in name.split("."))


def _bad(path: str, text: str) -> ConfigError:
    return ConfigError((Problem(path, 0, text),))


async def _password(path: str, files: FileAccess) -> str:
    if not path:
        return ""
    data, state = await files.read(path, MAX_PASSWORD_FILE)
    if state.size < 0:
        raise ConfigError((Problem(path, 0, "there is no such file"),))
    return data.partition(b"\n")[0].rstrip(b"\r").decode("latin-1")  # as aiomysql encodes it: bytes stay bytes


def _tls(db: MariaDbSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=db.tls_ca or None)
    if db.tls == "unverified":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if db.tls_cert:
        context.load_cert_chain(db.tls_cert, db.tls_key or None)
    return context


def _said(error: Exception) -> str:
    """The server's words, or the system's."""
    cause = error.__cause__
    code, *words = error.args or ("",)
    text = str(words[0]) if words else str(code)
    text += f" ({cause})" if isinstance(cause, OSError) and str(cause) else ""
    if not isinstance(error, aiomysql.MySQLError | OSError):
        text = f"what the server says makes no sense: {type(error).__name__}: {text}"
    return readable(text[:MAX_SAID].encode("utf-8", "replace")) + (
        f" (error {code})" if isinstance(code, int) and code else ""
    )
