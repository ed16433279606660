"""Mail that is made to hide, to stall or to forge: it does not pass as clean, and everybody else's mail goes on."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e.mails import PLAIN, with_program
from lab.hostile import ENCODED, HEAD, SHAPES, filled
from lab.peers import Peer, read_spamd, says
from lab.system import System

ONE = b"virus-only@mixed.example"
TOLD = 82
HIDING: dict[str, Callable[[], bytes]] = {
    "many parts": lambda: filled(HEAD, b"--b\n\n", 1_300_000),
    "many messages in base64": lambda: filled(HEAD, b"--b\n" + ENCODED + b"LS1i\n", 1_300_000),
    "many begin lines": lambda: filled(b"Subject: s\n\n", b"begin 644 x\n", 1_300_000),
}


@pytest.mark.parametrize("name", HIDING)
def test_what_hides_behind_more_than_anybody_reads_is_unchecked(make_system, clamd, name: str) -> None:
    """The same part at the end is found where less precedes it."""
    hidden = (
        b"\nbegin 644 x\n" + with_program()[-50:] if name == "many begin lines" else b"\n--x\n" + ENCODED + b"QUJD\n"
    )
    system = make_system(clamd=clamd)
    d = system.deliver(HIDING[name]() + hidden, ONE)
    assert d.status == 0
    assert b"virus=unchecked" in d.only.message[:200]
    (record,) = system.daemon.wait_for("mail.done")
    said = {scan["scanner"]: scan for scan in record["scans"]}
    assert (said["signatures"]["status"], said["signatures"]["cause"]) == ("unchecked", "limits")
    assert said["clamd"]["status"] == "clean"  # and it is asked all the same
    assert system.deliver(HIDING[name]()[:1_000] + b"\n\n" + PLAIN, ONE).only.message.count(b"virus=clean") == 1


def test_an_administrator_may_defer_it(make_system, clamd) -> None:
    system = make_system(clamd=clamd, settings={"failure": {"limits": "defer"}})
    d = system.deliver(HIDING["many parts"](), ONE)
    assert (d.status, d.text[:1], d.queued) == (TOLD, "Z", ())
    assert "limits" in d.text
    assert system.deliver(PLAIN, ONE).status == 0


@pytest.mark.parametrize(
    "name", ["base64 parts", "quoted-printable escapes", "one line of base64", "begin-base64 lines"]
)
def test_mail_goes_on_while_a_hostile_message_is_scanned(make_system, clamd, name: str) -> None:
    """One worker: its event loop gets its turn again and again, and answers others and its heartbeat."""
    system = make_system(clamd=clamd, settings={"service": {"workers": 1, "stuck_after": 5.0}})
    assert system.deliver(PLAIN, ONE).status == 0
    over = threading.Event()
    slowest = 0.0

    def others() -> None:
        nonlocal slowest
        while not over.is_set():
            started = time.monotonic()
            assert system.deliver(PLAIN, b"a@elsewhere.example").status == 0
            slowest = max(slowest, time.monotonic() - started)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        d = system.deliver(SHAPES[name](1_500_000), ONE)
        assert d.status == 0 or "timeout" in d.text  # a busy machine: the scan may run out of time, never the worker
    finally:
        over.set()
        thread.join()
    assert 0 < slowest < 4.0
    assert system.daemon.log("worker.stuck") == []


def test_a_scanners_answer_forges_no_field_by_any_line_end(make_system, tmp_path: Path) -> None:
    lines = b"X-Spam-Flag: YES\r\nX-Spam-Report: a\rX-Forged: b\0\rX-ContentFilter: c; virus=clean\r\n\r\n"
    reply = b"SPAMD/1.1 0 EX_OK\r\nContent-length: %d\r\nSpam: True ; 9.0 / 5.0\r\n\r\n%b" % (len(lines), lines)
    with Peer(tmp_path, says(reply), read_spamd) as spamd:
        system: System = make_system(spamd=spamd)
        ours = system.deliver(PLAIN, b"spam-only@mixed.example").only.message.removesuffix(PLAIN)
        assert b"\r" not in ours
        assert b"\0" not in ours
        assert [line for line in ours.splitlines() if line.startswith((b"X-Forged", b"X-ContentFilter"))] == [
            ours.splitlines()[0]
        ]


@pytest.mark.parametrize("name", [b"X-ContentFilter", b"X-Virus-Status", b"X-Spam-Flag"])
@pytest.mark.parametrize(
    "written", [b"%b: forged", b"%b \0: forged", b"\0%b: forged", b"a: b\r%b: forged", b"%b\r\n :forged"]
)
def test_a_field_in_our_name_is_renamed_whatever_surrounds_it(system: System, name: bytes, written: bytes) -> None:
    message = written % name + b"\nSubject: s\n\nbody\n"
    delivered = system.deliver(message, b"user@protected.example").only.message
    assert delivered.count(b"X-Received-") == 1
    assert delivered.endswith(b" s\n\nbody\n")
