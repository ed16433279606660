"""The receive buffer: whole lines, exact counts, and no byte searched twice."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.calibration import units_since

from contentfilter.errors import RemoteProtocolError
from contentfilter.wire.buffer import SHOWN, ReceiveBuffer, printable

LF = re.compile(rb"\n")


@given(st.lists(st.binary(max_size=10)))
def test_lines_come_out_as_they_went_in_however_they_are_split(pieces: list[bytes]) -> None:
    buffer, lines = ReceiveBuffer(), []
    for piece in pieces:
        buffer.feed(piece)
        while (line := buffer.line(LF, 1000)) is not None:
            lines.append(line)
    whole = b"".join(pieces)
    assert lines == whole.split(b"\n")[:-1]
    assert buffer.take(len(buffer)) == whole.split(b"\n")[-1]


def test_a_count_is_taken_only_when_all_is_there() -> None:
    buffer = ReceiveBuffer()
    buffer.feed(b"abc")
    assert buffer.take(4) is None
    assert (buffer.take(2), len(buffer), buffer.take(0), buffer.take(1), len(buffer)) == (b"ab", 1, b"", b"c", 0)


def test_a_line_over_the_limit_is_refused_whole_or_not() -> None:
    for data in (b"12345", b"12345\n"):
        buffer = ReceiveBuffer()
        buffer.feed(data)
        with pytest.raises(RemoteProtocolError, match="4 bytes"):
            buffer.line(LF, 4)
    buffer = ReceiveBuffer()
    buffer.feed(b"1234\n")
    assert buffer.line(LF, 4) == b"1234"


def test_a_line_that_drips_is_searched_once() -> None:
    """Searching from the start for each byte would look at 20,000,000,000 of them."""
    buffer, started = ReceiveBuffer(), time.thread_time()
    for _ in range(200_000):
        buffer.feed(b"x")
        assert buffer.line(LF, 1_000_000) is None
    assert units_since(started) < 150


def test_what_people_see_is_short_and_printable() -> None:
    assert printable(b"a\r\n\0\x7f\xff z") == "a????? z"
    assert len(printable(b"x" * 1_000_000)) == SHOWN
