"""clamd asked for real, and everything that a clamd can do wrong played by scripted peers."""

import asyncio
import io
import os
import signal
import socket
import time
from pathlib import Path

import clamd as clamd_package
import pytest
from lab import peers
from lab.clamd import EICAR, EICAR_NAME, PHISHING, PUA, Clamd
from lab.peers import Peer, Talk, read_clamd
from lab.process import MissingProgramError, NotStartedError, ask, find_program

from contentfilter import settings
from contentfilter.deadline import Deadline
from contentfilter.errors import BackendError, Cause
from contentfilter.model import Message, ScanOutcome, ScanStatus
from contentfilter.scanners.clamd import ClamdScanner
from contentfilter.wire import clamd as wire

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("nothing_left")]

LETTER = b"From: a@example.org\r\nSubject: hello\r\n\r\nnothing in here\r\n"
PADDING = b"0123456789abcde\n" * 4096  # 64 KiB
SLACK = 2.0  # seconds by which a busy machine may be late


def scanner(*backends: str, **changes: object) -> ClamdScanner:
    """Without proofs: scripted peers say one thing to everything."""
    changes = {"proof": 0.0} | changes
    return ClamdScanner(settings.ClamdSettings(backends=backends, **changes))  # type: ignore[arg-type]


async def scan(backend: str, message: Message, seconds: float = 5.0, **changes: object) -> ScanOutcome:
    return await scanner(backend, **changes).scan(message, Deadline.after(seconds))


async def fault(backend: str, message: Message, seconds: float = 5.0, **changes: object) -> BackendError:
    """The error of a scan, which must come within the deadline and not hold the message."""
    end = time.monotonic() + seconds + SLACK
    with pytest.raises(BackendError) as caught:
        await scan(backend, message, seconds, **changes)
    assert time.monotonic() < end
    message.close()  # while the error lives: BufferError if it keeps a view of the message
    return caught.value


# ---------------------------------------------------------------- the real one


@pytest.mark.parametrize("unnamed", [False, True], ids=["memfd", "O_TMPFILE"])
@pytest.mark.parametrize("over", ["backend", "tcp_backend"], ids=["unix", "tcp"])
async def test_a_virus_is_found_and_a_letter_is_clean(clamd: Clamd, message, over: str, unnamed: bool) -> None:
    backend = getattr(clamd, over)
    found = await scan(backend, message(EICAR, unnamed=unnamed))
    assert (found.status, found.name, found.backend) == (ScanStatus.FOUND, EICAR_NAME, backend)
    assert 0 < found.seconds < 5
    buried = await scan(backend, message(LETTER + PADDING * 20 + EICAR, unnamed=unnamed))
    assert buried.status is ScanStatus.FOUND
    for clean in (b"", b"\n", LETTER, LETTER + PADDING * 20):
        outcome = await scan(backend, message(clean, unnamed=unnamed))
        assert (outcome.status, outcome.name) == (ScanStatus.CLEAN, "")


@pytest.mark.parametrize(("content", "name"), [(PUA, "PUA.Lab.Tool"), (PHISHING, "Lab.Phishing.Page-1")])
async def test_other_signatures_keep_their_names(clamd: Clamd, message, content: bytes, name: str) -> None:
    outcome = await scan(clamd.backend, message(LETTER + content))
    assert outcome.name == f"{name}.UNOFFICIAL"


@pytest.mark.parametrize("content", [LETTER, EICAR, LETTER + PADDING * 3 + EICAR, PUA])
async def test_the_clamd_package_is_of_the_same_opinion(clamd: Clamd, message, content: bytes) -> None:
    second = clamd_package.ClamdUnixSocket(clamd.socket).instream(io.BytesIO(content))["stream"]
    for backend in (clamd.backend, clamd.tcp_backend):
        outcome = await scan(backend, message(content))
        assert (outcome.status is ScanStatus.FOUND, outcome.name or None) == (second[0] == "FOUND", second[1])


async def test_a_unix_socket_gets_the_descriptor_and_tcp_the_bytes(tmp_path: Path, message) -> None:
    with Peer(tmp_path, peers.says(b"fd[5]: OK\0"), read_clamd) as peer:
        await scan(peer.backend, message(LETTER))
        assert peer.seen == [b"zFILDES\0\0"]
    with Peer(None, peers.says(b"stream: OK\0"), read_clamd) as peer:
        await scan(peer.backend, message(LETTER))
        assert peer.seen == [b"zINSTREAM\0" + len(LETTER).to_bytes(4, "big") + LETTER + bytes(4)]


async def test_a_descriptor_that_clamd_could_not_read_is_never_passed(clamd: Clamd, tmp_path: Path, message) -> None:
    """clamd answers OK to one that is open for writing only, whatever is inside."""
    infected = message(EICAR)
    path = tmp_path / "message"
    path.write_bytes(EICAR)
    for flags in (os.O_WRONLY, os.O_PATH):
        os.dup2(fd := os.open(path, flags), infected.fd)
        os.close(fd)
        assert (await scan(clamd.backend, infected)).status is ScanStatus.FOUND


async def test_many_scans_at_once_are_each_answered_for_themselves(clamd: Clamd, message) -> None:
    """More than clamd's listen queue and threads take: nobody is told that it is down."""
    many, deadline = scanner(clamd.backend, concurrency=100), Deadline.after(30)
    letters = [message(LETTER + (EICAR if number % 3 == 0 else b"")) for number in range(300)]
    outcomes = await asyncio.gather(*(many.scan(letter, deadline) for letter in letters))
    assert [o.status is ScanStatus.FOUND for o in outcomes] == [number % 3 == 0 for number in range(300)]


async def test_the_clamd_package_reads_the_same_version(clamd: Clamd) -> None:
    both = scanner(clamd.backend, clamd.tcp_backend)
    versions = [await both.version(backend.address, Deadline.after(5)) for backend in both.limiter.backends]
    second = clamd_package.ClamdUnixSocket(clamd.socket).version()
    assert set(versions) == {wire.parse_version(second.encode())}
    assert versions[0].product.startswith("ClamAV ")


@pytest.fixture(scope="module")
def small(lab_directory: Path):
    with Clamd(lab_directory / "small", "StreamMaxLength 1M", "MaxFileSize 2M", "AlertExceedsMax yes") as small:
        yield small


async def test_above_stream_max_length_is_too_big(small: Clamd, message) -> None:
    for size in (1_200_000, 20_000_000):
        error = await fault(small.tcp_backend, message(LETTER + bytes(size)))
        assert (error.cause, error.detail) == (Cause.TOO_BIG, "INSTREAM size limit exceeded.")


async def test_above_max_file_size_is_too_big_and_never_clean(small: Clamd, message) -> None:
    error = await fault(small.backend, message(PADDING * 40 + EICAR))
    assert (error.cause, error.detail) == (Cause.LIMITS, "Heuristics.Limits.Exceeded.MaxFileSize")


async def test_our_own_limit_is_known_before_clamd_is_asked(tmp_path: Path, message) -> None:
    with Peer(tmp_path, peers.says(b"fd[5]: OK\0"), read_clamd) as peer:
        error = await fault(peer.backend, message(b"12345"), max_size=4)
        assert (error.cause, peer.connections) == (Cause.TOO_BIG, 0)
        assert (await scan(peer.backend, message(b"1234"), max_size=4)).status is ScanStatus.CLEAN
        assert (await scan(peer.backend, message(PADDING), max_size=0)).status is ScanStatus.CLEAN


# ---------------------------------------------------------------- its bad days


@pytest.fixture
def own(lab_directory: Path):
    """A clamd that the test may stop and kill."""
    with Clamd(lab_directory / "own") as own:
        yield own


@pytest.mark.parametrize("over", ["backend", "tcp_backend"], ids=["unix", "tcp"])
async def test_a_clamd_that_hangs_is_a_timeout_within_the_deadline(own: Clamd, message, over: str) -> None:
    own.signal(signal.SIGSTOP)
    assert (await fault(getattr(own, over), message(EICAR), 0.3)).cause is Cause.TIMEOUT
    assert (await fault(getattr(own, over), message(EICAR), 60.0, timeout=0.3)).cause is Cause.TIMEOUT


async def test_a_clamd_killed_while_it_holds_the_message_is_down(own: Clamd, message) -> None:
    own.signal(signal.SIGSTOP)
    task = asyncio.create_task(scan(own.backend, message(EICAR)))
    await asyncio.sleep(0)  # the question is in its socket now
    own.kill()
    with pytest.raises(BackendError) as caught:
        await task
    assert caught.value.cause is Cause.DOWN


async def test_a_clamd_killed_in_the_middle_of_a_scan_is_down_and_never_clean(own: Clamd, message) -> None:
    task = asyncio.create_task(scan(own.backend, message(PADDING * 380 + EICAR)))
    while True:  # until clamd says that it is at work on it
        stats = await asyncio.to_thread(clamd_package.ClamdUnixSocket(own.socket).stats)
        if "FILDES" in stats or task.done():
            break
    assert not task.done(), "the scan was over before clamd could be killed"
    own.kill()
    with pytest.raises(BackendError) as caught:
        await task
    assert caught.value.cause is Cause.DOWN


async def test_a_clamd_ended_gently_says_found_or_nothing(own: Clamd, message) -> None:
    own.signal(signal.SIGSTOP)
    task = asyncio.create_task(scan(own.backend, message(EICAR)))
    await asyncio.sleep(0)
    own.signal(signal.SIGTERM)
    own.signal(signal.SIGCONT)
    (said,) = await asyncio.gather(task, return_exceptions=True)
    assert getattr(said, "status", None) is ScanStatus.FOUND or getattr(said, "cause", None) is Cause.DOWN


async def test_a_clamd_that_does_not_run_is_down(tmp_path: Path, message) -> None:
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(stale))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    for backend in (f"unix:{tmp_path}/absent", f"unix:{stale}", f"tcp:127.0.0.1:{port}", "tcp:nowhere.invalid:1"):
        error = await fault(backend, message(LETTER))
        assert (error.cause, error.backend) == (Cause.DOWN, backend)


async def test_a_restart_is_survived_by_the_same_scanner(lab_directory: Path, message) -> None:
    directory = lab_directory / "restarted"
    with Clamd(directory) as first:
        one = scanner(first.backend)
        assert (await one.scan(message(EICAR), Deadline.after(5))).status is ScanStatus.FOUND
    with pytest.raises(BackendError):
        await one.scan(message(EICAR), Deadline.after(5))
    with Clamd(directory):
        assert (await one.scan(message(EICAR), Deadline.after(5))).status is ScanStatus.FOUND


# ---------------------------------------------------------------- scripted peers

DAYS: dict[str, tuple[Talk, Cause]] = {
    "closes at once": (peers.closes(), Cause.DOWN),
    "closes without a byte": (peers.closes_after_question(), Cause.DOWN),
    "cut off": (peers.says(b"stream: O"), Cause.BAD_REPLY),
    "cut off before the end byte": (peers.says(b"stream: OK"), Cause.BAD_REPLY),
    "silent": (peers.says_and_stays(b""), Cause.TIMEOUT),
    "half an answer, then silent": (peers.says_and_stays(b"stream: OK"), Cause.TIMEOUT),
    "drips without an end": (peers.drips_forever(b"stream: ", b"x"), Cause.TIMEOUT),
    "answers twice": (peers.says(b"stream: OK\0stream: OK\0"), Cause.BAD_REPLY),
    "changes its mind": (peers.says(b"stream: OK\0stream: Eicar FOUND\0"), Cause.BAD_REPLY),
    "nonsense": (peers.says(b"250 ok\r\n"), Cause.BAD_REPLY),
    "binary nonsense": (peers.says(bytes(range(256)) * 10), Cause.BAD_REPLY),
    "huge answer": (peers.floods(b"stream: ", b"x" * 65_536), Cause.BAD_REPLY),
    "an answer to something else": (peers.says(b"PONG\0"), Cause.BAD_REPLY),
    "out of memory": (peers.says(b"stream: Can't allocate memory ERROR\0"), Cause.MEMORY),
    "slow client, it says": (peers.says(b"COMMAND READ TIMED OUT\n"), Cause.TIMEOUT),
    "temporary file": (peers.says(b"stream: Can't create temporary file ERROR\0"), Cause.BAD_REPLY),
    "a limit as a finding": (peers.says(b"stream: Heuristics.Limits.Exceeded.MaxScanSize FOUND\0"), Cause.LIMITS),
}


@pytest.mark.parametrize("size", [len(LETTER), 40 * len(PADDING)], ids=["small", "large"])
@pytest.mark.parametrize("over", ["unix", "tcp"])
@pytest.mark.parametrize("day", DAYS)
async def test_each_bad_day_has_its_cause(tmp_path: Path, message, day: str, over: str, size: int) -> None:
    talk, cause = DAYS[day]
    with Peer(tmp_path if over == "unix" else None, talk, read_clamd) as peer:
        error = await fault(peer.backend, message(bytes(size)), 0.3 if cause is Cause.TIMEOUT else 10.0)
    assert (error.cause, error.backend) == (cause, peer.backend)
    assert error.detail.isascii()
    assert error.detail.isprintable()


@pytest.mark.parametrize("over", ["unix", "tcp"])
async def test_a_whole_answer_in_single_bytes_counts(tmp_path: Path, message, over: str) -> None:
    with Peer(tmp_path if over == "unix" else None, peers.drips(b"stream: Eicar FOUND\0"), read_clamd) as peer:
        assert (await scan(peer.backend, message(LETTER))).name == "Eicar"


async def test_closed_without_a_byte_is_tried_once_more_on_a_fresh_connection(tmp_path: Path, message) -> None:
    talk = peers.in_turn(peers.closes_after_question(), peers.says(b"fd[5]: OK\0"))
    with Peer(tmp_path, talk, read_clamd) as peer:
        assert (await scan(peer.backend, message(LETTER))).status is ScanStatus.CLEAN
        assert peer.connections == 2


async def test_another_backend_is_asked_when_one_fails(tmp_path: Path, clamd: Clamd, message) -> None:
    with Peer(tmp_path, peers.says(b"nonsense\0"), read_clamd) as peer:
        outcome = await scanner(peer.backend, clamd.backend).scan(message(EICAR), Deadline.after(5))
        assert (outcome.status, outcome.backend, peer.connections) == (ScanStatus.FOUND, clamd.backend, 1)


async def test_where_fildes_is_refused_the_bytes_are_streamed_from_then_on(tmp_path: Path, message) -> None:
    with Peer(tmp_path, peers.refuses_descriptor(b"stream: Eicar FOUND\0"), read_clamd) as peer:
        one = scanner(peer.backend)
        for _ in range(3):
            assert (await one.scan(message(LETTER), Deadline.after(5))).name == "Eicar"
        assert [question[:5] for question in peer.seen] == [b"zFILD", b"zINST", b"zINST", b"zINST"]


@pytest.mark.parametrize(
    ("answer", "cause"),
    [(b"stream: OK\0", Cause.BAD_REPLY), (b"INSTREAM size limit exceeded. ERROR\0", Cause.TOO_BIG)],
)
async def test_an_answer_before_the_end_of_the_message_is_heard_but_never_clean(message, answer, cause) -> None:
    with Peer(None, peers.answers_early(answer), read_clamd) as peer:
        error = await fault(peer.backend, message(PADDING * 400), 5.0)
        assert error.cause is cause


async def test_a_full_listen_queue_means_wait_not_down(tmp_path: Path, message) -> None:
    peer = Peer(tmp_path, peers.says(b"fd[5]: OK\0"), read_clamd, backlog=1)
    taken = peers.fill_listen_queue(peer.path)
    try:
        error = await fault(peer.backend, message(LETTER), 0.1)
        assert error.cause is Cause.BUSY
        task = asyncio.create_task(scan(peer.backend, message(LETTER)))
        await asyncio.sleep(0)
        assert not task.done()
        for sock in taken:
            sock.close()
        peer.start()
        assert (await task).status is ScanStatus.CLEAN
    finally:
        for sock in taken:
            sock.close()
        peer.stop()


async def test_a_client_that_goes_away_leaves_nothing_behind(tmp_path: Path, message) -> None:
    with Peer(tmp_path, peers.says_and_stays(b""), read_clamd) as peer:
        one = scanner(peer.backend, concurrency=1)
        for _ in range(5):
            task = asyncio.create_task(one.scan(message(LETTER), Deadline.after(5)))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert one.limiter.backends[0].outstanding == 0


async def test_a_clamd_whose_listen_queue_is_full_says_its_version_in_time_or_is_busy(tmp_path: Path) -> None:
    peer = Peer(tmp_path, peers.says(b"ClamAV 9.9/123/Tue Dec 24 09:31:02 2024\0"), read_clamd, backlog=1)
    taken = peers.fill_listen_queue(peer.path)
    one = scanner(peer.backend)
    address = one.limiter.backends[0].address
    for _ in range(2):
        with pytest.raises(BackendError, match="no place in its listen queue in time") as caught:
            await one.version(address, Deadline.after(0.1))
        assert caught.value.cause is Cause.BUSY
    for sock in taken:
        sock.close()
    with peer:
        version = await one.version(address, Deadline.after(5))
    assert (version.product, version.database) == ("ClamAV 9.9", 123)


@pytest.mark.parametrize(
    ("answer", "cause"), [(b"", Cause.DOWN), (b"what?/\n", Cause.BAD_REPLY), (b"sorry ERROR\n", Cause.DOWN)]
)
async def test_a_probe_of_a_sick_clamd_says_so(tmp_path: Path, answer: bytes, cause: Cause) -> None:
    with Peer(tmp_path, peers.says(answer), read_clamd) as peer:
        one = scanner(peer.backend)
        with pytest.raises(BackendError) as caught:
            await one.version(one.limiter.backends[0].address, Deadline.after(5))
        assert caught.value.cause is cause
    with pytest.raises(BackendError) as caught:
        await one.version(one.limiter.backends[0].address, Deadline.after(5))
    assert caught.value.cause is Cause.DOWN


# ---------------------------------------------------------------- the lab itself


async def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingProgramError, match="apt-get install clamav-daemon"):
        find_program("clamd-that-is-not", "clamav-daemon")


async def test_a_clamd_that_does_not_start_shows_its_log(lab_directory: Path) -> None:
    with pytest.raises(NotStartedError, match="NoSuchOption"):
        Clamd(lab_directory / "broken", "NoSuchOption yes").start()


async def test_the_answers_of_the_real_one_are_the_ones_we_read(clamd: Clamd) -> None:
    assert wire.version_reader().feed(ask(clamd.socket, wire.command("VERSION"))) is not None
