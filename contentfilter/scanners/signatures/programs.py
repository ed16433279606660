"""Executable formats: the rule that finds programs by their own headers, whatever linker wrote them.

A Windows program begins with ``MZ`` and has the offset of its second header, 32 bits little endian, at 0x3C. That
header begins with ``PE\\0\\0`` (Windows), ``NE`` (16 bits) or ``LE``/``LX`` (drivers, OS/2). The loader ignores the
rest of the first header, so this rule does as well.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Format = Literal["pe", "ne", "le", "elf", "macho"]
FORMATS: tuple[Format, ...] = get_args(Format)
DEFAULT_FORMATS: tuple[Format, ...] = ("pe",)
OFFSET_AT = 0x3C
LARGEST_OFFSET = 1 << 28  # bytes; Windows loads no image whose header is further in
HEAD = 64  # bytes that find_format needs

_DESCRIPTIONS: dict[Format, str] = {
    "pe": "Windows program (MZ and PE headers)",
    "ne": "Windows program, 16 bit (MZ and NE headers)",
    "le": "driver or OS/2 program (MZ and LE headers)",
    "elf": "Linux program (ELF header)",
    "macho": "macOS program (Mach-O header)",
}
_SECOND: dict[Format, tuple[bytes, ...]] = {"pe": (b"PE\0\0",), "ne": (b"NE",), "le": (b"LE\0\0", b"LX\0\0")}
_MACHO = (b"\xce\xfa\xed\xfe", b"\xcf\xfa\xed\xfe", b"\xfe\xed\xfa\xce", b"\xfe\xed\xfa\xcf")
_FAT = b"\xca\xfe\xba\xbe"
_ARCHITECTURES = 20  # of a fat Mach-O file; in a Java class, with the same magic, the field is at least 45


@dataclass(frozen=True, slots=True)
class Formats:
    """Formats that are searched for."""

    wanted: frozenset[Format]

    @property
    def starts(self) -> tuple[bytes, ...]:
        """Bytes with which the wanted formats begin."""
        starts: list[bytes] = [b"MZ"] if self.wanted & _SECOND.keys() else []
        if "elf" in self.wanted:
            starts.append(b"\x7fELF")
        if "macho" in self.wanted:
            starts += [*_MACHO, _FAT]
        return tuple(starts)

    def second_header(self, head: bytes) -> int:
        """Return the offset of the second header of a program that begins with ``head``; 0 if there is none."""
        if len(head) < HEAD or head[:2] != b"MZ" or not self.wanted & _SECOND.keys():
            return 0
        offset = int.from_bytes(head[OFFSET_AT:HEAD], "little")
        return offset if 4 <= offset <= LARGEST_OFFSET else 0

    def second(self, magic: bytes) -> tuple[Format, str] | None:
        """Return format and description for the first four bytes of a second header."""
        for name, magics in _SECOND.items():
            if name in self.wanted and magic.startswith(magics):
                return name, _DESCRIPTIONS[name]
        return None

    def first(self, head: bytes) -> tuple[Format, str] | None:
        """Return format and description of a program that ``head`` alone identifies (ELF, Mach-O)."""
        name: Format | None = None
        if head.startswith(b"\x7fELF") and len(head) > 6 and head[4] in (1, 2) and head[5] in (1, 2) and head[6] == 1:
            name = "elf"
        elif (head.startswith(_MACHO) and len(head) >= 16) or (
            head.startswith(_FAT) and 0 < int.from_bytes(head[4:8], "big") <= _ARCHITECTURES
        ):
            name = "macho"
        return (name, _DESCRIPTIONS[name]) if name in self.wanted and name is not None else None
