"""The log of a real daemon: what smtplog tells, where lines go, and that they are as docs/logs.md has them."""

import json
import re
import select
import shlex
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from e2e.mails import PLAIN, SPAM, VIRUS
from lab.clamd import Clamd
from lab.events import schema
from lab.schema import wrong
from lab.spamd import Spamd
from lab.system import System

MakeSystem = Callable[..., System]


def story(system: System, sender: bytes, message: bytes, **more: Any) -> tuple[dict[str, Any], list[str]]:
    """The record of a message, and the stages of the story that the log tells of it."""
    system.deliver(message, sender=sender, **more)
    (record,) = system.daemon.wait_for("mail.done", where=lambda line: line["sender"] == sender.decode())
    return record, [line["stage"] for line in system.daemon.log("mail.step") if line["id"] == record["id"]]


def set_smtplog(system: System, value: int) -> None:
    before = len(system.daemon.log("worker.reload"))
    system.control("smtplog", f"{value}\n")
    system.daemon.reload()
    system.daemon.wait_for("worker.reload", before + 1)


def test_smtplog_decides_whose_trace_is_logged_and_a_reload_changes_it(make_system: MakeSystem, clamd: Clamd) -> None:
    system = make_system(clamd=clamd)
    assert story(system, b"0@a.example", VIRUS)[1] == []
    set_smtplog(system, 1)
    assert story(system, b"1a@a.example", PLAIN)[1] == []
    stages = story(system, b"1b@a.example", VIRUS)[1]
    assert {"message", "origin", "recipients", "clamd", "decision", "answer"} <= set(stages)
    set_smtplog(system, 2)
    assert {"message", "origin", "clamd", "decision"} <= set(story(system, b"2@a.example", PLAIN)[1])
    set_smtplog(system, 0)
    assert story(system, b"0b@a.example", VIRUS)[1] == []


def test_trouble_is_a_warning_and_what_a_message_deserves_is_not(make_system: MakeSystem, lab_directory: Any) -> None:
    with Clamd(lab_directory / "logclamd") as clamd:
        system = make_system(clamd=clamd, settings={"failure": {"clamd": "pass"}})
        refused, _ = story(system, b"virus@a.example", VIRUS)
        assert (refused["decision"], refused["level"]) == ("reject", "info")
        clamd.stop()
        unchecked, _ = story(system, b"unchecked@a.example", PLAIN)
        assert (unchecked["decision"], unchecked["level"]) == ("queue", "warning")


@pytest.mark.parametrize("form", ["json", "logfmt"])
def test_with_syslog_every_process_writes_there_with_the_facility(make_system: MakeSystem, form: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslogd:
        path = f"/tmp/cf-{time.monotonic_ns()}"
        syslogd.bind(path)
        log = {"to": "syslog", "socket": path, "format": form}
        system = make_system(controls={"sysfacility": "LOG_LOCAL3\n"}, settings={"log": log})
        assert system.deliver(PLAIN).status == 0
        heard: list[str] = []
        while not any("mail.done" in line for line in heard):
            assert select.select([syslogd], [], [], 30)[0], heard
            heard.append(syslogd.recv(65536).decode())
        assert system.daemon.log() == [], "nothing is left for standard error"
    pids = {int(match[1]) for line in heard if (match := re.match(r"<15[0-9]>.{15} contentfilter\[(\d+)\]: ", line))}
    assert pids == {system.daemon.pid, *system.daemon.workers()}
    assert all(line.startswith(("<158>", "<157>", "<156>", "<155>")) for line in heard), "19 * 8 and the severity"
    assert ('"event":"mail.done"' if form == "json" else " event=mail.done ") in heard[-1]


def test_under_journald_every_line_has_its_severity(lab_directory: Any) -> None:
    """Standard error is a pipe here; the variable says that it is journald's."""
    serve = f'exec {shlex.quote(sys.executable)} -P -m contentfilter --config "$0" serve --allow-root'
    script = "export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2); " + serve
    system = System(lab_directory / "journald", settings={"origin": {"bounce_users": ["no-such-user"]}})
    system.daemon._command = ("bash", "-c", script)
    with system:
        assert system.deliver(PLAIN).status == 0
        system.daemon.wait_for("text", where=lambda line: '"event":"mail.done"' in line["text"])
        lines = [line["text"] for line in system.daemon.log("text")]
    marks = {"info": "<6>{", "warning": "<4>{", "error": "<3>{"}
    assert all(line.startswith(marks[json.loads(line[3:])["level"]]) for line in lines)
    assert {json.loads(line[3:])["level"] for line in lines} == {"info", "warning"}


def test_every_line_of_a_busy_daemon_is_as_the_schema_says(make_system: MakeSystem, clamd: Clamd, spamd: Spamd) -> None:
    system = make_system(
        clamd=clamd, spamd=spamd, activated=True, settings={"origin": {"bounce_users": ["no-such-user"]}}
    )
    set_smtplog(system, 2)
    for message in (PLAIN, VIRUS, SPAM):
        system.deliver(message)
    system.deliver(SPAM + VIRUS, b"virus-only@mixed.example", b"none@mixed.example")
    system.control("clamavclients", "bad bad bad\n" * 3)
    system.daemon.write_config("[listen]\nsocket = 1\n")
    system.daemon.reload()
    system.daemon.wait_for("service.reload-failed")
    system.daemon.stop()
    lines = system.daemon.log()
    assert {"mail.done", "mail.step", "service.problem", "service.stop", "worker.ready"} <= {
        line["event"] for line in lines
    }
    assert [(line, found) for line in lines if (found := wrong(line, schema()))] == []
