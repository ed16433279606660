"""H-Sphere's controls: parameters by precedence, table keys, signature lists, and a line for whatever is odd."""

import time
import tomllib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.calibration import units_since

from contentfilter.admin.migrate_hsphere import LISTS, PARAMETERS, QMAIL, READS, migrate
from contentfilter.admin.migration import CONTROL, ChangeKind, Migration, MigrationNote
from contentfilter.config.controls import PARAMETERS as READ_BY_DAEMON
from contentfilter.scanners.signatures.rules import parse_loadertypes, parse_signatures
from contentfilter.settings import Settings
from contentfilter.tables.rows import parse_table

TABLES = {"clamavclients": b"a@example.com\n", "spamdclients": b"a@example.com\n"}


def content(migration: Migration, path: str) -> bytes:
    (found,) = (file.content for file in migration.files if file.path == path)
    return found


def rows(migration: Migration, name: str) -> list[bytes]:
    return [line for line in content(migration, f"control/{name}").splitlines() if not line.startswith(b"#")]


def options(migration: Migration) -> dict[str, str]:
    return dict(line.decode().split(" ", 1) for line in rows(migration, "options"))


def said(migration: Migration, path: str, line: int = 0) -> list[MigrationNote]:
    return [d for d in migration.differences if d.path == path and line in (0, d.line)]


def test_plain_controls_carry_over_without_a_decision() -> None:
    old = TABLES | {"options": b"clamglobal 0\nskipcachk 2\nsamsgsize=262144\nchksignature: 1\ndatabytes\t1000\n"}
    done = migrate(old, ("rcpthosts", "me"))
    assert options(done) == {
        "clamglobal": "0", "skipcachk": "2", "samsgsize": "262144", "chksignature": "1", "databytes": "1000",
    }  # fmt: skip
    assert rows(done, "clamavclients") == rows(done, "spamdclients") == [b"a@example.com"]
    assert not done.needs_a_person


def test_the_settings_keep_the_old_controls_out_of_reach() -> None:
    toml = tomllib.loads(content(migrate(TABLES), "contentfilter.toml").decode())
    assert msgspec.convert(toml, Settings).service.control == CONTROL != Settings().service.control


def test_a_parameters_own_file_beats_options_and_the_contradiction_is_reported() -> None:
    done = migrate(TABLES | {"options": b"\nsamsgsize 1\n", "samsgsize": b"2 \nnot read\n"})
    assert options(done) == {"samsgsize": "2"}
    assert [d.kind for d in said(done, "options", 2)] == [ChangeKind.CHECK]
    assert [d.kind for d in said(done, "samsgsize", 2)] == [ChangeKind.CHANGED]


def test_the_last_line_counts_in_options() -> None:
    done = migrate(TABLES | {"options": b"databytes 1\ndatabytes 2\n"})
    assert options(done) == {"databytes": "2"}
    assert said(done, "options", 1)[0].kind is ChangeKind.CHECK


@pytest.mark.parametrize(
    "line", [b"skipcachk 3", b"clamglobal yes", b"samsgsize 250k", b"samsgsize -1", b"databytes", b"sysfacility LOCAL0",
             b"samsgsize 1\0", b"databytes \xb2", b"spamglobal 1 # all"]
)  # fmt: skip
def test_a_wrong_value_is_skipped_and_named(line: bytes) -> None:
    done = migrate(TABLES | {"options": b"# ours\n" + line + b"\n"})
    assert options(done) == {}
    assert [d.kind for d in said(done, "options", 2)] == [ChangeKind.CHECK]


def test_unknown_names_are_named_and_near_misses_guessed() -> None:
    done = migrate(TABLES | {"options": b"spamglobel 1\n\xff\xfe 1\n"})
    assert "spamglobal" in said(done, "options", 1)[0].text
    assert [d.kind for d in said(done, "options", 2)] == [ChangeKind.CHECK]


def test_what_belongs_to_qmail_is_left_alone_and_asks_nobody() -> None:
    done = migrate(TABLES | {"options": b"badmailfrom x\nbadurls 1\nspfbehavior 3\n"}, ("tarpitcount",))
    assert [d.kind for line in (1, 2, 3) for d in said(done, "options", line)] == [ChangeKind.LEFT] * 3
    assert [d.subject for d in said(done, ".")] == ["tarpitcount"]
    assert not done.needs_a_person


def test_the_parameters_are_those_that_the_daemon_reads() -> None:
    assert set(PARAMETERS) == {parameter.name for parameter in READ_BY_DAEMON}


def test_no_parameter_is_both_ours_and_qmails() -> None:
    assert not QMAIL & set(READS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_parameter_is_read_from_either_place(name: str) -> None:
    value = "LOG_LOCAL3" if name == "sysfacility" else "1"
    for old in ({"options": f"{name.upper()} = {value}\r\n".encode()}, {name: f"{value}\n".encode()}):
        assert options(migrate(TABLES | old)) == {name: value}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"Joe@Example.COM", b"joe@example.com"), (b"example.com", b"@example.com"), (b"@example.com", b"@example.com"),
        (b"*@example.com", b"@example.com"), (b"*@*.example.com", b".example.com"), (b"*.example.com", b".example.com"),
        (b".example.com", b".example.com"), (b"*", b"*"), (b"@", b"*"), (b"*@*", b"*"),
        (b"joe@example.com\r", b"joe@example.com"),
        (b"o'brien+x=y@example.com", b"o'brien+x=y@example.com"), (b"!joe@example.com", b"!joe@example.com"),
        (b"  joe@example.com", b"joe@example.com"),
    ],
)  # fmt: skip
def test_keys_of_the_tables(old: bytes, new: bytes) -> None:
    assert rows(migrate({"clamavclients": old + b"\n"}), "clamavclients") == [new]


@pytest.mark.parametrize(
    "key", [b"jo?@example.com", b"[Jj]oe@example.com", b"j*@example.com", b"b\xfc@example.com", b"a b@example.com",
            b"joe@", b"a@b@c", b"@.example.com", b"a\0@example.com", b"a@exa..mple", b"\\*@example.com", b"!", b"! ",
            b"!!a@example.com", b"!#a@example.com"]
)  # fmt: skip
def test_a_key_that_our_tables_cannot_hold_is_skipped_and_named(key: bytes) -> None:
    done = migrate({"spamdclients": b"# c\n" + key + b"\nz@example.com\n"})
    assert rows(done, "spamdclients") == [b"z@example.com"]
    assert [d.kind for d in said(done, "spamdclients", 2)] == [ChangeKind.CHECK]


def test_keys_that_contradict_each_other_are_named() -> None:
    done = migrate({"clamavclients": b"a@example.com\nA@example.com\n!a@example.com\n"})
    assert rows(done, "clamavclients") == [b"!a@example.com"]  # the last, as where our tables are read
    assert said(done, "clamavclients", 3)[0].kind is ChangeKind.CHECK


def test_the_tables_written_are_read_back_without_a_problem() -> None:
    keys = [b"a@example.com", b"!b@example.com", b"@example.com", b".example.org", b"*", b"o'neil@example.net"]
    done = migrate({"clamavclients": b"\n".join(keys)})
    table, problems = parse_table(content(done, "control/clamavclients"), "clamavclients")
    assert problems == ()
    assert table == {key.removeprefix(b"!"): b"!" if key.startswith(b"!") else b"" for key in keys}


def test_lines_of_dos_and_exempting_rows_are_reported() -> None:
    done = migrate({"clamavclients": b"a@example.com\r\n!b@example.com\r\n"})
    assert any(d.subject == "CR LF" for d in said(done, "clamavclients"))
    assert said(done, "clamavclients", 2)[0].kind is ChangeKind.CHECK


def test_tables_that_exist_only_compiled_are_asked_for() -> None:
    done = migrate({"options": b"clamglobal 1\n"}, ("clamavclients.cdb", "spamdclients.db"))
    assert said(done, "clamavclients") == []  # clamglobal: nobody depends on the rows
    assert "spamdclients.db" in said(done, "spamdclients")[0].text


def test_signature_lists_are_cut_as_before_and_readable_for_our_scanners() -> None:
    done = migrate(TABLES | {
        "badmimetypes": b"# programs\nTVqQAAMAAAAEAAAA\nshort\n<script>x\nTVpQAAIAA",
        "badsignatures": b"TVqQAAMAA\n",
        "badloadertypes": b"MzIuZ\nM\n",
    })  # fmt: skip
    signatures, problems = parse_signatures(content(done, "control/badsignatures"), "badsignatures")
    assert ([r.pattern for r in signatures.rules], problems) == (["TVqQAAMAA", "TVpQAAIAA"], ())
    loaders, problems = parse_loadertypes(content(done, "control/badloadertypes"), "badloadertypes")
    assert ([r.pattern for r in loaders.rules], problems) == (["MzIuZ"], ())
    assert [d.kind for line in (2, 3, 4) for d in said(done, "badmimetypes", line)] == [
        ChangeKind.CHANGED,
        ChangeKind.CHECK,
        ChangeKind.CHECK,
    ]
    assert any("loses the last line" in d.text for d in said(done, "badmimetypes", 5))
    assert [d.kind for d in said(done, "badloadertypes", 2)] == [ChangeKind.CHECK]


def test_a_directory_without_hsphere_gives_no_files() -> None:
    done = migrate({"me": b"mail.example.com\n"}, ("rcpthosts",))
    assert done.files == ()
    assert done.needs_a_person


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["options", "clamavclients", "samsgsize", *LISTS]), st.binary(max_size=200)))
def test_any_bytes_give_a_report_and_controls_in_printable_ascii(old: dict[str, bytes]) -> None:
    done = migrate(old)
    for difference in done.differences:
        text = f"{difference.path}{difference.subject}{difference.text}"
        assert text.isascii()
        assert text.isprintable()
    for file in done.files:
        assert file.content.decode("ascii").replace("\n", "").isprintable()


def test_a_million_odd_bytes_take_linear_time() -> None:
    started = time.thread_time()
    migrate({"options": b"name" + b" " * 1_000_000 + b"\n" + b"\t=" * 500_000, "clamavclients": b"*" * 1_000_000})
    assert units_since(started) < 250
