"""simscan's controls: what each row becomes, and that no oddity of them goes unsaid."""

import struct
import time
import tomllib
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.calibration import units_since

from contentfilter.admin.migrate_simscan import migrate
from contentfilter.admin.migration import LISTED, ChangeKind, Migration, MigrationNote
from contentfilter.policy.addresses import deciding
from contentfilter.settings import Settings
from contentfilter.tables.rows import parse_table


def control(*lines: bytes, **others: bytes) -> Migration:
    return migrate({"simcontrol": b"".join(line + b"\n" for line in lines), **others})


def content(migration: Migration, path: str) -> bytes:
    (found,) = (file.content for file in migration.files if file.path == path)
    return found


def rows(migration: Migration, name: str) -> list[bytes]:
    return [line for line in content(migration, f"control/{name}").splitlines() if not line.startswith(b"#")]


def options(migration: Migration) -> dict[str, str]:
    lines = content(migration, "control/options").decode().splitlines()
    return dict(line.split(" ", 1) for line in lines if not line.startswith("#"))


def toml(migration: Migration) -> Settings:
    return msgspec.convert(tomllib.loads(content(migration, "contentfilter.toml").decode()), Settings)


def at(migration: Migration, line: int, path: str = "simcontrol") -> list[MigrationNote]:
    return [d for d in migration.differences if (d.path, d.line) == (path, line) and d.kind is not ChangeKind.SAME]


def test_the_usual_single_row_carries_over_without_a_decision() -> None:
    done = control(b":clam=yes,spam=yes,spam_hits=9.5,size_limit=300000")
    assert rows(done, "clamavclients") == rows(done, "spamdclients") == [b"*"]
    assert toml(done).spamd.reject_score == 9.5
    assert (toml(done).spamd.action, toml(done).spamd.rewrite) == ("mark", "full")
    assert options(done) == {"skipsachk": "2", "samsgsize": "299999"}
    assert not done.needs_a_person


def test_rows_per_domain_and_address_become_keys_with_their_own_score() -> None:
    done = control(b"Joe@Example.com:clam=no,spam_hits=15", b"example.com:spam=yes,clam=yes,spam_hits=6", b":clam=yes")
    assert rows(done, "clamavclients") == [b"!joe@example.com", b"@example.com", b"*"]
    assert rows(done, "spamdclients") == [b"joe@example.com reject_score=15", b"@example.com reject_score=6"]
    assert toml(done).tables.extension == "-"


def test_the_tables_written_are_read_back_key_by_key() -> None:
    done = control(b":clam=yes,spam=yes,spam_hits=5", b"a.example:spam_hits=7", b"joe-x@a.example:clam=no,spam=no")
    expected = {
        "clamavclients": {b"*": b"", b"@a.example": b"", b"joe-x@a.example": b"!"},
        "spamdclients": {b"*": b"", b"@a.example": b"reject_score=7", b"joe-x@a.example": b"!"},
    }
    for name, rows_expected in expected.items():
        table, problems = parse_table(content(done, f"control/{name}"), name)
        assert table.keys() == rows_expected.keys()
        assert problems == ()
        assert table == rows_expected


def test_what_simscan_applies_to_senders_too_is_left_to_a_person() -> None:
    done = control(b"example.com:spam=no", b":clam=yes,spam=yes,spam_hits=5")
    assert [d.subject for d in done.differences if d.kind is ChangeKind.CHECK] == ["sender"]


def test_passthru_marks_and_its_absence_refuses() -> None:
    done = control(b"a.example:spam=yes,spam_passthru=yes", b"b.example:spam=yes,spam_passthru=no", b":spam=yes")
    assert toml(done).spamd.action == "reject"
    assert rows(done, "spamdclients") == [b"@a.example spam=mark", b"@b.example", b"*"]


def test_where_refusing_was_chosen_at_configure_nothing_is_refused_unasked() -> None:
    done = control(b":spam=yes")
    assert (toml(done).spamd.action, toml(done).spamd.reject_score) == ("mark", 0.0)
    assert any(d.kind is ChangeKind.CHECK and "./configure" in d.text for d in done.differences)


def test_rows_without_spam_hits_among_others_take_configures_ten_and_say_so() -> None:
    done = control(b"a.example:spam=yes,spam_hits=4", b":spam=yes")
    assert toml(done).spamd.reject_score == 10.0
    assert rows(done, "spamdclients") == [b"@a.example reject_score=4", b"*"]
    assert any(d.kind is ChangeKind.CHECK and d.subject == "rows without spam_hits" for d in done.differences)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"#example.com:clam=no", "has no comments"),
        (b" :clam=no", "does not recognise the default row"),
        (b"example.com:clam=yes, spam=yes", "every blank"),
        (b"example.com:clam=maybe", "neither yes nor no"),
        (b"example.com:spam_hits=nan", "not a number above 0"),
        (b"example.com:spam_hits=0", "not a number above 0"),
        (b"example.com:spam_hits=-3", "not a number above 0"),
        (b"example.com:size_limit=300k", "not a plain number"),
        (b"example.com:bogofilter=yes", "unknown to simscan"),
        (b"example.com:clam", "every blank"),
        (b"example.com:regex=v.agra", "use a SpamAssassin rule"),
        (b"example.com:spamuser=joe", "no spamd user"),
        (b"example.com:qmailqueue=/bin/other", "starts one program"),
        (b"example.com:qmailqueue=other", "not an absolute path"),
        (b"example.com:size_limit=5", "one limit for all"),
        (b"example.com:attach=.e\xffe", "printable ASCII"),
        (b"*.example.com:clam=no", "neither an address nor a domain"),
        (b"@example.com:clam=no", "neither an address nor a domain"),
        (b"b\xfccher@example.com:clam=no", "neither an address nor a domain"),
        (b"example.com:clam=\0yes", "NUL"),
        (b"example.com:" + b"x" * 4000, "over 3999"),
    ],
)
def test_every_odd_row_is_named_with_its_line(line: bytes, expected: str) -> None:
    done = control(b":clam=yes,spam=yes", line)
    assert any(expected in d.text and d.kind in (ChangeKind.LOST, ChangeKind.CHECK) for d in at(done, 2)), (
        done.differences
    )


def test_an_odd_row_is_not_written_where_it_never_held() -> None:
    done = control(b":clam=yes", b"#example.com:clam=no", b"*.example.com:clam=no", b"a.example:clam=\0no")
    assert rows(done, "clamavclients") == [b"*"]


def test_of_equal_keys_the_first_counts_as_in_a_cdb() -> None:
    done = control(b":clam=yes", b"Example.com:clam=no", b"example.com:clam=yes")
    assert rows(done, "clamavclients") == [b"*", b"!@example.com"]
    assert "line 2" in at(done, 3)[0].text


def test_line_ends_of_dos_change_nothing() -> None:
    assert control(b":clam=yes,spam=yes\r", b"a.example:spam=no\r") == control(
        b":clam=yes,spam=yes", b"a.example:spam=no"
    )


def test_a_comment_in_plain_words_asks_nobody() -> None:
    done = control(b"# the default", b":clam=yes")
    assert [d.kind for d in at(done, 1)] == [ChangeKind.LEFT]


def test_size_limit_keeps_its_edge() -> None:
    assert (
        options(control(b":spam=yes,size_limit=1000"))["samsgsize"] == "999"
    )  # simscan skips from 1000 on, we above 999
    assert options(control(b":spam=yes", simsizelimit=b"5000\n"))["samsgsize"] == "4999"
    assert "samsgsize" not in options(control(b":spam=yes,size_limit=0"))


def test_a_program_behind_simscan_goes_to_queue_conf() -> None:
    done = control(b":clam=yes,qmailqueue=/usr/bin/next-queue")
    assert b"\nqueue /usr/bin/next-queue\n" in content(done, "queue.conf")
    assert b"\nqueue /var/qmail/bin/qmail-queue\n" in content(control(b":clam=yes"), "queue.conf")


def test_only_endings_that_all_forbid_are_in_force_for_clamd() -> None:
    done = control(b":clam=yes,attach=.exe:.scr", b"a.example:attach=.exe:.mp3")
    lines = content(done, "clamd/contentfilter-attachments.cdb").splitlines()[1:]
    assert [line.split(b":")[3] for line in lines if not line.startswith(b"#")] == [rb"(?i)\.exe$"]
    assert len([line for line in lines if line.startswith(b"#")]) == 2
    assert any(d.kind is ChangeKind.CHECK and d.subject == "attach" for d in done.differences)


def test_endings_of_one_domain_are_not_in_force_for_all() -> None:
    done = control(b"a.example:clam=yes,attach=.exe")
    assert b"\n#ContentFilter.Attachment.exe:" in content(done, "clamd/contentfilter-attachments.cdb")


def test_forbidden_attachments_without_virus_check_are_left_to_a_person() -> None:
    assert any("without a virus check" in d.text for d in at(control(b":spam=yes,attach=.exe"), 1))


def test_without_simcontrol_ssattach_holds_for_all() -> None:
    done = migrate({"ssattach": b".exe\n.com:.bat\n"})
    assert rows(done, "clamavclients") == rows(done, "spamdclients") == [b"*"]
    assert content(done, "clamd/contentfilter-attachments.cdb").count(b"ContentFilter.Attachment") == 2
    assert "only the first" in at(done, 2, "ssattach")[0].text  # simscan does not see .bat


def test_a_directory_without_simscan_gives_no_files() -> None:
    done = migrate({"me": b"mail.example.com\n"}, ("rcpthosts",))
    assert done.files == ()
    assert done.needs_a_person


def cdb(*records: tuple[bytes, bytes]) -> bytes:
    """A cdb file; its hash tables are empty, since nothing here looks anything up."""
    body = b"".join(struct.pack("<II", len(k), len(v)) + k + v for k, v in records)
    return struct.pack("<II", 2048 + len(body), 0) * 256 + body


def test_the_compiled_rows_are_read_where_the_text_is_gone() -> None:
    done = migrate({"simcontrol.cdb": cdb((b"", b"clam=yes"), (b"a.example", b"clam=no"))})
    assert rows(done, "clamavclients") == [b"*", b"!@a.example"]
    assert options(done)


def test_rows_that_were_never_compiled_are_noticed() -> None:
    compiled = cdb((b"", b"clam=yes"))
    same = migrate({"simcontrol": b":clam=yes\n", "simcontrol.cdb": compiled})
    changed = migrate({"simcontrol": b":clam=yes\na.example:clam=no\n", "simcontrol.cdb": compiled})
    assert at(same, 0, "simcontrol.cdb") == []
    assert "changed since" in at(changed, 0, "simcontrol.cdb")[0].text


@pytest.mark.parametrize("cut", [0, 7, 2047, 2049, 2060])
def test_a_damaged_cdb_is_refused(cut: int) -> None:
    done = migrate({"simcontrol": b":clam=yes\n", "simcontrol.cdb": cdb((b"", b"clam=yes"))[:cut]})
    assert at(done, 0, "simcontrol.cdb")[0].subject == "damaged"


def test_a_cdb_record_that_claims_too_much_is_refused() -> None:
    whole = bytearray(cdb((b"", b"clam=yes")))
    struct.pack_into("<I", whole, 2052, 9000)
    done = migrate({"simcontrol": b":clam=yes\n", "simcontrol.cdb": bytes(whole)})
    assert at(done, 0, "simcontrol.cdb")[0].subject == "damaged"


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["simcontrol", "simcontrol.cdb", "ssattach", "simsizelimit"]), st.binary(max_size=300)
    )
)
def test_any_bytes_give_a_report_in_printable_ascii(old: dict[str, bytes]) -> None:
    for difference in migrate(old).differences:
        text = f"{difference.path}{difference.subject}{difference.text}"
        assert text.isascii()
        assert text.isprintable()


def test_a_large_file_takes_linear_time_and_counts_what_it_does_not_list() -> None:
    line = b"user%d@example.com:clam=yes,spam=maybe" + b" " * 3000 + b"=\n"
    started = time.thread_time()
    done = migrate({"simcontrol": b"".join(line % n for n in range(5000))})
    assert units_since(started) < 1000
    assert len(rows(done, "clamavclients")) == 5000
    assert len(done.differences) < 6 * LISTED
    assert any(d.subject == "9000 more" and d.kind is ChangeKind.CHECK for d in done.differences)


# simscan's own way of finding the settings for a message to one recipient, written from its README, against ours.

KEYS = ["", "a.example", "b.example", "joe@a.example", "joe-x@a.example", "joe-x-y@a.example", "ann@b.example"]
WHO = [
    "joe@a.example",
    "joe-x@a.example",
    "joe-x-y@a.example",
    "joe-z@a.example",
    "eve@a.example",
    "ann@b.example",
    "q@c.example",
]
yes_no = st.sampled_from(["yes", "no"])
row = st.fixed_dictionaries(
    {}, optional={"clam": yes_no, "spam": yes_no, "spam_hits": st.sampled_from(["3", "7.25", "20"])}
)


def looked_up(recipient: str) -> Iterator[str]:
    """The keys that simscan asks for, one after the other; a later row overrides."""
    local, _, domain = recipient.partition("@")
    yield ""
    yield domain
    parts = local.split("-")
    yield from ("-".join(parts[:n]) + "@" + domain for n in range(1, len(parts) + 1))


def ours(table: list[bytes], recipient: str) -> tuple[bool, dict[str, str]]:
    """(wanted, options) for a recipient by the rule of our own tables."""
    found = {row.split()[0].removeprefix(b"!"): row for row in table}
    decided = deciding(found, recipient.encode(), extension=b"-")
    if decided is None:
        return False, {}
    key, *rest = found[decided[1]].decode().split()
    return not key.startswith("!"), dict(option.split("=") for option in rest)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), row, min_size=1))
def test_each_recipient_is_treated_as_simscan_treated_them(table: dict[str, dict[str, str]]) -> None:
    lines = [f"{key}:" + ",".join(f"{k}={v}" for k, v in said.items()) for key, said in table.items()]
    done = control(*(line.encode() for line in lines))
    for recipient in WHO:
        theirs: dict[str, str] = {}
        for key in looked_up(recipient):
            theirs |= table.get(key, {})
        assert ours(rows(done, "clamavclients"), recipient)[0] == (theirs.get("clam") == "yes")
        spam, said = ours(rows(done, "spamdclients"), recipient)
        assert spam == (theirs.get("spam") == "yes")
        if spam and "spam_hits" in theirs:
            assert float(said.get("reject_score", toml(done).spamd.reject_score)) == float(theirs["spam_hits"])
