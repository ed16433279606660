"""spamd's wire format: every response in a table, read at once, byte by byte, cut off, and with bytes behind it."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.calibration import units_since

from contentfilter.errors import Cause, LocalProtocolError, RemoteProtocolError
from contentfilter.wire import spamd
from contentfilter.wire.spamd import Response, ResponseReader

LIMIT = 1000  # max_body in these tests

VERDICTS = [
    ("CHECK", b"SPAMD/1.1 0 EX_OK\r\nSpam: True ; 15.0 / 5.0\r\n\r\n", Response(0, "EX_OK", True, 15.0, 5.0)),
    ("CHECK", b"SPAMD/1.1 0 EX_OK\r\nSpam: False ; -2.3 / 5.0\r\n\r\n", Response(0, "EX_OK", False, -2.3, 5.0)),
    ("CHECK", b"SPAMD/1.1 0 EX_OK\nSPAM:yes;7/5\n\n", Response(0, "EX_OK", True, 7.0, 5.0)),
    ("CHECK", b"SPAMD/1.5 0\r\nspam:\tNo ; -0.0 / -5\r\n\r\n", Response(0, "", False, 0.0, -5.0)),
    (
        "CHECK",
        b"SPAMD/1.1 0 EX_OK\r\nX-New: :x\r\nSpam: False ; 0.1 / 5.0  \r\nContent-length: 0\r\n\r\n",
        Response(0, "EX_OK", False, 0.1, 5.0),
    ),
    (
        "SYMBOLS",
        b"SPAMD/1.1 0 EX_OK\r\nContent-length: 5\r\nSpam: True ; 1 / 1\r\n\r\nGTUBE",
        Response(0, "EX_OK", True, 1.0, 1.0, b"GTUBE"),
    ),
    (
        "HEADERS",
        b"SPAMD/1.1 0 EX_OK\r\nSpam: True ; 1 / 1\r\nCONTENT-LENGTH: 11\r\n\r\nA: b\r\n\0\xff\r\n\r",
        Response(0, "EX_OK", True, 1.0, 1.0, b"A: b\r\n\0\xff\r\n\r"),
    ),
]
ENDS_EARLY = [
    ("PING", b"SPAMD/1.5 0 PONG\r\n", Response(0, "PONG")),
    ("CHECK", b"SPAMD/1.0 76 Bad header line: x\r\n", Response(76, "Bad header line: x")),
    ("PROCESS", b"SPAMD/1.0 79 Timeout: (30 second)\x1b\r\n", Response(79, "Timeout: (30 second)?")),
]

OK = b"SPAMD/1.1 0 EX_OK\r\n"
SPAM = b"Spam: True ; 15.0 / 5.0\r\n"
NONSENSE = [
    ("CHECK", b"\r\n"),
    ("CHECK", b"HTTP/1.1 200 OK\r\n"),
    ("CHECK", b"SPAMD/1.1 OK\r\n"),
    ("CHECK", b"SPAMD/1.1 1234 x\r\n"),
    ("CHECK", b"SPAMD/1.1 0EX_OK\r\n"),
    ("CHECK", b"UNKNOWN COMMAND\n"),
    ("CHECK", OK + b"\r\n"),
    ("CHECK", OK + b"no header\r\n"),
    ("CHECK", OK + b" Spam: True ; 15.0 / 5.0\r\n"),
    ("CHECK", OK + b"Spam: Perhaps ; 15.0 / 5.0\r\n"),
    ("CHECK", OK + b"Spam: True ; nan / 5.0\r\n"),
    ("CHECK", OK + b"Spam: True ; 1e9 / 5.0\r\n"),
    ("CHECK", OK + b"Spam: True ; 1234567890 / 5.0\r\n"),
    ("CHECK", OK + b"Spam: True ; 15.0\r\n"),
    ("CHECK", OK + SPAM + SPAM),
    ("CHECK", OK + b"Content-length: 3\r\nContent-length: 3\r\n"),
    ("CHECK", OK + b"Content-length: -1\r\n"),
    ("CHECK", OK + b"Content-length: 1001\r\n"),
    ("CHECK", OK + b"Content-length: 99999999999999999999\r\n"),
    ("CHECK", OK + "Content-length: ٣\r\n".encode()),
    ("HEADERS", OK + SPAM + b"\r\n"),
    ("PROCESS", OK + SPAM + b"\r\n"),
    ("CHECK", OK + b"A: b\r\n" * 65),
    ("CHECK", b"x" * 4097),
]


@pytest.mark.parametrize(("command", "data", "event"), VERDICTS + ENDS_EARLY)
def test_a_response_is_the_same_at_once_and_byte_by_byte(command: str, data: bytes, event: Response) -> None:
    assert ResponseReader(command, LIMIT).feed(data) == event
    reader = ResponseReader(command, LIMIT)
    for position in range(len(data) - 1):
        assert reader.feed(data[position : position + 1]) is None
    assert reader.feed(data[-1:]) == event


@pytest.mark.parametrize(("command", "data", "event"), VERDICTS + ENDS_EARLY)
def test_a_response_that_is_cut_off_is_no_response(command: str, data: bytes, event: Response) -> None:
    for length in range(len(data)):
        reader = ResponseReader(command, LIMIT)
        assert reader.feed(data[:length]) is None
        with pytest.raises(RemoteProtocolError, match="cut off" if length else "without an answer"):
            reader.end()


@pytest.mark.parametrize(("command", "data", "event"), VERDICTS)
def test_bytes_behind_a_verdict_spoil_it(command: str, data: bytes, event: Response) -> None:
    with pytest.raises(RemoteProtocolError, match="after the end"):
        ResponseReader(command, LIMIT).feed(data + b"\n")


@pytest.mark.parametrize(("command", "data", "event"), ENDS_EARLY)
def test_bytes_behind_a_failure_do_not_matter(command: str, data: bytes, event: Response) -> None:
    assert ResponseReader(command, LIMIT).feed(data + b"\r\n") == event


@pytest.mark.parametrize(("command", "data"), NONSENSE)
def test_nonsense_is_no_verdict(command: str, data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        ResponseReader(command, LIMIT).feed(data)


@given(st.binary(max_size=300))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    reader = ResponseReader("CHECK", LIMIT)
    try:
        event = reader.feed(data)
        assert event is None or data.startswith(b"SPAMD/")
    except RemoteProtocolError:
        pass


@given(body=st.binary(max_size=200), steps=st.lists(st.integers(1, 50), max_size=40))
def test_a_body_arrives_unchanged_however_it_is_split(body: bytes, steps: list[int]) -> None:
    data = OK + b"Content-length: %d\r\n" % len(body) + SPAM + b"\r\n" + body
    reader, event = ResponseReader("PROCESS", LIMIT), None
    for step in steps:
        if event is None and data:
            event, data = reader.feed(data[:step]), data[step:]
    if event is None:
        event = reader.feed(data)
    assert event == Response(0, "EX_OK", True, 15.0, 5.0, body)


def test_a_line_that_drips_costs_linear_time() -> None:
    """Twenty megabytes of body in small pieces after a dripped head: far from the square of it."""
    size = 20_000_000
    reader = ResponseReader("PROCESS", size)
    started = time.thread_time()
    for byte in OK + SPAM + b"Content-length: %d\r\n\r\n" % size:
        assert reader.feed(bytes((byte,))) is None
    for _ in range(size // 1000 - 1):
        assert reader.feed(bytes(1000)) is None
    assert reader.feed(bytes(1000)) is not None
    assert units_since(started) < 250


def test_a_request_has_exact_length_and_an_empty_line() -> None:
    assert spamd.request("CHECK", 42) == b"CHECK SPAMC/1.5\r\nContent-length: 42\r\n\r\n"
    assert spamd.request("PROCESS", 7, user=b"j\xf6rg+x@example.org", compress=True) == (
        b"PROCESS SPAMC/1.5\r\nContent-length: 7\r\nUser: j\xf6rg+x@example.org\r\nCompress: zlib\r\n\r\n"
    )
    assert spamd.request("PING", 0) == b"PING SPAMC/1.5\r\n\r\n"


BAD_USERS = [b"a\r\nCompress: zlib", b"a\nb", b"a\rb", b"a\0", b"\x7f", b"\t", b"u" * 1025]


@pytest.mark.parametrize("user", BAD_USERS)
def test_a_user_can_never_add_a_header(user: bytes) -> None:
    assert not spamd.usable_user(user)
    with pytest.raises(LocalProtocolError):
        spamd.request("CHECK", 1, user=user)


@given(st.binary(max_size=60))
def test_whatever_the_user_a_request_has_the_same_lines(user: bytes) -> None:
    if not spamd.usable_user(user):
        return
    head = spamd.request("CHECK", 1, user=user)
    assert head.split(b"\r\n") == [b"CHECK SPAMC/1.5", b"Content-length: 1", b"User: " + user, b"", b""]
    assert len(head.splitlines()) == 4


@pytest.mark.parametrize(("command", "size"), [("TELL", 1), ("check", 1), ("CHECK\r\nX", 1), ("CHECK", -1)])
def test_a_request_that_we_do_not_make_is_a_defect(command: str, size: int) -> None:
    with pytest.raises(LocalProtocolError):
        spamd.request(command, size)


def test_every_code_has_a_cause() -> None:
    assert {code: spamd.cause(code) for code in (69, 75, 76, 79)} == {
        69: Cause.DOWN,
        75: Cause.BUSY,
        76: Cause.BAD_REPLY,
        79: Cause.TIMEOUT,
    }
    assert all(isinstance(spamd.cause(code), Cause) for code in range(64, 80))
    assert spamd.cause(999) is Cause.BAD_REPLY
