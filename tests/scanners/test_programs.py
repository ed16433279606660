"""Programs are found by their own headers, whatever their linker wrote into the rest."""

import random
import struct
from pathlib import Path

import pytest
from lab import programs
from lab.programs import BASE64, BINARY, b64, mixed, qp, uu
from lab.wrappings import signed

from contentfilter.model import Scanner
from contentfilter.scanners.signatures.engine import Engine, Rules, default_loadertypes, default_signatures
from contentfilter.scanners.signatures.programs import FORMATS, Format

NO_RULES = Rules(Scanner.SIGNATURES, ())
NEVER = Engine(
    Rules(Scanner.SIGNATURES, default_signatures().rules[-1:]), None
)  # only the built-in rule finds programs
MADE = programs.made()


def windows(second: bytes, offset: int = 128, fill: bytes = b"\x11") -> bytes:
    """A program with a DOS header of odd bytes and a second header at ``offset``."""
    head = b"MZ" + fill * 58 + struct.pack("<I", offset)
    return head.ljust(offset, b"\x22")[: max(offset, 64)] + second + b"\0" * 600


@pytest.mark.parametrize("offset", [64, 65, 128, 511, 1024, 70_001, 300_000, 3_000_000])
@pytest.mark.parametrize("encode", [b64, uu, qp], ids=["base64", "uuencode", "quoted-printable"])
def test_the_second_header_is_found_at_any_offset(offset: int, encode: object) -> None:
    if offset > 100_000 and encode is not b64:
        offset //= 10
    program = windows(b"PE\0\0\x4c\x01", offset)
    head = {b64: BASE64, uu: BINARY, qp: BINARY + b"Content-Transfer-Encoding: quoted-printable\n"}[encode]  # type: ignore[index]
    detection = NEVER.scan(mixed(head, encode(program)))  # type: ignore[operator]
    assert detection is not None
    assert (detection.scanner, detection.rule) == (Scanner.SIGNATURES, "pe")
    assert "PE" in detection.description
    program = windows(b"PX\0\0\x4c\x01", offset)
    assert NEVER.scan(mixed(head, encode(program))) is None  # type: ignore[operator]


@pytest.mark.parametrize("offset", [0, 3, 1 << 29, (1 << 32) - 4])
def test_an_offset_that_windows_would_refuse_is_none(offset: int) -> None:
    program = b"MZ" + b"\x11" * 58 + struct.pack("<I", offset) + b"PE\0\0" * 100
    assert NEVER.scan(mixed(BASE64, b64(program))) is None


def test_the_second_header_may_overlap_the_first() -> None:
    """As in the smallest programs that run: the offset is 4 and is itself a field of the second header."""
    program = b"MZ\0\0PE\0\0" + b"\x4c\x01" + bytes(50) + struct.pack("<I", 4) + bytes(300)
    assert NEVER.scan(mixed(BASE64, b64(program))) is not None


SAMPLES: dict[Format, bytes] = {
    "pe": windows(b"PE\0\0\x4c\x01"),
    "ne": windows(b"NE\x05\x14"),
    "le": windows(b"LE\0\0\0\0"),
    "elf": b"\x7fELF\x02\x01\x01" + bytes(600),
    "macho": b"\xcf\xfa\xed\xfe\x07\0\0\x01" + bytes(600),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_found_if_it_is_wanted(name: Format) -> None:
    for wanted in FORMATS:
        engine = Engine(default_signatures(), None, formats=(wanted,))
        for message in (mixed(BASE64, b64(SAMPLES[name])), mixed(BINARY, SAMPLES[name])):
            found = engine.scan(message)
            assert (found is not None) is (name == wanted)
            assert found is None or found.rule == name


def test_a_java_class_is_not_a_program_of_macos() -> None:
    engine = Engine(default_signatures(), None, formats=FORMATS)
    assert engine.scan(mixed(BASE64, b64(b"\xca\xfe\xba\xbe\0\0\0\x34" + bytes(600)))) is None
    assert engine.scan(mixed(BASE64, b64(b"\xca\xfe\xba\xbe\0\0\0\x02" + bytes(600)))) is not None


def test_the_rule_is_part_of_chksignature() -> None:
    assert Engine(None, default_loadertypes()).scan(mixed(BASE64, b64(SAMPLES["pe"]))) is None
    assert Engine(default_signatures(), None, formats=()).scan(mixed(BASE64, b64(SAMPLES["pe"]))) is None


@pytest.mark.parametrize("chunk", [0, 1, 57, 1000, 4096])
@pytest.mark.parametrize("how", ["part", "multipart", "twice"])
def test_signed_data_is_opened(chunk: int, how: str) -> None:
    inner = {
        "part": BASE64 + b"\n" + b64(MADE),
        "multipart": mixed(BASE64, b64(MADE)),
        "twice": BASE64 + b"\n" + b64(signed(mixed(BASE64, b64(MADE)))),
    }[how]
    header = b"Content-Type: application/pkcs7-mime\nContent-Transfer-Encoding: base64\n\n"
    assert NEVER.scan(header + b64(signed(inner, chunk))) is not None
    assert NEVER.scan(b"Content-Type: application/pkcs7-mime\n\n" + signed(inner, chunk)) is not None
    assert NEVER.scan(header + b64(signed(b"\nhello\n", chunk))) is None


def test_malformed_signed_data_raises_nothing() -> None:
    rng = random.Random(3)
    whole = signed(mixed(BASE64, b64(MADE)), 100)
    for _ in range(300):
        broken = bytearray(whole)
        for _ in range(rng.randrange(1, 5)):
            broken[rng.randrange(min(120, len(broken)))] = rng.randrange(256)
        NEVER.scan(BASE64 + b"\n" + b64(bytes(broken[: rng.randrange(20, len(broken))])))


def test_the_default_lists_cover_today_s_linkers_in_compatible_mode() -> None:
    engine = Engine(default_signatures(), None, "compatible")
    for head in ("4d5a900003000400", "4d5a780001000000", "4d5a800001000000", "4d5a400001000000"):
        program = bytes.fromhex(head) + bytes(400)
        assert engine.scan(b"Content-Transfer-Encoding: base64\n\n" + b64(program)) is not None, head


def test_programs_of_this_system_are_found(tmp_path: Path) -> None:
    real = programs.real()
    assert real, "pip's launchers are missing"
    for path in real.values():
        assert NEVER.scan(mixed(BASE64, b64(path.read_bytes()))) is not None, path
