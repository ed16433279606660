"""Every system call of the hook fails once in every way: no mail is acknowledged that is not queued, none is queued
twice behind an error, none is refused permanently, nobody waits too long, and nothing stays behind.

By default a sample with every call and every error in it; CONTENTFILTER_FAULTS=all (`make faults`) tries all.
"""

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lab import hook, inject
from lab.hook import Reply, accepted, split
from lab.inject import ERRORS, MOVES, Bench, Fault, Outcome

from contentfilter.wire import envelope
from contentfilter.wire.hook import Action, Answer, Result, Submission

from .conftest import shared

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("musl-gcc"), reason="ptrace by x86-64's registers, and musl"
)

TEMPORARY = {51, 52, 53, 54, 55, 71, 81, 120}
STARTING = ("arch_prctl", "set_tid_address")  # of the C library, before main
LIMIT = 10.0  # seconds; the budget is one, and waiting for parts is cut short in this build
EVERYTHING = os.environ.get("CONTENTFILTER_FAULTS") == "all"
SMALL = b"Subject: test\n\n" + b"hello\n" * 20
LARGE = b"Subject: test\n\n" + b"0123456789abcde\n" * 20_000

# What an administrator should read in the status: memory, disk, reading, configuration.
TELLING = {
    ("memfd_create", "ENOMEM"): {51},
    ("memfd_create", "EMFILE"): {51},
    ("memfd_create", "ENOSPC"): {53},
    ("pipe2", "ENOMEM"): {51},
    ("pipe2", "EMFILE"): {51},
    ("fork", "ENOMEM"): {51},
    ("open", "EMFILE"): {51},
    ("open", "ENOMEM"): {51},
    ("open", "ENOSPC"): {53, 55},
    ("read", "EIO"): {54, 55},
    ("read", "ENOMEM"): {51},
    ("read", "EINTR"): {82},  # nothing has happened: accepted or refused as ever
    ("read", "short"): {82},
    ("sendfile", "ENOSPC"): {53},
    ("sendfile", "EIO"): {53},
    ("dup2", "EMFILE"): {120},
    ("execve", "ENOMEM"): {120},
    ("execve", "EIO"): {120},
}


def parts(count: int) -> tuple[Submission, ...]:
    return tuple(
        Submission(b"X-Part: %d\n" % i, 0, envelope.build(b"s@example.org", [b"r%d@example.org" % i]))
        for i in range(count)
    )


Make = Callable[..., Bench]


@pytest.fixture
def bench(tmp_path: Path, standin_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    base = shared(tmp_path_factory)
    programs = (inject.build(base), hook.build(base, "impatient static", counts=False), standin_program)

    def make(reply: Reply | None, message: bytes = SMALL, **settings: object) -> Bench:
        return Bench(tmp_path / "b", programs, reply, message, **settings)

    return make


def sample(calls: list[str], thin: bool) -> list[Fault]:
    """Which call fails how. ``thin``: every call once, in turn in each way, and the first of each name in all ways."""
    faults = []
    for number, call in enumerate(calls, 1):
        hows = [*ERRORS, "kill", *(["short"] if call in MOVES else [])]
        chosen = [hows[number % len(hows)]] if thin and not EVERYTHING and call in calls[: number - 1] else hows
        faults += [Fault(number, how, "hook") for how in chosen]
    return faults


def common(o: Outcome, began: float) -> None:
    """Invariants that hold for every fault."""
    description = f"{o.fault}: status {o.status}, {len(o.queued)} queued, {o.result.stderr!r}"
    assert time.monotonic() - began < LIMIT, description
    assert o.leftovers == (), description
    if o.fault.how == "kill" and o.fault.call:
        assert o.status == -9, description
    elif o.fault.call == "clock_gettime" and o.fault.how != "short":  # that one moves no bytes: nothing happened
        assert o.status == 81, f"{description}: without a clock nobody knows when to give up"
    elif o.fault.call not in STARTING:
        telling = TELLING.get((o.fault.call, o.fault.how))
        assert o.status in telling if telling and o.status else o.status in TEMPORARY | {0, 31, 82}, description


def each(bench: Bench, thin: bool = False) -> Iterator[tuple[Outcome, str]]:
    calls = bench.calls()
    assert len(calls) > 30
    seen = set()
    for fault in sample(calls, thin):
        began = time.monotonic()
        outcome = bench.run(fault)
        common(outcome, began)
        seen.add((outcome.fault.call, fault.how))
        yield outcome, f"{outcome.fault}: status {outcome.status}, {len(outcome.queued)} queued"
    assert len(seen) > len(set(calls)) * len(ERRORS)


def whole(message: bytes, o: Outcome) -> bool:
    return [q.message for q in o.queued] == [message] and o.queued[0].envelope.recipients == (b"recipient@example.com",)


@pytest.mark.parametrize("message", [SMALL, LARGE], ids=["in memory", "on disk"])
def test_one_copy_is_queued_whole_or_the_client_is_told_to_try_again(bench: Make, message: bytes) -> None:
    for o, description in each(bench(accepted(b"X: y\n"), message, memory=100_000)):
        assert o.queued == () if o.status else whole(b"X: y\n" + message, o), description
        assert o.status not in (31, 82), description


@pytest.mark.parametrize("action", [Action.REJECT, Action.DEFER])
def test_a_refusal_stays_what_it_is_or_becomes_a_deferral(bench: Make, action: Action) -> None:
    said = {Action.REJECT: b"Dno (#5.7.1)", Action.DEFER: b"Zno (#5.7.1)"}[action]
    for o, description in each(bench(Answer(action, text="no (#5.7.1)"))):
        assert o.queued == (), description
        assert o.status != 0, description
        assert o.status != 31 or action is Action.REJECT, description
        assert o.status != 82 or o.result.texts[6] == said, description


@pytest.mark.parametrize("message", [SMALL, LARGE], ids=["in memory", "on disk"])
def test_several_copies_are_all_queued_or_none_or_the_report_says_which(bench: Make, message: bytes) -> None:
    undone = set()
    for o, description in each(bench(split(*parts(2)), message, memory=100_000), thin=True):
        copies = {q.envelope.recipients[0]: q.message for q in o.queued}
        assert len(copies) == len(o.queued), description
        assert all(m == b"X-Part: %d\n" % (to[1] - ord("0")) + message for to, m in copies.items()), description
        assert o.status not in (31, 82), description
        if o.status == 0:
            assert len(copies) == 2, description
        elif copies and o.fault.call != "clock_gettime" and o.fault.how != "kill":
            assert o.reports[0].results.count(Result(0, True)) == len(copies), description
            assert b"parts are queued" in o.result.stderr, description
        undone.add(o.status > 0 and not copies)
    assert undone == {True, False}


@pytest.mark.parametrize("how", ["ENOMEM", "EIO", "EINTR", "kill"])
def test_a_commit_that_breaks_off_queues_no_more_and_says_what_is_queued(bench: Make, how: str) -> None:
    """The whole will come again, so every part that is queued after the first failure would be there twice."""
    lab = bench(split(*parts(3)))
    for done in range(3):
        o = lab.run(Fault(done + 1, how, "commit"))
        if how == "EINTR":
            assert (o.status, len(o.queued)) == (0, 3)
        elif how == "kill":
            assert (o.status, len(o.queued), o.reports) == (-9, done, ())
        else:
            assert (o.status, len(o.queued)) == (54, done)
            assert [r.committed for r in o.reports[0].results] == [i < done for i in range(3)]


def test_a_part_that_fails_at_any_call_before_it_is_the_real_queue_undoes_all(bench: Make) -> None:
    lab = bench(split(*parts(2)))
    for how in (*ERRORS, "kill"):
        for number in range(1, 100):
            o = lab.run(Fault(number, how, "part"))
            if not o.fault.call:
                break
            common_part(o)
        assert number > 6, "the parts' calls were not seen"
        assert (o.status, len(o.queued)) == (0, 2)


def common_part(o: Outcome) -> None:
    description = f"{o.fault}: status {o.status}, {len(o.queued)} queued, {o.result.stderr!r}"
    assert o.leftovers == (), description
    assert len(o.queued) == (0 if o.status else 2), description
    assert o.status in TEMPORARY | {0}, description


@pytest.mark.parametrize("unavailable", ["defer", "accept"])
def test_without_a_daemon_the_answer_is_what_was_configured(bench: Make, unavailable: str) -> None:
    """Each takes its whole budget, so they run simultaneously; what precedes the first attempt is tried elsewhere."""
    lab = bench(None, unavailable=unavailable)
    calls = lab.calls()
    first = calls.index("connect")
    near = {*range(first, first + 8), *range(len(calls) - 22, len(calls) + 1)}
    faults = [fault for fault in sample(calls, thin=False) if fault.number in near]
    with ThreadPoolExecutor(96) as pool:
        outcomes = list(pool.map(lab.run, faults if EVERYTHING else faults[::2]))
    for o in outcomes:
        common(o, time.monotonic())
        description = f"{o.fault}: status {o.status}, {len(o.queued)} queued"
        assert o.status != 31, description
        assert o.queued == () if o.status else unavailable == "accept", description
        if not o.status:
            assert whole(b"X-ContentFilter: unavailable; virus=unchecked; spam=unchecked\n" + SMALL, o), description
    assert {o.status for o in outcomes} & {0 if unavailable == "accept" else 82}
