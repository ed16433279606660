"""Descriptors of an offer: the daemon cannot change through them what the hook queues, on disk or in memory."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest
from lab.abuse import abuse
from lab.hook import FakeDaemon, HookLab, accepted, split

from contentfilter.wire.hook import Answer, Submission

MESSAGE = b"Subject: test\n\n" + b"0123456789abcde\n" * 10_000
ENVELOPE = b"Fsender@example.org\0" + b"Trecipient@example.com\0" * 1000 + b"\0"
ANSWERS = {
    "as received": accepted(),
    "rewritten": Answer(accepted().action, submissions=(Submission(b"X-New: 1\n", skip=14),)),
    "split": split(Submission(b"A: 1\n"), Submission(b"B: 2\n", skip=14, envelope=b"Fa@b.example\0Tc@d.example\0\0")),
}
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
root = pytest.mark.skipif(os.getuid() != 0, reason="needs root: the daemon is another user than the hook")


def expected(answer: Answer) -> list[tuple[bytes, bytes]]:
    return [(each.prepend + MESSAGE[each.skip :], each.envelope or ENVELOPE) for each in answer.submissions]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("memory", [pytest.param(0, marks=root, id="file"), pytest.param(1 << 20, id="memory")])
def test_a_daemon_that_tries_everything_changes_nothing(lab: HookLab, memory: int, answer: str) -> None:
    reply = ANSWERS[answer]
    with FakeDaemon(lab.socket, reply, handle=abuse):
        assert lab.run(MESSAGE, ENVELOPE, memory=memory, spool=lab.directory).status == 0
    assert [(q.message, q.envelope_bytes) for q in lab.standin.queued()] == expected(reply)


def test_even_root_cannot_change_what_is_in_memory(lab: HookLab) -> None:
    with FakeDaemon(lab.socket, accepted(), handle=lambda fd: abuse(fd, as_root=True)):
        assert lab.run(MESSAGE, ENVELOPE).status == 0
    assert [(q.message, q.envelope_bytes) for q in lab.standin.queued()] == expected(accepted())


def test_a_file_is_open_for_reading_only(lab: HookLab) -> None:
    flags = []
    with FakeDaemon(lab.socket, accepted(), handle=lambda fd: flags.append(fcntl.fcntl(fd, fcntl.F_GETFL))):
        assert lab.run(MESSAGE, ENVELOPE, memory=0, spool=lab.directory).status == 0
    assert [each & os.O_ACCMODE for each in flags] == [os.O_RDONLY] * 2


@root
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare (package util-linux)")
def test_without_proc_a_large_message_is_sealed_in_memory(lab: HookLab, tmp_path: Path) -> None:
    def script(name: str, line: str) -> Path:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\nexec {line}\n")
        path.chmod(0o755)
        return path

    hook = script("hook", f"unshare -m sh -c 'mount -t tmpfs none /proc && exec {lab.program}'")
    queue = script("queue", f"sh -c 'umount /proc && exec {lab.standin.program}'")  # which looks into /proc itself
    seals: list[int] = []
    with FakeDaemon(lab.socket, accepted(), handle=lambda fd: seals.append(fcntl.fcntl(fd, fcntl.F_GET_SEALS))):
        done = lab.run(MESSAGE, ENVELOPE, memory=0, spool=lab.directory, program=hook, queue=queue)
    assert (done.status, done.stderr) == (0, b"")
    assert seals == [SEALS, SEALS]
    assert [(q.message, q.envelope_bytes) for q in lab.standin.queued()] == expected(accepted())
