"""H-Sphere's parameters: own file before options before default, and qmail's rules of reading (domain-spec 2.1)."""

import asyncio
import dataclasses
from pathlib import Path

import pytest

from contentfilter.config.controls import PARAMETERS, read_controls
from contentfilter.errors import ConfigError
from contentfilter.policy.plan import Switches

SAMPLE = Path(__file__).parents[2] / "etc" / "control" / "options"
DEFAULTS = {parameter.name: parameter.default for parameter in PARAMETERS}


@pytest.fixture
def read(tmp_path):
    def read(**files):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        controls, problems = asyncio.run(read_controls(str(tmp_path)))
        assert all(problem.warning for problem in problems)
        return controls, [(Path(problem.path).name, problem.line, problem.text) for problem in problems]

    return read


def test_the_defaults_are_those_of_the_policy():
    for field in dataclasses.fields(Switches):
        assert DEFAULTS[field.name] == field.default, field.name


def test_without_files_all_is_default(read):
    controls, problems = read()
    assert controls.values == DEFAULTS
    assert set(controls.places.values()) == {""}
    assert (controls.badsignatures, controls.badloadertypes) == (None, None)
    assert problems == []


def test_without_a_directory_all_is_default_and_that_is_said(tmp_path):
    controls, (problem,) = asyncio.run(read_controls(str(tmp_path / "missing")))
    assert controls.values == DEFAULTS
    assert problem.warning
    assert "no such directory" in problem.text


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (b"samsgsize 5", 5),
        (b"samsgsize\t5", 5),
        (b"samsgsize=5", 5),
        (b"samsgsize = 5", 5),
        (b"samsgsize:5", 5),
        (b"samsgsize : 5", 5),
        (b"samsgsize: 5", 5),
        (b"  samsgsize 5  ", 5),
        (b"SAMSGSIZE 5", 5),
        (b"samsgsize 5\r", 5),
        (b"samsgsize 5 # bytes", 5),
        (b"samsgsize 4\nsamsgsize 5", 5),
        (b"samsgsize 0005", 5),
        (b"#samsgsize 5", 0),
        (b"# samsgsize 5", 0),
    ],
)
def test_forms_of_a_line_in_options(read, line, value):
    controls, problems = read(options=b"# head\n\n" + line + b"\n")
    assert controls.values["samsgsize"] == value
    assert problems == []


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"5\n", 5),
        (b"5", 5),
        (b"5 \t \nsecond line", 5),
        (b"0\n", 0),
    ],
)
def test_an_own_file_holds_the_value_in_its_first_line(read, content, value):
    controls, problems = read(samsgsize=content, options=b"samsgsize 7\n")
    assert controls.values["samsgsize"] == value
    assert controls.places["samsgsize"].endswith("/samsgsize:1")
    assert problems == []


def test_options_beats_the_default_and_says_its_line(read):
    controls, _ = read(options=b"\nclamglobal 1\n")
    assert controls.values["clamglobal"] is True
    assert controls.places["clamglobal"].endswith("/options:2")


@pytest.fixture
def refused(tmp_path):
    def refused(**files):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        try:
            problems = asyncio.run(read_controls(str(tmp_path)))[1]
        except ConfigError as error:
            problems = error.problems
        errors = [problem for problem in problems if not problem.warning]
        return [(Path(problem.path).name, problem.line, problem.text) for problem in errors]

    return refused


@pytest.mark.parametrize(
    "content",
    [b"x", b"-1", b"+5", b"\xff\x00xxx", b"9" * 30, b"\xd9\xa3", b"yes", b"\xc2\xa05", b"\xe2\x80\x8b5", b"x5"],
)
@pytest.mark.parametrize("place", ["samsgsize", "options"])
def test_what_is_no_number_is_an_error_so_that_what_is_in_force_stays(refused, content, place):
    files = {"options": b"samsgsize 7\n"} | {place: b"samsgsize " + content if place == "options" else content}
    ((name, line, text),) = refused(**files)
    assert (name, line) == (place, 1)
    assert "samsgsize" in text
    assert "the value is not used" in text
    assert text.isascii()


@pytest.mark.parametrize("content", [b"", b"\n", b" \t\n", b"\n5"])
def test_a_file_without_a_value_changes_nothing_and_is_told(read, content):
    controls, ((name, line, text),) = read(samsgsize=content, options=b"samsgsize 7\n")
    assert controls.values["samsgsize"] == 7
    assert controls.places["samsgsize"].endswith("/options:1")
    assert (name, line) == ("samsgsize", 1)
    assert "without a value" in text


@pytest.mark.parametrize(
    ("content", "warned"), [(b" 1\n", ""), (b"\xef\xbb\xbf1\n", "byte order mark"), (b"1\r\n", "CR"), (b"\t1\r", "CR")]
)
@pytest.mark.parametrize("name", ["clamglobal", "options"])
def test_blanks_byte_order_marks_and_carriage_returns_do_not_switch_protection_off(read, name, content, warned):
    if name == "options":
        content = content.replace(b"1", b"clamglobal 1")
    controls, problems = read(**{name: content})
    assert controls.values["clamglobal"] is True
    assert [warned in text for _, _, text in problems] == ([True] if warned and name != "options" else [])


@pytest.mark.parametrize("name", ["clamglobal", "options", "badsignatures"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_an_error_with_its_file(refused, name, encoding):
    ((file, line, text),) = refused(**{name: "clamglobal 1\nspamglobal 1\n".encode(encoding)})
    assert (file, line) == (name, 1)
    assert "UTF-16" in text


def test_a_byte_order_mark_costs_no_signature(read):
    controls, problems = read(badsignatures=b"\xef\xbb\xbfTVqQAAMAA\r\nTVpQAAIAA\r\n")
    assert controls.badsignatures == b"TVqQAAMAA\nTVpQAAIAA\n"
    assert len(problems) == 2


def test_digits_count_up_to_the_first_other_character_as_in_qmail(read):
    controls, ((_, _, text),) = read(databytes=b"20000000bytes\n")
    assert controls.values["databytes"] == 20_000_000
    assert "as qmail does" in text


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("clamglobal", b"1", b"2"),
        ("skipcachk", b"2", b"3"),
        ("skipsachk", b"1", b"9"),
        ("spamdchildren", b"1", b"0"),
        ("spamdchildren", b"10000", b"10001"),
        ("smtplog", b"2", b"3"),
        ("sysfacility", b"LOG_LOCAL7", b"LOG_LOCAL8"),
        ("sysfacility", b"log_local0", b"mail"),
    ],
)
def test_values_have_their_ranges(read, refused, name, good, bad):
    controls, problems = read(options=name.encode() + b" " + good)
    assert str(controls.values[name]) in (good.decode(), "True")
    assert problems == []
    (problem,) = refused(options=name.encode() + b" " + bad)
    assert name in problem[2]


def test_parameters_of_other_programs_are_none_of_our_business(read):
    names = b"badmailfrom mfdnscheck smtpauth tarpitcount spfbehavior stricthelocheck qmailspp catchall".split()
    assert read(options=b"".join(name + b" 1\n" for name in names))[1] == []


def test_a_near_miss_of_ours_is_asked_about(read):
    _, ((name, line, text),) = read(options=b"badhelo x\nchksignatures 1\n")
    assert (name, line) == ("options", 2)
    assert text == "unknown parameter 'chksignatures'; did you mean 'chksignature'?"


@pytest.mark.parametrize("name", ["badurls", "urlscnt"])
def test_expired_parameters_are_told_wherever_they_stand(read, name):
    _, problems = read(options=name.encode() + b" 1\n", **{name: b"1\n"})
    assert [(place, "expired" in text) for place, _, text in problems] == [("options", True), (name, True)]


def test_junk_is_told_in_bounds_and_hides_nothing(read):
    junk = b"\x00\xff\x1b[2J=\n" * 5000
    controls, problems = read(options=b"clamglobal 1\n" + junk + b"spamglobal 1\n")
    assert controls.values["clamglobal"] is controls.values["spamglobal"] is True
    assert len(problems) <= 101
    assert all(text.isascii() and text.isprintable() for _, _, text in problems)


def test_signature_lists_are_passed_on_as_they_are(read):
    controls, _ = read(badsignatures=b"TVqQAAMAA\xff\n", badloadertypes=b"")
    assert (controls.badsignatures, controls.badloadertypes) == (b"TVqQAAMAA\xff\n", b"")


def test_all_files_that_cannot_be_read_are_named_at_once(tmp_path):
    (tmp_path / "clamglobal").mkdir()
    (tmp_path / "options").mkdir()
    with open(tmp_path / "badsignatures", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ConfigError) as caught:
        asyncio.run(read_controls(str(tmp_path)))
    assert {Path(problem.path).name for problem in caught.value.problems} == {"options", "clamglobal", "badsignatures"}


def test_the_sample_shows_every_parameter_with_its_default(read):
    text = SAMPLE.read_bytes()
    shown = [line[1:].split()[0].decode() for line in text.split(b"\n") if line[:1] == b"#" and line[1:2].isalpha()]
    assert sorted(shown) == sorted(DEFAULTS)
    assert read(options=text)[0].values == DEFAULTS
    in_force = b"\n".join(line[1:] if line[1:2].isalpha() else line for line in text.split(b"\n"))
    controls, problems = read(options=in_force)
    assert problems == []
    assert controls.values == DEFAULTS | {"sysfacility": "LOG_LOCAL0"}
