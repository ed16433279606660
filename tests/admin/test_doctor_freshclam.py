"""The doctor on freshclam: a real clamd with databases of ours, a real freshclam on a mirror of ours, crafted trees."""

import os
import pwd
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from lab import clamdb
from lab.clamd import Clamd
from lab.process import find_program

from contentfilter.admin.diagnostic import Diagnostic, Level
from contentfilter.admin.doctor_freshclam import configuration, freshclam, loaded, on_disk, outcome, schedule
from contentfilter.admin.doctor_scanners import _queue
from contentfilter.settings import ClamdSettings as ClamdSettings
from contentfilter.settings import Settings

HOUR = 3600.0


@pytest.fixture(scope="module")
def daily(lab_directory: Path) -> Iterator[Clamd]:
    """A real clamd that has loaded database 100."""
    directory = lab_directory / "daily"
    (directory / "database").mkdir(parents=True)
    clamdb.write(directory / "database" / "daily.cud", 100)
    with Clamd(directory) as clamd:
        yield clamd


@pytest.fixture
def settings(daily: Clamd) -> Settings:
    return Settings(clamd=ClamdSettings(backends=(daily.backend,)))


def only(findings: Iterator[Diagnostic]) -> tuple[str, str, str]:
    (one,) = findings
    return one.level.value, one.what, one.remedy


def test_a_clamd_that_has_loaded_what_is_there_is_in_order(daily: Clamd, settings: Settings) -> None:
    level, what, _ = only(loaded(settings, daily.backend, daily.directory / "database", 600))
    assert (level, "has loaded database 100" in what) == ("ok", True)


@pytest.mark.parametrize(
    ("number", "hours", "level", "word"),
    [
        (101, 0.01, "ok", "clamd still has 100"),
        (101, 3.0, "warning", "is not loaded"),
        (99, 3.0, "warning", "reads another directory"),
    ],
)
def test_a_database_that_clamd_did_not_load_is_a_warning_after_a_while(
    number: int, hours: float, level: str, word: str, daily: Clamd, settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "daily.cvd"
    clamdb.write(path, number)
    os.utime(path, (path.stat().st_mtime - hours * HOUR,) * 2)
    found, what, remedy = only(loaded(settings, daily.backend, tmp_path, 600))
    assert (found, word in what) == (level, True), what
    assert bool(remedy) == (level != "ok")


def test_the_newest_of_the_databases_counts_and_what_is_none_is_passed_over(tmp_path: Path) -> None:
    assert on_disk(tmp_path) is None
    clamdb.write(tmp_path / "daily.cvd", 7)
    clamdb.write(tmp_path / "daily.cld", 11)
    clamdb.write(tmp_path / "main.cvd", 62)
    assert on_disk(tmp_path) == (11, tmp_path / "daily.cld")
    for garbage in (b"", b"ClamAV-VDB", b"ClamAV-VDB:x:-1:", b"\0" * 600, b"ClamAV-VDB:x:" + b"9" * 600):
        (tmp_path / "daily.cld").write_bytes(garbage)
        assert on_disk(tmp_path) == (7, tmp_path / "daily.cvd")


@pytest.fixture
def conf(daily: Clamd, tmp_path: Path) -> Callable[..., list[tuple[str, str]]]:
    """(level, what) of a freshclam.conf with these lines."""

    def examined(*lines: str, self_check: int | None = None) -> list[tuple[str, str]]:
        values = dict(line.split(" ", 1) for line in lines)
        directory = str(daily.directory / "database")
        settings = Settings(clamd=ClamdSettings(backends=(daily.backend,)))
        found = configuration(settings, values, tmp_path / "freshclam.conf", directory, self_check)
        return [(each.level.value, each.what) for each in found]

    return examined


def test_freshclam_must_feed_and_tell_the_clamd_that_we_ask(
    conf: Callable[..., list[tuple[str, str]]], daily: Clamd, tmp_path: Path
) -> None:
    here = f"DatabaseDirectory {daily.directory}/database"
    (level, what), *more = conf(here, f"NotifyClamd {daily.directory}/clamd.conf")
    assert (level, "tells clamd" in what, more) == ("ok", True, [])
    other = tmp_path / "other.conf"
    other.write_text("LocalSocket /nowhere\n")
    assert [level for level, _ in conf(here, f"NotifyClamd {other}")] == ["warning"]
    assert [level for level, _ in conf(here, f"NotifyClamd {tmp_path}/missing")] == ["warning"]
    assert [level for level, _ in conf(here)] == ["ok"], "clamd's own SelfCheck will do"
    assert [level for level, _ in conf(here, self_check=0)] == ["warning"]
    assert conf("DatabaseDirectory /elsewhere", self_check=0)[0][0] == "error"


@pytest.mark.parametrize(
    ("path", "text", "level", "word"),
    [
        ("proc/42/comm", "freshclam\n", "ok", "with pid 42"),
        ("proc/42/comm", "clamd\n", "warning", "nothing runs it"),
        ("etc/cron.d/clamav", "# freshclam here\n47 * * * * clamav freshclam --quiet\n", "ok", "cron starts it"),
        ("etc/crontab", "# 47 * * * * clamav freshclam\n", "warning", "nothing runs it"),
        ("etc/cron.daily/freshclam", "#!/bin/sh\n", "ok", "cron starts it"),
        ("etc/systemd/system/timers.target.wants/clamav-freshclam-once.timer", "", "ok", "once.timer starts it"),
        (
            "etc/systemd/system/multi-user.target.wants/clamav-freshclam.service",
            "",
            "warning",
            "enabled, but freshclam does not run",
        ),
        ("etc/motd", "", "warning", "nothing runs it"),
    ],
)
def test_what_runs_freshclam_is_found(path: str, text: str, level: str, word: str, tmp_path: Path) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    finding = schedule(tmp_path)
    assert (finding.level.value, word in finding.what) == (level, True), finding.what
    assert bool(finding.remedy) == (level != "ok")


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Runs a real freshclam once, on a mirror on this machine; its log."""
    place, database, log = tmp_path / "mirror", tmp_path / "fresh", tmp_path / "freshclam.log"
    for directory in (place, database):
        directory.mkdir()
    clamdb.write(database / "daily.cld", 100)
    clamdb.write(place / "daily.cvd", 100)
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.getuid() and "pytest" in path.name:
            path.chmod(0o755)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(place)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = tmp_path / "freshclam.conf"
    config.write_text(
        f"DatabaseDirectory {database}\nUpdateLogFile {log}\nLogTime yes\nMaxAttempts 1\nConnectTimeout 5\n"
        f"DatabaseOwner {pwd.getpwuid(os.getuid()).pw_name}\nPrivateMirror http://127.0.0.1:{server.server_port}\n"
    )

    def run() -> Path:
        program = find_program("freshclam", "clamav-freshclam")
        command = [program, f"--config-file={config}", "--update-db=daily", "--quiet"]
        subprocess.run(command, capture_output=True, timeout=60, check=False)
        return log

    yield run
    server.shutdown()
    server.server_close()


def test_the_last_run_of_a_real_freshclam_is_told(mirror: Callable[[], Path], tmp_path: Path) -> None:
    good = outcome(str(mirror()))
    assert (good.level, "had no trouble" in good.what) == (Level.OK, True), good.what
    (tmp_path / "mirror" / "daily.cvd").unlink()
    bad = outcome(str(mirror()))
    assert (bad.level, "had trouble" in bad.what) == (Level.WARNING, True), bad.what
    assert bad.remedy
    clamdb.write(tmp_path / "mirror" / "daily.cvd", 100)
    assert outcome(str(mirror())).level is Level.OK, "only the last run counts"


@pytest.mark.parametrize(
    ("line", "level"),
    [
        (b"-> daily.cvd updated (version: 5, sigs: 1)", "ok"),
        (b"-> WARNING: DNS Update Info disabled. Falling back to HTTP mode.", "ok"),
        (b"-> !Update failed.", "warning"),
        (b"-> ERROR: Update failed.", "warning"),
        (b"-> ^Clamd was NOT notified: Can't connect to clamd through /run/clamd", "warning"),
        (b"-> WARNING: Clamd was NOT notified: Can't connect", "warning"),
        (b"-> WARNING: You are on cool-down until after: 2026-11-22", "warning"),
        (b"\x1b[31m-> ERROR: \xff\0" + b"x" * 70_000, "ok"),  # the beginning of the run is not in sight any more
        (b"\x1b[31m-> ERROR: \xff\0" + b"x" * 5_000, "warning"),
    ],
)
def test_the_words_of_a_log_that_mean_trouble(line: bytes, level: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    started = b"Sat Nov 21 03:31:29 2026 -> ClamAV update process started at Sat Nov 21 03:31:29 2026\n"
    log.write_bytes(started + b"-> ERROR: of yesterday\n" + started + b"Sat Nov 21 " + line + b"\n")
    finding = outcome(str(log))
    assert finding.level.value == level, finding.what
    assert finding.what.isprintable()
    assert len(finding.what) < 400


def test_logs_that_are_not_there_are_no_trouble(tmp_path: Path) -> None:
    assert outcome("").level is Level.OK
    assert outcome(str(tmp_path / "none")).level is Level.OK
    (tmp_path / "empty").write_bytes(b"")
    assert outcome(str(tmp_path / "empty")).level is Level.OK


def test_all_of_it_together_and_nothing_about_a_clamd_elsewhere(
    daily: Clamd, settings: Settings, tmp_path: Path
) -> None:
    conf = tmp_path / "freshclam.conf"
    run = partial(freshclam, settings, daily.directory / "clamd.conf", conf, tmp_path)
    assert [(each.level.value, "there is no" in each.what) for each in run()] == [("ok", False), ("warning", True)]
    conf.write_text(f"DatabaseDirectory {daily.directory}/database\nNotifyClamd {daily.directory}/clamd.conf\n")
    assert [each.level.value for each in run()] == ["ok", "ok", "warning", "ok"]
    elsewhere = Settings(clamd=ClamdSettings(backends=("tcp:192.0.2.1:3310",)))
    assert list(freshclam(elsewhere, daily.directory / "clamd.conf", conf, tmp_path)) == []


@pytest.mark.parametrize(
    ("lines", "ours", "level"),
    [
        ({"MaxThreads": "12", "MaxQueue": "100"}, 16, "ok"),  # Debian's own, with two workers
        ({"MaxThreads": "12", "MaxQueue": "100"}, 128, "warning"),
        ({}, 100, "ok"),
        ({}, 101, "warning"),
        ({"MaxThreads": "200", "MaxQueue": "100"}, 150, "ok"),
    ],
)
def test_what_waits_in_clamd_s_queue_is_no_alarm(lines: dict[str, str], ours: int, level: str) -> None:
    assert _queue(lines, Path("clamd.conf"), ours).level.value == level
