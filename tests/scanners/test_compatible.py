"""Warlord's rules W1 to W12, one by one, and what they are known to miss."""

import pytest
from lab.programs import BASE64, b64, made, mixed, qp, uu, wrap

from contentfilter.model import Scanner
from contentfilter.scanners.signatures import compatible
from contentfilter.scanners.signatures.compatible import Hit
from contentfilter.scanners.signatures.engine import (
    Detection,
    Engine,
    default_loadertypes,
    default_signatures,
    parse_loadertypes,
    parse_signatures,
)

TYPES = frozenset({b"TVqQAAMAA"})
LOADERS = frozenset({b"MzIuZ"})
CTE = b"Content-Transfer-Encoding: base64\n"
FIRST = b"TVqQAAMAAAAEAAAA\n"
PLAIN = b"AAAAAAAAAAAAAAAA\n"
NAME = b"AAAAMzIuZGxsAAAA\n"


def scan(text: bytes, *, whitespace: bool = False) -> Hit | None:
    return compatible.scan(text, TYPES, LOADERS, whitespace)


def test_w1_no_tree_no_boundary_no_type_is_needed() -> None:
    assert scan(CTE + b"\n" + FIRST) == Hit(False, b"TVqQAAMAA", 3)


def test_w1_the_state_ends_with_the_message() -> None:
    assert scan(CTE + b"\n" + FIRST) is not None
    assert scan(b"\n" + FIRST) is None


def test_w2_an_empty_line_ends_the_data_but_not_the_declaration() -> None:
    assert scan(CTE + b"\n" + PLAIN + b"\nshort\n" + NAME) is None
    assert scan(CTE + b"\n" + PLAIN + b"\n" + FIRST) is not None


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        (b"content-transfer-encoding: base64", True),
        (b"CONTENT-TRANSFER-ENCODING: BASE64", True),
        (b"Content-Transfer-Encoding: base64; more", True),
        (b"Content-Transfer-Encoding:base64", False),
        (b"Content-Transfer-Encoding:  base64", False),
        (b"Content-Transfer-Encoding:\tbase64", False),
        (b"Content-Transfer-Encoding:\n base64", False),
        (b'Content-Transfer-Encoding: "base64"', False),
        (b"Content-Transfer-Encoding: (x) base64", False),
        (b" Content-Transfer-Encoding: base64", False),
        (b"Content-Transfer-Encoding: base6", False),
    ],
)
def test_w3_the_declaration_is_one_exact_text_in_any_case(line: bytes, seen: bool) -> None:
    assert (scan(line + b"\n\n" + FIRST) is not None) is seen


def test_w3_the_declaration_counts_in_a_body_too() -> None:
    assert scan(b"Subject: x\n\nhello\n" + CTE + b"\n" + FIRST) is not None


def test_w4_the_first_data_line_follows_the_empty_line_directly() -> None:
    assert scan(CTE + b"\nAAAA\n" + FIRST) is None


@pytest.mark.parametrize(("line", "seen"), [(b"TVqQAAMAA", False), (b"TVqQAAMAAA", True), (b"TVqQAAMAA\r", True)])
def test_w4_the_first_data_line_has_ten_characters(line: bytes, seen: bool) -> None:
    assert (scan(CTE + b"\n" + line + b"\n") is not None) is seen


def test_w5_a_dash_ends_everything() -> None:
    assert scan(CTE + b"--b\n\n" + FIRST) is None
    assert scan(CTE + b"\n" + PLAIN + b"-\n" + NAME) is None


def test_w5_wins_over_w4() -> None:
    assert compatible.scan(CTE + b"\n-VqQAAMAAAAA\n", frozenset({b"-VqQAAMAA"}), LOADERS) is None
    assert scan(CTE + b"\n-AAAAAAAAAAAA\n" + NAME) is None


def test_w6_nine_letters_are_compared_exactly() -> None:
    assert scan(CTE + b"\ntvqqaamaaAAAA\n") is None
    assert scan(CTE + b"\n TVqQAAMAAAAA\n") is None
    assert scan(CTE + b"\nTVqQAAMABAAA\n") is None
    assert scan(CTE + b"\n" + PLAIN + FIRST) is None


def test_w7_white_space_in_base64_is_a_hit_only_when_asked_for() -> None:
    text = CTE + b"\n" + PLAIN + b"AAA AAAA\n"
    assert scan(text) is None
    assert scan(text, whitespace=True) == Hit(False, b"", 4)
    assert scan(CTE + b"\n" + PLAIN + b"A AAA\n", whitespace=True) is None


@pytest.mark.parametrize("shift", range(12))
def test_w8_a_loader_type_is_found_at_each_offset(shift: int) -> None:
    text = CTE + b"\n" + PLAIN + b"M" * shift + b"MzIuZ" + b"A\n"
    assert scan(text) == Hit(True, b"MzIuZ", 4)


def test_w8_the_first_data_line_is_searched_too() -> None:
    assert scan(CTE + b"\n" + NAME) == Hit(True, b"MzIuZ", 3)


def test_w8_a_line_has_six_characters() -> None:
    assert scan(CTE + b"\n" + PLAIN + b"MzIuZ\n") is None
    assert scan(CTE + b"\n" + PLAIN + b"MzIuZA\n") is not None


def test_w8_nothing_is_found_across_a_line_break_or_outside_data() -> None:
    assert scan(CTE + b"\n" + PLAIN + b"AAAAAAAMzI\nuZGxsAAAA\n") is None
    assert scan(b"Subject: x\n\n" + NAME) is None
    assert scan(CTE + NAME + b"\n") is None


def test_w9_the_sentinel_matters_for_a_leading_l_only() -> None:
    text = CTE + b"\n" + PLAIN + b"zIuZAAAA\n"
    assert compatible.scan(text, TYPES, frozenset({b"LzIuZ"})) == Hit(True, b"LzIuZ", 4)
    assert compatible.scan(text, TYPES, frozenset({b"MzIuZ"})) is None


def test_w10_a_long_line_is_cut_not_refused() -> None:
    assert scan(CTE + b"\n" + b"A" * 900 + NAME) is not None
    assert scan(CTE + b"\n" + b"A" * 1000 + NAME) is None
    assert scan(CTE + b"\n" + b"A" * 2000 + b"\n" + NAME) == Hit(True, b"MzIuZ", 4)


def test_w11_a_second_paragraph_is_a_first_data_line_again() -> None:
    assert scan(CTE + b"\n" + PLAIN + b"\n" + FIRST) == Hit(False, b"TVqQAAMAA", 5)


def test_w12_a_hit_is_told_with_its_line() -> None:
    engine = Engine(default_signatures(), default_loadertypes(), "compatible")
    description = "Windows program, the usual linker header"
    message = mixed(BASE64, b64(made()))
    assert engine.scan(message) == Detection(Scanner.SIGNATURES, "TVqQAAMAA", description, "line 17", 0)
    loader = Engine(None, default_loadertypes(), "compatible").scan(CTE + b"\n" + NAME)
    assert loader is not None
    assert (loader.scanner, loader.rule, loader.part) == (Scanner.LOADERTYPES, "MzIuZ", "line 3")


def test_lists_are_cut_to_nine_and_five_letters() -> None:
    signatures, _ = parse_signatures(b"TVqQAAMAAAAEAAAA long\nUEsDBBQA short\n", "")
    loaders, _ = parse_loadertypes(b"MzIuZGxs long\nMi5k short", "")
    engine = Engine(signatures, loaders, "compatible")
    found = engine.scan(CTE + b"\nTVqQAAMAAZZZZZZZ\n")
    assert found is not None
    assert found.rule == "TVqQAAMAAAAEAAAA"
    assert engine.scan(CTE + b"\nUEsDBBQAAZZZZZZZ\n") is None
    assert engine.scan(CTE + b"\n" + PLAIN + b"MzIuZZZZ\n") is not None
    assert engine.scan(CTE + b"\n" + PLAIN + b"Mi5kZZZZ\n") is None


@pytest.mark.parametrize(
    "message",
    [
        CTE.replace(b": ", b":\n ") + b"\n" + FIRST,
        CTE + b"\nTVqQ\nAAMAAAAEAAAA\n",
        CTE + b"\n" + wrap(b64(made()).replace(b"\n", b""), 8),
        CTE + b"\n!" + FIRST,
        b"X: y\n\n" + uu(made()),
        b"Content-Transfer-Encoding: quoted-printable\n\n" + qp(made()),
        b"Content-Transfer-Encoding: 8bit\n\n" + made(),
    ],
    ids=["folded field", "short first line", "eight columns", "junk", "uuencode", "quoted-printable", "8bit"],
)
def test_what_warlord_misses_is_missed_here_and_found_in_mime_mode(message: bytes) -> None:
    signatures = default_signatures()
    assert Engine(signatures, None, "compatible").scan(message) is None
    assert Engine(signatures, None).scan(message) is not None


def test_a_last_line_without_newline_is_a_line() -> None:
    assert scan(CTE + b"\n" + FIRST.rstrip()) == Hit(False, b"TVqQAAMAA", 3)
    assert scan(b"") is None
    assert scan(b"\n\n") is None
