"""Kept completely or not at all, readable by nobody else, found again, and within its limits."""

import asyncio
import errno
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from contentfilter.deadline import Deadline
from contentfilter.errors import QuarantineError
from contentfilter.model import Message
from contentfilter.settings import Settings
from contentfilter.store.quarantine import DAY, RECOUNT, Quarantine
from contentfilter.store.retention import STALE
from contentfilter.store.sidecar import Release, Search, plain, valid_incident
from contentfilter.verdict.record import MailRecord, ScanRecord, fields

MAIL = b"Message-ID: <one@there>\nSubject: =?utf-8?q?x?=\n y\n\nbody\0\xff"


def message_of(data: bytes) -> Message:
    return Message(-1, len(data), data)


def facts_of(sender=b"s@there", recipients=(b"a@here", b"b@here"), withheld=(1,), rule="clamd: Eicar", **more):
    return {
        "origin": "stranger",
        "rule": rule,
        "scans": [{"scanner": "clamd", "status": "found", "ms": 1.5, "name": rule.removeprefix("clamd: ")}],
        "envelope_hex": {"sender": sender.hex(), "recipients": [r.hex() for r in recipients]},
        "withheld_from": list(withheld),
    } | more


def keep(quarantine: Quarantine, incident: str, data: bytes = MAIL, **more) -> str:
    return asyncio.run(quarantine.keep(incident, message_of(data), facts_of(**more), Deadline.after(20)))


def files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if not p.is_dir())


def incidents(quarantine: Quarantine, **search) -> list[str]:
    return [entry.incident for entry in quarantine.entries(Search(**search))]


class Clock:
    """Starts now, because files carry true times, and moves only by hand."""

    def __init__(self):
        self.now = time.time()

    def __call__(self):
        return self.now


# Keeping


def test_message_and_sidecar_are_complete_and_private(tmp_path):
    old = os.umask(0)
    try:
        data = MAIL + bytes(range(256)) * 10_000
        name = keep(Quarantine(tmp_path / "q"), "id1", data)
    finally:
        os.umask(old)
    assert name == hashlib.sha256(data).hexdigest()
    assert files(tmp_path / "q") == ["entries/id1.eml", "entries/id1.json", f"messages/{name[:2]}/{name}.eml"]
    assert (tmp_path / "q" / "entries" / "id1.eml").read_bytes() == data
    for path in (tmp_path / "q", *(tmp_path / "q").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_the_sidecar_has_the_envelope_as_bytes_and_everything_that_was_given(tmp_path):
    clock = Clock()
    quarantine = Quarantine(tmp_path, clock=clock)
    versions = {"clamd": "1.4.2/27000"}
    keep(quarantine, "id1", sender=b"\xff@x", recipients=(b"a\n", b"B@here"), versions=versions, extra=7)
    entry = quarantine.get("id1")
    assert (entry.sender, entry.recipients, entry.withheld) == (b"\xff@x", (b"a\n", b"B@here"), (b"B@here",))
    assert (entry.time, entry.size, entry.sha256) == (clock.now, len(MAIL), hashlib.sha256(MAIL).hexdigest())
    assert (entry.message_id, entry.subject) == ("<one@there>", "=?utf-8?q?x?= y")
    assert entry.versions == versions
    assert entry.signatures == ("Eicar", "clamd: Eicar")
    assert json.loads((tmp_path / "entries" / "id1.json").read_bytes())["extra"] == 7
    assert json.dumps(plain(entry))


def test_what_the_pipeline_records_can_be_read_back(tmp_path):
    """The sidecar is the record of the message; a field renamed there must not get lost here."""
    scan = ScanRecord("clamd", "found", 2.5, name="Win.Bad", backend="unix:/run/c")
    record = MailRecord(
        "id1", "relay", 7, "192.0.2.1", "ann", "s@there", ("a@here",), 1, 4, (scan,), "drop", "virus", "clamd: Win.Bad",
        0, 1, 0, 3.5,
    )  # fmt: skip
    quarantine = Quarantine(tmp_path)
    envelope = {"sender": b"s@there".hex(), "recipients": [b"a@here".hex()]}
    more = fields(record) | {"envelope_hex": envelope, "withheld_from": [0]}
    asyncio.run(quarantine.keep("id1", message_of(MAIL), more, Deadline.after(20)))
    entry = quarantine.get("id1")
    assert entry.scans == (scan,)
    assert (entry.origin, entry.remote, entry.user, entry.rule) == ("relay", "192.0.2.1", "ann", "clamd: Win.Bad")
    assert (entry.reason, entry.decision, entry.size) == ("virus", "drop", 4)
    assert incidents(quarantine, signature="Win.Bad", sender="s@there", recipient="a@here") == ["id1"]


def test_a_message_that_is_closed_while_it_is_kept_is_complete(tmp_path, monkeypatch):
    quarantine, message = Quarantine(tmp_path), message_of(MAIL)
    below = quarantine._below

    def close(*names):
        message.close()  # as when the deadline passed: between the hash and the copy
        return below(*names)

    monkeypatch.setattr(quarantine, "_below", close)
    name = asyncio.run(quarantine.keep("id1", message, facts_of(), Deadline.after(20)))
    assert name == hashlib.sha256(MAIL).hexdigest()
    assert quarantine.message("id1").read() == MAIL


def test_a_message_that_is_closed_already_is_not_kept_as_an_empty_one(tmp_path):
    message = message_of(MAIL)
    message.close()
    with pytest.raises(OSError, match="has been closed"):
        asyncio.run(Quarantine(tmp_path).keep("id1", message, facts_of(), Deadline.after(20)))
    assert files(tmp_path) == []


def test_equal_messages_share_their_bytes(tmp_path):
    quarantine = Quarantine(tmp_path)
    keep(quarantine, "a")
    keep(quarantine, "b")
    assert (tmp_path / "entries" / "a.eml").stat().st_ino == (tmp_path / "entries" / "b.eml").stat().st_ino
    quarantine.delete("a")
    assert quarantine.message("b").read() == MAIL
    assert len(list((tmp_path / "messages").rglob("*.eml"))) == 1
    quarantine.delete("b")
    assert files(tmp_path) == []


def test_a_message_with_as_many_links_as_the_disk_allows_is_stored_anew(tmp_path, monkeypatch):
    quarantine = Quarantine(tmp_path)
    keep(quarantine, "a")
    link = os.link

    def crowded(source, target, **options):
        if str(source).endswith(".eml"):
            raise OSError(errno.EMLINK, "Too many links")
        link(source, target, **options)

    monkeypatch.setattr(os, "link", crowded)
    keep(quarantine, "b")
    assert quarantine.message("a").read() == quarantine.message("b").read() == MAIL
    assert (tmp_path / "entries" / "a.eml").stat().st_ino != (tmp_path / "entries" / "b.eml").stat().st_ino


def test_an_incident_that_is_there_stays_as_it_was(tmp_path):
    quarantine = Quarantine(tmp_path)
    keep(quarantine, "a")
    with pytest.raises(FileExistsError):
        keep(quarantine, "a", b"other")
    assert quarantine.message("a").read() == MAIL


class FailsOnce:
    """A system call that fails the ``nth`` time."""

    def __init__(self, true, nth):
        self.true, self.nth, self.calls = true, nth, 0

    def __call__(self, *args, **options):
        self.calls += 1
        if self.calls == self.nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.true(*args, **options)


@pytest.mark.parametrize("step", ["link", "rename", "fsync", "utime", "mkdir"])
def test_a_failure_at_any_step_leaves_nothing_and_is_told(tmp_path, monkeypatch, step):
    """The step fails the first time, then the second time it is done, and so on until it is not reached."""
    true, told = getattr(os, step), 0
    for nth in range(1, 20):
        fails = FailsOnce(true, nth)
        monkeypatch.setattr(os, step, fails)
        quarantine = Quarantine(tmp_path / str(nth))
        try:
            keep(quarantine, "id")
        except OSError:
            told += 1
            assert files(tmp_path / str(nth)) == []
        else:
            assert incidents(quarantine) == ["id"]
            if fails.calls < nth:
                break
    assert told
    assert fails.calls < nth


@pytest.mark.parametrize("step", ["link", "rename", "fsync", "utime"])
def test_a_step_that_hangs_costs_the_message_its_deadline_and_leaves_nothing_when_it_returns(
    tmp_path, monkeypatch, step
):
    """The message was deferred: what is stored afterwards is removed again."""
    true, end, ended = getattr(os, step), threading.Event(), threading.Event()

    def hang(*arguments, **options):
        end.wait(30)
        return true(*arguments, **options)

    monkeypatch.setattr(os, step, hang)
    quarantine = Quarantine(tmp_path)

    async def keep_with_a_watchdog() -> float:
        delays, finished = [0.0], asyncio.Event()

        async def watch() -> None:
            while not finished.is_set():
                before = time.monotonic()
                await asyncio.sleep(0.01)
                delays.append(time.monotonic() - before)

        watching = asyncio.create_task(watch())
        with pytest.raises(TimeoutError):
            await quarantine.keep("id1", message_of(MAIL), facts_of(), Deadline.after(0.5))
        finished.set()
        await watching
        return len(delays)

    drop = quarantine._drop

    def dropped(*arguments):
        drop(*arguments)
        ended.set()

    monkeypatch.setattr(quarantine, "_drop", dropped)
    assert asyncio.run(keep_with_a_watchdog()) > 5, "the event loop goes on"
    end.set()
    assert ended.wait(20)
    assert files(tmp_path) == []


def test_an_expired_deadline_is_told(tmp_path):
    with pytest.raises(TimeoutError):
        asyncio.run(Quarantine(tmp_path).keep("id", message_of(b"x"), {}, Deadline.after(-1)))


CRASH = """
import asyncio, os, signal, sys
from contentfilter.deadline import Deadline
from contentfilter.model import Message
from contentfilter.store.quarantine import Quarantine
directory, victim = sys.argv[1], int(sys.argv[2])
step = 0
steps = ("open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.utime")
def audit(event, arguments):
    global step
    if event in steps and directory in str(arguments[0]):
        step += 1
        if step == victim:
            os.kill(os.getpid(), signal.SIGKILL)
from pathlib import Path
quarantine = Quarantine(Path(directory))
sys.addaudithook(audit)
data = b"Subject: x\\n\\n" + bytes(100_000)
asyncio.run(quarantine.keep("id", Message(-1, len(data), data), {"rule": "r"}, Deadline.after(20)))
"""


def test_a_kill_before_any_step_leaves_it_complete_or_absent(tmp_path):
    data = b"Subject: x\n\n" + bytes(100_000)
    seen = []
    for victim in range(1, 40):
        directory = tmp_path / str(victim)
        ended = subprocess.run([sys.executable, "-c", CRASH, str(directory), str(victim)], check=False)
        assert ended.returncode in (0, -signal.SIGKILL)
        clock = Clock()
        quarantine = Quarantine(directory, clock=clock)
        there = incidents(quarantine)
        if there:
            assert quarantine.message("id").read() == data
            assert quarantine.get("id").rule == "r"
        seen.append(bool(there))
        clock.now += STALE + 60
        quarantine.expire()
        left = [name for name in files(directory) if "id." not in name and "/messages/" not in f"/{name}"]
        assert left == []
        assert there or files(directory) == []
        if ended.returncode == 0:
            break
        if not there:  # the next attempt is not in the way of the last
            keep(quarantine, "id", data)
            assert quarantine.message("id").read() == data
    assert ended.returncode == 0
    assert len(seen) > 8
    assert seen == sorted(seen)  # absent up to the one step that makes it exist


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    """RLIMIT_FSIZE makes the kernel refuse the write itself."""
    program = (
        "import asyncio, sys, signal\nfrom pathlib import Path\nfrom contentfilter.deadline import Deadline\n"
        "from contentfilter.model import Message\nfrom contentfilter.store.quarantine import Quarantine\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "q = Quarantine(Path(sys.argv[1]))\n"
        "try: asyncio.run(q.keep('id', Message(-1, 100_000, bytes(100_000)), {}, Deadline.after(20)))\n"
        "except OSError as error: sys.exit(f'told {error.errno}')\n"
    )
    limit = 50_000
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert ended.stderr == f"told {errno.EFBIG}\n"
    assert files(tmp_path) == []


# Hostile names and links


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "a\0b", "a\n", "a" * 65, "é", "a.json", "-rf", "*"]
)
def test_a_name_that_could_lead_elsewhere_is_refused(tmp_path, name):
    quarantine = Quarantine(tmp_path / "q")
    assert not valid_incident(name)
    with pytest.raises(OSError, match="incident"):
        keep(quarantine, name)
    for use in (quarantine.find, quarantine.get, quarantine.message, quarantine.delete):
        with pytest.raises(QuarantineError, match="not an incident"):
            use(name)
    assert files(tmp_path) == []


def test_symbolic_links_are_not_followed(tmp_path):
    quarantine = Quarantine(tmp_path / "q")
    keep(quarantine, "good")
    secret = tmp_path / "secret"
    secret.write_bytes((tmp_path / "q" / "entries" / "good.json").read_bytes().replace(b'"good"', b'"evil"'))
    (tmp_path / "q" / "entries" / "evil.json").symlink_to(secret)
    (tmp_path / "q" / "entries" / "evil.eml").symlink_to(secret)
    with pytest.raises(OSError, match="symbolic"):
        quarantine.get("evil")
    with pytest.raises(OSError, match="symbolic"):
        quarantine.message("evil")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "entries").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(OSError, match="symbolic"):
        keep(Quarantine(tmp_path / "r"), "id")
    assert files(tmp_path / "elsewhere") == []


def test_a_directory_that_others_could_enter_is_closed(tmp_path):
    (tmp_path / "q").mkdir(mode=0o755)
    keep(Quarantine(tmp_path / "q"), "id")
    assert stat.S_IMODE((tmp_path / "q").stat().st_mode) == 0o700


# Limits


def test_expiry_by_age_takes_the_entry_and_its_bytes_and_nothing_younger(tmp_path):
    clock = Clock()
    quarantine = Quarantine(tmp_path, retention=2.0, clock=clock)
    keep(quarantine, "a", b"old")
    keep(quarantine, "b", b"shared")
    clock.now += DAY
    keep(quarantine, "c", b"shared")
    clock.now += DAY - 1
    assert quarantine.expire().entries == ()
    clock.now += 1
    assert quarantine.expire(dry_run=True).entries == ("a", "b")
    assert incidents(quarantine) == ["c", "b", "a"]
    assert quarantine.expire().entries == ("a", "b")
    assert incidents(quarantine) == ["c"]
    assert quarantine.message("c").read() == b"shared"
    assert len(list((tmp_path / "messages").rglob("*.eml"))) == 1


def test_a_full_quota_lets_the_oldest_go(tmp_path):
    clock = Clock()
    quarantine = Quarantine(tmp_path, quota=100_000, clock=clock)
    for number in range(12):
        clock.now += 1
        keep(quarantine, f"id{number:02}", bytes([number]) * 15_000)
    there = incidents(quarantine)
    assert there == [f"id{number:02}" for number in range(11, 11 - len(there), -1)]
    assert 5 <= len(there) <= 6
    used = sum(path.stat().st_size for path in (tmp_path / "entries").iterdir())
    assert used <= 100_000
    assert quarantine.expire().used == used


def test_equal_messages_count_once_for_the_quota(tmp_path):
    quarantine = Quarantine(tmp_path, quota=100_000)
    for number in range(8):
        keep(quarantine, f"id{number}", bytes(60_000))
    assert len(incidents(quarantine)) == 8 or quarantine.expire().used <= 100_000
    assert quarantine.expire().used < 70_000


def test_what_is_protected_never_makes_room_and_the_new_message_is_refused(tmp_path):
    clock = Clock()
    quarantine = Quarantine(tmp_path, quota=50_000, protect=1.0, clock=clock)
    keep(quarantine, "a", b"a" * 30_000)
    with pytest.raises(OSError, match="quarantine is full") as refused:
        keep(quarantine, "b", b"b" * 30_000)
    assert refused.value.errno == errno.EDQUOT
    assert files(tmp_path)[:2] == ["entries/a.eml", "entries/a.json"]
    clock.now += DAY
    keep(quarantine, "b", b"b" * 30_000)
    assert incidents(quarantine) == ["b"]


def test_a_message_above_the_quota_costs_nobody_their_entry(tmp_path):
    quarantine = Quarantine(tmp_path, quota=50_000)
    keep(quarantine, "a")
    with pytest.raises(OSError, match="quarantine is full"):
        keep(quarantine, "b", bytes(50_000))
    assert incidents(quarantine) == ["a"]


def test_the_quota_sees_what_other_processes_kept(tmp_path):
    clock = Clock()
    one, other = (Quarantine(tmp_path, quota=100_000, protect=1.0, clock=clock) for _ in range(2))
    keep(one, "a", b"a" * 40_000)
    keep(other, "b", b"b" * 40_000)
    clock.now += RECOUNT
    with pytest.raises(OSError, match="quarantine is full"):
        keep(one, "c", b"c" * 40_000)


def test_expiry_removes_what_a_crash_left_and_only_when_it_is_old(tmp_path):
    clock = Clock()
    quarantine = Quarantine(tmp_path, clock=clock)
    name = keep(quarantine, "a")
    for stray in ("entries/.new-1", "entries/x.eml", f"messages/{name[:2]}/.new-2"):
        (tmp_path / stray).write_bytes(b"half")
    (tmp_path / "messages" / name[:2] / f"{name[:2]}{'0' * 62}.eml").write_bytes(b"unreferenced")
    assert quarantine.expire().stray == 1
    assert len(files(tmp_path)) == 6
    clock.now += STALE + 60
    assert quarantine.expire().stray == 3
    assert files(tmp_path) == ["entries/a.eml", "entries/a.json", f"messages/{name[:2]}/{name}.eml"]


def test_the_defaults_come_from_the_settings(tmp_path):
    quarantine = Quarantine.of(Settings())
    assert quarantine.directory == Path("/var/lib/contentfilter/quarantine")


def keep_many(directory: Path, who: str, count: int, results) -> None:
    quarantine = Quarantine(directory, quota=2_000_000)
    complete = 0
    for number in range(count):
        incident = f"{who}{number:03}"
        keep(quarantine, incident, b"the same bytes" if number % 2 else incident.encode() * 100)
        try:
            with quarantine.held(incident) as entry, quarantine.message(incident) as file:
                assert hashlib.sha256(file.read()).hexdigest() == entry.sha256
                complete += 1
        except QuarantineError:
            pass  # expired already
    results.put(complete)


def expire_often(directory: Path, stop, results) -> None:
    """An entry counts as too old as soon as it is there."""
    quarantine = Quarantine(directory, retention=1e-9)
    gone = 0
    while not stop.is_set():
        gone += len(quarantine.expire().entries)
    results.put(gone + len(quarantine.expire().entries))


def test_keeping_and_expiry_in_several_processes_never_part_an_entry_from_its_message(tmp_path):
    context = multiprocessing.get_context("fork")
    stop, kept, expired = context.Event(), context.Queue(), context.Queue()
    keepers = [context.Process(target=keep_many, args=(tmp_path, who, 60, kept)) for who in "xy"]
    expirer = context.Process(target=expire_often, args=(tmp_path, stop, expired))
    for process in (*keepers, expirer):
        process.start()
    for process in keepers:
        process.join(60)
        assert process.exitcode == 0
    stop.set()
    total = expired.get(timeout=30)
    expirer.join(30)
    assert expirer.exitcode == 0
    kept.get(timeout=5), kept.get(timeout=5)
    assert total == 120
    assert [name for name in files(tmp_path) if name.startswith("entries")] == []


# Finding


@pytest.fixture
def four(tmp_path) -> Quarantine:
    clock = Clock()
    quarantine = Quarantine(tmp_path, clock=clock)
    keep(quarantine, "0a1", b"Message-ID: <M1@x>\n\n", sender=b"Bob@There.example", rule="clamd: Win.Test-1")
    clock.now += 100
    keep(quarantine, "0a2", b"Subject: Invoice [1]\n\n", recipients=(b"c@here", b"d@here"), rule="clamd: Win.Test-10")
    clock.now += 100
    keep(quarantine, "0b1", sender=b"", rule="signatures: Loader")
    clock.now += 100
    keep(quarantine, "0b2")
    return quarantine


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ({}, ["0b2", "0b1", "0a2", "0a1"]),
        ({"sender": "bob@there"}, ["0a1"]),
        ({"sender": "bob@*.EXAMPLE"}, ["0a1"]),
        ({"sender": "*@there"}, ["0b2", "0a2"]),
        ({"recipient": "d@here"}, ["0a2"]),
        ({"signature": "win.test-1"}, ["0a1"]),
        ({"signature": "Win.Test"}, []),
        ({"signature": "Win.Test-1*"}, ["0a2", "0a1"]),
        ({"signature": "clamd: Win.Test-10"}, ["0a2"]),
        ({"message_id": "m1@X"}, ["0a1"]),
        ({"subject": "*[1]"}, ["0a2"]),
        ({"incident": "0a"}, ["0a2", "0a1"]),
        ({"sender": "there", "incident": "0b"}, ["0b2"]),
    ],
)
def test_search(four, search, found):
    assert incidents(four, **search) == found


def test_search_by_time_and_by_release(four):
    first = four.get("0a1").time
    assert incidents(four, since=first + 100) == ["0b2", "0b1", "0a2"]
    assert incidents(four, until=first + 100) == ["0a1"]
    asyncio.run(four.note_release("0a2", Release(1.0, "root", ("c@here",))))
    assert incidents(four, unreleased=True) == ["0b2", "0b1", "0a1"]


def test_a_unique_prefix_is_enough_and_an_ambiguous_one_is_not_guessed(four):
    assert four.find("0b2").incident == "0b2"
    keep(four, "0c")
    keep(four, "0c1")
    assert four.find("0c").incident == "0c"
    with pytest.raises(QuarantineError, match="2 incidents"):
        four.find("0a")
    with pytest.raises(QuarantineError, match="not in the quarantine"):
        four.find("0d")


def test_a_release_is_noted_with_everything_else_left_alone(four):
    path = four.directory / "entries" / "0a1.json"
    before, age = json.loads(path.read_bytes()), path.stat().st_mtime
    for by in ("root", "ann"):
        asyncio.run(four.note_release("0a1", Release(2.0, by, ("x@y",))))
    after = json.loads(path.read_bytes())
    assert [done["by"] for done in after.pop("released")] == ["root", "ann"]
    assert after == before
    assert path.stat().st_mtime == age  # its age is what expiry goes by


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"incident": "0a1"}',
        b'{"incident": "other", "sha256": "%s"}' % (b"0" * 64),
        b'{"incident": "0a1", "sha256": "../../x"}',
        b'{"incident": "0a1", "sha256": "%s", "withheld_from": [0]}' % (b"0" * 64),
        b'{"incident": "0a1", "sha256": "%s", "withheld_from": [-1]}' % (b"0" * 64),
        b'{"incident": "0a1", "sha256": "%s", "envelope_hex": {"sender": "zz"}}' % (b"0" * 64),
    ],
)
def test_a_damaged_sidecar_is_shown_as_such_and_can_be_deleted(four, damage):
    (four.directory / "entries" / "0a1.json").write_bytes(damage)
    with pytest.raises(QuarantineError, match="damaged"):
        four.get("0a1")
    assert "damaged" in four.find("0a1").damaged
    assert incidents(four) == ["0b2", "0b1", "0a2", "0a1"]
    four.delete("0a1")
    assert incidents(four) == ["0b2", "0b1", "0a2"]


def test_an_entry_that_is_held_is_neither_released_nor_removed_by_others(four):
    other = Quarantine(four.directory, retention=1e-9)
    with four.held("0a1"):
        with pytest.raises(QuarantineError, match="just now"), other.held("0a1"):
            pass
        with pytest.raises(QuarantineError, match="just now"):
            other.delete("0a1")
        asyncio.run(four.note_release("0a1", Release(1.0, "root", ())))
    with other.held("0a1") as entry:
        assert entry.released


def test_an_empty_place_is_an_empty_quarantine(tmp_path):
    quarantine = Quarantine(tmp_path / "none")
    assert incidents(quarantine) == []
    assert quarantine.expire().used == 0
    assert not (tmp_path / "none").exists()
