"""Who has SpamAssassin preferences: read from the list or from SpamAssassin's table, and found for each recipient."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab.mariadb import MariaDb
from tables.conftest import SQL

from contentfilter.errors import ConfigError
from contentfilter.settings import MariaDbSettings as Section
from contentfilter.settings import ServiceSettings, Settings
from contentfilter.tables.files import load_tables, sources
from contentfilter.tables.mariadb import BATCH, fingerprint_query, read_tables
from contentfilter.tables.owners import OwnerBuilder, parse_owners
from contentfilter.tables.rows import Rows
from contentfilter.tables.snapshot import Snapshot, compile_snapshot


def found(snapshot: Snapshot, recipient: bytes) -> tuple[bytes, bytes]:
    assert snapshot.owners is not None
    return snapshot.owners(recipient)


def opened(path: Path, rows: Rows, extension: bytes = b"") -> Snapshot:
    compile_snapshot(rows, str(path / "snapshot"))
    return Snapshot.open(str(path / "snapshot"), extension)


# The list


def test_the_list_names_mailboxes_and_domains() -> None:
    text = b"# who has some\nAnna@X.example   # a comment\n@y.example\nz.example\n"
    owners, problems = parse_owners(text, "spamprefs")
    assert (list(owners), problems) == ([b"anna@x.example", b"@y.example", b"@z.example"], ())


@pytest.mark.parametrize("line", [b"*", b".x.example", b"!a@x.example", b"a@b@x.example", b"a@x.example score=5"])
def test_what_is_no_owner_is_reported_and_left_out(line: bytes) -> None:
    owners, problems = parse_owners(b"good@x.example\n" + line + b"\n", "spamprefs")
    assert [owner for owner in owners if not line.startswith(owner)] == [b"good@x.example"]
    assert len(problems) == 1
    assert problems[0].path == "spamprefs"


def test_the_list_is_read_with_the_tables_and_a_change_is_seen(tmp_path: Path) -> None:
    rows, _ = asyncio.run(load_tables(str(tmp_path)))
    assert rows.prefs == {}
    (tmp_path / "spamprefs").write_text("anna@x.example\n")
    assert sources(str(tmp_path)) != rows.sources
    rows, problems = asyncio.run(load_tables(str(tmp_path)))
    assert (list(rows.prefs), problems) == ([b"anna@x.example"], ())


# The snapshot


def test_the_mailboxs_own_preferences_go_before_its_domains(tmp_path: Path) -> None:
    snapshot = opened(tmp_path, Rows(prefs=[b"anna@x.example", b"@x.example"]))
    assert found(snapshot, b"Anna@X.example") == (b"anna@x.example", b"anna@x.example")
    assert found(snapshot, b"Ben@x.example") == (b"@x.example", b"ben@x.example")
    assert found(snapshot, b"ben@sub.x.example") == (b"", b"")


def test_an_address_with_an_extension_has_the_mailboxs_preferences(tmp_path: Path) -> None:
    rows = Rows(prefs=[b"anna@x.example"])
    assert found(opened(tmp_path, rows, b"-"), b"anna-lists-a@x.example") == (b"anna@x.example", b"anna@x.example")
    assert found(opened(tmp_path, rows), b"anna-lists-a@x.example") == (b"", b"")


def test_a_recipient_without_a_domain_has_those_of_the_default_one(tmp_path: Path) -> None:
    snapshot = opened(tmp_path, Rows(default_domain=b"X.example", prefs=[b"@x.example"]))
    assert found(snapshot, b"Root") == (b"@x.example", b"root@x.example")


def test_nobody_is_asked_where_nobody_has_preferences(tmp_path: Path) -> None:
    assert opened(tmp_path, Rows({b"a@x.example": b""})).owners is None


NAMES = st.sampled_from([b"a@x.y", b"b@x.y", b"@x.y", b"a-b@x.y", b"@y.z", b"c@y.z"])
VALUES = st.sampled_from([b"", b"!", b"score=5"])


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.dictionaries(NAMES, VALUES),
    st.dictionaries(NAMES, VALUES),
    st.sets(NAMES, min_size=1),
    st.lists(st.one_of(NAMES, st.binary(max_size=8), st.builds(bytes.__add__, NAMES, st.binary(max_size=2)))),
)
def test_owners_and_rows_do_not_disturb_each_other(
    tmp_path: Path, clamav: dict[bytes, bytes], spamd: dict[bytes, bytes], owners: set[bytes], asked: list[bytes]
) -> None:
    without, having = opened(tmp_path, Rows(clamav, spamd)), opened(tmp_path, Rows(clamav, spamd, prefs=sorted(owners)))
    for recipient in asked:
        assert having.lookup(recipient) == without.lookup(recipient)
        address = recipient.lower()
        domain = b"@" + address.rpartition(b"@")[2]
        key = address if address in owners else domain if b"@" in address and domain in owners else b""
        assert found(having, recipient) == (key, address if key else b"")


# SpamAssassin's table


def test_names_of_all_panels_are_understood() -> None:
    names = [
        b"Anna@X.example",
        b"@GLOBAL",
        b"$GLOBAL",
        b"%y.example",
        b"@z.example",
        b"@~w.example",
        b"%@v.example",
        None,
        b"",
    ]
    builder = OwnerBuilder()
    builder.add([(name,) for name in names])
    assert list(builder.keys) == [b"anna@x.example", b"@y.example", b"@z.example", b"@w.example", b"@v.example"]
    assert builder.report.problems() == ()


@pytest.mark.parametrize(
    "name", [b"root", b"%", b"*", b".x.example", b"a@b@c", b"a@x\n@y.example", b"x" * 2000 + b"@y"]
)
def test_a_name_that_cannot_be_a_recipient_is_a_warning(name: bytes) -> None:
    builder = OwnerBuilder()
    builder.add([(b"a@x.example",), (name,), (b"b@x.example",)])
    assert list(builder.keys) == [b"a@x.example", b"b@x.example"]
    (problem,) = builder.report.problems()
    assert problem.warning


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "password").write_text("change me\n")
    (tmp_path / "control").mkdir()
    return tmp_path


@pytest.fixture
def prefs(db: MariaDb) -> MariaDb:
    db.run("DROP TABLE IF EXISTS userpref")
    db.run((SQL / "userpref.sql").read_text())
    db.run("""
        INSERT INTO userpref (username, preference, value) VALUES
            ('@GLOBAL', 'required_score', '5'), ('anna@x.example', 'required_score', '2'),
            ('anna@x.example', 'whitelist_from', '*@y.example'), ('@y.example', 'required_score', '3');
    """)
    return db


def config(db: MariaDb, place: Path, **more: Any) -> Settings:
    keys = {"socket": db.socket, "database": "mail", "password_file": str(place / "password")}
    section = Section(**keys | {"prefs_table": "userpref"} | more)
    return Settings(mariadb=section, service=ServiceSettings(control=str(place / "control")))


def test_owners_come_from_spamassassins_table_by_a_user_who_may_read_names_only(prefs: MariaDb, place: Path) -> None:
    loaded = asyncio.run(read_tables(config(prefs, place)))
    assert loaded is not None
    assert (sorted(loaded[0].prefs), loaded[1]) == ([b"@y.example", b"anna@x.example"], ())
    with pytest.raises(ConfigError, match="denied"):
        asyncio.run(read_tables(config(prefs, place, prefs_query="SELECT value FROM userpref")))


def test_another_table_or_a_query_gives_the_owners(prefs: MariaDb, place: Path) -> None:
    prefs.run("CREATE TABLE panel (box VARCHAR(99)); GRANT SELECT ON panel TO 'contentfilter'@'localhost'")
    prefs.run("INSERT INTO panel VALUES ('ben@x.example')")
    for more in (
        {"prefs_table": "mail.panel", "prefs_column": "box"},
        {"prefs_table": "", "prefs_query": "SELECT CONCAT('B', 'en@x.example')"},
    ):
        loaded = asyncio.run(read_tables(config(prefs, place, **more)))
        assert loaded is not None
        assert list(loaded[0].prefs) == [b"ben@x.example"]
    with pytest.raises(ConfigError, match="expected one column"):
        asyncio.run(read_tables(config(prefs, place, prefs_query="SELECT 1, 2")))


def test_only_a_change_of_who_has_preferences_is_a_change(prefs: MariaDb, place: Path) -> None:
    before = asyncio.run(read_tables(config(prefs, place)))
    assert before is not None
    prefs.run("INSERT INTO userpref (username, preference, value) VALUES ('anna@x.example', 'report_safe', '0')")
    prefs.run("UPDATE userpref SET value = '9' WHERE username = 'anna@x.example' AND preference = 'required_score'")
    assert asyncio.run(read_tables(config(prefs, place), before[0].sources)) is None
    prefs.run("UPDATE userpref SET username = 'bert@x.example' WHERE username = 'anna@x.example'")
    after = asyncio.run(read_tables(config(prefs, place), before[0].sources))
    assert after is not None
    assert sorted(after[0].prefs) == [b"@y.example", b"bert@x.example"]


def test_a_query_of_ones_own_has_no_fingerprint_but_ones_own() -> None:
    assert fingerprint_query(Section(prefs_query="SELECT 'a@x.example'")) == ""
    assert "userpref" in fingerprint_query(Section(prefs_table="userpref"))


def test_many_owners_are_all_found(prefs: MariaDb, place: Path) -> None:
    count = 10 * BATCH + 7
    prefs.run(f"""
        INSERT INTO userpref (username, preference, value)
        SELECT CONCAT('u', seq, IF(seq % 50, '@x', '@SUB.x'), '.example'), 'required_score', '4' FROM seq_1_to_{count}
    """)
    loaded = asyncio.run(read_tables(config(prefs, place)))
    assert loaded is not None
    assert len(loaded[0].prefs) == count + 2
    snapshot = opened(place, loaded[0])
    assert found(snapshot, b"U50@sub.x.example") == (b"u50@sub.x.example",) * 2
    assert found(snapshot, b"u%d@x.example" % count)[0]
