"""Several submissions: all are queued, or none is; after the commit a failure is reported and causes a retry."""

import os
import signal
import time
from pathlib import Path

import pytest
from lab.hook import HookLab, HookProcess, split, until

from contentfilter.wire import envelope
from contentfilter.wire.hook import CommitReport, Result, Submission

SIZES = pytest.mark.parametrize("size", [0, 20, 65_536, 300_000], ids=["empty", "small", "64K", "large"])


def parts(count: int) -> tuple[Submission, ...]:
    return tuple(
        Submission(b"X-Part: %d\n" % i, 0, envelope.build(b"s@example.org", [b"r%d@example.org" % i]))
        for i in range(count)
    )


@SIZES
@pytest.mark.parametrize("count", [2, 3, 10])
def test_all_parts_are_queued_byte_for_byte(both: HookLab, size: int, count: int) -> None:
    message = os.urandom(size)
    daemon = both.daemon(split(*parts(count)))
    result = both.run(message)
    daemon.wait(reports=1)
    queued = sorted(both.standin.queued(), key=lambda q: q.envelope.recipients)
    assert (result.status, result.stderr) == (0, b"")
    assert [q.message for q in queued] == [b"X-Part: %d\n" % i + message for i in range(count)]
    assert [q.envelope.recipients for q in queued] == [(b"r%d@example.org" % i,) for i in range(count)]
    assert daemon.reports == [CommitReport((Result(0, True),) * count)]
    assert {q.ppid for q in queued} == {result.pid}


def test_parts_may_replace_leading_bytes_and_keep_the_envelope(both: HookLab) -> None:
    block = envelope.build(b"s", [b"r%d" % i for i in range(20_000)])
    message = os.urandom(200_000)
    both.daemon(split(Submission(b"", 0), Submission(b"new head\n", 150_000), Submission(b"x" * 200_000, 200_000)))
    assert both.run(message, block).status == 0
    queued = both.standin.queued()
    assert sorted(q.message for q in queued) == sorted([message, b"new head\n" + message[150_000:], b"x" * 200_000])
    assert {q.envelope_bytes for q in queued} == {block}


def test_as_many_parts_as_the_protocol_allows(lab: HookLab) -> None:
    daemon = lab.daemon(split(*parts(128)))
    assert lab.run().status == 0
    daemon.wait(reports=1)
    assert len(lab.standin.queued()) == 128


@SIZES
@pytest.mark.parametrize("point", ["message", "envelope"])
@pytest.mark.parametrize(("failure", "status"), [("53", 53), ("11", 11), ("31", 31), ("13", 71), ("82", 71), ("0", 81)])
def test_a_part_that_fails_before_the_commit_undoes_all(
    lab: HookLab, size: int, point: str, failure: str, status: int
) -> None:
    daemon = lab.daemon(split(*parts(3)))
    result = lab.run(os.urandom(size), knobs={"at": point, "when": "X-Part: 1", "exit": failure})
    daemon.wait(reports=1)
    assert result.status == status
    assert (lab.standin.queued(), lab.standin.leftovers()) == ([], [])
    assert daemon.reports == [CommitReport((Result(54, False), Result(int(failure), False), Result(54, False)))]


@pytest.mark.parametrize("point", ["message", "envelope"])
def test_a_part_that_is_killed_before_the_commit_undoes_all(both: HookLab, point: str) -> None:
    daemon = both.daemon(split(*parts(3)))
    result = both.run(b"x" * 200_000, knobs={"at": point, "when": "X-Part: 2", "signal": str(int(signal.SIGKILL))})
    daemon.wait(reports=1)
    assert result.status == 81
    assert (both.standin.queued(), both.standin.leftovers()) == ([], [])
    assert daemon.reports[0].results[2] == Result(-9, False)


@pytest.mark.parametrize(("failure", "status"), [("53", 53), ("66", 66), ("31", 71), ("1", 71)])
def test_a_part_that_fails_after_the_commit_is_told(both: HookLab, failure: str, status: int) -> None:
    daemon = both.daemon(split(*parts(3)))
    result = both.run(knobs={"at": "end", "when": "X-Part: 1", "exit": failure})
    daemon.wait(reports=1)
    assert result.status == status
    assert b"not queued: 2 with status " + failure.encode() in result.stderr
    assert [q.envelope.recipients for q in both.standin.queued()] == [(b"r0@example.org",), (b"r2@example.org",)]
    assert daemon.reports == [CommitReport((Result(0, True), Result(int(failure), True), Result(0, True)))]


def test_a_part_that_is_killed_after_the_commit_is_told(both: HookLab) -> None:
    daemon = both.daemon(split(*parts(2)))
    result = both.run(knobs={"at": "end", "when": "X-Part: 0", "signal": "9"})
    daemon.wait(reports=1)
    assert (result.status, len(both.standin.queued())) == (81, 1)
    assert b"not queued: 1 by signal 9" in result.stderr
    assert daemon.reports == [CommitReport((Result(-9, True), Result(0, True)))]


def stalled(lab: HookLab, hook: HookProcess) -> int:
    until(lambda: lab.standin.stalled(), "one stands still")
    return lab.standin.stalled()[0]


@pytest.mark.parametrize("point", ["message", "envelope"])
def test_nothing_is_committed_while_one_part_stands_still(lab: HookLab, point: str) -> None:
    daemon = lab.daemon(split(*parts(3)))
    hook = lab.start(b"x" * 100_000, knobs={"at": point, "when": "X-Part: 1", "stall": "1"})
    pid = stalled(lab, hook)
    until(lambda: len(lab.standin.leftovers()) >= 8, "the others have come as far as they can")
    assert lab.standin.queued() == []
    os.kill(pid, signal.SIGKILL)
    assert hook.wait().status == 81
    assert (lab.standin.queued(), lab.standin.stalled()) == ([], [pid])
    daemon.wait(reports=1)


def test_killing_the_hook_before_the_commit_queues_nothing(lab: HookLab) -> None:
    lab.daemon(split(*parts(3)))
    hook = lab.start(b"x" * 100_000, knobs={"at": "message", "when": "X-Part: 1", "stall": "1"})
    pid = stalled(lab, hook)
    hook.kill()
    assert hook.wait().status == -signal.SIGKILL
    os.kill(pid, signal.SIGKILL)
    until(lambda: len([n for n in lab.standin.leftovers() if not n.startswith(str(pid))]) == 0, "the others cleaned up")
    assert lab.standin.queued() == []


def test_a_program_that_cannot_be_started_undoes_all(both: HookLab) -> None:
    queue = both.directory / "not-a-program"
    queue.write_text("no magic number")
    queue.chmod(0o755)
    daemon = both.daemon(split(*parts(2)))
    assert both.run(queue=queue).status == 120
    daemon.wait(reports=1)


def test_a_caller_that_ignores_children_does_not_cost_the_statuses(lab: HookLab) -> None:
    daemon = lab.daemon(split(*parts(2)))
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        hook = lab.start(knobs={"at": "end", "when": "X-Part: 0", "exit": "53"})
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert hook.wait().status == 53
    daemon.wait(reports=1)


def test_a_hundred_thousand_recipients_in_two_parts(both: HookLab) -> None:
    halves = [
        envelope.build(b"s", [b"recipient%d@example.org" % i for i in range(first, 100_000, 2)]) for first in (0, 1)
    ]
    both.daemon(split(*(Submission(b"", 0, half) for half in halves)))
    started = time.monotonic()
    assert both.run().status == 0
    assert time.monotonic() - started < 10
    assert {q.envelope_bytes for q in both.standin.queued()} == set(halves)


@pytest.mark.parametrize("point", ["message", "envelope"])
def test_the_deadline_ends_a_part_that_stands_still(lab: HookLab, impatient_hook: Path, point: str) -> None:
    daemon = lab.daemon(split(*parts(3)))
    knobs = {"at": point, "when": "X-Part: 1", "stall": "1"}
    result = lab.run(b"x" * 100_000, program=impatient_hook, budget=1, knobs=knobs)
    daemon.wait(reports=1)
    assert result.status == 52
    assert lab.standin.queued() == []
    assert daemon.reports == [CommitReport((Result(54, False), Result(-9, False), Result(54, False)))]


def test_the_deadline_after_the_commit_asks_for_a_retry(lab: HookLab, impatient_hook: Path) -> None:
    daemon = lab.daemon(split(*parts(2)))
    knobs = {"at": "end", "when": "X-Part: 1", "stall": "1"}
    result = lab.run(program=impatient_hook, budget=1, knobs=knobs)
    daemon.wait(reports=1)
    assert result.status == 52
    assert b"not queued: 2 with status 52" in result.stderr
    assert daemon.reports == [CommitReport((Result(0, True), Result(52, True)))]
    for pid in lab.standin.stalled():
        os.kill(pid, signal.SIGKILL)
