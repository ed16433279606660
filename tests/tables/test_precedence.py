"""Which row decides: every kind of key, every pair of them, with and without exemption (design 6)."""

import itertools

import pytest

from contentfilter.policy.addresses import KeyKind, candidates, deciding, parse_key
from contentfilter.tables.rows import Rows
from contentfilter.tables.snapshot import Snapshot, compile_snapshot

# From the most specific on: all that can decide for this recipient.
RECIPIENT = b"User-Lists-Qmail@Mail.Example.COM"
ORDER = [
    (KeyKind.ADDRESS, b"user-lists-qmail@mail.example.com"),
    (KeyKind.EXTENSION, b"user-lists@mail.example.com"),
    (KeyKind.EXTENSION, b"user@mail.example.com"),
    (KeyKind.DOMAIN, b"@mail.example.com"),
    (KeyKind.PARENT, b".example.com"),
    (KeyKind.PARENT, b".com"),
    (KeyKind.EVERYBODY, b"*"),
]
KEYS = [key for _, key in ORDER]
OTHERS = [b"user@example.com", b"@example.com", b".mail.example.com", b"lists-qmail@mail.example.com", b".org", b"@com"]


@pytest.fixture
def ask(tmp_path):
    def ask(table, recipient, extension=b"-", domain=b""):
        """The row that decides, by the snapshot; the plain resolution must agree."""
        path = str(tmp_path / "snapshot")
        compile_snapshot(Rows(clamav=table, default_domain=domain), path)
        snapshot = Snapshot.open(path, extension)
        row, nobody = snapshot.lookup(recipient)
        snapshot.close()
        assert nobody is None, "the other table is empty"
        found = deciding(table, recipient, extension, domain)
        assert (row and row.key) == (found and found[1])
        return row and (row.key, row.exempt)

    return ask


def test_candidates_are_listed_from_the_most_specific_on():
    assert list(candidates(RECIPIENT, b"-")) == ORDER


@pytest.mark.parametrize(("high", "low"), list(itertools.combinations(range(len(KEYS)), 2)))
@pytest.mark.parametrize(("first", "second"), list(itertools.product((b"", b"!"), repeat=2)))
def test_of_two_rows_the_more_specific_decides_whether_it_exempts_or_not(ask, high, low, first, second):
    table = {KEYS[low]: second, KEYS[high]: first}
    assert ask(table, RECIPIENT) == (KEYS[high], first == b"!")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [b"", b"!"])
def test_each_kind_of_row_decides_alone(ask, key, value):
    assert ask({key: value} | dict.fromkeys(OTHERS, b"!"), RECIPIENT) == (key, value == b"!")


def test_rows_of_others_decide_nothing(ask):
    assert ask(dict.fromkeys(OTHERS, b""), RECIPIENT) is None


def test_without_an_extension_character_nothing_is_cut_off(ask):
    table = {b"user@mail.example.com": b"", b"user-lists@mail.example.com": b""}
    assert ask(table, RECIPIENT, extension=b"") is None
    assert ask(table, RECIPIENT.replace(b"-", b"+"), extension=b"+") == (b"user@mail.example.com", False)


@pytest.mark.parametrize("recipient", [b"-a@d.example", b"--@d.example", b"@d.example", b"-@d.example"])
def test_an_extension_never_leaves_an_empty_local_part(ask, recipient):
    assert ask({b"@d.example": b"", b"-@d.example": b""}, recipient) == (
        (b"-@d.example" if recipient in (b"--@d.example", b"-@d.example") else b"@d.example"),
        False,
    )


def test_a_name_that_is_all_extension_is_only_itself():
    kinds = [kind for kind, _ in candidates(b"-a@d", b"-")]
    assert kinds == [KeyKind.ADDRESS, KeyKind.DOMAIN, KeyKind.EVERYBODY]


def test_a_dotted_key_means_sub_domains_at_any_depth_but_not_the_domain(ask):
    table = {b".example.com": b""}
    assert ask(table, b"u@example.com") is None
    assert ask(table, b"u@a.example.com") == (b".example.com", False)
    assert ask(table, b"u@a.b.c.d.e.f.example.com") == (b".example.com", False)
    assert ask(table, b"u@notexample.com") is None


def test_the_nearest_parent_decides(ask):
    table = {b".example.com": b"", b".b.example.com": b"!", b".com": b""}
    assert ask(table, b"u@a.b.example.com") == (b".b.example.com", True)
    assert ask(table, b"u@b.example.com") == (b".example.com", False)


def test_only_ascii_letters_are_folded(ask):
    table = {b"j\xc3\xb6rg@example.com": b""}
    assert ask(table, b"J\xc3\xb6RG@EXAMPLE.com") == (b"j\xc3\xb6rg@example.com", False)
    assert ask(table, b"J\xc3\x96RG@example.com") is None


def test_a_recipient_without_domain_is_looked_up_with_the_one_that_qmail_adds(ask):
    table = {b"postmaster@me.example": b"", b"*": b"!"}
    assert ask(table, b"Postmaster", domain=b"ME.example") == (b"postmaster@me.example", False)
    assert ask(table, b"root", domain=b"me.example") == (b"*", True)
    assert ask(table, b"postmaster") == (b"*", True)


@pytest.mark.parametrize(
    "recipient", [b"", b"@", b"user@", b"*", b".", b"a@b@c", b"\n", b"u@x\0A", b"@" * 1000, b"." * 1000]
)
@pytest.mark.parametrize("table", [{}, {b"*": b""}, {b"u@x": b"", b"@c": b""}])
def test_strange_recipients_are_answered(ask, recipient, table):
    assert ask(table, recipient) == (
        (b"@c", False) if recipient == b"a@b@c" and b"@c" in table else (b"*", False) if b"*" in table else None
    )


@pytest.mark.parametrize(
    ("written", "key"),
    [
        (b"User@Example.COM", b"user@example.com"),
        (b"@Example.com", b"@example.com"),
        (b"Example.com", b"@example.com"),
        (b".Example.com", b".example.com"),
        (b"*", b"*"),
        (b"@", b"*"),
        (b"localhost", b"@localhost"),
        (b"u@[192.0.2.1]", b"u@[192.0.2.1]"),
        (b"a.b+c=d/e'f@x.example", b"a.b+c=d/e'f@x.example"),
        (b"\xc3\xa4@\xc3\xb6.example", b"\xc3\xa4@xn--nda.example"),
    ],
)
def test_keys_as_administrators_write_them(written, key):
    assert parse_key(written) == (key, "")


@pytest.mark.parametrize(
    ("written", "remedy"),
    [
        (b"", "write user@domain"),
        (b"*@example.com", "write @example.com"),
        (b"*.example.com", "write .example.com"),
        (b"@*.example.com", "write .example.com"),
        (b"*@*.example.com", "write .example.com"),
        (b"@.example.com", "write .example.com"),
        (b"info*@example.com", "only a lone *"),
        (b"user@", "no domain"),
        (b".", "no domain"),
        (b"..", "not a domain"),
        (b"user@exam..ple", "not a domain"),
        (b"user@example.com.", "not a domain"),
        (b"user@ex,ample", "not a domain"),
        (b"a@b@c.example", "more than one @"),
        (b"<user@example.com>", "bare address"),
        (b'"user"@example.com', "bare address"),
        (b"user\x00@example.com", "control character"),
        (b"us er@example.com", "blank"),
        (b"u" * 1000 + b"@x", "longer than"),
    ],
)
def test_what_is_no_key_is_refused_with_a_remedy(written, remedy):
    key, wrong = parse_key(written)
    assert key == b""
    assert remedy in wrong
