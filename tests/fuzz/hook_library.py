"""The hook's own parsers as functions: compiled from queue_hook into a library, for comparison with the daemon's."""

import ctypes
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab.compiler import compiled

SOURCE = Path(__file__).with_name("hook_parsers.c")
HOOK = SOURCE.parents[2] / "queue_hook"
ROOM = 1 << 20


@dataclass(frozen=True, slots=True)
class HookParsers:
    """Each function does to its arguments what the hook does to what it reads."""

    library: ctypes.CDLL

    def envelope(self, data: bytes, piece: int) -> tuple[int, int]:
        """The status that the hook would leave with, 0 if none, and how many bytes it would keep."""
        used = ctypes.c_size_t()
        status = self.library.parse_envelope(
            data, ctypes.c_size_t(len(data)), ctypes.c_size_t(piece), ctypes.byref(used)
        )
        return status, used.value

    def answer(self, packet: bytes, body: bytes | None, message_size: int) -> str | None:
        """The answer as the hook reads it; None if it rejects it."""
        out = ctypes.create_string_buffer(ROOM)
        size = len(body or b"")
        good = self.library.parse_answer(
            packet, ctypes.c_size_t(len(packet)), body, ctypes.c_size_t(size), ctypes.c_uint64(message_size), out, ROOM
        )
        return out.value.decode("ascii") if good else None

    def conf(self, text: bytes) -> tuple[int, str]:
        """0 and what is in force, or the status and what it says."""
        out = ctypes.create_string_buffer(ROOM)
        status = self.library.parse_conf(text, ctypes.c_size_t(len(text)), out, ctypes.c_size_t(ROOM))
        return status, out.value.decode("utf-8", "surrogateescape")

    def request(self, environ: bytes, attempt: int, budget: int) -> bytes:
        """The packet that it sends when its environment is ``environ``, each variable with its NUL."""
        packet = ctypes.create_string_buffer(65536)
        size = self.library.make_request(environ, ctypes.c_size_t(len(environ)), attempt, budget, packet)
        return packet.raw[:size]


@functools.cache
def hook_parsers() -> HookParsers:
    """Compile and load the library, once per process."""
    options = ["-O1", "-std=gnu11", "-D_GNU_SOURCE", "-w", "-shared", "-fPIC", f"-I{HOOK}"]
    with tempfile.TemporaryDirectory() as directory:
        library = ctypes.CDLL(str(compiled(Path(directory), "hook_parsers.so", ["gcc", *options, SOURCE])))
    library.make_request.restype = ctypes.c_size_t
    return HookParsers(library)
