"""A release reaches qmail-queue once, byte for byte, and its token holds for exactly that message."""

import asyncio
import hashlib
import mmap
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.standin import Standin, build

from contentfilter.deadline import Deadline
from contentfilter.errors import QuarantineError
from contentfilter.model import Message
from contentfilter.store.quarantine import Quarantine
from contentfilter.store.release import LIFETIME, TOKEN_WITHIN, Releaser, load_secret, released, sign

SECRET = bytes(range(32))
NOW = 1_800_000_000.0
MAIL = b"Subject: kept\nX-ContentFilter: forged\n\n\0body\xff without line end"


def token(data: bytes = MAIL, secret: bytes = SECRET, expires: float = NOW + 10, by: str = "root") -> bytes:
    return sign(secret, "0a1b2c", by, int(expires), hashlib.sha256(data).hexdigest())


# The token


def test_without_a_secret_nothing_was_released():
    """A worker that cannot read the key has an empty one; anybody can sign with that."""
    assert released(token(secret=b"") + MAIL, b"", NOW) is None


def test_a_token_is_one_header_line_that_names_incident_user_and_end():
    line = token(by="ann")
    assert line.startswith(b"X-ContentFilter-Released: 0a1b2c; by=ann; expires=1800000010; sha256=")
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert len(line) < 998


BIG = bytes(range(256)) * 12_000


@pytest.mark.parametrize(
    "data",
    [MAIL, b"", b"\n", b"\nno header", b"Subject: x", b"A: b\r\n\r\nc", BIG],
    ids=["mail", "empty", "newline", "body", "header", "crlf", "binary"],
)
def test_a_token_is_known_whatever_the_message_looks_like(data):
    assert released(token(data) + data, SECRET, NOW) == "0a1b2c"


def test_a_token_is_known_in_a_mapped_file():
    with tempfile.TemporaryFile() as file:
        file.write(token() + MAIL)
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            assert released(data, SECRET, NOW) == "0a1b2c"


def test_what_delivery_puts_in_front_does_not_matter():
    front = b"Delivered-To: a@b\nReceived: (qmail 1 invoked by uid 2); 1 Jan 2027\n\t(folded)\nX-Envelope-To: c\n"
    for hops in (1, 100):
        assert released(front * hops + token() + MAIL, SECRET, NOW) == "0a1b2c"


@given(st.integers(0, len(token() + MAIL) - 1), st.integers(1, 255))
def test_no_byte_of_it_can_be_changed(at, difference):
    data = bytearray(token() + MAIL)
    data[at] ^= difference
    assert released(data, SECRET, NOW) is None


@pytest.mark.parametrize(
    "data",
    [
        token() + MAIL + b"\n",
        token() + MAIL[:-1],
        token() + b"X-More: 1\n" + MAIL,
        token(expires=NOW - 1) + MAIL,
        token(secret=bytes(32)) + MAIL,
        token(by="root")[:-1] + b"\r\n" + MAIL,
        b" " + token() + MAIL,
        b"X" + token() + MAIL,
        b"\n" + token() + MAIL,  # in the body
        b"\r\n" + token() + MAIL,
        b"A: b\n\n" + token() + MAIL,
        b"A: b\n\r\n" + token() + MAIL,
        token() + token() + MAIL,  # only the first one counts
        token().replace(b"mac=", b"mac= ") + MAIL,
        token().lower() + MAIL,
        b"X-ContentFilter-Released: \n" + token() + MAIL,
        MAIL,
        b"",
    ],
)
def test_anything_else_is_no_release(data):
    assert released(data, SECRET, NOW) is None


def test_a_token_ends_at_its_time():
    data = token(expires=NOW + 10) + MAIL
    assert released(data, SECRET, NOW + 10) == "0a1b2c"
    assert released(data, SECRET, NOW + 11) is None


def test_a_forger_costs_neither_a_hash_nor_a_long_search(monkeypatch):
    """The body is hashed only behind a MAC that is right; the header is searched only to its limit."""
    body = bytes(8 << 20)
    forged = token(body, secret=bytes(32))
    beyond = b"A: b\n" * (TOKEN_WITHIN // 5 + 1) + token(body) + body
    monkeypatch.setattr(hashlib, "sha256", lambda *_: pytest.fail("hashed"))
    assert released(forged * 20 + body, SECRET, NOW) is None
    assert released(beyond, SECRET, NOW) is None


def test_a_user_name_cannot_break_the_line():
    line = sign(SECRET, "a", "x\ny; mac=z\0é", 1, "0" * 64)
    assert line.count(b"\n") == 1
    assert b"by=x_y__mac_z__;" in line


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
    forwarded = b"Delivered-To: x\nReceived: (qmail)\n" + standin.queued()[0].message
    assert released(forwarded, SECRET, time.time() + LIFETIME - 60) == "id1"
    assert released(forwarded, SECRET, time.time() + LIFETIME + 60) is None


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
    with pytest.raises(QuarantineError, match="no end within the time"):
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
    with pytest.raises(QuarantineError, match="not those that were kept"):
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
    with pytest.raises(QuarantineError, match="to whom"):
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
