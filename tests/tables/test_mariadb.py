"""Tables from a real MariaDB: what is read, what is refused, what a fault costs, and that nothing waits for ever."""

import asyncio
import re
import signal
import socket
import subprocess
import textwrap
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab.mariadb import MariaDb
from lab.peers import Peer
from tables.conftest import prepare

from contentfilter.config.load import read_settings
from contentfilter.errors import ConfigError
from contentfilter.settings import MariaDbSettings as Section
from contentfilter.settings import ServiceSettings, Settings
from contentfilter.tables.mariadb import fingerprint_query, read_tables, server_name
from contentfilter.tables.rows import Rows


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "password").write_text("change me\n")
    (tmp_path / "password").chmod(0o600)
    (tmp_path / "control").mkdir()
    return tmp_path


def settings(db: MariaDb | None, place: Path, **more: Any) -> Settings:
    keys = {"socket": db.socket if db else "", "database": "mail", "password_file": str(place / "password")} | more
    return Settings(mariadb=Section(**keys), service=ServiceSettings(control=str(place / "control")))


def read(db: MariaDb | None, place: Path, **more: Any) -> tuple[Rows, list[str]]:
    loaded = asyncio.run(read_tables(settings(db, place, **more)))
    assert loaded is not None
    return loaded[0], [problem.text for problem in loaded[1]]


def refused(db: MariaDb | None, place: Path, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        asyncio.run(read_tables(settings(db, place, **more)))
    return str(caught.value)


# What is read


def test_rows_exemptions_and_options_are_read_as_from_files(db: MariaDb, place: Path) -> None:
    db.run("""
        INSERT INTO clamavclients (address, exempt, virus) VALUES
            ('Anna@X.example', 0, NULL), ('boss@x.example', 1, 'remove'), ('@x.example', 0, 'Move:Virus@x.example'),
            ('y.example', 0, ''), ('.z.example', 0, 'mark'), ('*', 1, NULL);
        INSERT INTO spamdclients (address, spam, score, reject_score) VALUES
            ('anna@x.example', 'reject', 'very-aggressive', 15.50), ('@x.example', NULL, '6.5', 0);
    """)
    (place / "control" / "me").write_text("Mail.X.example\n")
    rows, problems = read(db, place)
    assert problems == []
    assert rows.clamav == {
        b"anna@x.example": b"",
        b"boss@x.example": b"!",
        b"@x.example": b"virus=move:Virus@x.example",
        b"@y.example": b"",
        b".z.example": b"virus=mark",
        b"*": b"!",
    }
    assert rows.spamd == {
        b"anna@x.example": b"spam=reject score=2 reject_score=15.5",
        b"@x.example": b"score=6.5 reject_score=0",
    }
    assert rows.default_domain == b"mail.x.example"


BAD = {
    "user@@x.example": "more than one @",
    "u@x.example\ninjected@x.example": "control character",
    "two words@x.example": "blank",
    "": "no key",
    "u" * 1200 + "@x.example": "longer than",
    "*@x.example": "for a whole domain",
}


@pytest.mark.parametrize("address", BAD, ids=BAD.values())
def test_a_bad_row_is_named_and_left_out(db: MariaDb, place: Path, address: str) -> None:
    db.run("ALTER TABLE clamavclients MODIFY address VARCHAR(2000), DROP PRIMARY KEY")
    db.run(f"INSERT INTO clamavclients (address) VALUES ('a@x.example'), ('{address}'), ('b@x.example')")
    rows, problems = read(db, place)
    assert list(rows.clamav) == [b"a@x.example", b"b@x.example"]
    assert len(problems) == 1
    assert BAD[address] in problems[0]
    assert address[:10].split("\n")[0] in problems[0]


GARBAGE = {
    "X'6100407865'": "a NUL",
    "X'FFFE6100'": "another character set",
    "CONCAT(REPEAT('x', 5000000), '@x.example')": "megabytes",
}
BYTES = {"X'C3284078'": b"\xc3(@x", "CONVERT('\u00e9@x.example' USING latin1)": b"\xe9@x.example"}


@pytest.mark.parametrize("value", GARBAGE, ids=GARBAGE.values())
def test_bytes_that_are_no_address_are_left_out_and_the_others_stay(db: MariaDb, place: Path, value: str) -> None:
    db.run("ALTER TABLE clamavclients DROP PRIMARY KEY, MODIFY address LONGBLOB")
    db.run(f"INSERT INTO clamavclients (address) VALUES ('a@x.example'), ({value}), ('b@x.example')")
    rows, problems = read(db, place)
    assert list(rows.clamav) == [b"a@x.example", b"b@x.example"]
    assert len(problems) == 1
    assert problems[0].isprintable()
    assert len(problems[0]) < 1000


@pytest.mark.parametrize("value", BYTES)
def test_an_address_in_no_known_character_set_stays_the_bytes_that_it_is(db: MariaDb, place: Path, value: str) -> None:
    """As in an envelope, which may contain it."""
    db.run("ALTER TABLE clamavclients DROP PRIMARY KEY, MODIFY address LONGBLOB")
    db.run(f"INSERT INTO clamavclients (address) VALUES ('a@x.example'), ({value})")
    rows, problems = read(db, place)
    assert (list(rows.clamav), problems) == ([b"a@x.example", BYTES[value]], [])


def test_a_null_address_and_bad_options_are_problems(db: MariaDb, place: Path) -> None:
    db.run("ALTER TABLE clamavclients MODIFY address VARCHAR(320) NULL, DROP PRIMARY KEY")
    db.run("INSERT INTO clamavclients (address, virus) VALUES (NULL, 'mark'), ('a@x.example', 'delete')")
    db.run("INSERT INTO clamavclients (address, exempt) VALUES ('b@x.example', 7)")
    rows, problems = read(db, place)
    assert rows.clamav == {b"a@x.example": b"", b"b@x.example": b""}
    assert len(problems) == 3
    assert any("'a@x.example': virus is 'delete'" in text for text in problems)
    assert any("exempt is '7'" in text for text in problems)


def test_a_key_with_two_meanings_protects(db: MariaDb, place: Path) -> None:
    db.run("INSERT INTO clamavclients (address, exempt) VALUES ('@x.example', 1), ('x.example', 0), ('X.example', 0)")
    rows, problems = read(db, place)
    assert rows.clamav == {b"@x.example": b""}
    assert "more than once" in problems[0]


PANEL = """
    CREATE TABLE `panel` (`e``mail` VARCHAR(99), av INT, level DECIMAL(4,1), note TEXT);
    INSERT INTO panel VALUES ('a@x.example', 1, 7.0, NULL), ('b@x.example', 0, NULL, 'x');
    GRANT SELECT ON panel TO 'contentfilter'@'localhost';
"""


def test_the_table_of_another_panel_is_read_by_its_own_names(db: MariaDb, place: Path) -> None:
    db.run(PANEL)
    columns = ("address=e`mail", "score=level")
    rows, _ = read(db, place, clamav_table="", spamd_table="mail.panel", spamd_columns=columns, updated_column="")
    assert (rows.clamav, rows.spamd) == ({}, {b"a@x.example": b"score=7", b"b@x.example": b""})


def test_the_table_of_another_panel_is_read_by_a_query(db: MariaDb, place: Path) -> None:
    db.run(PANEL)
    query = "SELECT `e``mail` AS Address, 1 - av AS exempt, NULL AS virus FROM panel"
    rows, _ = read(db, place, clamav_query=query, spamd_table="")
    assert (rows.clamav, rows.spamd) == ({b"a@x.example": b"", b"b@x.example": b"!"}, {})


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"clamav_table": "absent"}, "error 1142"),
        ({"clamav_columns": ("address", "exempt=gone")}, "Unknown column 'gone'"),
        ({"clamav_columns": ("exempt",)}, "there must be a column 'address'"),
        ({"clamav_query": "SELECT 5 AS address"}, "wrong type"),
        ({"clamav_query": "SELECT 'a@x' AS address, 'yes' AS exempt"}, "wrong type"),
        ({"clamav_query": "SELECT address, 'x' AS spam FROM clamavclients"}, "unknown column 'spam'"),
        ({"clamav_query": "SELECT nonsense"}, "error 1054"),
        ({"clamav_query": "DELETE FROM clamavclients"}, "error 1142"),
        ({"fingerprint_query": "SELECT NULL"}, "exactly one row"),
        ({"database": "elsewhere"}, "error 1044"),
        ({"user": "nobody"}, "cannot connect: Access denied"),
        ({"socket": "/nonexistent/sock"}, "cannot connect"),
        ({"password_file": "/nonexistent/password"}, "no such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-",
)
def test_what_cannot_be_read_is_one_clear_error(db: MariaDb, place: Path, more: dict[str, Any], says: str) -> None:
    assert says in refused(db, place, **more)


def test_a_missing_table_is_an_error_and_not_an_empty_one(db: MariaDb, place: Path) -> None:
    db.run("DROP TABLE spamdclients")
    assert "'mail.spamdclients' doesn't exist (error 1146)" in refused(db, place)


def test_a_wrong_password_is_refused_and_not_repeated(db: MariaDb, place: Path) -> None:
    (place / "password").write_text("secret-but-wrong\n")
    said = refused(db, place)
    assert "Access denied" in said
    assert "secret" not in said


DOCUMENTED = re.findall(
    r"^    \[mariadb\]\n(?:    .*\n)+", (Path(__file__).parents[2] / "docs" / "tables.md").read_text(), re.MULTILINE
)
PANELS = """
    CREATE TABLE mailbox (username VARCHAR(99), spam_level DECIMAL(4,1), modified TIMESTAMP(6));
    CREATE TABLE vpopmail (pw_name CHAR(32), pw_domain CHAR(96), pw_gid INT);
    CREATE TABLE domains (name VARCHAR(99), antivirus ENUM('yes', 'no'), changed TIMESTAMP(6));
    CREATE TABLE mailboxes (email VARCHAR(99), antivirus ENUM('yes', 'no'), av_action VARCHAR(9), changed TIMESTAMP(6));
    INSERT INTO mailbox VALUES ('a@x.example', 7, NULL);
    INSERT INTO vpopmail VALUES ('a', 'x.example', 0), ('b', 'x.example', 16384), ('c', 'x.example', 32768);
    INSERT INTO domains VALUES ('x.example', 'yes', '2026-01-01'), ('y.example', 'no', '2026-01-01');
    INSERT INTO mailboxes VALUES ('a@y.example', 'yes', 'tag', '2026-01-01'), ('b@y.example', 'yes', 'remove', NULL);
    GRANT SELECT ON mail.* TO 'contentfilter'@'localhost';
"""


def test_the_documented_settings_for_other_panels_read_them(db: MariaDb, place: Path) -> None:
    db.run(PANELS)
    found = {}
    for text in DOCUMENTED:
        section = tomllib.loads(textwrap.dedent(text))["mariadb"]
        if "socket" not in section:  # the one of our own schema
            rows, problems = read(db, place, **{key: value for key, value in section.items() if key != "database"})
            assert problems == []
            found[next(word for word in ("vpopmail", "mailboxes", "mailbox") if word in text)] = rows
    assert found["mailbox"].clamav == {b"a@x.example": b""}
    assert found["mailbox"].spamd == {b"a@x.example": b"score=7"}
    assert found["vpopmail"].spamd == {b"a@x.example": b"", b"b@x.example": b"!", b"c@x.example": b"spam=remove"}
    assert found["mailboxes"].clamav == {
        b"@x.example": b"",
        b"a@y.example": b"virus=mark",
        b"b@y.example": b"virus=remove",
    }
    db.run("DROP TABLE mailbox, vpopmail, domains, mailboxes; REVOKE SELECT ON mail.* FROM 'contentfilter'@'localhost'")


# Whether anything changed

CHANGES = {
    "a row added": "INSERT INTO clamavclients (address) VALUES ('new@x.example')",
    "a row of the other table added": "INSERT INTO spamdclients (address) VALUES ('new@x.example')",
    "a row removed": "DELETE FROM clamavclients WHERE address = 'a@x.example'",
    "the youngest removed": "DELETE FROM clamavclients WHERE address = 'b@x.example'",
    "an exemption": "UPDATE clamavclients SET exempt = 1 WHERE address = 'a@x.example'",
    "an option": "UPDATE clamavclients SET virus = 'mark' WHERE address = 'a@x.example'",
    "an address": "UPDATE clamavclients SET address = 'c@x.example' WHERE address = 'a@x.example'",
    "one for another": """
        DELETE FROM clamavclients WHERE address = 'a@x.example';
        INSERT INTO clamavclients (address) VALUES ('d@x.example')
    """,
    "everything removed": "DELETE FROM clamavclients",
    "two rows changed places": "UPDATE clamavclients SET exempt = 1 - exempt",
}


@pytest.mark.parametrize("updated", ["updated_at", ""], ids=["by time", "by rows"])
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen_and_none_is_seen_where_there_is_none(
    db: MariaDb, place: Path, change: str, updated: str
) -> None:
    db.run("INSERT INTO clamavclients (address, exempt) VALUES ('a@x.example', 0)")
    db.run("INSERT INTO clamavclients (address, exempt) VALUES ('b@x.example', 1)")
    before, _ = read(db, place, updated_column=updated)
    asked = db.run("SHOW GLOBAL STATUS LIKE 'Com_select'")
    assert asyncio.run(read_tables(settings(db, place, updated_column=updated), before.sources)) is None
    count = [int(line.split()[1]) for line in (asked, db.run("SHOW GLOBAL STATUS LIKE 'Com_select'"))]
    assert count[1] - count[0] == 1, "unchanged tables cost one query"
    db.run(CHANGES[change])
    after = asyncio.run(read_tables(settings(db, place, updated_column=updated), before.sources))
    assert after is not None
    assert (after[0].clamav, after[0].spamd) != (before.clamav, before.spamd)


def test_a_transaction_that_ends_after_a_younger_one_is_seen(db: MariaDb, place: Path) -> None:
    """The newest time alone would not tell."""
    db.run("INSERT INTO clamavclients (address, updated_at) VALUES ('a@x.example', '2030-01-01 00:00:00')")
    before, _ = read(db, place)
    db.run("INSERT INTO spamdclients (address) VALUES ('a@x.example'); UPDATE clamavclients SET exempt = 1")
    assert asyncio.run(read_tables(settings(db, place), before.sources)) is not None


def test_a_query_without_fingerprint_reads_all_and_with_one_only_on_change(db: MariaDb, place: Path) -> None:
    own = {"clamav_query": "SELECT address FROM clamavclients"}
    assert fingerprint_query(settings(db, place, **own).mariadb) == ""
    before, _ = read(db, place, **own)
    assert asyncio.run(read_tables(settings(db, place, **own), before.sources)) is not None
    own["fingerprint_query"] = "SELECT COUNT(*), NULL FROM clamavclients"
    before, _ = read(db, place, **own)
    assert asyncio.run(read_tables(settings(db, place, **own), before.sources)) is None


# Faults: an error in time, whatever the server does

SLOW = "SELECT address, SLEEP(20) AS exempt FROM clamavclients"


def test_a_server_that_hangs_in_a_query_is_given_up(db: MariaDb, place: Path) -> None:
    db.run("INSERT INTO clamavclients (address) VALUES ('a@x.example'), ('b@x.example')")
    began = time.monotonic()
    assert "silent for 0.3 s" in refused(db, place, clamav_query=SLOW, timeout=0.3)
    assert "not done within 0.4 s" in refused(db, place, clamav_query=SLOW, load_timeout=0.4)
    assert time.monotonic() - began < 10


def test_a_stopped_server_is_given_up_at_login_and_read_again_when_it_goes_on(own_db: MariaDb, place: Path) -> None:
    own_db.signal(signal.SIGSTOP)
    try:
        assert "no connection and login within 0.5 s" in refused(own_db, place, connect_timeout=0.5)
    finally:
        own_db.signal(signal.SIGCONT)
    assert read(own_db, place)[1] == []


def test_a_server_that_is_killed_while_rows_come_is_an_error_and_its_rows_are_not_used(
    own_db: MariaDb, place: Path
) -> None:
    fill(own_db, 300_000)

    async def die() -> None:
        loading = asyncio.create_task(read_tables(settings(own_db, place)))
        while "SELECT `address`" not in own_db.run("SHOW PROCESSLIST"):
            await asyncio.sleep(0)
        own_db.kill()
        with pytest.raises(ConfigError) as caught:
            await loading
        assert "Lost connection" in str(caught.value)

    asyncio.run(die())
    assert "cannot connect" in refused(own_db, place)
    own_db.start()
    assert len(read(own_db, place)[0].clamav) == 300_000


def no_answer(peer: Peer, sock: socket.socket) -> None:
    peer.over.wait()


def nonsense(peer: Peer, sock: socket.socket) -> None:
    sock.sendall(b"\x04\0\0\0GET " + bytes(range(256)) * 10)
    peer.over.wait()


@pytest.mark.parametrize("talk", [no_answer, nonsense, lambda peer, sock: None], ids=["silent", "nonsense", "closes"])
def test_a_port_where_something_else_listens_is_an_error_in_time(place: Path, directory: Path, talk: Any) -> None:
    with Peer(directory, talk, lambda sock: b"") as peer:
        assert "connect" in refused(None, place, socket=peer.path, connect_timeout=0.5)


# TLS


@pytest.fixture(scope="session")
def tls_db(lab_directory: Path) -> Iterator[tuple[MariaDb, Path]]:
    """A server with a certificate for 127.0.0.1 from an authority of our own."""
    keys = lab_directory / "keys"
    keys.mkdir()
    new = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    ca = ["-CA", f"{keys}/ca.pem", "-CAkey", f"{keys}/ca.key", "-addext", "subjectAltName=IP:127.0.0.1"]
    for name, more in (("ca", ["-subj", "/CN=lab authority"]), ("server", ["-subj", "/CN=db", *ca])):
        words = [*new, *more, "-keyout", f"{keys}/{name}.key", "-out", f"{keys}/{name}.pem"]
        subprocess.run(words, check=True, capture_output=True)
        (keys / f"{name}.key").chmod(0o644)
    options = (f"--ssl-cert={keys}/server.pem", f"--ssl-key={keys}/server.key", f"--ssl-ca={keys}/ca.pem")
    with MariaDb(lab_directory / "tlsdb", *options) as db:
        prepare(db)
        db.run("CREATE USER 'contentfilter'@'127.0.0.1' IDENTIFIED BY 'change me' REQUIRE SSL")
        db.run("GRANT SELECT ON mail.* TO 'contentfilter'@'127.0.0.1'")
        yield db, keys


def over_tcp(db: MariaDb, **more: Any) -> dict[str, Any]:
    return {"socket": "", "host": "127.0.0.1", "port": db.port, **more}


def test_tls_with_our_authority_is_verified_and_without_it_refused(tls_db: tuple[MariaDb, Path], place: Path) -> None:
    db, keys = tls_db
    ca = f"{keys}/ca.pem"
    assert read(db, place, **over_tcp(db, tls="verify", tls_ca=ca))[1] == []
    assert "certificate verify failed" in refused(db, place, **over_tcp(db, tls="verify"))
    assert "localhost" in refused(db, place, **over_tcp(db, tls="verify", tls_ca=ca, host="localhost"))
    assert read(db, place, **over_tcp(db, tls="unverified"))[1] == []
    assert "Access denied" in refused(db, place, **over_tcp(db)), "the account requires TLS"
    assert "TLS: " in refused(db, place, **over_tcp(db, tls="verify", tls_ca="/nonexistent/ca.pem"))


def test_a_server_without_tls_is_refused_before_the_password_is_sent(db: MariaDb, place: Path) -> None:
    assert "offers no TLS" in refused(db, place, **over_tcp(db, tls="unverified"))


# Size


def fill(db: MariaDb, count: int) -> None:
    db.run("TRUNCATE clamavclients")
    db.run(
        "INSERT INTO clamavclients (address)"
        f" SELECT CONCAT('user', seq, '@domain', seq % 1000, '.example') FROM seq_1_to_{count}"
    )


def test_a_million_rows_load_in_seconds_and_the_loop_still_answers(own_db: MariaDb, place: Path) -> None:
    fill(own_db, 1_000_000)
    lags: list[float] = []

    async def watch() -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.002)
            lags.append(time.monotonic() - began - 0.002)

    async def load() -> tuple[Rows, float]:
        watching = asyncio.create_task(watch())
        began = time.monotonic()
        loaded = await read_tables(settings(own_db, place))
        spent = time.monotonic() - began
        watching.cancel()
        assert loaded is not None
        return loaded[0], spent

    rows, spent = asyncio.run(load())
    began = time.monotonic()
    assert asyncio.run(read_tables(settings(own_db, place), rows.sources)) is None
    unchanged = time.monotonic() - began
    print(f"{spent:.1f} s, longest lag {max(lags) * 1000:.0f} ms, unchanged {unchanged:.2f} s")
    assert len(rows.clamav) == 1_000_000
    assert spent < 30
    assert max(lags) < 1.0
    assert unchanged < 5


# Settings


@pytest.mark.parametrize(
    ("line", "says", "warning"),
    [
        ('clamav_columns = ["exempt"]', "clamav_columns: expected address, exempt, virus", False),
        ('clamav_columns = ["address", "score"]', "clamav_columns: expected address, exempt, virus", False),
        ('spamd_columns = ["address", "address=email"]', "each at most once", False),
        ('socket = "run/db"', "socket: expected an absolute path", False),
        ('password_file = "secret"', "password_file: expected an absolute path", False),
        ('socket = "/run/db"\ntls = "verify"', "tls: over a Unix socket", False),
        ('host = "db.example"', "between this machine and db.example", True),
        ('password = "x"', "unknown key 'password' in [mariadb]", False),
    ],
)
def test_what_is_wrong_in_the_settings_is_said(tmp_path: Path, line: str, says: str, warning: bool) -> None:
    (tmp_path / "toml").write_text(f"[mariadb]\n{line}\n")
    (problem,) = read_settings(str(tmp_path / "toml"))[1]
    assert says in problem.text
    assert problem.warning is warning


def test_a_password_never_shows(place: Path) -> None:
    assert "change" not in server_name(settings(None, place).mariadb)
