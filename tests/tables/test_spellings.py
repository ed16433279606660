"""Addresses that are equal for people are equal here, invisible characters do no harm, damaged files change nothing."""

# ruff: noqa: E501, RUF001

import asyncio
import random
import time
from pathlib import Path

import pytest

from contentfilter.endpoint import Address
from contentfilter.errors import ConfigError
from contentfilter.policy.addresses import alias, deciding, folded, normal, parse_key
from contentfilter.settings import ServiceSettings, Settings
from contentfilter.tables.files import load_tables
from contentfilter.tables.keeper import Keeper
from contentfilter.tables.result import Builder
from contentfilter.tables.rows import Rows, parse_table
from contentfilter.tables.snapshot import Snapshot, compile_snapshot

SPELLINGS = {
    "ü": ["bücher.example", "BÜCHER.example", "Bücher.EXAMPLE", "bu\u0308cher.example", "xn--bcher-kva.example",
          "XN--BCHER-KVA.Example", "bücher。example", "ｂücher．example"],
    "cyrillic": ["почта.рф", "ПОЧТА.РФ", "xn--80a1acny.xn--p1ai"],
    "han": ["例え.テスト", "xn--r8jz45g.xn--zckzah"],
    "sharp s": ["straße.example", "xn--strae-oqa.example"],
    "plain": ["Example.COM", "example.com", "ｅxample.com"],
}  # fmt: skip
PAIRS = [(one, other) for group in SPELLINGS.values() for one in group for other in group]


@pytest.mark.parametrize(("written", "recipient"), PAIRS)
@pytest.mark.parametrize(
    ("row", "to"),
    [("@{}", "anna@{}"), ("Anna@{}", "aNNa@{}"), (".{}", "anna@mail.{}"), ("anna@{}", "anna-lists@{}"), ("{}", "a@{}")],
)
def test_both_spellings_of_a_domain_are_one_key(
    tmp_path: Path, written: str, recipient: str, row: str, to: str
) -> None:
    table, problems = parse_table(row.format(written).encode(), "x")
    assert not [problem for problem in problems if not problem.warning]
    (key,) = table
    assert key.isascii(), "the normal form"
    address = to.format(recipient).encode()
    compile_snapshot(Rows(clamav=table, spamd={key: b"score=7"}, prefs=[] if row[0] == "." else [key]), f"{tmp_path}/s")
    snapshot = Snapshot.open(f"{tmp_path}/s", b"-")
    clamav, spamd = snapshot.lookup(address)
    assert clamav is not None
    assert spamd is not None
    assert (clamav.key, spamd.key, spamd.options) == (key, key, b"score=7")
    assert deciding(table, address, b"-") is not None
    if snapshot.owners:
        owner, name = snapshot.owners(address)
        assert owner == key
        assert name.isascii()
    assert set(snapshot.rows().clamav) == {key}, "no row is doubled"
    snapshot.close()


def test_the_default_domain_may_be_in_either_spelling(tmp_path: Path) -> None:
    for me in ("bücher.example", "xn--bcher-kva.example"):
        (tmp_path / "me").write_text(f"{me}\n")
        (tmp_path / "clamavclients").write_text("@BÜCHER.example\n")
        rows, _ = asyncio.run(load_tables(str(tmp_path)))
        compile_snapshot(rows, f"{tmp_path}/s")
        assert Snapshot.open(f"{tmp_path}/s").lookup(b"root")[0] is not None


def test_other_addresses_stay_different() -> None:
    for one, other in [("ü", "u"), ("ö", "ü"), ("ß", "ss"), ("і", "i")]:
        assert normal(f"a@{one}.example".encode()) != normal(f"a@{other}.example".encode())
    assert normal(b"a@b\xfccher.example") == b"a@b\xfccher.example", "not UTF-8: as it is"
    assert alias(b"@xn--\xff.example") == alias(b"@xn--a-.example") == alias(b"@x.example") == b""


def test_a_look_up_of_the_worst_domain_takes_microseconds_and_a_key_milliseconds() -> None:
    rng = random.Random(1)
    worst = [
        ["u@" + ".".join("".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(63)) for _ in range(5))],
        ["u@" + ".".join("".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(32)) for _ in range(10))],
        ["u@" + "\ufdfa" * 320],
        ["u@" + "a" + "\u0300\u0316" * 240],
        ["u@xn--" + "9" * 900 + ".example"],
        ["u@" + ".".join(["xn--" + "z" * 55] * 16)],
    ]
    for (text,) in worst:
        address = text.encode()
        for function, limit in ((folded, 0.002), (parse_key, 0.1), (alias, 0.1)):
            began = time.thread_time()
            function(address)
            assert time.thread_time() - began < limit, (function, text[:40])


INVISIBLE = ["\u00a0", "\u200b", "\ufeff", "\u00ad", "\u3000", "\u2060", "\u200e", "\u2028", "\u3164", "\u2800", "\ufe0f",
             "\u00a0\u200b", "\U000e0020"]  # fmt: skip


@pytest.mark.parametrize("character", INVISIBLE)
def test_invisible_characters_are_cut_at_the_ends_and_an_error_inside(character: str) -> None:
    for key in ("anna@x.example", "@x.example", "x.example", ".x.example"):
        wanted = parse_key(key.encode())
        for text in (character + key, key + character, character + key + character):
            assert parse_key(text.encode()) == wanted
        at = len(key) - 3
        found, wrong = parse_key((key[:at] + character + key[at:]).encode())
        assert found == b""
        assert "invisible" in wrong
    table, (problem,) = parse_table(f"# a\n@x.exam{character}ple\n".encode(), "x")
    assert (table, problem.line, problem.warning) == ({}, 2, False)


@pytest.mark.parametrize(
    "key",
    ["mailto:a@x.example", "a@x.example,", "a@x.example;", "virus=move:box@x.example", "virus=remove", "“a@x.example”",
     "a＠x.example", "<a@x.example>", "a@x.example.", "a@@x.example", "a@x..example", "a@x_é…example", "a,b@x.example"],
)  # fmt: skip
def test_what_is_no_address_is_an_error(key: str) -> None:
    assert parse_key(key.encode())[0] == b""


def test_a_domain_that_is_not_utf_8_is_an_error_and_such_a_local_part_is_not() -> None:
    assert "not UTF-8" in parse_key(b"@b\xfccher.example")[1]
    assert parse_key(b"j\xfcrg@x.example") == (b"j\xfcrg@x.example", "")


# Damaged files

GOOD = "".join(f"user{number}@x.example\n" for number in range(80))
DAMAGE = {
    "UTF-16": GOOD.encode("utf-16"),
    "UTF-16 without a mark": GOOD.encode("utf-16-le"),
    "commas": GOOD.replace("\n", ",\n").encode(),
    "one bad row": b"user@@x.example\n",
    "most rows": b"a@x.example\n" + b"user@@x.example\n" * 2,
    "another file": b"PK\x03\x04 zip\nfoo bar\n",
}


@pytest.mark.parametrize("name", ["clamavclients", "spamdclients", "spamprefs"])
@pytest.mark.parametrize("data", DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_is_not_what_it_should_be_changes_nothing(tmp_path: Path, name: str, data: bytes) -> None:
    config = Settings(service=ServiceSettings(control=str(tmp_path), state=str(tmp_path)))
    keeper = Keeper()
    (tmp_path / name).write_text("a@x.example\n")
    assert asyncio.run(keeper.update(config, reread=True))[0]
    before = (tmp_path / "tables.snapshot").read_bytes()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        asyncio.run(keeper.update(config, reread=True))
    assert asyncio.run(keeper.update(config, reread=False)) == (False, ())
    problem = caught.value.problems[0]
    assert problem.path.endswith(name)
    assert problem.line >= 1
    assert len(problem.text) < 300
    assert len(caught.value.problems) <= 102
    assert name in keeper.state().trouble
    assert (tmp_path / "tables.snapshot").read_bytes() == before


def test_without_any_tables_the_good_rows_of_a_damaged_file_are_better_than_none(tmp_path: Path) -> None:
    (tmp_path / "clamavclients").write_bytes(DAMAGE["most rows"])
    keeper = Keeper()
    config = Settings(service=ServiceSettings(control=str(tmp_path), state=str(tmp_path)))
    changed, problems = asyncio.run(keeper.update(config, reread=True))
    assert changed
    assert len(problems) == 2
    assert keeper.state().clamav_rows == 1


@pytest.mark.parametrize(
    "data", [GOOD.encode("utf-8-sig"), GOOD.replace("\n", "\r\n").encode(), GOOD.replace("\n", "\r").encode()]
)
def test_byte_order_marks_and_line_ends_of_other_systems_are_understood(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "clamavclients").write_bytes(data)
    rows, (problem,) = asyncio.run(load_tables(str(tmp_path)))
    assert len(rows.clamav) == 80
    assert problem.warning


def test_some_bad_rows_among_good_ones_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "clamavclients").write_bytes(b"a@x.example\nb@x.example\nuser@@x.example\nc@x.example virus=what\n")
    rows, problems = asyncio.run(load_tables(str(tmp_path)))
    assert list(rows.clamav) == [b"a@x.example", b"b@x.example", b"c@x.example"]
    assert len(problems) == 2


def test_rows_of_a_database_are_judged_likewise() -> None:
    builder = Builder("clamavclients")
    builder.begin([("address", 253)])
    builder.add([(b"a@x.example",), (b"x@@y",), (None,)])
    assert "2 of 3 rows are invalid" in builder.damage()[0].text
    builder.add([(b"b@x.example",)])
    assert builder.damage() == ()


# Backends


@pytest.mark.parametrize(
    "text",
    ["tcp://127.0.0.1:783", "tcp:a,b:783", "tcp:user@h:783", "tcp:h/x:783", "tcp:127.0.0.1 :783", "tcp:-h:783", "tls:h..x:783",
     "tcp:127.0.1:783", "tcp:300.1.1.1:783", "tcp:[::1:783", "tcp:[h]x:783", "tcp:h:783\u00a0", "tcp:h\u200b:783",
     "unix:/path\u00a0", "unix:/path ", "unix:/pa\u200bth", "unix:/path\n", "unix://", "unix:/", "unix:/path/"],
)  # fmt: skip
def test_a_backend_that_is_written_wrong_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"unix:|tcp:|host|port|backend|IPv6"):
        Address.parse(text)


@pytest.mark.parametrize(
    "text", ["tcp:127.0.0.1:783", "tcp:[::1]:783", "tls:scan_1.mail-x.example.:783", "tcp:localhost:1", "unix:/run/a b"]
)
def test_a_backend_that_is_written_well_is_taken(text: str) -> None:
    assert Address.parse(text)
