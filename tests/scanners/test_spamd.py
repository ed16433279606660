"""spamd asked for real, and everything that a spamd can do wrong played by scripted peers."""

import asyncio
import os
import re
import signal
import socket
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import aiospamc
import pytest
from lab import peers
from lab.clamd import Clamd
from lab.peers import Peer, Talk, read_spamd
from lab.spamd import GTUBE, Spamd

from contentfilter import settings
from contentfilter.deadline import Deadline
from contentfilter.errors import BackendError, Cause
from contentfilter.model import Message, ScanOutcome, ScanStatus, Want
from contentfilter.scanners.spamd import SpamdScanner

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("nothing_left")]

HEAD = (
    b"From: Ann <ann@example.org>\r\nTo: bob@example.net\r\nSubject: minutes of the meeting\r\n"
    b"Date: Mon, 06 Jan 2025 10:00:00 +0000\r\nMessage-ID: <%s@example.org>\r\n\r\n"
)
LETTER = HEAD % b"1" + b"Dear Bob,\r\n\r\nthe minutes are attached.\r\n\r\nAnn\r\n"
SPAM = HEAD % b"2" + GTUBE + b"\r\n"
VERDICT = b"SPAMD/1.1 0 EX_OK\r\nSpam: False ; 0.5 / 5.0\r\n\r\n"
SLACK = 2.0  # seconds by which a busy machine may be late


def scanner(*backends: str, children: int = 2, **changes: object) -> SpamdScanner:
    return SpamdScanner(settings.SpamdSettings(backends=backends, **changes), children)  # type: ignore[arg-type]


async def scan(
    backend: str, message: Message, seconds: float = 20.0, user: bytes = b"", want: Want = Want.CHECK, **changes: object
) -> ScanOutcome:
    return await scanner(backend, **changes).scan(message, Deadline.after(seconds), user=user, want=want)


async def fault(backend: str, message: Message, seconds: float = 5.0, **changes: object) -> BackendError:
    """The error of a scan, which must come within the deadline and not hold the message."""
    end = time.monotonic() + seconds + SLACK
    with pytest.raises(BackendError) as caught:
        await scan(backend, message, seconds, **changes)  # type: ignore[arg-type]
    assert time.monotonic() < end
    message.close()  # while the error lives: BufferError if it keeps a view of the message
    return caught.value


async def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.002)


# ---------------------------------------------------------------- the real one


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "zlib"])
@pytest.mark.parametrize("over", ["backend", "tcp_backend"], ids=["unix", "tcp"])
async def test_spam_is_found_and_a_letter_is_clean(spamd: Spamd, message, over: str, compress: bool) -> None:
    backend = getattr(spamd, over)
    found = await scan(backend, message(SPAM), compress=compress)
    assert (found.status, found.threshold, found.rewritten, found.backend) == (ScanStatus.FOUND, 5.0, b"", backend)
    assert found.score is not None
    assert found.score > 900
    clean = await scan(backend, message(LETTER), compress=compress)
    assert (clean.status, clean.threshold) == (ScanStatus.CLEAN, 5.0)
    assert clean.score is not None
    assert clean.score < 5


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "zlib"])
async def test_headers_gives_the_head_and_process_the_whole_message(spamd: Spamd, message, compress: bool) -> None:
    head = (await scan(spamd.backend, message(SPAM), want=Want.HEADERS, compress=compress)).rewritten
    whole = (await scan(spamd.backend, message(SPAM), want=Want.PROCESS, compress=compress)).rewritten
    assert b"\r\nX-Spam-Flag: YES\r\n" in b"\r\n" + head
    assert head.endswith(b"\r\n\r\n")
    assert GTUBE not in head
    assert b"\r\nX-Spam-Flag: YES\r\n" in b"\r\n" + whole
    assert whole.endswith(b"\r\n\r\n" + GTUBE + b"\r\n")
    clean = (await scan(spamd.backend, message(LETTER), want=Want.PROCESS)).rewritten
    assert b"X-Spam-Status: No" in clean
    assert clean.endswith(LETTER.partition(b"\r\n\r\n")[2])


async def test_a_large_message_comes_back_whole(spamd: Spamd, message) -> None:
    """More in each direction than the sockets hold."""
    body = b"".join(b"%06d the quick brown fox jumps over the lazy dog\r\n" % number for number in range(60_000))
    outcome = await scan(spamd.backend, message(HEAD % b"3" + body), want=Want.PROCESS)
    assert outcome.rewritten.endswith(b"\r\n\r\n" + body)


async def test_the_users_own_preferences_count(spamd: Spamd, message) -> None:
    spamd.prefer("strict@example.net", "required_score 0.001")
    spamd.prefer("lenient@example.net", "required_score 9999")
    thresholds = {
        user: (await scan(spamd.backend, message(SPAM), user=user)).threshold
        for user in (b"strict@example.net", b"lenient@example.net", b"nobody@example.net", b"")
    }
    assert list(thresholds.values()) == [0.0, 9999.0, 5.0, 5.0]


@pytest.mark.parametrize("user", [b"a\r\nContent-length: 1", b"a\nb", b"\0", b"u" * 5000])
async def test_a_hostile_user_is_left_out(spamd: Spamd, message, user: bytes) -> None:
    assert (await scan(spamd.backend, message(SPAM), user=user)).status is ScanStatus.FOUND


async def test_what_arrives_is_exactly_the_message(tmp_path: Path, message) -> None:
    content = b"Subject: \0\r\n\n\r\xff no final newline" * 50_000
    for compress in (False, True):
        with Peer(tmp_path, peers.says(VERDICT), read_spamd) as peer:
            await scan(peer.backend, message(content), user=b"bob", compress=compress)
            head, _, body = peer.seen[0].partition(b"\r\n\r\n")
        assert (zlib.decompress(body) if compress else body) == content
        assert b"\r\nContent-length: %d\r\nUser: bob" % len(body) in head
        assert (b"\r\nCompress: zlib" in head) is compress


async def test_an_empty_message_is_never_asked_about(tmp_path: Path, message) -> None:
    with Peer(tmp_path, peers.says(VERDICT), read_spamd) as peer:
        outcome = await scan(peer.backend, message(b""))
        assert (outcome.status, outcome.detail, peer.connections) == (ScanStatus.SKIPPED, "empty message", 0)


@pytest.mark.parametrize("content", [LETTER, SPAM, HEAD % b"4", b"no header at all\n", b"\n", b"\0" * 100])
async def test_aiospamc_is_of_the_same_opinion(spamd: Spamd, message, content: bytes) -> None:
    second = await aiospamc.check(content, socket_path=Path(spamd.socket))
    ours = await scan(spamd.backend, message(content))
    spam = second.headers.spam
    assert spam is not None
    assert (ours.status is ScanStatus.FOUND, ours.score, ours.threshold) == (spam.value, spam.score, spam.threshold)


async def test_no_more_at_once_than_there_are_children(tmp_path: Path, message) -> None:
    """The third question does not even connect before a place is free."""
    go = threading.Event()

    def talk(peer: Peer, sock: socket.socket) -> None:
        read_spamd(sock)
        assert go.wait(peers.WAIT)
        sock.sendall(VERDICT)

    with Peer(tmp_path, talk, read_spamd) as peer:
        one = scanner(peer.backend, children=2)
        tasks = [asyncio.create_task(one.scan(message(LETTER), Deadline.after(20))) for _ in range(20)]
        await until(lambda: peer.connections == 2)
        for _ in range(20):
            await asyncio.sleep(0)
        assert (peer.connections, one.limiter.backends[0].outstanding) == (2, 2)
        go.set()
        assert all(outcome.status is ScanStatus.CLEAN for outcome in await asyncio.gather(*tasks))
        assert (peer.connections, one.limiter.backends[0].outstanding) == (20, 0)


# ---------------------------------------------------------------- its bad days


@pytest.fixture
def own(lab_directory: Path):
    """A spamd that the test may stop and kill."""
    with Spamd(lab_directory / "own-spamd") as own:
        yield own


def children(daemon: Spamd) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()]


SLOW = HEAD % b"slow" + b"".join(b"line %06d of a text that takes spamd its time\r\n" % n for n in range(20_000))


def at_work(daemon: Spamd) -> list[int]:
    """The child of each scan of SLOW that has begun so far."""
    return [int(pid) for pid in re.findall(r"\[(\d+)\] info: spamd: checking message <slow@", daemon.log.read_text())]


async def test_a_child_killed_in_the_middle_of_a_scan_is_made_good_by_one_retry(own: Spamd, message) -> None:
    task = asyncio.create_task(scan(own.backend, message(SLOW), 60.0))
    await until(lambda: len(at_work(own)) == 1)
    os.kill(at_work(own)[0], signal.SIGKILL)
    assert (await task).score is not None
    assert len(at_work(own)) == 2


async def test_children_that_keep_dying_are_down(own: Spamd, message) -> None:
    task = asyncio.create_task(scan(own.backend, message(SLOW), 60.0))
    for times in (1, 2):
        await until(lambda times=times: len(at_work(own)) == times)
        os.kill(at_work(own)[-1], signal.SIGKILL)
    with pytest.raises(BackendError) as caught:
        await task
    assert caught.value.cause is Cause.DOWN


async def test_a_spamd_that_hangs_is_a_timeout_and_one_that_is_gone_is_down(own: Spamd, message) -> None:
    for pid in (own.pid, *children(own)):
        os.kill(pid, signal.SIGSTOP)
    assert (await fault(own.backend, message(SPAM), 0.3)).cause is Cause.TIMEOUT
    assert (await fault(own.tcp_backend, message(SPAM), 60.0, timeout=0.3)).cause is Cause.TIMEOUT
    own.kill()
    assert (await fault(own.backend, message(SPAM))).cause is Cause.DOWN
    assert (await fault(own.tcp_backend, message(SPAM))).cause is Cause.DOWN


async def test_a_clamd_where_a_spamd_should_be_is_a_bad_reply(clamd: Clamd, message) -> None:
    assert (await fault(clamd.backend, message(LETTER))).cause is Cause.BAD_REPLY


# ---------------------------------------------------------------- scripted peers

OK = b"SPAMD/1.1 0 EX_OK\r\n"
SCORE = b"Spam: True ; 15.0 / 5.0\r\n"

DAYS: dict[str, tuple[Talk, Cause]] = {
    "closes at once": (peers.closes(), Cause.DOWN),
    "closes without a byte": (peers.closes_after_question(), Cause.DOWN),
    "cut off in the status": (peers.says(b"SPAMD/1.1 0"), Cause.BAD_REPLY),
    "cut off in the head": (peers.says(OK), Cause.BAD_REPLY),
    "cut off before the empty line": (peers.says(OK + SCORE), Cause.BAD_REPLY),
    "cut off in the body": (peers.says(OK + SCORE + b"Content-length: 9\r\n\r\n12345678"), Cause.BAD_REPLY),
    "silent": (peers.says_and_stays(b""), Cause.TIMEOUT),
    "half an answer, then silent": (peers.says_and_stays(OK + SCORE), Cause.TIMEOUT),
    "drips without an end": (peers.drips_forever(b"SPAMD/1.1 0 ", b"x"), Cause.TIMEOUT),
    "answers twice": (peers.says(VERDICT + VERDICT), Cause.BAD_REPLY),
    "nonsense": (peers.says(b"250 ok\r\n"), Cause.BAD_REPLY),
    "binary nonsense": (peers.says(bytes(range(256)) * 10), Cause.BAD_REPLY),
    "no verdict": (peers.says(OK + b"\r\n"), Cause.BAD_REPLY),
    "a number without end": (peers.says(OK + b"Content-length: " + b"9" * 4000 + b"\r\n"), Cause.BAD_REPLY),
    "headers without end": (peers.floods(OK, b"X-Header: x\r\n" * 1000), Cause.BAD_REPLY),
    "a line without end": (peers.floods(OK, b"x" * 65_536), Cause.BAD_REPLY),
    "a body beyond reason": (peers.says(OK + SCORE + b"Content-length: 99999999999\r\n\r\n"), Cause.BAD_REPLY),
    "its preferences are down": (peers.says(b"SPAMD/1.0 69 Service Unavailable: SQL\r\n"), Cause.DOWN),
    "it did not understand": (peers.says(b"SPAMD/1.0 76 Bad header line: (x)\r\n"), Cause.BAD_REPLY),
    "it timed out": (peers.says(b"SPAMD/1.0 79 Timeout: (x)\r\n"), Cause.TIMEOUT),
    "it asks to come again": (peers.says(b"SPAMD/1.0 75 EX_TEMPFAIL\r\n"), Cause.BUSY),
}


@pytest.mark.parametrize("want", [Want.CHECK, Want.PROCESS])
@pytest.mark.parametrize("over", ["unix", "tcp"])
@pytest.mark.parametrize("day", DAYS)
async def test_each_bad_day_has_its_cause(tmp_path: Path, message, day: str, over: str, want: Want) -> None:
    talk, cause = DAYS[day]
    content = LETTER if want is Want.CHECK else LETTER * 20_000  # the second is more than a socket holds
    with Peer(tmp_path if over == "unix" else None, talk, read_spamd) as peer:
        error = await fault(peer.backend, message(content), 0.3 if cause is Cause.TIMEOUT else 10.0, want=want)
    assert (error.cause, error.backend) == (cause, peer.backend)
    assert error.detail.isascii()
    assert error.detail.isprintable()


async def test_a_rewritten_message_without_its_length_is_not_taken(tmp_path: Path, message) -> None:
    with Peer(tmp_path, peers.says(OK + SCORE + b"\r\nSubject: x\r\n\r\n"), read_spamd) as peer:
        for want in (Want.HEADERS, Want.PROCESS):
            assert (await fault(peer.backend, message(LETTER), want=want)).cause is Cause.BAD_REPLY


@pytest.mark.parametrize("over", ["unix", "tcp"])
async def test_a_whole_answer_in_single_bytes_counts(tmp_path: Path, message, over: str) -> None:
    answer = OK + b"content-LENGTH: 4\r\nSPAM: True ; -15.25 / 5.0\r\n\r\nA: b"
    with Peer(tmp_path if over == "unix" else None, peers.drips(answer), read_spamd) as peer:
        outcome = await scan(peer.backend, message(LETTER), want=Want.HEADERS)
    assert (outcome.status, outcome.score, outcome.rewritten) == (ScanStatus.FOUND, -15.25, b"A: b")


@pytest.mark.parametrize(
    ("answer", "cause"), [(VERDICT, Cause.BAD_REPLY), (b"SPAMD/1.0 76 Bad header line: (x)\r\n", Cause.BAD_REPLY)]
)
async def test_an_answer_before_the_end_of_the_message_neither_blocks_nor_counts(message, answer, cause) -> None:
    with Peer(None, peers.answers_early(answer), read_spamd) as peer:
        assert (await fault(peer.backend, message(LETTER * 200_000))).cause is cause


async def test_closed_without_a_byte_is_tried_once_more_on_a_fresh_connection(tmp_path: Path, message) -> None:
    with Peer(tmp_path, peers.in_turn(peers.closes_after_question(), peers.says(VERDICT)), read_spamd) as peer:
        assert (await scan(peer.backend, message(LETTER))).score == 0.5
        assert peer.connections == 2


async def test_another_backend_is_asked_when_one_fails(tmp_path: Path, spamd: Spamd, message) -> None:
    with Peer(tmp_path, peers.says(b"SPAMD/1.0 69 Service Unavailable: SQL\r\n"), read_spamd) as peer:
        outcome = await scanner(peer.backend, spamd.backend).scan(message(SPAM), Deadline.after(20))
        assert (outcome.status, outcome.backend, peer.connections) == (ScanStatus.FOUND, spamd.backend, 1)


async def test_compressing_ends_with_the_deadline(message) -> None:
    letter = message(LETTER * 50_000)
    with pytest.raises(BackendError) as caught:
        await scan("unix:/nowhere", letter, 0.0, compress=True)
    assert caught.value.cause is Cause.TIMEOUT
    letter.close()
