"""Mail readers as oracles: Python's email, MIME::Parser, GMime, munpack and uudeview, and the files that each opens."""

import contextlib
import email.policy
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path
from typing import Protocol

PERL = """
use MIME::Parser; binmode STDIN; binmode STDOUT; $| = 1;
sub leaves { my ($e) = @_; my @p = $e->parts; return map { leaves($_) } @p if @p;
  my $b = $e->bodyhandle; return $b ? ($b->as_string) : (); }
while (read(STDIN, my $n, 4) == 4) {
  read(STDIN, my $m, unpack('N', $n));
  my $p = MIME::Parser->new; $p->output_to_core(1); $p->tmp_to_core(1); $p->extract_uuencode(1);
  $p->extract_nested_messages(1);
  my @f = eval { local $SIG{__WARN__} = sub {}; leaves($p->parse_data($m)) };
  print pack('N', scalar @f), map { pack('N', length $_), $_ } @f;
}
"""
GMIME = """
import struct, sys, gi
gi.require_version("GMime", "3.0")
from gi.repository import GMime
GMime.init()
def leaves(part):
    if isinstance(part, GMime.Multipart):
        for at in range(part.get_count()):
            yield from leaves(part.get_part(at))
    elif isinstance(part, GMime.MessagePart):
        inner = part.get_message()
        if inner is not None:
            yield from leaves(inner.get_mime_part())
    elif isinstance(part, GMime.Part):
        content = part.get_content()
        if content is not None:
            stream = GMime.StreamMem.new()
            content.write_to_stream(stream)
            yield bytes(stream.get_byte_array())
read, write = sys.stdin.buffer.read, sys.stdout.buffer.write
while len(size := read(4)) == 4:
    data = read(struct.unpack(">I", size)[0])
    try:
        message = GMime.Parser.new_with_stream(GMime.StreamMem.new_with_buffer(data)).construct_message(None)
        found = list(leaves(message.get_mime_part())) if message is not None else []
    except Exception:
        found = []
    write(struct.pack(">I", len(found)) + b"".join(struct.pack(">I", len(f)) + f for f in found))
    sys.stdout.buffer.flush()
"""


class Reader(Protocol):
    """Opens a message as a person would, and returns the contents of all leaves."""

    def __call__(self, message: bytes) -> list[bytes]: ...


def python(message: bytes) -> list[bytes]:
    """Python's email package."""
    found = []
    for part in message_from_bytes(message, policy=email.policy.compat32).walk():
        if not part.is_multipart():
            with contextlib.suppress(Exception):  # it raises for some encoded content
                payload = part.get_payload(decode=True)
                found.append(payload if isinstance(payload, bytes) else b"")
    return found


class Resident:
    """A reader in a process of its own, which answers each message with the leaves that it found."""

    def __init__(self, *argv: str) -> None:
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, message: bytes) -> list[bytes]:
        assert self._process.stdin
        self._process.stdin.write(struct.pack(">I", len(message)) + message)
        self._process.stdin.flush()
        return [self._read(self._number()) for _ in range(self._number())]

    def _number(self) -> int:
        return int(struct.unpack(">I", self._read(4))[0])

    def _read(self, size: int) -> bytes:
        assert self._process.stdout
        data = self._process.stdout.read(size)
        assert len(data) == size, "the reader ended"
        return data

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)


class Unpacker:
    """A reader that writes files: {file} in its arguments is the message, {out} the directory."""

    def __init__(self, *argv: str) -> None:
        self._argv = argv

    def __call__(self, message: bytes) -> list[bytes]:
        with tempfile.TemporaryDirectory() as name:
            file, out = Path(name, "message"), Path(name, "out")
            out.mkdir()
            file.write_bytes(message)
            argv = [word.format(file=file, out=out) for word in self._argv]
            subprocess.run(argv, cwd=out, capture_output=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
            return [path.read_bytes() for path in out.rglob("*") if path.is_file()]


@contextlib.contextmanager
def readers() -> Iterator[dict[str, Reader]]:
    """All readers, by name. The Debian packages of the tests have them."""
    perl, gmime = Resident("perl", "-e", PERL), Resident("/usr/bin/python3", "-c", GMIME)
    try:
        yield {
            "python": python,
            "MIME::Parser": perl,
            "GMime": gmime,
            "munpack": Unpacker("munpack", "-q", "-t", "-f", "{file}"),
            "uudeview": Unpacker("uudeview", "-i", "-q", "-o", "-p", "{out}", "{file}"),
        }
    finally:
        perl.close()
        gmime.close()


def missing() -> list[str]:
    """Programs of readers that are not installed."""
    return [name for name in ("perl", "munpack", "uudeview", "/usr/bin/python3") if shutil.which(name) is None]
