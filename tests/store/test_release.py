"""A release reaches qmail-queue once, byte for byte, and its token holds for exactly that message."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lab.standin import Standin, build

from contentfilter.deadline import Deadline
from contentfilter.errors import QuarantineError
from contentfilter.model import Message
from contentfilter.store.quarantine import Quarantine
from contentfilter.store.release import Releaser, load_secret
from contentfilter.store.release_token import LIFETIME, verify

SECRET = bytes(range(32))
BIG = bytes(range(256)) * 12_000
MAIL = b"Subject: kept\nX-ContentFilter: forged\n\n\0body\xff without line end"


# The secret


def test_the_secret_is_made_once_and_only_its_owner_may_read_it(tmp_path):
    old = os.umask(0)
    try:
        with ThreadPoolExecutor(8) as pool:
            secrets = set(pool.map(lambda _: load_secret(tmp_path), range(32)))
    finally:
        os.umask(old)
    assert len(secrets) == 1
    assert len(secrets.pop()) == 32
    assert [path.name for path in tmp_path.iterdir()] == ["release.key"]
    assert stat.S_IMODE((tmp_path / "release.key").stat().st_mode) == 0o600


def test_a_secret_that_others_could_know_is_not_used(tmp_path):
    load_secret(tmp_path)
    (tmp_path / "release.key").chmod(0o640)
    with pytest.raises(PermissionError, match="only its owner"):
        load_secret(tmp_path)
    (tmp_path / "release.key").rename(tmp_path / "other")
    (tmp_path / "release.key").symlink_to("other")
    with pytest.raises(OSError, match="symbolic"):
        load_secret(tmp_path)
    (tmp_path / "release.key").unlink()
    (tmp_path / "release.key").write_bytes(b"")
    (tmp_path / "release.key").chmod(0o600)
    with pytest.raises(PermissionError, match="32 bytes"):
        load_secret(tmp_path)


# The submission


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("standin"))


@pytest.fixture
def queue(program, tmp_path, monkeypatch):
    """A stand-in, and the means to set its knobs."""
    standin = Standin(program, tmp_path / "queue")

    def knobs(**values):
        for name, value in standin.environ(**values).items():
            monkeypatch.setenv(name, value)
        return standin

    return knobs


@pytest.fixture
def releaser(tmp_path, program) -> Releaser:
    quarantine = Quarantine(tmp_path / "quarantine")
    return Releaser(quarantine, program, SECRET, "ann")


RECIPIENTS = (b"a@here", b"b\xff@here", b"c@here")


def keep(releaser: Releaser, incident: str = "id1", data: bytes = MAIL, withheld=(1, 2)) -> None:
    facts = {
        "envelope_hex": {"sender": b"s-@there-@[]".hex(), "recipients": [r.hex() for r in RECIPIENTS]},
        "withheld_from": list(withheld),
    }
    asyncio.run(releaser.quarantine.keep(incident, Message(-1, len(data), data), facts, Deadline.after(20)))


def release(releaser: Releaser, incident: str = "id1", seconds: float = 20, **how):
    return asyncio.run(releaser.release(incident, Deadline.after(seconds), **how))


@pytest.mark.parametrize("data", [MAIL, b"", BIG], ids=["mail", "empty", "binary"])
def test_those_who_were_left_out_get_the_very_bytes_below_one_line(releaser, queue, data):
    standin = queue()
    keep(releaser, data=data)
    done = release(releaser)
    (queued,) = standin.queued()
    assert queued.envelope_bytes == b"Fs-@there-@[]\0Tb\xff@here\0Tc@here\0\0"
    line, _, rest = queued.message.partition(b"\n")
    assert rest == data
    assert line.startswith(b"X-ContentFilter-Released: id1; by=ann; ")
    assert done.to == ("b?@here", "c@here")
    assert set(queued.descriptors) == {0, 1, 2}


def test_what_goes_out_is_known_on_its_way_back_as_long_as_qmail_would_try(releaser, queue):
    standin = queue()
    keep(releaser)
    release(releaser)
    forwarded = (
        b"Delivered-To: c@here\nReceived: (qmail 7 invoked by uid 500); 9 Jan 2027 08:15:00 -0000\n"
        + standin.queued()[0].message
    )
    for later, incident in ((LIFETIME - 60, "id1"), (LIFETIME + 60, None)):
        found = verify(forwarded, SECRET, time.time() + later, RECIPIENTS[1:])
        assert (found.incident if found else None) == incident


def test_a_token_is_for_the_addresses_to_which_the_recipients_forward(releaser, queue):
    standin = queue()
    keep(releaser)
    release(releaser, forward=(b"final@there",))
    (queued,) = standin.queued()
    assert queued.envelope.recipients == RECIPIENTS[1:]
    assert verify(queued.message, SECRET, time.time(), (b"final@there",))
    assert verify(queued.message, SECRET, time.time(), RECIPIENTS[1:]) is None


def test_a_release_is_marked_with_who_when_and_to_whom(releaser, queue):
    queue()
    keep(releaser)
    before = time.time()
    release(releaser, to=(b"boss@here",))
    (done,) = releaser.quarantine.get("id1").released
    assert (done.by, done.to) == ("ann", ("boss@here",))
    assert before <= done.time <= time.time()


def test_a_second_release_must_be_asked_for(releaser, queue):
    standin = queue()
    keep(releaser)
    release(releaser)
    with pytest.raises(QuarantineError, match="released before, by ann"):
        release(releaser)
    assert len(standin.queued()) == 1
    release(releaser, again=True)
    assert len(standin.queued()) == 2
    assert len(releaser.quarantine.get("id1").released) == 2


def test_two_at_once_release_it_once(releaser, queue):
    standin = queue()
    keep(releaser)

    async def both():
        jobs = [releaser.release("id1", Deadline.after(20)) for _ in range(2)]
        return await asyncio.gather(*jobs, return_exceptions=True)

    results = asyncio.run(both())
    assert sum(isinstance(result, QuarantineError) for result in results) == 1
    assert len(standin.queued()) == 1


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (11, "address"),
        (31, "refused"),
        (51, "memory"),
        (53, "disk"),
        (62, "queue dir"),
        (81, "defect"),
        (99, "status 99"),
    ],
)
@pytest.mark.parametrize("at", ["message", "end"])
def test_every_other_exit_status_is_an_error_and_leaves_it_unmarked(releaser, queue, status, words, at):
    standin = queue(at=at, exit=str(status))
    keep(releaser)
    with pytest.raises(QuarantineError, match=f"status {status}.*nothing was queued") as error:
        release(releaser)
    assert words in str(error.value)
    assert releaser.quarantine.get("id1").released == ()
    assert standin.queued() == []


def test_a_queue_that_is_killed_is_an_error(releaser, queue):
    standin = queue(at="envelope", signal=str(int(signal.SIGKILL)))
    keep(releaser)
    with pytest.raises(QuarantineError, match="killed by a signal"):
        release(releaser)
    assert releaser.quarantine.get("id1").released == ()
    assert standin.queued() == []


def test_a_queue_that_hangs_is_killed_at_the_deadline(releaser, queue):
    standin = queue(at="message", stall="1")
    keep(releaser)
    with pytest.raises(QuarantineError, match="timed out"):
        release(releaser, seconds=0.5)
    (pid,) = standin.stalled()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert standin.queued() == []
    assert releaser.quarantine.get("id1").released == ()


def script(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "program"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_program_that_does_not_read_has_not_queued_anything(releaser, tmp_path):
    keep(releaser, data=BIG)
    hasty = Releaser(releaser.quarantine, script(tmp_path, "exit 0"), SECRET, "ann")
    with pytest.raises(QuarantineError, match="before it had read everything"):
        release(hasty)
    assert releaser.quarantine.get("id1").released == ()


@pytest.mark.parametrize("path", ["/nonexistent/qmail-queue", "/etc/passwd", "/"])
def test_a_program_that_cannot_be_started_is_an_error(releaser, path):
    keep(releaser)
    with pytest.raises(QuarantineError, match="is it the real qmail-queue"):
        release(Releaser(releaser.quarantine, Path(path), SECRET, "ann"))
    assert releaser.quarantine.get("id1").released == ()


KILLER = """#!{python}
import os, signal, sys
os.read(0, 1000)
os.kill(os.getppid(), signal.SIGKILL)
while os.read(0, 1 << 20):
    pass
with open({answer!r}, "wb") as answer:
    answer.write(b"envelope: " + os.read(1, 1000))
"""
RELEASE = """
import asyncio, sys
from pathlib import Path
from contentfilter.deadline import Deadline
from contentfilter.store.quarantine import Quarantine
from contentfilter.store.release import Releaser
releaser = Releaser(Quarantine(Path(sys.argv[1])), Path(sys.argv[2]), bytes(32), "ann")
asyncio.run(releaser.release("id1", Deadline.after(20)))
"""


def test_who_is_killed_half_way_leaves_a_queue_that_finds_no_envelope(releaser, tmp_path):
    keep(releaser, data=BIG)
    answer, program = tmp_path / "answer", tmp_path / "program"
    os.mkfifo(answer)
    program.write_text(KILLER.format(python=sys.executable, answer=str(answer)))
    program.chmod(0o755)
    arguments = [sys.executable, "-c", RELEASE, str(releaser.quarantine.directory), str(program)]
    with subprocess.Popen(arguments) as process:
        assert answer.read_bytes() == b"envelope: "
        assert process.wait(20) == -signal.SIGKILL
    assert releaser.quarantine.get("id1").released == ()


def test_bytes_that_are_not_the_ones_kept_do_not_go_out(releaser, queue):
    standin = queue()
    keep(releaser)
    with open(releaser.quarantine.directory / "entries" / "id1.eml", "r+b") as file:
        file.write(b"X")
    with pytest.raises(QuarantineError, match="has changed since it was stored"):
        release(releaser)
    assert standin.queued() == []


@pytest.mark.parametrize("to", [(b"a\0Tb",), (b"x" * 1003,)])
def test_an_address_that_would_break_the_envelope_is_refused(releaser, queue, to):
    standin = queue()
    keep(releaser)
    with pytest.raises(QuarantineError, match="not an envelope address"):
        release(releaser, to=to)
    assert standin.queued() == []


def test_withheld_from_nobody_needs_an_address(releaser, queue):
    standin = queue()
    keep(releaser, withheld=())
    with pytest.raises(QuarantineError, match="--to"):
        release(releaser)
    release(releaser, to=(b"x@y",))
    assert standin.queued()[0].envelope.recipients == (b"x@y",)


def test_a_release_that_cannot_be_noted_is_told(releaser, queue, monkeypatch):
    standin = queue()
    keep(releaser)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space"):
        release(releaser)
    assert len(standin.queued()) == 1
    assert releaser.quarantine.get("id1").released == ()
