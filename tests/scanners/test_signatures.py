"""Programs are found however they are wrapped; what is harmless is not; hostile mail costs no more than its size."""

import base64
import io
import mmap
import random
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab import programs
from lab.programs import BASE64, BINARY, QUOTED, b64, mixed, qp, wrap

from contentfilter.errors import BackendError, Cause
from contentfilter.model import Scanner
from contentfilter.scanners.signatures import engine as module
from contentfilter.scanners.signatures import lines, mime, work
from contentfilter.scanners.signatures.engine import (
    Detection,
    Engine,
    Rule,
    Rules,
    default_loadertypes,
    default_signatures,
    parse_loadertypes,
    parse_signatures,
)
from contentfilter.scanners.signatures.rules import Fragment
from contentfilter.scanners.signatures.work import OutOfWorkError

ETC = Path(__file__).parents[2] / "etc/control"
BOTH = Engine(default_signatures(), default_loadertypes())
SIGNATURES = Engine(default_signatures(), None)
LOADERS = Engine(None, default_loadertypes())
MADE = programs.made()
REAL = programs.real()


# ---- the lists


def test_the_samples_hold_the_built_in_lists() -> None:
    assert parse_signatures((ETC / "badsignatures").read_bytes(), "s") == (default_signatures(), ())
    assert parse_loadertypes((ETC / "badloadertypes").read_bytes(), "l") == (default_loadertypes(), ())


def test_the_commented_rows_of_the_sample_are_rules_too() -> None:
    text = re.sub(rb"(?m)^#(?=\S)", b"", (ETC / "badsignatures").read_bytes())
    rules, problems = parse_signatures(text, "s")
    assert not problems
    assert {"UEsDBAkAA", "UEsDB**AA"} < {rule.pattern for rule in rules.rules}


def test_a_line_is_a_pattern_and_what_it_stands_for() -> None:
    text = b"# comment\n\n  TVqQ*AMAA\tDOS  program # remark\r\nUEsD\n"
    rules, problems = parse_signatures(text, "s")
    assert rules == Rules(Scanner.SIGNATURES, (Rule("TVqQ*AMAA", "DOS program"), Rule("UEsD", "")))
    assert not problems


def test_a_bad_line_is_reported_once_and_skipped() -> None:
    text = b"TVq\nTVq-AMAA\nT***V***\n" + b"A" * 81 + b"\nTVqQ\xff\nTVqQ\nTVqQ again\nUEsDB"
    rules, problems = parse_signatures(text, "control/badsignatures")
    assert [rule.pattern for rule in rules.rules] == ["TVqQ", "UEsDB"]
    assert [(p.path, p.line) for p in problems] == [("control/badsignatures", n) for n in (1, 2, 3, 4, 5, 7)]
    assert "shorter than 4" in problems[0].text
    assert "'-' is not a base64 letter" in problems[1].text
    assert "twice" in problems[5].text
    assert [p.warning for p in problems] == [False] * 5 + [True], "a repeated line changes nothing"


def test_a_loader_type_has_no_wildcard() -> None:
    rules, problems = parse_loadertypes(b"MzI*Z\nMzIuZ\n", "l")
    assert [rule.pattern for rule in rules.rules] == ["MzIuZ"]
    assert problems[0].line == 1


@pytest.mark.parametrize("rule", default_signatures().rules, ids=lambda rule: rule.pattern)
def test_every_row_of_the_default_list_is_found(rule: Rule) -> None:
    program = base64.b64decode(rule.pattern + "AAA")[:7] + b"A" * 400
    detection = Engine(Rules(Scanner.SIGNATURES, (rule,)), None).scan(mixed(BASE64, b64(program)))
    assert detection == Detection(Scanner.SIGNATURES, rule.pattern, rule.description, "part 2, base64, line 17", 1)


def test_nine_letters_fix_54_bits_and_no_more() -> None:
    engine = Engine(parse_signatures(b"TVqQAAMAA\n", "")[0], None)
    assert engine.scan(mixed(BASE64, b64(bytes.fromhex("4d5a9000030003ff")))) is not None
    assert engine.scan(mixed(BASE64, b64(bytes.fromhex("4d5a900003000400")))) is None
    assert engine.scan(mixed(BASE64, b64(bytes.fromhex("4d5a900002000000")))) is None


def test_a_wildcard_stands_for_one_letter() -> None:
    engine = Engine(parse_signatures(b"UEsDB**AA ZIP\n*EsD*BQAA second\n", "")[0], None)
    found = engine.scan(mixed(BASE64, b64(b"PK\x03\x04\x2d\0\0\0\0")))
    assert found is not None
    assert found.rule == "UEsDB**AA"
    assert engine.scan(mixed(BASE64, b64(b"PK\x05\x06\x2d\0\0\0\0"))) is None


def test_a_loader_type_of_another_name_is_compared_bit_by_bit() -> None:
    pattern = base64.b64encode(b"??advapi.dll")[3:10]  # starts and ends within bytes
    engine = Engine(None, parse_loadertypes(pattern + b" advapi", "")[0])
    for shift in range(3):
        program = MADE + b"x" * shift
        assert (engine.scan(mixed(BASE64, b64(program + b"advapi.dll"))) is not None) is True
        assert engine.scan(mixed(BASE64, b64(program + b"advbpi.dll"))) is None


@pytest.mark.parametrize(
    ("block", "hit"),
    [
        (b"32.dl", True),
        (b"C2.dl", True),
        (b"42.dl", False),
        (b"32.d\x7f", True),
        (b"32.d\x3f", False),
        (b"32.d", False),
    ],
)
def test_the_bits_beside_the_whole_bytes_count(block: bytes, hit: bool) -> None:
    (fragment,) = Fragment.compile(Rule("MyLmR", ""))
    assert (fragment.whole, fragment.lead, fragment.tail) == (b"2.d", 4, 2)
    assert fragment.matches(block, 1) is hit


@pytest.mark.parametrize("row", ["TVpQ", "TVq*AAMAA", "TV**AAMA", "TVqQ"])
def test_a_row_whose_fixed_bytes_are_text_finds_programs(row: str) -> None:
    engine = Engine(parse_signatures(row.encode() + b"\n", "")[0], None, formats=())
    third = b"\x50" if row == "TVpQ" else b"\x90"
    assert engine.scan(mixed(BASE64, b64(b"MZ" + third + MADE[3:]))) is not None
    assert engine.scan(b"Subject: s\n\n" + base64.b64decode("TVpQ") + b" is no program\n") is None


@pytest.mark.parametrize("row", [b"TVq*AAMAA", b"TV**AAMA", b"TVpQ", b"TVqQAAMA"])
def test_a_row_that_compatible_mode_cannot_match_is_an_error(row: bytes) -> None:
    rules, problems = parse_signatures(row + b"\nTVqQAAMAA*\n", "s", "compatible")
    assert [rule.pattern for rule in rules.rules] == ["TVqQAAMAA*"]
    assert [(p.line, p.warning) for p in problems] == [(1, False)]
    assert "never matches in compatible mode" in problems[0].text
    assert parse_signatures(row, "s")[1] == ()
    assert "never matches" in parse_loadertypes(b"MzIu\n", "l", "compatible")[1][0].text


def test_no_list_finds_nothing() -> None:
    assert Engine(None, None).scan(mixed(BASE64, b64(MADE))) is None
    assert Engine(Rules(Scanner.SIGNATURES, ()), None).scan(mixed(BASE64, b64(MADE))) is None


# ---- programs


def names_a_library(program: bytes) -> bool:
    return re.search(rb"32\.dll", program, re.IGNORECASE) is not None


DISGUISES = dict(programs.disguises(MADE))


@pytest.mark.parametrize("name", DISGUISES)
def test_a_program_is_found_in_every_disguise(name: str) -> None:
    message = DISGUISES[name]
    signature, loader = SIGNATURES.scan(message), LOADERS.scan(message)
    assert signature is not None
    assert signature.scanner is Scanner.SIGNATURES
    assert loader is not None
    assert loader.scanner is Scanner.LOADERTYPES
    assert "KERNEL32.dll" in loader.description
    assert BOTH.scan(message) == signature


@pytest.mark.skipif(not REAL, reason="this pip and setuptools carry no launchers")
@pytest.mark.parametrize("name", sorted(REAL)[::3])  # they are alike; test_programs.py finds all of them
def test_a_real_program_is_found_in_every_disguise(name: str) -> None:
    program = REAL[name].read_bytes()
    missed, silent = [], []
    for how, message in programs.disguises(program):
        missed += [how] * (SIGNATURES.scan(message) is None)
        silent += [how] * (LOADERS.scan(message) is None)
    assert missed == []
    assert silent == ([] if names_a_library(program) else list(DISGUISES))


def test_a_program_without_a_known_signature_is_found_by_its_library() -> None:
    program = b"MZ\x01\x02\x03\x04" + MADE[6:].replace(b"PE\0\0", b"XX\0\0")
    assert SIGNATURES.scan(mixed(BASE64, b64(program))) is None
    detection = BOTH.scan(mixed(BASE64, b64(program)))
    assert detection is not None
    assert (detection.scanner, detection.rule) == (Scanner.LOADERTYPES, "MzIuZ")


@pytest.mark.parametrize("name", [b"kernel32.dll", b"USER32.DLL", b"WSock32.Dll", b"x32.dLl"])
@pytest.mark.parametrize("place", [lines.PIECE * 3 // 4 - 8, 600_000, 600_001, 600_002])
def test_a_library_is_found_in_any_case_at_any_place(name: bytes, place: int) -> None:
    program = b"MZ\0".ljust(place, b"\x01") + name + b"\0" * 50
    for how in (mixed(BASE64, b64(program)), mixed(BASE64, b64(program, 63)), mixed(BINARY, program)):
        detection = LOADERS.scan(how)
        assert detection is not None
        assert name.decode() in detection.description


def test_every_seam_between_windows_is_searched() -> None:
    for place in range(48, 9000, 5):
        program = b"MZ\0".ljust(place, b"\x01") + b"KERNEL32.dll" + b"\0" * 12_000
        assert LOADERS.scan(mixed(BASE64, b64(program))) is not None, place


def test_the_place_is_told() -> None:
    for name in ("8bit", "8bit, no multipart"):
        detection = BOTH.scan(DISGUISES[name])
        assert detection is not None
        assert ", 8bit, line " in detection.part
        assert detection.layers == 0
    inner = mixed(BASE64, b64(MADE))
    detection = BOTH.scan(mixed(programs.FORWARD, inner, boundary=b"OUT", declared=b"boundary=OUT"))
    assert detection is not None
    assert detection.part == "part 2.2, base64, line 32"
    detection = BOTH.scan(mixed(BASE64, b64(b64(b64(MADE)))))
    assert detection is not None
    assert (detection.rule, detection.layers) == ("VkZaeFVVR", 1)
    plain = Engine(parse_signatures(b"TVqQAAMAA\n", "")[0], None)
    detection = plain.scan(mixed(BASE64, b64(b64(b64(MADE)))))
    assert detection is not None
    assert detection.part == "part 2, base64, line 17 > body, base64, line 1 > body, base64, line 1"
    assert detection.layers == 3


@given(
    columns=st.integers(1, 200),
    newline=st.sampled_from([b"\n", b"\r\n", b"\r", b" \n\t", b"\n\n"]),
    junk=st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=4)), max_size=30),
)
@settings(max_examples=60, deadline=None)
def test_any_wrapping_and_any_junk_is_seen_through(columns: int, newline: bytes, junk: list[tuple[int, bytes]]) -> None:
    letters = set(base64.b64encode(bytes(range(256)) * 3)) | set(b"=/+-")
    text = bytearray(wrap(base64.b64encode(MADE), columns).replace(b"\n", newline))
    for place, extra in junk:
        text[place:place] = bytes(set(extra) - letters)
    message = mixed(BASE64, bytes(text))
    assert SIGNATURES.scan(message) is not None
    assert LOADERS.scan(message) is not None


# ---- harmless mail


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def archive() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("setup.exe", MADE)
        file.writestr("noise", noise(100_000))
    return out.getvalue()


QUOTES = b"TVqQAAMAAAAEAAAA//8AALgAAAAAAAAAQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n"
HARMLESS = {
    "zip": archive(),
    "jpeg": b"\xff\xd8\xff\xe0\0\x10JFIF\0" + noise(4_000_000),
    "png": b"\x89PNG\r\n\x1a\n" + zlib.compress(noise(1_000_000)),
    "pdf": b"%PDF-1.5\n%\xe2\xe3\xcf\xd3\n1 0 obj\n" + noise(500_000).replace(b"\0", b" ") + b"user32.dll",
    "document that names user32.dll": b"Copy user32.dll and KERNEL32.DLL to the directory.\n" * 50,
    "text that begins with MZ": b"MZ is how user32.dll and kernel32.dll begin.\n" * 20,
    "Linux program": b"\x7fELF\x02\x01\x01\0" + noise(100_000) + b"kernel32.dll",
    "text that begins with a signature": b"TVqQAAMAA is how programs begin.\nDo you see?\n",
    "one line of a program, quoted": b"Look:\n\n" + QUOTES + b"\nThat is all.\n",
    "first line of a program, quoted": QUOTES + b"\nThat is all, user32.dll.\n",
    "three lines of a program, quoted": QUOTES + b"A" * 76 + b"\n" + b"A" * 76 + b"\nThat is all.\n",
    "signature list": (ETC / "badsignatures").read_bytes() + (ETC / "badloadertypes").read_bytes(),
    "dim": b"dim filename as string\n",
    "word list": b"".join(b"word%d\n" % i for i in range(2000)),
    "begin": b"begin at the start\nMore text\nbegin 644 nothing\nMZ 32.dll\nend\n",
    "MZ and PE in one text": b"MZ PE 32.dll " * 100,
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("how", ["base64", "quoted-printable", "8bit", "text", "forward"])
def test_harmless_mail_is_clean(name: str, how: str) -> None:
    data = HARMLESS[name]
    if how == "quoted-printable" and len(data) > 500_000:
        data = data[:500_000]
    message = {
        "base64": lambda: mixed(BASE64, b64(data)),
        "quoted-printable": lambda: mixed(QUOTED, qp(data)),
        "8bit": lambda: mixed(BINARY, data),
        "text": lambda: b"From: a\nSubject: b\n\n" + data,
        "forward": lambda: mixed(programs.FORWARD, mixed(BASE64, b64(data)), boundary=b"O", declared=b"boundary=O"),
    }[how]()
    if name == "dim" and how in ("base64", "forward"):
        assert BOTH.scan(message) is not None  # the rule is about text: encoded text that begins so is meant
    else:
        assert BOTH.scan(message) is None


def test_chance_hits_of_five_letters_do_not_count() -> None:
    text = bytearray(base64.b64encode(noise(300_000)))
    for place, rule in enumerate(default_loadertypes().rules):
        text[1000 * (place + 1) : 1000 * (place + 1) + 5] = rule.pattern.encode()
    message = mixed(BASE64, wrap(bytes(text)))
    assert LOADERS.scan(message) is None
    assert Engine(None, default_loadertypes(), "compatible").scan(message) is not None


# ---- bad input


PIECES = [
    b"\n",
    b"\r",
    b"\n\n",
    b"=",
    b"--",
    b"--x\n",
    b"Content-Type: multipart/mixed; boundary=x\n",
    b"Content-Type: message/rfc822\n\n",
    b"Content-Transfer-Encoding: base64\n",
    b"Content-Transfer-Encoding: quoted-printable\n",
    b'boundary="',
    b"begin 644 x\n",
    b"M" * 61 + b"\n",
    b"A" * 400,
    b"TVqQAAMAA",
    b"MZ\0",
    b"32.dll",
]


@given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from(PIECES)), max_size=40))
@settings(max_examples=300, deadline=None)
def test_no_bytes_make_it_fail(pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    for engine in (BOTH, LOADERS, Engine(default_signatures(), default_loadertypes(), "compatible")):
        detection = engine.scan(data)
        assert detection is None or (detection.part.isprintable() and detection.description.isascii())


@pytest.mark.parametrize("message", [b"", b"\n", b"\r", b"--", b"begin", b"Content-Type:", b"\0", b"a: b", b"a: b\n\n"])
def test_tiny_messages_are_clean(message: bytes) -> None:
    assert BOTH.scan(message) is None


def test_a_mapped_message_is_free_again_after_the_scan(tmp_path: Path) -> None:
    for program in (MADE, b"PK\x03\x04\0" + noise(300_000)):
        file = tmp_path / "message"
        file.write_bytes(mixed(BASE64, b64(program + noise(300_000))))
        with file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            detection = BOTH.scan(mapped)
            assert (detection is not None) is (program is MADE)
            assert BOTH.scan(memoryview(mapped)) == detection == BOTH.scan(bytearray(mapped))
            mapped.close()  # raises while any view of it is left


HIDING = {
    "content inside content": lambda: mixed(BASE64, b64(b"MZ\0".ljust(5000, b"\1") + b"kernel32.dll")),
    "parts": lambda: b"Content-Type: multipart/mixed; boundary=b\n\n" + b"--b\n\n" * 60,
    "delimiters": lambda: b"a: b\n\n" + b"--x\n" * 60,
    "begin lines": lambda: b"a: b\n\n" + b"begin 644 x\n" * 60,
    "fields": lambda: b"a: b\n" + b"Content-Type: x\n" * 60,
    "encodings": lambda: b"a: b\n\n" + b"Content-Transfer-Encoding: base64\n\n" * 60,
    "encoded messages": lambda: (
        b"Content-Type: multipart/mixed; boundary=o\n\n" + (b"--o\n" + BASE64 + b"\n" + INNER) * 10
    ),
}
INNER = b64(b"Content-Type: multipart/mixed; boundary=i\n\n" + b"--i\n\nx\n" * 10)


@pytest.mark.parametrize("name", HIDING)
def test_a_message_that_exceeds_its_work_is_not_clean(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more work the same message is scanned to its end, and a detection before the limit still counts."""
    message = HIDING[name]()
    complete = Engine(default_signatures(), None).scan(message)
    monkeypatch.setattr(work, "PRICE", 10)
    monkeypatch.setattr(work, "FLOOR", 40_000)
    with pytest.raises(BackendError) as refused:
        BOTH.scan(message)
    assert refused.value.cause is Cause.LIMITS
    assert refused.value.detail.isprintable()
    monkeypatch.setattr(work, "FLOOR", 400_000)
    assert complete is None
    assert BOTH.scan(mixed(BASE64, b64(MADE)) + b"\n" + message) is not None


@pytest.mark.parametrize(
    ("limit", "hides"),
    [
        ("NESTED", lambda: b"Content-Type: message/rfc822\n\n" * 60),
        (
            "BOUNDARIES",
            lambda: (
                b"Content-Type: multipart/mixed; boundary=x\n\n"
                + b"".join(b"--x\nContent-Type: multipart/mixed; boundary=b%d\n\n" % i for i in range(60))
            ),
        ),
    ],
)
def test_who_hides_behind_a_limit_is_not_clean(
    limit: str, hides: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """... and what was seen before the limit still decides; without the limit the same message is clean."""
    message = hides()
    before = getattr(mime, limit)
    monkeypatch.setattr(mime, limit, 1000)
    assert BOTH.scan(message) is None
    monkeypatch.setattr(mime, limit, min(before, 50))
    with pytest.raises(BackendError) as refused:
        BOTH.scan(message)
    assert refused.value.cause is Cause.LIMITS
    assert BOTH.scan(mixed(BASE64, b64(MADE)) + b"\n" + message) is not None


def test_encodings_inside_each_other_are_followed_and_their_limit_is_said() -> None:
    message = mixed(BASE64, b64(MADE))
    for _ in range(module.LAYERS - 2):
        message = b"Content-Type: message/rfc822\n" + BASE64 + b"\n" + b64(message)
    assert BOTH.scan(message) is not None
    for _ in range(3):
        message = b"Content-Type: message/rfc822\n" + BASE64 + b"\n" + b64(message)
    with pytest.raises(BackendError, match="nested encodings"):
        BOTH.scan(message)


def test_padding_in_place_of_the_letter_of_value_zero_is_seen_through() -> None:
    """Thunderbird decodes it so; none of the readers that the tests can ask does."""
    lines = b64(MADE)
    for place in range(6, 100):
        if lines[place : place + 1] == b"A":
            assert SIGNATURES.scan(mixed(BASE64, lines[:place] + b"=" + lines[place + 1 :])) is not None, place


def test_on_the_event_loop_a_scan_ends_soon() -> None:
    message = b"Content-Type: multipart/mixed; boundary=b\n\n" + (b"--b\nX: y\n\n" + b"z" * 100 + b"\n") * 900
    with pytest.raises(OutOfWorkError):
        BOTH.scan(message, inline=True)
    assert BOTH.scan(message) is None
    assert BOTH.scan(mixed(BASE64, b64(MADE)), inline=True) is not None


def test_memory_does_not_grow_with_the_message(tmp_path: Path) -> None:
    import tracemalloc

    peaks = []
    for size in (3_000_000, 24_000_000):
        file = tmp_path / "message"
        file.write_bytes(mixed(BASE64, b64(b"MZ\0" + bytes(size))) + mixed(BASE64, b64(b"text\n" * (size // 5))))
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            tracemalloc.start()
            assert BOTH.scan(mapped) is None
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.2
    assert peaks[1] < 16_000_000
