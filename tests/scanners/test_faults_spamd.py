"""Every edge of spamd that was measured, as a test with its outcome. The real one where it can do it.

Further ones are in test_spamd.py: not running, hanging, children killed while they scan, closing without a byte, cut,
dripping, answering twice, a clamd in its place, too many questions, an empty message.
"""

import socket
import time
import zlib
from pathlib import Path

import pytest
from lab import peers
from lab.peers import Peer, read_spamd
from lab.spamd import Spamd
from scanners.test_spamd import LETTER, fault, scan, scanner

from contentfilter.deadline import Deadline
from contentfilter.errors import Cause
from contentfilter.model import ScanStatus, Want
from contentfilter.wire import spamd as wire

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("nothing_left")]


def answered(daemon: Spamd, question: bytes) -> wire.Response:
    """What the real one says to these bytes and the end of input."""
    reader = wire.ResponseReader("CHECK", 1000)
    with socket.create_connection(daemon.tcp, 20) as sock:
        sock.sendall(question)
        sock.shutdown(socket.SHUT_WR)
        while True:
            data = sock.recv(65_536)
            response = reader.feed(data) if data else reader.end()
            if response is not None:
                return response


# ---------------------------------------------------------------- what the real one refuses


@pytest.mark.parametrize(
    ("question", "code", "cause"),
    [
        (b"CHECK SPAMC/1.5\r\nContent-length: 3\r\n\r\nfar more than that\r\n", 76, Cause.BAD_REPLY),
        (b"CHECK SPAMC/1.5\r\nno header at all\r\n\r\n", 76, Cause.BAD_REPLY),
        (b"CHECK SPAMC/1.5\r\nContent-length: 9\r\nUser: \x01\r\n\r\nSubject:\n", 76, Cause.BAD_REPLY),
        (b"CHECK SPAMC/1.5\r\nContent-length: 9\r\nCompress: zlib\r\n\r\nnot zlib\n", 69, Cause.DOWN),
        (b"TELL SPAMC/1.5\r\nContent-length: 9\r\n\r\nSubject:\n", 69, Cause.DOWN),
    ],
    ids=["wrong length", "no header", "control character", "broken compression", "not allowed"],
)
async def test_each_refusal_of_the_real_one_has_its_cause(
    spamd: Spamd, question: bytes, code: int, cause: Cause
) -> None:
    response = answered(spamd, question)
    assert (response.code, wire.cause(response.code, response.text)) == (code, cause)


async def test_a_spamd_whose_preferences_cannot_be_read_is_down(lab_directory: Path, message) -> None:
    dsn = "user_scores_dsn DBI:mysql:spamassassin:127.0.0.1:1"
    with Spamd(lab_directory / "prefs", dsn, "user_scores_sql_username x", sql=True) as own:
        error = await fault(own.backend, message(LETTER), 20.0, user=b"bob@example.net")
    assert error.cause is Cause.DOWN
    assert error.detail.startswith("69 ")


async def test_a_program_that_is_no_spamd_at_all_is_a_bad_reply(tmp_path: Path, message) -> None:
    with Peer(tmp_path, peers.says(b"220 mail.example.net ESMTP\r\n"), read_spamd) as peer:
        assert (await fault(peer.backend, message(LETTER))).cause is Cause.BAD_REPLY


# ---------------------------------------------------------------- every code it may give

CODES = {
    64: Cause.BAD_REPLY,
    65: Cause.BAD_REPLY,
    66: Cause.BAD_REPLY,
    67: Cause.BAD_REPLY,
    68: Cause.DOWN,
    69: Cause.DOWN,
    70: Cause.BAD_REPLY,
    71: Cause.DOWN,
    72: Cause.DOWN,
    73: Cause.DOWN,
    74: Cause.DOWN,
    75: Cause.BUSY,
    76: Cause.BAD_REPLY,
    77: Cause.DOWN,
    78: Cause.DOWN,
    79: Cause.TIMEOUT,
    1: Cause.BAD_REPLY,
    999: Cause.BAD_REPLY,
}


@pytest.mark.parametrize("code", CODES)
async def test_each_code_has_its_cause(tmp_path: Path, message, code: int) -> None:
    with Peer(tmp_path, peers.says(b"SPAMD/1.0 %d EX_SOMETHING\r\n" % code), read_spamd) as peer:
        error = await fault(peer.backend, message(LETTER))
    assert (error.cause, error.detail) == (CODES[code], f"{code} EX_SOMETHING")


@pytest.mark.parametrize("text", [b"fork: Cannot allocate memory", b"Out of memory!"])
async def test_a_spamd_without_memory_says_so(tmp_path: Path, message, text: bytes) -> None:
    with Peer(tmp_path, peers.says(b"SPAMD/1.0 71 " + text + b"\r\n"), read_spamd) as peer:
        assert (await fault(peer.backend, message(LETTER))).cause is Cause.MEMORY


# ---------------------------------------------------------------- answers that are not what was asked for


async def test_a_body_that_falls_short_is_never_delivered(tmp_path: Path, message) -> None:
    """Each length but the right one, byte by byte."""
    body = b"X-Spam-Status: Yes\r\n\r\nhello"
    head = b"SPAMD/1.1 0 EX_OK\r\nSpam: True ; 9.0 / 5.0\r\nContent-length: %d\r\n\r\n" % len(body)
    talks = [peers.says(head + body[:sent]) for sent in range(len(body) + 1)]
    with Peer(tmp_path, peers.in_turn(*talks), read_spamd) as peer:
        for sent in range(len(body)):
            error = await fault(peer.backend, message(LETTER), want=Want.PROCESS)
            assert (error.cause, "body cut off" in error.detail) == (Cause.BAD_REPLY, True), sent
        assert (await scan(peer.backend, message(LETTER), want=Want.PROCESS)).rewritten == body


async def test_what_is_sent_compressed_is_whole(spamd: Spamd, message) -> None:
    """spamd answers 69 to compressed data that is cut or broken; ours never is."""
    content = LETTER + b"line of text\r\n" * 100_000
    assert (await scan(spamd.backend, message(content), compress=True)).status is ScanStatus.CLEAN
    cut = zlib.compress(content)[:-100]
    head = b"CHECK SPAMC/1.5\r\nContent-length: %d\r\nCompress: zlib\r\n\r\n" % len(cut)
    assert answered(spamd, head + cut).code == 69


# ---------------------------------------------------------------- how long a try may take


async def test_a_small_message_is_given_up_sooner_than_a_large_one(tmp_path: Path, message) -> None:
    times = []
    with Peer(tmp_path, peers.says_and_stays(b""), read_spamd) as peer:
        for size in (1000, 1_000_000):
            started = time.monotonic()
            error = await fault(peer.backend, message(bytes(size)), 20.0, timeout_base=0.1, timeout_per_megabyte=0.5)
            times.append(time.monotonic() - started)
            assert error.cause is Cause.TIMEOUT
    assert 0.1 <= times[0] < 0.6 <= times[1]


async def test_after_a_spamd_that_hangs_there_is_time_for_another_one(tmp_path: Path, spamd: Spamd, message) -> None:
    with Peer(tmp_path, peers.says_and_stays(b""), read_spamd) as peer:
        one = scanner(peer.backend, spamd.backend, timeout_base=3.0)
        outcome = await one.scan(message(LETTER), Deadline.after(30))
    assert (outcome.status, outcome.backend, peer.connections) == (ScanStatus.CLEAN, spamd.backend, 1)
    assert outcome.seconds >= 3.0, "what the first one took counts"
