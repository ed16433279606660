"""The text of a table: which lines become rows, and that nothing is skipped silently."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contentfilter import files
from contentfilter.policy.addresses import parse_key
from contentfilter.tables import rows
from contentfilter.tables.rows import parse_table


def parse(text):
    table, problems = parse_table(text, "table")
    assert all(problem.path == "table" for problem in problems)
    return table, [(problem.line, problem.warning) for problem in problems]


def complaint(text):
    (problem,) = parse_table(text, "table")[1]
    return problem.text


def test_rows_comments_and_empty_lines():
    text = b"# comment\n\nA@x.example\n  \t\n@x.example # behind a key\n!.x.example\nx.y\t#too\n*"
    assert parse(text) == ({b"a@x.example": b"", b"@x.example": b"", b".x.example": b"!", b"@x.y": b"", b"*": b""}, [])


@pytest.mark.parametrize("text", [b"", b"\n", b"#", b"# only\n\n#comments"])
def test_a_file_without_rows_is_an_empty_table(text):
    assert parse(text) == ({}, [])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"*@x.example", "write @x.example"),
        (b"John Doe <j@x.example>", "name=value"),
        (b"a@x.example b@x.example", "name=value"),
        (b"! a@x.example", "write !key"),
        (b"!", "write !key"),
        (b"!!a@x.example,", "not a domain"),
        (b"a@x.example\xa0b@y", "more than one @"),
        (b"a\x00@x.example", "control character"),
        (b"\x00" * 5000, "longer than"),
        (b"a@x.example,b@x.example", "more than one @"),
        (b"a@x..example", "not a domain"),
    ],
)
def test_a_bad_line_is_reported_with_a_remedy_and_left_out(line, says):
    text = b"good@x.example\n" + line + b"\n!last@x.example\n"
    assert parse(text) == ({b"good@x.example": b"", b"last@x.example": b"!"}, [(2, False)])
    assert says in complaint(text)
    assert "skipped" in complaint(text)


def test_options_are_reserved_a_row_with_an_unknown_one_stays_in_force_without_it():
    table, found = parse(b"a@x.example action=remove # c\n")
    assert table == {b"a@x.example": b""}
    assert found == [(1, False)]
    assert "unknown option 'action'" in complaint(b"a@x.example action=remove")


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (b"virus=Remove", b"virus=remove"),
        (b"virus=move:Spam@X.example", b"virus=move:Spam@X.example"),
        (b"score=very-aggressive spam=reject", b"spam=reject score=2"),
        (b"score=Default\treject_score=015.50", b"score=5 reject_score=15.5"),
        (b"score=5 score=7", b"score=7"),
        (b"reject_score=0", b"reject_score=0"),
    ],
)
def test_options_are_kept_in_their_one_form(written, kept):
    assert parse(b"A@x.example " + written + b" # why") == ({b"a@x.example": kept}, [])


@pytest.mark.parametrize(
    "option",
    [
        b"virus=delete", b"spam=", b"spam=move:", b"spam=move:x.example", b"spam=move:@x.example", b"spam=move:*",
        b"virus=move:a@b@c", b"score=0", b"score=-1", b"score=high", b"score=1e3", b"score=99999", b"score=nan",
        b"reject_score=normal", b"reject_score=1,5",
    ],
)  # fmt: skip
def test_a_bad_option_is_reported_and_the_row_protects_without_it(option):
    assert parse(b"a@x.example score=3 " + option)[1] == [(1, False)]
    assert parse(b"a@x.example " + option)[0] == {b"a@x.example": b""}
    assert "in force without it" in complaint(b"a@x.example " + option)


def test_an_option_of_the_other_table_is_an_error():
    table, problems = parse_table(b"a@x.example spam=reject\n", "table", rows.OPTIONS["clamavclients"])
    assert table == {b"a@x.example": b""}
    assert "belongs into spamdclients" in problems[0].text


def test_the_last_of_equal_keys_counts_and_the_first_is_named():
    text = b"a@x.example\nb@x.example\n!A@x.example\nx.example\n@x.example\n"
    table, found = parse(text)
    assert table == {b"a@x.example": b"!", b"b@x.example": b"", b"@x.example": b""}
    assert found == [(3, True), (5, True)]
    first, second = parse_table(text, "table")[1]
    assert "unlike in line 1" in first.text
    assert "as in line 4" in second.text


def test_an_exemption_that_is_taken_back_is_taken_back():
    assert parse(b"!a@x.example\na@x.example\n")[0] == {b"a@x.example": b""}


def test_a_lone_name_is_a_domain_and_a_warning():
    assert parse(b"postmaster\n") == ({b"@postmaster": b""}, [(1, True)])


def test_windows_line_ends_and_byte_order_mark_do_no_harm():
    assert parse(b"\xef\xbb\xbfa@x.example\r\n!b@x.example\r\n") == (
        {b"a@x.example": b"", b"b@x.example": b"!"},
        [(1, True), (1, True)],
    )


def test_a_file_of_garbage_gives_a_bounded_number_of_problems():
    table, problems = parse_table(b"no key at all\n" * 50_000, "table")
    assert table == {}
    assert len(problems) == files.MAX_PROBLEMS + 1
    assert "49900 more" in problems[-1].text


LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [b"a@x.example", b"!a@x.example", b"A@X.example", b"# c", b"", b"@x.example", b"x.example", b"*", b"?"]
        ),
        st.binary(max_size=20).filter(lambda line: not set(line) & set(b"\n\r \t#=\x0b\x0c\x1c\x1d\x1e\x1f\x85")),
    )
)


@settings(max_examples=300, deadline=None)
@given(LINES)
def test_the_quick_way_for_plain_lines_gives_the_same_rows_as_line_by_line(lines):
    expected = {}
    for line in lines:
        key, wrong = parse_key(line.removeprefix(b"!"))
        if not wrong:
            expected[key] = b"!" if line.startswith(b"!") else b""
    assert parse_table(b"\n".join([b"", *lines]), "x")[0] == expected
