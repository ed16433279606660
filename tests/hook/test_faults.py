"""Loops, missing programs, full disks and small limits: each is a temporary status with a line that says why."""

import fcntl
import os
import signal
import subprocess
from pathlib import Path

import pytest
from lab.hook import FINAL, HookLab, HookProcess, Offer, accepted, split

from contentfilter.wire.hook import Answer, Submission


def stalled(lab: HookLab, program: Path, *, nonblocking: bool = False) -> int:
    """The status of a hook whose client has sent a part of a message and then nothing more."""
    message, envelope = os.pipe(), os.pipe()
    os.write(message[1], b"Subject: a part\n")
    os.set_blocking(message[0], not nonblocking)
    environ = {"CONTENTFILTER_QUEUE_CONF": str(lab.configure())}
    try:
        done = subprocess.run([program], stdin=message[0], stdout=envelope[0], env=environ, check=False, timeout=FINAL)
    finally:
        for fd in (*message, *envelope):
            os.close(fd)
    return done.returncode


@pytest.mark.parametrize("nonblocking", [False, True])
def test_a_client_that_stalls_is_left_in_the_end(lab: HookLab, impatient_hook: Path, nonblocking: bool) -> None:
    assert stalled(lab, impatient_hook, nonblocking=nonblocking) == 52


def test_the_time_for_reading_is_not_the_time_for_the_answer(lab: HookLab, impatient_hook: Path) -> None:
    """The answer comes after a hook that was started later has run out of its time for reading."""

    def late(_: Offer) -> Answer:
        assert stalled(lab, impatient_hook) == 52
        return accepted()

    lab.daemon(late)
    assert lab.run(program=impatient_hook).status == 0
    assert len(lab.standin.queued()) == 1


def script(lab: HookLab, name: str, text: str) -> Path:
    path = lab.directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_queue_that_is_the_hook_itself_is_refused(both: HookLab) -> None:
    link = both.directory / "qmail-queue"
    link.symlink_to(both.program)
    daemon = both.daemon(accepted())
    result = both.run(queue=link)
    assert result.status == 55
    assert b"is this program" in result.stderr
    assert daemon.offers == []


@pytest.mark.parametrize("lead", ["exec ", ""], ids=["same process", "child"])
def test_a_wrapper_that_leads_back_is_noticed_on_the_second_pass(lab: HookLab, lead: str) -> None:
    daemon = lab.daemon(accepted())
    result = lab.run(queue=script(lab, "wrapper", f"{lead}{lab.program}; exit $?"))
    assert result.status == 81
    assert b"a loop" in result.stderr
    assert len(daemon.offers) == 1
    assert lab.standin.queued() == []


def test_split_submissions_notice_a_loop_too(lab: HookLab) -> None:
    daemon = lab.daemon(split(Submission(b"A: 1\n"), Submission(b"A: 2\n")))
    assert lab.run(queue=script(lab, "wrapper", f"exec {lab.program}")).status == 81
    assert len(daemon.offers) == 1


def test_a_long_way_round_ends_too(lab: HookLab) -> None:
    daemon = lab.daemon(accepted())
    wrapper = script(lab, "wrapper", f"sh -c '{lab.program}; exit $?'; exit $?")
    result = lab.run(queue=wrapper)
    assert result.status == 81
    assert 1 <= len(daemon.offers) <= 8


def test_other_mail_on_the_way_is_no_loop(lab: HookLab) -> None:
    """A wrapper may send a notice of its own, through another program that starts the hook."""
    lab.daemon(accepted())
    (lab.directory / "notice").write_text("notice\n")
    wrapper = script(
        lab,
        "wrapper",
        f'if [ "$INNER" ]; then exec {lab.standin.program}; fi; INNER=1; export INNER; exec 3<&0 4<&1; '
        f"printf 'Fs\\0Tadmin\\0\\0' >{lab.directory}/envelope; "
        f"sh -c '{lab.program} <{lab.directory}/notice 1<{lab.directory}/envelope; exit $?' && "
        f"exec {lab.standin.program} <&3 1<&4 3<&- 4<&-",
    )
    assert lab.run(b"mail\n", queue=wrapper).status == 0
    assert sorted(q.message for q in lab.standin.queued()) == [b"mail\n", b"notice\n"]


def test_a_mark_of_someone_else_does_no_harm(lab: HookLab) -> None:
    lab.daemon(accepted())
    for mark in ("1.1", "", "x", "999999999999999999999999.7", "4194304"):
        assert lab.run(env={"CONTENTFILTER_QUEUE_PASS": mark}).status == 0


def test_the_real_program_is_missing(both: HookLab) -> None:
    daemon = both.daemon(accepted())
    result = both.run(queue="/nonexistent/qmail-queue")
    assert result.status == 120
    assert b"/nonexistent/qmail-queue: No such file or directory; set `queue`" in result.stderr
    assert daemon.offers == []


def test_the_real_program_cannot_be_executed(both: HookLab) -> None:
    broken = both.directory / "broken"
    broken.write_text("no program")
    broken.chmod(0o755)
    both.daemon(accepted())
    assert both.run(queue=broken).status == 120


@pytest.mark.parametrize("status", [0, 11, 31, 53, 91, 111])
def test_the_real_programs_status_is_the_answer(lab: HookLab, status: int) -> None:
    lab.daemon(accepted())
    assert lab.run(knobs={"at": "end", "exit": str(status)}).status == status


def test_a_spool_directory_that_is_missing(both: HookLab) -> None:
    daemon = both.daemon(accepted())
    result = both.run(b"x" * 200_000, memory=100_000, spool="/nonexistent")
    assert result.status == 53
    assert b"no unnamed file in /nonexistent" in result.stderr
    assert daemon.offers == []


def test_a_spool_directory_without_unnamed_files(both: HookLab) -> None:
    both.daemon(accepted())
    assert both.run(b"x" * 200_000, memory=100_000, spool="/proc").status == 53


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 4 MiB, where this user may mount one."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=4m none {directory} 2>/dev/null"):
        pytest.skip("cannot mount a small file system here")
    return directory


@pytest.mark.parametrize("size", [2_500_000, 5_000_000], ids=["while copying", "while reading"])
def test_a_full_disk_is_a_write_error_and_leaves_nothing(lab: HookLab, small_disk: Path, size: int) -> None:
    try:
        lab.daemon(accepted(b"X: y\n"))
        assert lab.run(b"x" * size, memory=0, spool=small_disk).status == 53
        assert list(small_disk.iterdir()) == []
        assert os.statvfs(small_disk).f_bfree == os.statvfs(small_disk).f_blocks
        assert lab.standin.queued() == []
    finally:
        os.system(f"umount {small_disk}")


@pytest.mark.parametrize("descriptors", range(3, 9))
@pytest.mark.parametrize("parts", [1, 3])
def test_too_few_descriptors_never_refuse_for_good(lab: HookLab, descriptors: int, parts: int) -> None:
    lab.daemon(split(*(Submission(b"A: %d\n" % i) for i in range(parts))))
    limited = script(lab, "limited", f"ulimit -n {descriptors}; exec {lab.program}")
    result = lab.run(program=limited, budget=1)
    assert result.status in ((0, 51, 71) if parts == 1 else (51, 71, 120))
    assert len(lab.standin.queued()) == (result.status == 0)


def test_a_file_size_limit_never_refuses_for_good(lab: HookLab) -> None:
    lab.daemon(accepted())
    limited = script(lab, "limited", f"ulimit -f 100; exec {lab.program}")
    assert lab.run(b"x" * 200_000, program=limited).status in (53, -signal.SIGXFSZ)
    assert lab.standin.queued() == []


def test_it_runs_within_qmails_usual_memory_limit(lab: HookLab) -> None:
    lab.daemon(accepted(b"X: y\n"))
    limited = script(lab, "limited", f"ulimit -v 1950; ulimit -d 1950; ulimit -s 1950; exec {lab.program}")
    result = lab.run(b"x" * 1_000_000, program=limited)
    assert result.status == 0
    assert len(lab.standin.queued()[0].message) == 1_000_005


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_a_hook_that_is_killed_leaves_nothing(lab: HookLab, sig: int) -> None:
    spool = lab.directory / "spool"
    spool.mkdir()
    daemon = lab.daemon("silent")
    hook = lab.start(b"x" * 500_000, memory=0, spool=spool)
    daemon.wait(offers=1)
    hook.kill(sig)
    assert hook.wait().status == -sig
    assert (list(spool.iterdir()), lab.standin.queued()) == ([], [])


def test_stderr_that_nobody_reads_does_not_block(both: HookLab) -> None:
    assert both.run(fds={2: "full pipe"}, budget="wrong").status == 55


def test_a_caller_that_gives_up_in_the_middle_is_never_scanned(both: HookLab) -> None:
    daemon = both.daemon(accepted())
    assert both.run(b"half a mess", b"Fs@example.org\0Tr@example.org\0").status == 54
    assert daemon.offers == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become a user with too many pipes")
@pytest.mark.parametrize("size", [4000, 8000, 60_000])
def test_a_user_whose_pipes_have_become_small(both: HookLab, size: int) -> None:
    """Above a number of pages per user Linux gives small pipes: what does not fit must not block."""
    both.daemon(accepted(b"X: y\n"))
    environ = {"CONTENTFILTER_QUEUE_CONF": str(both.configure())} | both.standin.environ()
    for directory in (both.directory, *both.directory.parents[:3]):
        directory.chmod(0o755)
    pid = os.fork()
    if not pid:
        status = 99
        try:
            os.setresuid(64_999, 64_999, 64_999)
            kept = []
            for _ in range(70):
                kept.append(os.pipe())
                try:
                    fcntl.fcntl(kept[-1][1], fcntl.F_SETPIPE_SZ, 1 << 20)
                except PermissionError:
                    break
            process = HookProcess(both.program, b"m" * size, b"Fs\0Tr\0\0", environ, {}, both.directory)
            status = process.wait(10).status
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert both.standin.queued()[0].message == b"X: y\n" + b"m" * size
