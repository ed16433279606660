"""``contentfilter doctor`` on real daemons: each fault is found and reported with its remedy, and none hangs it."""

import itertools
import json
import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from lab import hook as hook_lab
from lab.clamd import Clamd
from lab.spamd import Spamd
from lab.system import System

from contentfilter.admin import doctor_scanners
from contentfilter.admin.diagnostic import Diagnostic, Level, examine
from contentfilter.cli.main import cli
from contentfilter.deadline import Deadline
from contentfilter.wire.clamd import Version

_numbers = itertools.count(1)


class Server:
    """A system with a qmail around it, and the command that looks at it."""

    def __init__(self, system: System, program: Path, clamd: Clamd) -> None:
        self.system = system
        self.directory = system.directory
        self.clamd = clamd
        self.program = program
        (self.directory / "state").chmod(0o700)
        self.bin = self.directory / "qmail" / "bin"
        self.bin.mkdir(parents=True)
        shutil.copy(system.queue_program, self.bin / "qmail-queue.real")
        (self.bin / "qmail-queue.real").chmod(0o4755)
        shutil.copy(program, self.bin / "qmail-queue")
        self.smtpd = self.bin / "qmail-smtpd"
        self.conf = self.write_conf()
        self.clamd_conf = clamd.directory / "clamd.conf"

    def write_conf(self, **more: object) -> Path:
        return self.system.queue_conf(queue=self.bin / "qmail-queue.real", **more)

    def run(self, status: int, *arguments: str) -> str:
        words = ["--config", str(self.system.daemon.config), "doctor", "--qmail", str(self.directory / "qmail")]
        words += ["--queue-conf", str(self.conf), "--binary", str(self.program)]
        words += ["--clamd-conf", str(self.clamd_conf), *arguments]
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == status, result.output
        return result.output

    def found(self, status: int) -> list[dict[str, str]]:
        report = json.loads(self.run(status, "--json"))
        assert report["ok"] is (status == 0)
        findings: list[dict[str, str]] = report["findings"]
        return findings

    def errors(self) -> list[tuple[str, str]]:
        """(topic, what) of the errors, of which there must be some; each has a remedy."""
        errors = [each for each in self.found(1) if each["level"] == "error"]
        assert all(each["remedy"] for each in errors)
        return [(each["topic"], each["what"]) for each in errors]

    def of(self, topic: str, level: str, status: int = 0) -> list[str]:
        return [each["what"] for each in self.found(status) if (each["topic"], each["level"]) == (topic, level)]


@pytest.fixture(scope="module")
def hook_program(lab_directory: Path) -> Path:
    directory = lab_directory / "hook"
    directory.mkdir(exist_ok=True)
    return hook_lab.build(directory)


@pytest.fixture(scope="module")
def make_server(lab_directory: Path, clamd: Clamd, spamd: Spamd, hook_program: Path) -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:

        def make(*, own_clamd: bool = False, **sections: dict[str, Any]) -> Server:
            number = next(_numbers)
            backend = stack.enter_context(Clamd(lab_directory / f"dc{number}")) if own_clamd else clamd
            settings = {"service": {"workers": 1}} | sections
            system = System(
                lab_directory / f"d{number}", settings=settings, clamd=backend, spamd=spamd, program=hook_program
            )
            return Server(stack.enter_context(system), hook_program, backend)

        yield make


@pytest.fixture(scope="module")
def shared(make_server: Callable[..., Server]) -> Server:
    """A test that changes something puts it back."""
    return make_server()


def test_a_server_in_order_has_no_errors(shared: Server) -> None:
    found = shared.found(0)
    topics = {each["topic"] for each in found if each["level"] == "ok"}
    wanted = "clamd daemon dialect directories disk freshclam hook limits memory socket spamd tables users"
    assert topics == set(wanted.split()) - _poor(found)
    assert all(each["remedy"] for each in found if each["level"] != "ok")
    assert "0 errors," in shared.run(0)


def _poor(found: list[dict[str, str]]) -> set[str]:
    """The machine's own shortcomings, which are not under test."""
    return {each["topic"] for each in found if each["level"] == "warning"} & {"disk", "memory", "limits", "freshclam"}


def test_a_clamd_that_is_stopped_is_an_error_with_its_name(make_server: Callable[..., Server]) -> None:
    server = make_server(own_clamd=True)
    server.clamd.stop()
    assert [(topic, server.clamd.backend in what) for topic, what in server.errors()] == [("clamd", True)]
    assert "systemctl restart clamav-daemon" in server.run(1)


def test_a_clamd_that_hangs_does_not_hang_the_doctor(make_server: Callable[..., Server]) -> None:
    server = make_server(own_clamd=True)
    server.clamd.signal(signal.SIGSTOP)
    started = time.monotonic()
    errors = server.errors()
    assert time.monotonic() - started < 10
    assert [topic for topic, _ in errors] == ["clamd"]
    assert "timeout" in errors[0][1]


def test_without_a_daemon_it_still_examines_the_rest(make_server: Callable[..., Server]) -> None:
    server = make_server()
    server.system.daemon.stop()
    assert {topic for topic, _ in server.errors()} >= {"daemon", "hook", "socket"}
    assert server.of("spamd", "ok", 1)


def test_a_daemon_that_hangs_does_not_hang_the_doctor(make_server: Callable[..., Server]) -> None:
    server = make_server()
    server.system.daemon.signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert "daemon" in {topic for topic, _ in server.errors()}
        assert time.monotonic() - started < 10
    finally:
        server.system.daemon.signal(signal.SIGCONT)


def test_modes_that_shut_out_or_let_in_are_found(shared: Server) -> None:
    socket, state, run = Path(shared.system.daemon.socket), shared.directory / "state", shared.directory
    before = run.stat().st_mode & 0o7777
    try:
        socket.chmod(0o600)
        state.chmod(0o755)
        assert [(topic, "mode 0600" in what) for topic, what in shared.errors()] == [("socket", True)]
        assert any(str(state) in what for what in shared.of("directories", "warning", 1))
        socket.chmod(0o666)
        state.chmod(0o777)
        assert [(topic, str(state) in what) for topic, what in shared.errors()] == [("directories", True)]
        state.chmod(0o700)
        run.chmod(0o700)
        assert ("socket", f"{run} does not let other users reach {socket}") in shared.errors()
    finally:
        run.chmod(before)
        state.chmod(0o700)
        socket.chmod(0o666)
    assert shared.found(0)


def test_a_hook_that_is_not_installed_is_reported_and_one_that_was_replaced_is_an_error(shared: Server) -> None:
    queue, real = shared.bin / "qmail-queue", shared.bin / "qmail-queue.real"
    kept = real.read_bytes()
    try:
        queue.write_bytes(kept)
        assert [topic for topic, _ in shared.errors()] == ["hook"]
        assert "hook install --force" in shared.run(1)
        real.unlink()
        assert any("is not the hook" in what for what in shared.of("hook", "warning"))
    finally:
        real.write_bytes(kept)
        real.chmod(0o4755)
        shutil.copy(shared.program, queue)


def test_an_older_hook_is_a_warning(shared: Server) -> None:
    queue = shared.bin / "qmail-queue"
    queue.write_bytes(queue.read_bytes() + b"older")
    try:
        assert any("differs from" in what for what in shared.of("hook", "warning"))
    finally:
        shutil.copy(shared.program, queue)


def test_a_hook_that_asks_elsewhere_is_an_error(shared: Server) -> None:
    elsewhere = shared.directory / "elsewhere.sock"
    try:
        shared.write_conf(socket=elsewhere)
        errors = shared.errors()
        assert {topic for topic, _ in errors} == {"hook"}
        assert any(f"the hook connects to {elsewhere}" in what for _, what in errors)
    finally:
        shared.write_conf()


def test_a_queue_conf_that_the_hook_refuses_is_an_error(shared: Server) -> None:
    try:
        shared.write_conf(dialect="klingon")
        assert [(topic, "queue.conf" in what) for topic, what in shared.errors()] == [("hook", True)]
    finally:
        shared.write_conf()


@pytest.mark.parametrize(
    ("image", "dialect", "level", "word"),
    [
        (b"214 notqmail home page", "notqmail", "ok", "looks like notqmail"),
        (b"214 notqmail home page", "sagredo", "warning", "looks like notqmail"),
        (b"\0ERROR_FD\0", "sagredo", "ok", "sagredo"),
        (b"\0ERROR_FD\0https://github.com/indimail/indimail-mta\0", "sagredo", "warning", "looks like indimail"),
        (b" ESMTP IndiMail \0ERROR_FD\0", "indimail", "ok", "looks like indimail"),
        (b"214 s/qmail home page: http://fehcom.de/sqmail.html", "simscan", "warning", "looks like s/qmail"),
        (b"214 netqmail home page\0control/badloadertypes.cdb\0", "sqmail", "ok", "s/qmail or SPAMCONTROL"),
        (b"214 netqmail home page\0control/badloadertypes.cdb\0", "stock", "ok", "s/qmail or SPAMCONTROL"),
        (b"214 netqmail home page", "auto", "ok", "netqmail"),
        (b"something of its own", "stock", "ok", "unknown"),
        (None, "stock", "ok", "unknown"),
    ],
)
def test_the_dialect_is_compared_where_the_qmail_can_be_recognised(
    shared: Server, image: bytes | None, dialect: str, level: str, word: str
) -> None:
    try:
        shared.write_conf(dialect=dialect)
        if image is not None:
            shared.smtpd.write_bytes(image)
        assert [word in what for what in shared.of("dialect", level)] == [True]
    finally:
        shared.write_conf()
        shared.smtpd.unlink(missing_ok=True)


def test_a_syslog_that_nobody_reads_is_a_warning(shared: Server) -> None:
    config, path = shared.system.daemon.config, shared.directory / "log.sock"
    kept = config.read_text()
    assert not shared.of("log", "ok"), "standard error is nobody's business"
    try:
        config.write_text(f'{kept}\n[log]\nto = "syslog"\nsocket = "{path}"\n')
        assert ["log lines go to standard error" in what for what in shared.of("log", "warning")] == [True]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslogd:
            syslogd.bind(str(path))
            assert ["a syslog daemon listens" in what for what in shared.of("log", "ok")] == [True]
    finally:
        config.write_text(kept)


def test_bad_settings_are_status_78(shared: Server) -> None:
    config = shared.system.daemon.config
    kept = config.read_text()
    try:
        config.write_text(kept + "\n[nonsense]\n")
        assert "nonsense" in shared.run(78)
    finally:
        config.write_text(kept)


@pytest.mark.parametrize(
    ("lines", "level", "word"),
    [
        ("MaxFileSize 10M\n", "error", "MaxFileSize"),
        ("StreamMaxLength 10M\n", "warning", "StreamMaxLength"),
        ("MaxFileSize 0\nStreamMaxLength 25M\nMaxThreads 40\n", "ok", "MaxThreads"),
        ("MaxThreads 2\nMaxQueue 4\n", "warning", "MaxThreads"),
    ],
)
def test_clamd_s_limits_are_compared_with_ours(shared: Server, lines: str, level: str, word: str) -> None:
    kept = shared.clamd_conf
    shared.clamd_conf = shared.directory / "clamd.conf"
    shared.clamd_conf.write_text(f"# a comment\nLocalSocket {shared.clamd.socket}\n{lines}")
    try:
        assert [word in what for what in shared.of("clamd", level, int(level == "error")) if word in what]
    finally:
        shared.clamd_conf = kept


@pytest.mark.parametrize(
    ("days", "level"),
    [(-0.1, "ok"), (1.9, "ok"), (2.1, "warning"), (6.9, "warning"), (8, "error"), (None, "warning")],
)
def test_an_old_database_is_reported(days: float | None, level: str) -> None:
    now = datetime(2026, 6, 1, tzinfo=UTC)
    version = Version("ClamAV", 1, None if days is None else now - timedelta(days=days))
    assert doctor_scanners.freshness("unix:/there", version, now).level.value == level


def test_a_worker_that_may_open_too_few_files_is_a_warning(make_server: Callable[..., Server]) -> None:
    server = make_server(service={"workers": 1, "max_in_flight": 64})  # a shell's own limit is often 1024
    assert server.of("limits", "warning") == []
    for pid in server.system.daemon.workers():
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (512, 512))
    assert ["may open 512 files" in what for what in server.of("limits", "warning")] == [True]


def test_users_that_do_not_exist_are_reported_by_name(shared: Server) -> None:
    config = shared.system.daemon.config
    kept = config.read_text()
    try:
        config.write_text(kept.replace("bounce_users = []", 'bounce_users = ["no-such-user"]'))
        assert any("'no-such-user'" in what for what in shared.of("users", "warning"))
    finally:
        config.write_text(kept)


def test_a_socket_by_another_name_is_the_same_clamd(shared: Server) -> None:
    kept, other = shared.clamd_conf, shared.directory / "run"
    other.symlink_to(Path(shared.clamd.socket).parent)
    shared.clamd_conf = shared.directory / "linked.conf"
    shared.clamd_conf.write_text(f"LocalSocket {other}/{Path(shared.clamd.socket).name}\n")
    try:
        assert not any("are unknown" in what for what in shared.of("clamd", "warning"))
    finally:
        shared.clamd_conf = kept


@pytest.mark.parametrize("text", [None, "LocalSocket /elsewhere\n"])
def test_limits_that_cannot_be_known_are_said_to_be_so(shared: Server, text: str | None) -> None:
    kept = shared.clamd_conf
    shared.clamd_conf = shared.directory / "other.conf"
    if text is not None:
        shared.clamd_conf.write_text(text)
    try:
        assert any("are unknown" in what for what in shared.of("clamd", "warning"))
    finally:
        shared.clamd_conf.unlink(missing_ok=True)
        shared.clamd_conf = kept


def test_more_workers_than_spamd_has_children_is_a_warning() -> None:
    levels = [[each.level for each in doctor_scanners.spamd_children(*numbers)] for numbers in ((8, 4), (4, 10))]
    assert levels == [[Level.WARNING], [Level.OK]]


def test_a_probe_that_breaks_or_never_ends_is_an_error_among_the_others() -> None:
    gate = threading.Event()

    def late() -> tuple[Diagnostic, ...]:
        gate.wait(30)
        return ()

    def broken() -> tuple[Diagnostic, ...]:
        raise PermissionError(13, "Permission denied", "/there")

    well = Diagnostic(Level.OK, "well", "it is")
    try:
        found = examine({"late": late, "broken": broken, "well": lambda: (well,)}, Deadline.after(0.3))
    finally:
        gate.set()
    assert [(each.level, each.topic) for each in found] == [
        (Level.ERROR, "late"), (Level.ERROR, "broken"), (Level.OK, "well"),
    ]  # fmt: skip
    assert "/there" in found[1].what
