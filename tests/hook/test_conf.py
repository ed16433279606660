"""queue.conf: strict, temporary when wrong, and never from the environment of a privileged run."""

import os
import re
from pathlib import Path

import pytest
from lab.hook import ROOT, SOURCES, HookLab, accepted

from contentfilter import __version__

SAMPLE = ROOT / "etc" / "queue.conf"


def check(lab: HookLab, text: str | bytes) -> tuple[int, bytes, bytes]:
    """Status, stderr and output of ``contentfilter-queue --check`` for a file of this content."""
    path = lab.directory / "checked.conf"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return run(lab, path, "--check")


def run(lab: HookLab, conf: Path, argument: str) -> tuple[int, bytes, bytes]:
    output = lab.directory / "output"
    pid = os.posix_spawn(
        lab.program,
        [str(lab.program), argument],
        {"CONTENTFILTER_QUEUE_CONF": str(conf)},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 1, output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600),
            (os.POSIX_SPAWN_OPEN, 2, f"{output}.err", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600),
        ],
    )
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, Path(f"{output}.err").read_bytes(), output.read_bytes()


def test_the_sample_shows_the_built_in_values(both: HookLab) -> None:
    missing = run(both, both.directory / "none", "--check")
    status, errors, output = check(both, SAMPLE.read_bytes())
    assert (status, errors) == (0, b"")
    queue = b"queue /var/qmail/bin/qmail-queue.real\n"
    assert missing == (0, b"", output.replace(queue, b""))
    assert queue in output


def test_every_name_is_read(both: HookLab) -> None:
    text = (
        "# comment\n\n  \t\nsocket /a\r\n\tqueue \t /b c/d\ndialect sqmail  \nunavailable accept\nbudget 3600\n"
        "memory 0\nspool /c\nenviron ONE\nenviron TWO"
    )
    status, _, output = check(both, text)
    assert status == 0
    assert output.decode().splitlines() == [
        "socket /a",
        "queue /b c/d",
        "dialect sqmail",
        "unavailable accept",
        "budget 3600",
        "memory 0",
        "spool /c",
        "environ ONE",
        "environ TWO",
    ]


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("sokcet /x", 1, "unknown"),
        ("Socket /x", 1, "unknown"),
        ("# fine\n\nbudget", 3, "seconds"),
        ("budget 0", 1, "1 to 3600"),
        ("budget 3601", 1, "1 to 3600"),
        ("budget -1", 1, "1 to 3600"),
        ("budget 240s", 1, "1 to 3600"),
        ("budget 99999999999999999999999999", 1, "1 to 3600"),
        ("memory 1073741825", 1, "bytes"),
        ("memory 4M", 1, "bytes"),
        ("socket run/queue.sock", 1, "absolute"),
        ("socket /" + "x" * 107, 1, "107"),
        ("queue qmail-queue", 1, "absolute"),
        ("spool", 1, "absolute"),
        ("dialect postfix", 1, "one of auto"),
        ("dialect", 1, "one of auto"),
        ("unavailable pass", 1, "defer or accept"),
        ("environ A=B", 1, "variable"),
        ("environ", 1, "variable"),
        ("environ X\n" * 65, 65, "at most 64"),
        ("x" * 16385, 0, "16384"),
        ("budget 1\0", 0, "NUL"),
    ],
)
def test_a_wrong_line_is_named_with_its_remedy(both: HookLab, text: str, line: int, says: str) -> None:
    status, errors, _ = check(both, text)
    assert status == 55
    assert re.fullmatch(rb"contentfilter-queue: \S+/checked.conf:%d: .*\n" % line, errors)
    assert says.encode() in errors


def test_a_wrong_file_defers_mail_before_reading_it(lab: HookLab) -> None:
    daemon = lab.daemon(accepted())
    result = lab.run(b"x" * 1_000_000, budget="soon")
    assert result.status == 55
    assert b"queue.conf:3: budget: seconds" in result.stderr
    assert daemon.offers == []


def test_a_directory_is_no_configuration(both: HookLab) -> None:
    status, errors, _ = run(both, both.directory, "--check")
    assert status == 55
    assert b"Is a directory" in errors


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a setuid program and another user")
def test_a_privileged_run_does_not_take_the_environments_word(lab: HookLab, tmp_path: Path) -> None:
    program = tmp_path / "setuid-hook"
    program.write_bytes(lab.program.read_bytes())
    program.chmod(0o4755)
    for directory in (tmp_path, *tmp_path.parents[:3]):
        directory.chmod(0o755)
    conf = tmp_path / "users.conf"
    conf.write_text("nonsense\n")
    output = tmp_path / "out"
    pid = os.fork()
    if not pid:
        os.setresuid(65534, 65534, 65534)
        os.dup2(os.open("/dev/null", os.O_RDWR), 1)
        os.execve(program, [str(program), "--check"], {"CONTENTFILTER_QUEUE_CONF": str(conf)})
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not output.exists()
    assert run(lab, conf, "--check")[0] == 55


def test_the_version_is_the_packages(lab: HookLab) -> None:
    assert run(lab, SAMPLE, "--version") == (0, b"", f"contentfilter-queue {__version__} protocol 1\n".encode())


def test_every_status_that_leaves_the_program_is_in_one_file() -> None:
    """No exit with a bare number or an errno: those could become a permanent refusal."""
    listed = set(re.findall(r"\bST_\w+(?= =)", (ROOT / "queue_hook" / "status.h").read_text()))
    used = set()
    for source in SOURCES:
        text = source.read_text()
        assert not re.search(r"\b(exit|_Exit|abort)\(", text), source
        assert not re.search(r"leave\((?!status|refuse|ST_|enum|submit_all|write\(1)", text), source
        used |= set(re.findall(r"\bST_\w+", text))
    assert used == listed
