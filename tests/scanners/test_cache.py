"""Who is answered by whom: shared scans, kept answers, scans that go on. No scanner; those are in e2e/test_retry.py."""

import asyncio
import gc
import mmap
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.peers import Peer, read_clamd, says, says_and_stays
from lab.slow import OK, Slow, tried

from contentfilter.deadline import Deadline
from contentfilter.errors import BackendError, Cause
from contentfilter.model import Message, Scanner, ScanOutcome, ScanStatus
from contentfilter.scanners.cache import ScanCache, ScanRequest
from contentfilter.scanners.cache_entries import CacheEntry, CacheKey
from contentfilter.scanners.clamd import ClamdScanner, database_of
from contentfilter.scanners.health import ProbeResult
from contentfilter.scanners.limiter import NEUTRAL
from contentfilter.settings import ClamdSettings, ReuseSettings

MAIL = b"Subject: hello\n\nletter\n"
CLEAN = ScanOutcome(Scanner.CLAMD, ScanStatus.CLEAN, backend="b", database="1")
FOUND = replace(CLEAN, status=ScanStatus.FOUND, name="Worm")
DOWN = BackendError(Cause.DOWN, "b", "gone")


def question(data: bytes, kind: bytes = b"clamd", **changes: Any) -> ScanRequest:
    return ScanRequest(kind, Message(-1, len(data), data), 5.0, **changes)


class Scans:
    """A scanner that answers when it is told to."""

    def __init__(self) -> None:
        self.asked = 0
        self._answers: list[asyncio.Future[ScanOutcome]] = []

    async def __call__(self, attempts: object) -> ScanOutcome:
        self.asked += 1
        self._answers.append(asyncio.get_running_loop().create_future())
        return await self._answers[-1]

    def say(self, what: ScanOutcome | BackendError, number: int = -1) -> None:
        if isinstance(what, BackendError):
            self._answers[number].set_exception(what)
        else:
            self._answers[number].set_result(what)


async def settle() -> None:
    """Everybody who can go on does."""
    for _ in range(20):
        await asyncio.sleep(0)


def start(recall: ScanCache, q: ScanRequest, scans: Scans, seconds: float = 5.0) -> "asyncio.Task[ScanOutcome]":
    return asyncio.create_task(recall.get(q, scans, Deadline.after(seconds)))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def kept_in(recall: ScanCache, clock: Clock, data: bytes, outcome: ScanOutcome, **changes: Any) -> None:
    """A slow scan of ``data``, whose answer is kept."""
    scans = Scans()
    task = start(recall, question(data, **changes), scans)
    await settle()
    clock.now += 20
    scans.say(outcome)
    assert await task == outcome
    await settle()


def has(database: str) -> Callable[[str, Deadline], Awaitable[str]]:
    async def ask(backend: str, deadline: Deadline) -> str:
        return database

    return ask


@pytest.mark.asyncio
async def test_three_equal_messages_are_one_scan_and_each_is_told() -> None:
    recall, scans = ScanCache(), Scans()
    tasks = [start(recall, question(tried(MAIL, minute)), scans) for minute in range(3)]
    await settle()
    scans.say(CLEAN)
    first, *others = await asyncio.gather(*tasks)
    assert scans.asked == 1
    assert (first.reused, [o.reused for o in others]) == ("", ["shared", "shared"])
    assert "shared with an equal message" in others[0].detail


@pytest.mark.asyncio
async def test_who_led_and_failed_hands_over_to_one_of_the_others() -> None:
    recall, scans = ScanCache(), Scans()
    tasks = [start(recall, question(MAIL), scans) for _ in range(4)]
    await settle()
    scans.say(DOWN)
    await settle()
    assert scans.asked == 2
    scans.say(CLEAN)
    with pytest.raises(BackendError):
        await tasks[0]
    assert [(await task).status for task in tasks[1:]] == [ScanStatus.CLEAN] * 3
    assert scans.asked == 2


@pytest.mark.asyncio
async def test_who_led_and_was_cancelled_does_not_take_the_others_along() -> None:
    recall, scans = ScanCache(), Scans()
    tasks = [start(recall, question(MAIL), scans) for _ in range(2)]
    await settle()
    tasks[0].cancel()
    await settle()
    scans.say(CLEAN)
    assert (await tasks[1]).status is ScanStatus.CLEAN
    assert scans.asked == 2


@pytest.mark.asyncio
async def test_who_joined_and_goes_away_does_not_disturb_the_others() -> None:
    recall, scans = ScanCache(), Scans()
    tasks = [start(recall, question(MAIL), scans) for _ in range(3)]
    await settle()
    tasks[1].cancel()
    await settle()
    scans.say(CLEAN)
    assert [(await tasks[n]).status for n in (0, 2)] == [ScanStatus.CLEAN] * 2


@pytest.mark.asyncio
async def test_however_many_equal_scans_hang_time_is_left_for_one_of_our_own() -> None:
    recall, scans = ScanCache(), Scans()
    hung = []
    for count in (1, 2, 3):
        hung.append(start(recall, replace(question(MAIL), timeout=0.01), scans))
        while scans.asked < count:
            await asyncio.sleep(0.01)
    deadline = Deadline.after(2.0)
    other = asyncio.create_task(recall.get(question(MAIL), scans, deadline))
    while scans.asked < 4:
        await asyncio.sleep(0.01)
    assert deadline.left() > 0.5
    scans.say(FOUND)
    assert (await other).reused == ""
    for number, leader in enumerate(hung):
        scans.say(CLEAN, number)
        await leader


@pytest.mark.asyncio
async def test_a_joined_scan_that_hangs_is_waited_for_as_long_as_timeout_and_not_longer() -> None:
    recall, scans = ScanCache(), Scans()
    leader = start(recall, question(MAIL), scans)
    await settle()
    other = asyncio.create_task(recall.get(replace(question(MAIL), timeout=0.05), scans, Deadline.after(5.0)))
    while scans.asked < 2:
        await asyncio.sleep(0.01)
    scans.say(FOUND)
    assert (await other).reused == ""
    scans.say(CLEAN, 0)
    await leader


@pytest.mark.parametrize(
    ("other", "kind"), [(MAIL + b"\n", b"clamd"), (MAIL.replace(b"h", b"H"), b"clamd"), (MAIL, b"clamd with a setting")]
)
@pytest.mark.asyncio
async def test_another_question_is_put_in_flight_and_later(other: bytes, kind: bytes) -> None:
    clock = Clock()
    recall, scans = ScanCache(clock=clock), Scans()
    tasks = [start(recall, question(MAIL), scans), start(recall, question(other, kind), scans)]
    await settle()
    assert scans.asked == 2
    clock.now += 20
    scans.say(FOUND, 0)
    scans.say(CLEAN, 1)
    assert [(await task).status for task in tasks] == [ScanStatus.FOUND, ScanStatus.CLEAN]
    await settle()
    later = start(recall, question(b"z" + MAIL, b"clamd"), scans)
    await settle()
    assert scans.asked == 3
    scans.say(CLEAN)
    await later


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.binary(min_size=1, max_size=3), st.booleans()), min_size=2, max_size=12))
def test_nobody_ever_gets_an_answer_about_other_content(mails: list[tuple[bytes, bool]]) -> None:
    """Each content has a name of its own as its finding; half of the scans are slow and kept."""

    async def run() -> None:
        clock = Clock()
        recall = ScanCache(clock=clock)

        async def ask(data: bytes, slow: bool) -> None:
            async def scan(attempts: object) -> ScanOutcome:
                await asyncio.sleep(0)
                clock.now += 10 * slow
                return replace(FOUND, name=data.hex())

            said = await recall.get(question(tried(data, 1)), scan, Deadline.after(5.0))
            assert said.name == data.hex()

        await asyncio.gather(*(ask(*mail) for mail in mails))
        for mail in mails:
            await ask(*mail)
        await recall.aclose()

    asyncio.run(run())


@pytest.mark.asyncio
async def test_clean_counts_while_the_database_is_the_same() -> None:
    clock = Clock()
    recall, scans = ScanCache(clock=clock), Scans()
    await kept_in(recall, clock, MAIL, CLEAN)
    said = await recall.get(question(MAIL, database=has("1")), scans, Deadline.after(5.0))
    assert (said.reused, scans.asked) == ("kept", 0)
    for other in ("2", ""):
        task = start(recall, question(MAIL, database=has(other)), scans)
        await settle()
        scans.say(CLEAN)
        assert (await task).reused == ""


@pytest.mark.asyncio
async def test_clean_without_a_known_database_is_never_used() -> None:
    clock = Clock()
    recall, scans = ScanCache(clock=clock), Scans()
    await kept_in(recall, clock, MAIL, replace(CLEAN, database=""))
    task = start(recall, question(MAIL, database=has("")), scans)
    await settle()
    assert scans.asked == 1
    scans.say(CLEAN)
    await task


@pytest.mark.asyncio
async def test_a_shared_answer_of_a_long_scan_counts_only_with_its_database() -> None:
    clock = Clock()
    recall, scans = ScanCache(clock=clock), Scans()
    leader = start(recall, question(MAIL), scans)
    await settle()
    joined = start(recall, question(MAIL, database=has("2")), scans)
    await settle()
    clock.now += 20
    scans.say(CLEAN)
    await leader
    await settle()
    assert scans.asked == 2, "clamd has a new database since that scan began"
    scans.say(FOUND)
    assert (await joined).status is ScanStatus.FOUND


@pytest.mark.asyncio
async def test_found_is_for_the_same_client() -> None:
    clock = Clock()
    recall, scans = ScanCache(clock=clock), Scans()
    await kept_in(recall, clock, tried(MAIL, 1), FOUND)
    same = await recall.get(question(tried(MAIL, 2), database=has("")), scans, Deadline.after(5.0))
    assert (same.status, same.name, same.reused) == (ScanStatus.FOUND, "Worm", "kept")
    task = start(recall, question(tried(MAIL, 2, "other.example"), database=has("1")), scans)
    await settle()
    assert scans.asked == 1
    scans.say(CLEAN)
    await task


@pytest.mark.asyncio
async def test_where_the_client_matters_nothing_of_another_ones_is_used() -> None:
    clock = Clock()
    recall, scans = ScanCache(clock=clock), Scans()
    spam = {"kind": b"spamd", "by_client": True}
    await kept_in(recall, clock, tried(MAIL, 1), CLEAN, **spam)
    same = await recall.get(question(tried(MAIL, 2), **spam), scans, Deadline.after(5.0))
    assert same.reused == "kept"
    tasks = [start(recall, question(tried(MAIL, 2, ip=ip), **spam), scans) for ip in ("198.51.100.1", "198.51.100.2")]
    await settle()
    assert scans.asked == 2
    for number, task in enumerate(tasks):
        scans.say(CLEAN, number)
        await task


@pytest.mark.parametrize(
    "outcome", [replace(CLEAN, status=ScanStatus.SKIPPED), replace(CLEAN, status=ScanStatus.UNCHECKED)]
)
@pytest.mark.asyncio
async def test_what_is_no_answer_is_not_kept(outcome: ScanOutcome) -> None:
    clock = Clock()
    recall, scans = ScanCache(clock=clock), Scans()
    await kept_in(recall, clock, MAIL, outcome)
    task = start(recall, question(MAIL), scans)
    await settle()
    assert scans.asked == 1
    scans.say(CLEAN)
    await task


@pytest.mark.asyncio
async def test_mail_that_is_scanned_quickly_is_never_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("hashed")

    monkeypatch.setattr("contentfilter.scanners.content.digest", never)
    recall = ScanCache()

    async def scan(attempts: object) -> ScanOutcome:
        await asyncio.sleep(0)
        return CLEAN

    for _ in range(3):
        assert await recall.get(question(MAIL), scan, Deadline.after(5.0)) == CLEAN
    mails = (question(MAIL + b"x" * n) for n in range(5))
    await asyncio.gather(*(recall.get(q, scan, Deadline.after(5.0)) for q in mails))


@pytest.mark.asyncio
async def test_what_one_worker_keeps_another_learns() -> None:
    clock, told = Clock(), list[tuple[CacheKey, CacheEntry]]()
    recall = ScanCache(lambda key, kept: told.append((key, kept)), clock=clock)
    await kept_in(recall, clock, MAIL, CLEAN)
    other, scans = ScanCache(clock=clock), Scans()
    other.learn(*told[0])
    said = await other.get(question(MAIL, database=has("1")), scans, Deadline.after(5.0))
    assert (said.reused, scans.asked) == ("kept", 0)


# ---------------------------------------------------------------- scans that go on, of a real ClamdScanner


def clamd_of(backend: str) -> ClamdScanner:
    return ClamdScanner(ClamdSettings(backends=(backend,), proof=0.0))


async def probed(scanner: ClamdScanner) -> None:
    """As by the supervisor's prober."""
    (backend,) = scanner.limiter.backends
    database = database_of(await scanner.version(backend.address, Deadline.after(5.0)))
    now = time.monotonic()
    scanner.learn(ProbeResult(Scanner.CLAMD, str(backend.address), now, now, database=database))


async def give_up(recall: ScanCache, scanner: ClamdScanner, message: Message, seconds: float = 0.1) -> None:
    q = ScanRequest(b"clamd", message, 5.0, database=scanner.database)
    deadline = Deadline.after(seconds)
    with pytest.raises(BackendError):
        await recall.get(q, partial(scanner.scan, message, deadline, NEUTRAL), deadline)
    message.close()


def message_of(data: bytes) -> Message:
    fd = os.memfd_create("message")
    os.write(fd, data)
    return Message(fd, len(data), mmap.mmap(fd, len(data), prot=mmap.PROT_READ))


@pytest.mark.parametrize("size", [0, 400_000], ids=["small", "hashed in a thread"])
@pytest.mark.asyncio
async def test_a_scan_that_goes_on_holds_nothing_of_its_message(tmp_path, nothing_left, size: int) -> None:
    data = tried(MAIL + b"x" * size, 1)
    message = message_of(data)
    ended = asyncio.Event()
    recall = ScanCache(report=lambda said, seconds: ended.set())
    with Slow(tmp_path) as slow:
        scanner = clamd_of(slow.backend)
        await probed(scanner)
        await give_up(recall, scanner, message)
        assert recall.abandoned
        while message_mapped():
            await asyncio.sleep(0.01)
            gc.collect()
        slow.says(OK)
        await ended.wait()
        again = Message(-1, len(data), data)
        said = await recall.get(
            ScanRequest(b"clamd", again, 5.0, database=scanner.database), Scans(), Deadline.after(5.0)
        )
        assert said.reused == "kept"
        assert len(slow.asked) == 1
    await recall.aclose()


def message_mapped() -> bool:
    with open("/proc/self/maps") as maps:
        return "memfd:message" in maps.read()


@pytest.mark.asyncio
async def test_a_scan_that_goes_on_keeps_its_slot_until_clamd_has_ended_it(tmp_path, nothing_left) -> None:
    recall = ScanCache()
    with Slow(tmp_path) as slow:
        scanner = ClamdScanner(ClamdSettings(backends=(slow.backend,), proof=0.0, concurrency=2))
        for number in range(5):
            await give_up(recall, scanner, message_of(MAIL + b"%d" % number))
        assert len(slow.asked) == 2, "clamd got more scans at once than it may"
        assert [b.outstanding for b in scanner.limiter.backends] == [2]
        slow.says(OK)
        while recall.abandoned:
            await asyncio.sleep(0.01)
        assert [b.outstanding for b in scanner.limiter.backends] == [0]
        last = message_of(MAIL + b"last")
        assert (await scanner.scan(last, Deadline.after(5.0))).status is ScanStatus.CLEAN
        last.close()
    await recall.aclose()


@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.asyncio
async def test_a_scan_goes_on_for_those_who_joined_when_its_first_message_leaves(
    tmp_path, nothing_left, goes_on: bool
) -> None:
    recall = ScanCache()
    with Slow(tmp_path) as slow:
        scanner, deadline = clamd_of(slow.backend), Deadline.after(10.0)
        messages = [message_of(MAIL), message_of(MAIL)]
        requests = [ScanRequest(b"clamd", message, 9.0, goes_on=goes_on) for message in messages]
        tasks = []
        for q in requests:
            scan = partial(scanner.scan, q.message, deadline, NEUTRAL)
            tasks.append(asyncio.create_task(recall.get(q, scan, deadline)))
            while not slow.asked:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        messages[0].close()
        slow.says(OK)
        assert (await tasks[1]).reused == "shared"
        assert len(slow.asked) == 1
        messages[1].close()
        while recall._background:
            await asyncio.sleep(0.01)
    await recall.aclose()


@pytest.mark.asyncio
async def test_where_no_retry_comes_a_scan_ends_with_its_last_message(tmp_path, nothing_left) -> None:
    recall = ScanCache()
    with Slow(tmp_path) as slow:
        scanner, message, deadline = clamd_of(slow.backend), message_of(MAIL), Deadline.after(0.2)
        q = ScanRequest(b"clamd", message, 5.0, goes_on=False)
        with pytest.raises(BackendError):
            await recall.get(q, partial(scanner.scan, message, deadline, NEUTRAL), deadline)
        message.close()
        await settle()
        assert not recall.abandoned
        assert [b.outstanding for b in scanner.limiter.backends] == [0]


@pytest.mark.asyncio
async def test_the_end_of_the_worker_ends_what_goes_on(tmp_path, nothing_left) -> None:
    recall = ScanCache()
    with Slow(tmp_path) as slow:
        await give_up(recall, clamd_of(slow.backend), message_of(MAIL))
        assert recall.abandoned
        await recall.aclose()
        assert not recall.abandoned


@pytest.mark.parametrize(
    "answer", [b"", b"stream: nonsense\0", b"stream: Heuristics.Limits.Exceeded.MaxScanTime FOUND\0", b"stream: OK"]
)
@pytest.mark.asyncio
async def test_what_is_no_verdict_is_none_when_it_comes_late(tmp_path, nothing_left, answer: bytes) -> None:
    ends: list[object] = []
    recall = ScanCache(report=lambda said, seconds: ends.append(said))
    hold = asyncio.Event()

    def talk(peer: Peer, sock) -> None:  # type: ignore[no-untyped-def]
        question = peer.read(sock)
        if b"VERSION" in question:
            return sock.sendall(b"ClamAV 1.4.0/27000/Mon Jan  1 00:00:00 2024\0")
        while not hold.is_set() and not peer.over.wait(0.01):
            pass
        return sock.sendall(answer)

    with Peer(tmp_path, talk, read_clamd) as peer:
        scanner = clamd_of(peer.backend)
        await give_up(recall, scanner, Message(-1, len(MAIL), MAIL))
        hold.set()
        while not ends:
            await asyncio.sleep(0.01)
        assert isinstance(ends[0], BackendError)
        scans = Scans()
        task = start(recall, question(MAIL, database=scanner.database), scans)
        await asyncio.sleep(0.05)
        assert scans.asked == 1
        scans.say(CLEAN)
        await task
    await recall.aclose()


@pytest.mark.asyncio
async def test_a_message_that_clamd_has_not_got_as_a_whole_is_not_waited_for(tmp_path, nothing_left) -> None:
    """It is streamed, and clamd does not read: there is no scan that could go on."""
    data = b"x" * 8_000_000
    recall = ScanCache()
    with Peer(None, lambda peer, sock: (peer.over.wait(5), None)[1], read_clamd) as peer:
        scanner = clamd_of(peer.backend)
        await give_up(recall, scanner, Message(-1, len(data), data))
        assert not recall.abandoned
    await recall.aclose()


@pytest.mark.asyncio
async def test_settings_switch_it_off(tmp_path, nothing_left) -> None:
    recall = ScanCache()
    recall.change(ReuseSettings(late=0))
    with Peer(tmp_path, says_and_stays(b""), read_clamd) as peer:
        scanner = clamd_of(peer.backend)
        await give_up(recall, scanner, Message(-1, len(MAIL), MAIL))
        assert not recall.abandoned
    recall.change(ReuseSettings(keep=0))
    with Peer(tmp_path, says(b"stream: OK\0"), read_clamd) as peer:
        scanner = clamd_of(peer.backend)
        message = Message(-1, len(MAIL), MAIL)
        for _ in range(2):
            deadline = Deadline.after(5.0)
            said = await recall.get(question(MAIL), partial(scanner.scan, message, deadline, NEUTRAL), deadline)
            assert said.reused == ""
        assert len(peer.seen) == 2, "not even the database is asked for"
