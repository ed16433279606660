"""Log targets: journald's severities, the local syslogd with its facility, and never a wait."""

import os
import re
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from contentfilter.log import make_logger
from contentfilter.log_target import FACILITIES, Stream, Syslog, Target, is_journal, open_target


class Syslogd:
    """The receiving end of /dev/log."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))

    def lines(self) -> list[bytes]:
        found = []
        while select.select([self.socket], [], [], 0)[0]:
            found.append(self.socket.recv(65536))
        return found


class Collected:
    """A target that keeps what it gets."""

    lost = 0

    def __init__(self) -> None:
        self.lines: list[tuple[bytes, str]] = []

    def write(self, line: bytes, level: str) -> None:
        self.lines.append((line, level))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    ("facility", "level", "number"),
    [
        ("", "info", 2 * 8 + 6),
        ("LOG_LOCAL0", "debug", 16 * 8 + 7),
        ("LOG_LOCAL3", "warning", 19 * 8 + 4),
        ("log_local7", "error", 23 * 8 + 3),
        ("LOG_LOCAL7", "critical", 23 * 8 + 2),
    ],
)
def test_a_syslog_line_has_facility_severity_time_name_and_pid(
    facility: str, level: str, number: int, path: Path
) -> None:
    syslogd = Syslogd(path)
    Syslog(str(path), facility, Collected()).write(b'{"event":"x"}\n', level)
    (line,) = syslogd.lines()
    form = rb"<(\d+)>[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d contentfilter\[(\d+)\]: (.*)"
    match = re.fullmatch(form, line, re.DOTALL)
    assert match, line
    assert (int(match[1]), int(match[2]), match[3]) == (number, os.getpid(), b'{"event":"x"}')


def test_every_facility_that_sysfacility_may_name_is_known() -> None:
    assert {f"LOG_LOCAL{digit}": (16 + digit) for digit in range(8)}.items() <= FACILITIES.items()


def test_a_syslogd_that_was_restarted_gets_the_next_line(path: Path) -> None:
    instead = Collected()
    syslog, first = Syslog(str(path), "", instead), Syslogd(path)
    syslog.write(b"one\n", "info")
    assert len(first.lines()) == 1
    first.socket.close()
    syslog.write(b"two\n", "info")
    second = Syslogd(path)
    syslog.write(b"three\n", "info")
    assert [line.rpartition(b" ")[2] for line in second.lines()] == [b"three"]
    assert instead.lines == [(b"two\n", "info")], "what nobody took goes to standard error, whole"


def test_a_restart_between_two_lines_loses_none(path: Path) -> None:
    instead = Collected()
    syslog, first = Syslog(str(path), "", instead), Syslogd(path)
    syslog.write(b"one\n", "info")
    first.socket.close()
    second = Syslogd(path)
    syslog.write(b"two\n", "info")
    assert [line.rpartition(b" ")[2] for line in second.lines()] == [b"two"]
    assert instead.lines == []


def test_a_syslogd_that_does_not_read_is_not_waited_for(path: Path) -> None:
    instead = Collected()
    syslogd, syslog = Syslogd(path), Syslog(str(path), "", instead)
    for _ in range(5_000):
        syslog.write(b"x" * 500 + b"\n", "info")
    kept = len(syslogd.lines())
    assert 0 < kept < 5_000
    assert len(instead.lines) == 5_000 - kept
    syslog.write(b"again\n", "info")
    assert syslogd.lines()[0].endswith(b" again"), "it goes on when there is room"


def test_lines_that_get_nowhere_are_counted_and_reported(path: Path) -> None:
    reader, writer = os.pipe()
    log = make_logger("json", "info", Syslog(str(path), "", Stream(writer)))
    os.close(reader)
    for _ in range(3):
        log.info("mail.done")
    syslogd = Syslogd(path)
    log.info("mail.done")
    assert b'"lines_lost":3' in syslogd.lines()[0]
    os.close(writer)


def test_under_journald_each_line_begins_with_its_severity(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    about = os.fstat(theirs.fileno())
    environ = {"JOURNAL_STREAM": f"{about.st_dev}:{about.st_ino}"}
    log = make_logger("json", "debug", open_target("stderr", "", "LOG_LOCAL3", environ, theirs.fileno()))
    for tell in (log.debug, log.info, log.warning, log.error, log.critical):
        tell("mail.done")
    theirs.close()
    with ours.makefile("rb") as lines:
        assert [line[:4] for line in lines] == [b"<7>{", b"<6>{", b"<4>{", b"<3>{", b"<2>{"]


def test_an_inherited_journal_stream_that_is_not_ours_changes_nothing(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    about = os.fstat(ours.fileno())
    environ = {"JOURNAL_STREAM": f"{about.st_dev}:{about.st_ino}"}
    target: Target = open_target("stderr", "", "", environ, theirs.fileno())
    target.write(b"plain\n", "error")
    assert ours.recv(100) == b"plain\n"
    assert not is_journal(theirs.fileno(), {})
    assert not is_journal(9_999, environ)
