"""The retry finds an answer: through real hooks and the real daemon, with a clamd that takes its time."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab.hook import until
from lab.scrape import scrape_until
from lab.slow import NEWER, OK, Slow, tried
from lab.system import Delivered, System

MAIL = b"Subject: a large one\n\nwith an archive that takes long\n"
VIRUS = b"Win.Worm.Slow-1 FOUND"


@pytest.fixture
def slow(lab_directory: Path) -> Iterator[Slow]:
    with Slow(lab_directory) as clamd:
        yield clamd


@pytest.fixture
def system(make_system: Callable[..., System], slow: Slow) -> System:
    return make_system(**options(slow))


def options(slow: Slow, **reuse: Any) -> dict[str, Any]:
    """A try of half a second; answers that took a tenth of one are kept."""
    return {
        "controls": {"options": "clamglobal 1\n"},
        "settings": {
            "service": {"budget": 20.0},
            "clamd": {"backends": [slow.backend], "timeout": 0.5},
            "reuse": {"slow": 0.1} | reuse,
        },
    }


def given_up(system: System, slow: Slow, message: bytes, word: bytes = OK) -> Delivered:
    """The first try: deferred. The scan continues to its end."""
    first = system.deliver(message)
    assert first.text.startswith("Z"), first
    assert not first.queued
    ended = len(system.daemon.log("scan.late"))
    slow.says(word)
    system.daemon.wait_for("scan.late", count=ended + 1)
    return first


def scan(system: System, count: int) -> dict[str, Any]:
    """clamd's part of the record of the ``count``-th message."""
    return next(s for s in system.daemon.wait_for("mail.done", count)[count - 1]["scans"] if s["scanner"] == "clamd")


def test_the_retry_finds_the_answer_of_the_scan_that_its_first_try_did_not_wait_for(system: System, slow: Slow) -> None:
    given_up(system, slow, tried(MAIL, 1))
    assert scan(system, 1)["cause"] == "timeout"
    slow.thinks()
    retry = tried(MAIL, 9, "other.example.net", "198.51.100.3")
    delivered = system.deliver(retry)
    assert delivered.status == 0
    assert delivered.only.message.endswith(retry), "the bytes of this try, not those of the first"
    said = scan(system, 2)
    assert (said["status"], said["reused"], said["backend"]) == ("clean", "kept", slow.backend)
    assert said["detail"].startswith("answer kept from ")
    assert len(slow.asked) == 1


def test_a_virus_that_was_found_too_late_refuses_the_retry(system: System, slow: Slow) -> None:
    given_up(system, slow, tried(MAIL, 1), VIRUS)
    slow.thinks()
    refused = system.deliver(tried(MAIL, 9))
    assert refused.text.startswith("D"), refused
    assert "Win.Worm.Slow-1" in refused.text
    assert system.daemon.wait_for("mail.done", 2)[1]["reason"] == "virus"
    assert len(slow.asked) == 1


def test_a_virus_found_in_one_clients_mail_does_not_refuse_anothers(system: System, slow: Slow) -> None:
    given_up(system, slow, tried(MAIL, 1), VIRUS)
    slow.says(OK)
    assert system.deliver(tried(MAIL, 1, "innocent.example.org", "203.0.113.8")).status == 0
    assert len(slow.asked) == 2


def test_other_content_is_never_answered_from_memory(system: System, slow: Slow) -> None:
    given_up(system, slow, tried(MAIL, 1))
    for other in (MAIL + b"\n", MAIL[:-1] + b"!", MAIL.replace(b"large", b"lArge")):
        slow.says(VIRUS)
        assert system.deliver(tried(other, 1)).status, other
    assert len(slow.asked) == 4


def test_the_contents_of_a_forged_received_field_are_scanned(system: System, slow: Slow) -> None:
    """Everything that is not a host name or a date is content."""
    given_up(system, slow, tried(MAIL, 1))
    forged = [
        tried(MAIL, 1).replace(b"mail.example.net", b"X5O!P%@AP"),
        tried(MAIL, 1).replace(b"with SMTP", b"with QQQQ"),
        tried(MAIL, 1).replace(b"20 Nov 2026 12:01:00", b"20 Nov 2026 12:01:xx"),
        tried(tried(MAIL, 2), 1).replace(b"in.example with SMTP", b"in.example with EVIL"),
    ]
    for number, message in enumerate(forged):
        slow.says(VIRUS)
        assert system.deliver(message).status, message
        assert len(slow.asked) == 2 + number


def test_clean_does_not_outlive_the_database(system: System, slow: Slow) -> None:
    given_up(system, slow, tried(MAIL, 1))
    slow.database = NEWER
    slow.says(VIRUS)
    assert system.deliver(tried(MAIL, 9)).status
    assert len(slow.asked) == 2


def test_clean_counts_only_while_clamd_says_which_database_it_has(system: System, slow: Slow) -> None:
    given_up(system, slow, tried(MAIL, 1))
    slow.mute = True
    slow.says(VIRUS)
    assert system.deliver(tried(MAIL, 9)).status
    assert len(slow.asked) == 2


def test_an_answer_counts_for_its_time_only(make_system: Callable[..., System], slow: Slow) -> None:
    system = make_system(**options(slow, keep=0.3))
    given_up(system, slow, tried(MAIL, 1))
    threading.Event().wait(0.4)  # its time
    assert system.deliver(tried(MAIL, 9)).status == 0
    assert len(slow.asked) == 2


def test_with_the_memory_off_each_try_is_scanned(make_system: Callable[..., System], slow: Slow) -> None:
    system = make_system(**options(slow, keep=0))
    assert system.deliver(tried(MAIL, 1)).status
    slow.says(OK)
    assert system.deliver(tried(MAIL, 2)).status == 0
    assert len(slow.asked) == 2
    assert not system.daemon.log("scan.late")


def test_equal_messages_in_flight_share_one_scan_and_others_do_not(system: System, slow: Slow) -> None:
    mails = [tried(MAIL, 1), tried(MAIL, 2), tried(MAIL + b".", 3)]
    hooks = [system.start_hook(mails[0])]
    until(lambda: len(slow.asked) == 1, "no question")
    hooks += [system.start_hook(mail) for mail in mails[1:]]
    until(lambda: len(slow.asked) == 2, "the other message was not asked about")
    slow.says(OK)
    ends = [system.delivered(process.wait(60), standin) for process, standin in hooks]
    assert [end.status for end in ends] == [0, 0, 0]
    for end, mail in zip(ends, mails, strict=True):
        assert end.only.message.endswith(mail)
    assert len(slow.asked) == 2
    reused = [s for record in system.records() for s in record["scans"] if s.get("reused")]
    assert [(s["reused"], s["status"]) for s in reused] == [("shared", "clean")]


def test_a_retry_joins_the_scan_that_still_runs(system: System, slow: Slow) -> None:
    assert system.deliver(tried(MAIL, 1)).status
    process, standin = system.start_hook(tried(MAIL, 2))
    system.daemon.wait_for("mail.done")
    until(lambda: len(system.daemon.log("mail.done")) == 1, "")
    slow.says(OK)
    assert system.delivered(process.wait(60), standin).status == 0
    assert len(slow.asked) == 1
    assert scan(system, 2)["reused"] in ("shared", "kept")


def test_a_client_that_goes_away_finds_the_answer_when_it_comes_again(
    make_system: Callable[..., System], slow: Slow
) -> None:
    changed = options(slow)
    changed["settings"]["clamd"]["timeout"] = 20.0
    system = make_system(**changed)
    process, _ = system.start_hook(tried(MAIL, 1))
    until(lambda: len(slow.asked) == 1, "no question")
    process.kill()
    system.daemon.wait_for("intake.client-gone")
    slow.says(OK)
    system.daemon.wait_for("scan.late")
    slow.thinks()
    assert system.deliver(tried(MAIL, 2)).status == 0
    assert len(slow.asked) == 1


def test_every_worker_knows_it_and_a_new_one_does_not(make_system: Callable[..., System], slow: Slow) -> None:
    changed = options(slow)
    changed["settings"]["service"]["workers"] = 2
    system = make_system(**changed)
    given_up(system, slow, tried(MAIL, 1))
    for minute in range(2, 40):
        hooks = [system.start_hook(tried(MAIL, minute)) for _ in range(10)]  # many simultaneous ones reach every worker
        assert {process.wait(60).status for process, _ in hooks} == {0}
        kept = [r["pid"] for r in system.records() if any(s.get("reused") == "kept" for s in r["scans"])]
        if len(set(kept)) == 2:
            break
    assert len(set(kept)) == 2, "some worker did not learn it"
    for pid in system.daemon.workers():
        os.kill(pid, signal.SIGKILL)
    system.daemon.wait_for("worker.ready", count=4)
    asked = len(slow.asked)
    assert system.deliver(tried(MAIL, 2)).status == 0
    assert len(slow.asked) == asked + 1


def test_a_reload_keeps_the_memory_unless_the_configuration_of_clamd_changes(system: System, slow: Slow) -> None:
    given_up(system, slow, tried(MAIL, 1))
    slow.thinks()
    system.daemon.reload()
    system.daemon.wait_for("worker.reload")
    assert system.deliver(tried(MAIL, 2)).status == 0
    assert len(slow.asked) == 1
    config = system.daemon.config.read_text()
    system.daemon.write_config(config.replace("[clamd]", "[clamd]\nmax_size = 1000000"))
    system.daemon.reload()
    system.daemon.wait_for("worker.reload", count=2)
    slow.says(OK)
    assert system.deliver(tried(MAIL, 3)).status == 0
    assert len(slow.asked) == 2


def test_no_more_scans_go_on_than_the_limit(make_system: Callable[..., System], slow: Slow) -> None:
    system = make_system(**options(slow, late_scans=1))
    assert system.deliver(tried(MAIL, 1)).status
    assert system.deliver(tried(MAIL + b"another\n", 1)).status
    slow.says(OK)
    system.daemon.wait_for("scan.late")
    assert system.deliver(tried(MAIL, 2)).status == 0
    assert system.deliver(tried(MAIL + b"another\n", 2)).status == 0
    assert len(slow.asked) == 3
    assert len(system.daemon.log("scan.late")) == 1


def test_a_scan_does_not_go_on_for_ever(make_system: Callable[..., System], slow: Slow) -> None:
    system = make_system(**options(slow, late=0.2))
    assert system.deliver(tried(MAIL, 1)).status
    (line,) = system.daemon.wait_for("scan.late")
    assert line["result"] == "timeout"


def test_the_metrics_count_what_was_spared(make_system: Callable[..., System], slow: Slow) -> None:
    changed = options(slow)
    changed["settings"]["http"] = {"listen": "127.0.0.1:0"}
    system = make_system(**changed)
    given_up(system, slow, tried(MAIL, 1))
    slow.thinks()
    assert system.deliver(tried(MAIL, 2)).status == 0
    scrape_until(system.daemon, lambda s: s.value("scans_reused_total", scanner="clamd", how="kept") == 1)
