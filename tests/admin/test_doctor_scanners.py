"""The doctor's probes of clamd and freshclam: a real clamd in several states, and a /proc and units of our own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import clamdb
from lab.clamd import Clamd
from lab.peers import Peer, read_clamd, says

from contentfilter.admin.diagnostic import Diagnostic
from contentfilter.admin.doctor_scanners import _queue, freshclam
from contentfilter.admin.doctor_scanners import clamd as clamd_probe
from contentfilter.settings import ClamdSettings, Settings


def settings(*backends: str) -> Settings:
    return Settings(clamd=ClamdSettings(backends=backends))


def probe(backend: str) -> Iterator[Diagnostic]:
    return clamd_probe(settings(backend), backend)


def only(diagnostics: Iterator[Diagnostic]) -> tuple[str, str, str]:
    (one,) = diagnostics
    return one.level.value, one.what, one.remedy


@pytest.mark.parametrize(
    ("path", "text", "level", "words"),
    [
        ("proc/42/comm", "freshclam\n", "ok", "running with pid 42"),
        ("proc/42/comm", "clamd\n", "warning", "no freshclam process and no timer"),
        ("etc/systemd/system/timers.target.wants/clamav-freshclam-once.timer", "", "ok", "once.timer"),
        (
            "etc/systemd/system/multi-user.target.wants/clamav-freshclam.service",
            "",
            "warning",
            "enabled, but freshclam is not running",
        ),
        ("etc/motd", "", "warning", "no freshclam process and no timer"),
    ],
)
def test_a_process_or_a_timer_of_freshclam_is_found(
    path: str, text: str, level: str, words: str, tmp_path: Path
) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    found, what, remedy = only(freshclam(settings("unix:/run/clamav/clamd.ctl"), tmp_path))
    assert (found, words in what) == (level, True), what
    assert bool(remedy) == (level != "ok")


def test_freshclam_of_a_clamd_on_another_machine_is_not_looked_for(tmp_path: Path) -> None:
    assert list(freshclam(settings("tcp:192.0.2.1:3310"), tmp_path)) == []
    assert len(list(freshclam(settings("tcp:192.0.2.1:3310", "tcp:[::1]:3310"), tmp_path))) == 1


def test_version_and_self_test_over_unix_socket_and_tcp(clamd: Clamd) -> None:
    for backend in (clamd.backend, clamd.tcp_backend):
        found = [(each.level.value, each.what) for each in probe(backend)]
        assert [level for level, _ in found] == ["warning", "ok"], found  # the lab's signatures are not official
        assert "no official database" in found[0][1]
        assert "detects the EICAR test file" in found[1][1]


def test_a_clamd_that_does_not_know_eicar_is_an_error(lab_directory: Path) -> None:
    directory = lab_directory / "no-eicar"
    (directory / "database").mkdir(parents=True)
    clamdb.write(directory / "database" / "daily.cud", 100)
    with Clamd(directory, database={}) as instance:
        age, found = probe(instance.backend)
        assert "database 100" in age.what
        assert (found.level.value, "does not detect the EICAR" in found.what) == ("error", True)
        assert "TemporaryDirectory" in found.remedy
        off = Settings(clamd=ClamdSettings(backends=(instance.backend,), proof=0.0))
        assert len(list(clamd_probe(off, instance.backend))) == 1, "no self-test where [clamd] proof is 0"


@pytest.mark.parametrize("answer", [b"", b"\xff\xfe\n", b"ERROR: no\n", b"HTTP/1.1 400 Bad Request\n"])
def test_whatever_answers_in_place_of_clamd_is_an_error(answer: bytes) -> None:
    with Peer(None, says(answer), read_clamd) as peer:
        level, what, remedy = only(probe(peer.backend))
    assert (level, peer.backend in what, bool(remedy)) == ("error", True, True)
    assert what.isprintable()


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
