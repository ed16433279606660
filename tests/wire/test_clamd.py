"""clamd's wire format: every answer in a table, read at once, byte by byte, cut off, and with bytes behind it."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contentfilter.errors import Cause, LocalProtocolError, RemoteProtocolError
from contentfilter.wire import clamd
from contentfilter.wire.clamd import Clean, Failed, Found, SignatureClass

SCANS = [
    (b"stream: OK\0", Clean()),
    (b"fd[12]: OK\0", Clean()),
    (b"fd[7]: OK\n", Clean()),
    (b"3: stream: OK\0", Clean()),
    (b"17: fd[9]: OK\0", Clean()),
    (b"stream: Win.Test.EICAR_HDB-1 FOUND\0", Found("Win.Test.EICAR_HDB-1")),
    (b"fd[10]: Eicar-Signature(44d88612fea8a8f36de82e1278abb02f:68) FOUND\0", Found("Eicar-Signature")),
    (b"2: fd[10]: Name FOUND\0", Found("Name")),
    (b"stream: name with blanks FOUND\0", Found("name with blanks")),
    (b"stream: Odd(1) FOUND\n", Found("Odd(1)")),
    (b"stream: Evil\r\x1b[31m\xe4 FOUND\0", Found("Evil??[31m?")),
    (b"stream: OK FOUND\0", Found("OK")),
    (b"/some/path: Name FOUND\0", Found("/some/path: Name")),
    (b"INSTREAM size limit exceeded. ERROR\0", Failed(Cause.TOO_BIG, "INSTREAM size limit exceeded.")),
    (b"fd[8]: Exceeded max scan size ERROR\0", Failed(Cause.TOO_BIG, "Exceeded max scan size")),
    (b"stream: Can't allocate memory ERROR\0", Failed(Cause.MEMORY, "Can't allocate memory")),
    (b"fd[8]: Exceeded time limit ERROR\0", Failed(Cause.TIMEOUT, "Exceeded time limit")),
    (b"COMMAND READ TIMED OUT\n", Failed(Cause.TIMEOUT, "COMMAND READ TIMED OUT")),
    (b"Error writing to temporary file. ERROR\0", Failed(Cause.BAD_REPLY, "Error writing to temporary file.")),
    (b"UNKNOWN COMMAND\0", Failed(Cause.BAD_REPLY, "UNKNOWN COMMAND", refused=True)),
    (b"COMMAND UNAVAILABLE\0", Failed(Cause.BAD_REPLY, "COMMAND UNAVAILABLE", refused=True)),
    (b"No file descriptor received. ERROR\0", Failed(Cause.BAD_REPLY, "No file descriptor received.", refused=True)),
    (b"fd[14]: Not a regular file ERROR\0", Failed(Cause.BAD_REPLY, "Not a regular file", refused=True)),
    (b"3: Command invalid inside IDSESSION. ERROR\0", Failed(Cause.BAD_REPLY, "Command invalid inside IDSESSION.")),
    (b"ERROR\0", Failed(Cause.BAD_REPLY, "ERROR")),
]

NONSENSE = [
    b"\0",
    b"OK\0",
    b"ok\0",
    b"stream: ok\0",
    b" stream: OK\0",
    b"stream: OK \0",
    b"stream: OK\r\n",
    b"stream: NOT OK\0",
    b"/some/path: OK\0",
    b"fd[]: OK\0",
    b"fd[99999999999999999999]: OK\0",
    b"stream:  FOUND\0",
    b"PONG\0",
    b"stream: Name FOUND or not\0",
    b"SPAMD/1.0 76 Bad header line: (closed before headers)\r\n",
    b"220 ready\r\n",
]


@pytest.mark.parametrize(("data", "event"), SCANS)
def test_an_answer_is_the_same_at_once_and_byte_by_byte(data: bytes, event: clamd.ScanAnswer) -> None:
    assert clamd.scan_reader().feed(data) == event
    reader = clamd.scan_reader()
    for position in range(len(data) - 1):
        assert reader.feed(data[position : position + 1]) is None
    assert reader.feed(data[-1:]) == event


@pytest.mark.parametrize(("data", "event"), SCANS)
def test_an_answer_that_is_cut_off_is_no_answer(data: bytes, event: clamd.ScanAnswer) -> None:
    for length in range(len(data)):
        reader = clamd.scan_reader()
        assert reader.feed(data[:length]) is None
        with pytest.raises(RemoteProtocolError, match="cut off" if length else "without an answer"):
            reader.end()


@pytest.mark.parametrize(("data", "event"), SCANS)
def test_a_second_answer_spoils_the_first(data: bytes, event: clamd.ScanAnswer) -> None:
    for more in (b"x", b"\0", b"stream: OK\0"):
        with pytest.raises(RemoteProtocolError, match="more than one"):
            clamd.scan_reader().feed(data + more)


@pytest.mark.parametrize("data", NONSENSE)
def test_nonsense_is_never_clean(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        clamd.scan_reader().feed(data)


def test_an_answer_without_an_end_is_refused_at_the_limit() -> None:
    reader = clamd.scan_reader()
    assert reader.feed(b"x" * clamd.ANSWER_LIMIT) is None
    with pytest.raises(RemoteProtocolError, match="4096"):
        reader.feed(b"x")
    with pytest.raises(RemoteProtocolError, match="4096"):
        clamd.scan_reader().feed(b"x" * 10_000_000 + b"\0")


@given(st.binary(max_size=300))
def test_only_the_two_known_forms_are_clean(data: bytes) -> None:
    try:
        event = clamd.scan_reader().feed(data)
    except RemoteProtocolError:
        return
    assert event != Clean() or data[:-1].endswith((b"stream: OK", b"]: OK"))


@given(st.binary(max_size=80).filter(lambda name: not set(name) & {0, 10} and name.strip()))
def test_a_name_is_printable_whatever_clamd_sends(name: bytes) -> None:
    event = clamd.scan_reader().feed(b"stream: " + name + b" FOUND\0")
    assert isinstance(event, Found)
    assert event.name.isascii()
    assert event.name.isprintable()


@pytest.mark.parametrize("name", ["SHUTDOWN", "RELOAD", "SCAN /", "STATS", "", "VERSION\0zSHUTDOWN"])
def test_a_command_that_we_do_not_give_is_a_defect(name: str) -> None:
    with pytest.raises(LocalProtocolError):
        clamd.command(name)


def test_commands_are_prefixed_and_ended() -> None:
    assert clamd.command("VERSION") == b"zVERSION\0"
    assert clamd.fildes() == b"zFILDES\0\0"


@pytest.mark.parametrize("size", [0, 1, clamd.CHUNK - 1, clamd.CHUNK, clamd.CHUNK + 1, 3 * clamd.CHUNK])
def test_instream_chunks_hold_the_message_and_end_with_a_zero(size: int) -> None:
    message = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    wire = b"".join(b"".join(batch) for batch in clamd.instream(memoryview(message)))
    assert wire.startswith(b"zINSTREAM\0")
    rest, found = wire[10:], b""
    while length := int.from_bytes(rest[:4], "big"):
        assert length <= clamd.CHUNK
        found += rest[4 : 4 + length]
        rest = rest[4 + length :]
    assert (found, rest) == (message, bytes(4))


def test_instream_copies_nothing() -> None:
    message = bytearray(clamd.CHUNK + 5)
    pieces = [
        piece for batch in clamd.instream(memoryview(message)) for piece in batch if isinstance(piece, memoryview)
    ]
    assert [len(piece) for piece in pieces] == [clamd.CHUNK, 5]
    assert all(piece.obj is message for piece in pieces)


VERSIONS = [
    (
        b"ClamAV 1.4.6/27500/Tue Dec 24 09:31:02 2024\0",
        clamd.Version("ClamAV 1.4.6", 27500, datetime(2024, 12, 24, 9, 31, 2, tzinfo=UTC)),
    ),
    (
        b"ClamAV 0.103.8/26837/Fri Mar  3 08:29:17 2023\n",
        clamd.Version("ClamAV 0.103.8", 26837, datetime(2023, 3, 3, 8, 29, 17, tzinfo=UTC)),
    ),
    (b"ClamAV 1.4.6\0", clamd.Version("ClamAV 1.4.6")),
]


@pytest.mark.parametrize(("data", "version"), VERSIONS)
def test_version_gives_the_database_and_its_date(data: bytes, version: clamd.Version) -> None:
    assert clamd.version_reader().feed(data) == version


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"UNKNOWN COMMAND/\0",
        b"ClamAV/x/y\0",
        b"ClamAV/9999999999/Tue Dec 24 09:31:02 2024\0",
        b"ClamAV/1/Tue Foo 24 09:31:02 2024\0",
        b"ClamAV/1/Tue Feb 30 09:31:02 2024\0",
        b"ClamAV\xff\0",
    ],
)
def test_a_version_line_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        clamd.version_reader().feed(data)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Win.Trojan.Agent-12345-0", SignatureClass.MALWARE),
        ("Win.Test.EICAR_HDB-1", SignatureClass.MALWARE),
        ("PUA.Win.Packer.Upx-1", SignatureClass.PUA),
        ("Heuristics.Phishing.Email.SpoofedDomain", SignatureClass.PHISHING),
        ("Heuristics.Safebrowsing.Suspected-malware_safebrowsing.clamav.net", SignatureClass.PHISHING),
        ("Email.Phishing.VOF1-6309159-0", SignatureClass.PHISHING),
        ("Heuristics.OLE2.ContainsMacros.VBA", SignatureClass.MACRO),
        ("Heuristics.Encrypted.Zip", SignatureClass.ENCRYPTED),
        ("Heuristics.Limits.Exceeded.MaxFileSize", SignatureClass.LIMITS),
        ("Heuristics.Broken.Executable", SignatureClass.BROKEN),
        ("Heuristics.PDF.ObfuscatedNameObject", SignatureClass.BROKEN),
        ("Heuristics.Zip.OverlappingFiles", SignatureClass.BROKEN),
        ("Heuristics.Structured.CreditCardNumber", SignatureClass.STRUCTURED),
        ("Sanesecurity.Phishing.Auction.1.UNOFFICIAL", SignatureClass.UNOFFICIAL),
        ("PUA.Foo.UNOFFICIAL", SignatureClass.UNOFFICIAL),
        ("XHeuristics.Limits.Exceeded", SignatureClass.MALWARE),
        ("", SignatureClass.MALWARE),
    ],
)
def test_a_name_tells_its_class(name: str, kind: SignatureClass) -> None:
    assert clamd.signature_class(name) is kind
