"""The promises of design, section 2, with every part real: hook, daemon, scanners, and a strict queue behind them."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from e2e.mails import PLAIN, SPAM, VIRUS
from e2e.trouble import SPLIT, kill_everything, open_files, waiting_in
from lab.hook import until
from lab.offer import Offer
from lab.peers import Peer, read_clamd, read_spamd, says_and_stays
from lab.system import System

from contentfilter.wire import envelope

TOLD = 82  # the status for which notqmail reads the text
UNPROTECTED = b"user@elsewhere.example"


# 1. No mail is lost


def test_whatever_the_queue_leaves_with_is_the_hooks_status(system: System) -> None:
    for status in (11, 31, 51, 52, 53, 54, 55, 61, 66, 71, 74, 81, 91, 120, 255):
        for point in ("message", "end"):
            d = system.deliver(PLAIN, knobs={"at": point, "exit": str(status)})
            assert (d.status, d.queued) == (status, ()), point


def test_a_queue_that_is_killed_is_no_success(system: System) -> None:
    for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGALRM):
        d = system.deliver(PLAIN, knobs={"at": "end", "signal": str(int(number))})
        assert (d.status, d.queued) == (-number, ())


@pytest.mark.parametrize("point", ["message", "envelope"])
def test_one_part_that_fails_before_the_commit_undoes_all(system: System, point: str) -> None:
    for knob, status in ({"exit": "53"}, 53), ({"exit": "11"}, 11), ({"exit": "200"}, 71), ({"signal": "9"}, 81):
        d = system.deliver(PLAIN, *SPLIT, knobs={"at": point, "when": "virus=clean", **knob})
        assert (d.status, d.queued) == (status, ()), knob


def test_one_part_that_fails_after_the_commit_is_no_success(system: System) -> None:
    """It can no longer be undone, so the client must send again: twice is better than never."""
    d = system.deliver(PLAIN, *SPLIT, knobs={"at": "end", "when": "virus=clean", "exit": "53"})
    assert d.status == 53
    assert [q.envelope.recipients for q in d.queued] == [SPLIT[1:]]
    assert "1 of 2 parts are queued" in d.stderr


def test_a_queue_on_a_full_disk(system: System, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=256k none {disk} 2>/dev/null"):
        pytest.skip("cannot mount a small file system here")
    try:
        for to in (UNPROTECTED,), SPLIT:
            d = system.deliver(b"x" * 400_000, *to, env={"STANDIN_DIR": str(disk)})
            assert d.status == 53
            assert list(disk.iterdir()) == []
    finally:
        os.system(f"umount {disk}")


def test_the_daemon_alone_queues_nothing(make_system, tmp_path: Path) -> None:
    """A hook that dies while the daemon decides: no copy turns up anywhere, whatever was decided."""
    with Peer(tmp_path, says_and_stays(b""), read_clamd) as peer:
        system = make_system(clamd=peer)
        process, standin = system.start_hook(PLAIN)
        waiting_in(system.daemon, peer)
        before = open_files(system.daemon)
        process.kill()
        process.wait()
        system.daemon.wait_for("intake.client-gone")
        until(lambda: open_files(system.daemon) < before, "the message is still held")
        with Offer(system.daemon.socket) as offer:  # somebody who asks and never queues
            assert offer.send(PLAIN).answer() is not None
        assert standin.queued() == []
        for pid in system.daemon.workers():
            assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""


# 4. One deadline


def test_at_the_end_of_the_budget_the_daemon_still_answers(make_system, tmp_path: Path) -> None:
    """Its own text, not the hook's: the answer was ready before the hook gave up."""
    with (
        Peer(tmp_path, says_and_stays(b""), read_clamd) as clamd,
        Peer(tmp_path, says_and_stays(b""), read_spamd) as spamd,
    ):
        system = make_system(clamd=clamd, spamd=spamd)
        started = time.monotonic()
        checked, standin = system.start_hook(PLAIN, budget=3)
        spam_only, other = system.start_hook(PLAIN, (b"spam-only@mixed.example",), budget=3)
        d = system.delivered(checked.wait(), standin)
        assert (d.status, d.queued) == (TOLD, ())
        assert d.text.startswith("Zvirus check not possible now (timeout)")
        d = system.delivered(spam_only.wait(), other)
        assert d.status == 0
        assert b"virus=skipped; spam=unchecked" in d.only.message
        assert time.monotonic() - started < 6


def test_the_daemons_own_budget_holds_too(make_system, tmp_path: Path) -> None:
    with Peer(tmp_path, says_and_stays(b""), read_clamd) as clamd:
        system = make_system(clamd=clamd, settings={"service": {"budget": 1.0}})
        assert system.deliver(PLAIN, budget=60).text.startswith("Zvirus check not possible now (timeout)")


# 5. Bytes are exact

BYTES = {
    "empty": b"",
    "newline": b"\n",
    "newlines": b"\n" * 3000,
    "one letter": b"x",
    "header only": b"Subject: s\n",
    "header without end": b"Subject: s",
    "folded without end": b"Subject: s\n t",
    "body only": b"\nbody\n",
    "body without end": b"Subject: s\n\nbody",
    "no header at all": b"just text\nin lines\n",
    "NUL": b"Subject: a\0b\nX: \0\n\n\0NUL\0\0\n\0",
    "NUL alone": b"\0",
    "CR LF": b"Subject: s\r\nX: y\r\n\r\nbody\r\n",
    "bare CR": b"Subject: s\rX: y\r\r\n\n\rbody\r\r",
    "8-bit": b"Subject: " + bytes(range(128, 256)) + b"\n\n" + bytes(range(256)) * 20,
    "mbox and dots": b"From x\n>From y\n.\n..\n\n.\nFrom z\n",
    "long line": b"Subject: s\n\n" + b"x" * 100_000,
    "wrong header": b": no name\n : folded nothing\nno colon\n\nbody\n",
}
TRACE = rb"X-ContentFilter: [0-9a-z]{16}; virus=[a-z]+; spam=[a-z]+\n"
SCANNED = rb"(X-Virus-Scanned: contentfilter \(signatures, loadertypes, clamd\)\nX-Virus-Status: Clean\n)?"
OURS = re.compile(TRACE + SCANNED + rb"X-Originating-IP: \[192\.0\.2\.7\]\n")


def exact(received: bytes, original: bytes) -> bool:
    """Our lines, then the original, and nothing between or behind."""
    ours = len(received) - len(original)
    return OURS.fullmatch(received[:ours]) is not None and received[ours:] == original


@pytest.mark.parametrize("to", [(UNPROTECTED,), SPLIT[:1], SPLIT], ids=["prepend", "scanned", "split"])
def test_what_is_queued_are_our_lines_and_the_original_bytes(system: System, to: tuple[bytes, ...]) -> None:
    for name, message in BYTES.items():
        d = system.deliver(message, *to)
        assert (d.status, len(d.queued)) == (0, len(to)), name
        assert all(exact(q.message, message) for q in d.queued), name


@pytest.mark.parametrize("to", [(UNPROTECTED,), SPLIT], ids=["one", "split"])
@pytest.mark.parametrize("forged", [b"", b"X-ContentFilter: forged\n\n"], ids=["in front", "in place of the header"])
def test_every_size_around_the_ways_that_bytes_take(system: System, to: tuple[bytes, ...], forged: bytes) -> None:
    """Below 64 KiB a pipe, then memory, then a file: each limit from both sides."""
    renamed = forged.replace(b"X-", b"X-Received-X-")
    ours = len(system.deliver(b"", UNPROTECTED).only.message) + len(renamed) - len(forged)
    pipe = [65_536 - ours + n for n in (-1, 0, 1)] + [65_536 + n for n in (-1, 0, 1)]
    ways = [(size, {}) for size in (4095, 4096, 4097, *pipe, 131_072)]
    ways += [(100_000 + n, {"memory": 100_000}) for n in (-ours, 1 - ours, -1, 0, 1)]
    ways += [(size, {"memory": 0}) for size in (len(forged), 65_536, 65_537, 300_000)]
    for size, conf in ways:
        body = os.urandom(size - len(forged))
        d = system.deliver(forged + body, *to, spool=system.directory, **conf)
        assert (d.status, len(d.queued)) == (0, len(to)), (size, conf)
        assert all(exact(q.message, renamed + body) for q in d.queued), (size, conf)


def test_a_mark_changes_the_subject_and_nothing_else(system: System) -> None:
    """GTUBE makes it spam; the odd bytes are in header and body."""
    head, _, gtube = SPAM.partition(b"\n\n")
    for name in ("NUL", "bare CR", "8-bit", "body without end"):
        odd = b"X-Odd: \xff\0\r!\n"
        message = odd + head + b"\n\n" + gtube + BYTES[name]
        received = system.deliver(message, b"spam-only@mixed.example").only.message
        tagged = message.replace(b"Subject: offer", b"Subject: [SPAM] offer")
        assert received.endswith(b"\n" + tagged), name
        assert b"X-Spam-Flag: YES\n" in received[: -len(tagged)], name


def test_without_headers_of_ours_not_one_byte_is_added(make_system) -> None:
    settings = {"headers": {"trace": False, "scanned": False}}
    system = make_system(settings=settings, controls={"xoriginatingip": "0\n", "clamavclients": "a@one.example\n"})
    sizes = [b"\n" * n for n in (65_535, 65_536, 65_537)]
    for message in (*BYTES.values(), *sizes):
        assert system.deliver(message, UNPROTECTED).only.message == message
        assert {q.message for q in system.deliver(message, UNPROTECTED, b"a@one.example").queued} == {message}


# 7. The abort signal


def test_an_envelope_that_is_cut_anywhere_is_an_abort_that_nobody_hears_of(system: System) -> None:
    whole = envelope.build(b"cut@example.net", (b"user@protected.example", b"b@c.example"))
    for size in range(len(whole)):
        d = system.deliver(VIRUS, block=whole[:size])
        assert (d.status, d.queued, d.text) == (54, (), ""), size
    assert system.deliver(PLAIN, sender=b"after-the-cuts@example.net").status == 0
    system.daemon.wait_for("mail.done", where=lambda r: r["sender"] == "after-the-cuts@example.net")
    assert [r for r in system.records() if r["sender"] == "cut@example.net"] == []
    assert system.daemon.log("intake.bad-envelope") == []


# 8. Bounces are never refused


def test_a_bounce_is_neither_refused_nor_deferred(make_system, clamd, spamd) -> None:
    origin = {"origin": {"smtp_users": [], "bounce_users": [str(os.getuid())]}}
    controls = {"databytes": "100\n", "maxrecipients": "1\n", "clamglobal": "1\n", "spamglobal": "1\n"}
    strict = {"spamd": {"action": "reject"}, "failure": {"spamd": "defer", "too_big": "defer"}}
    system = make_system(clamd=clamd, spamd=spamd, controls=controls, settings=origin | strict)
    for message in (VIRUS, SPAM):
        d = system.deliver(message, sender=b"")
        assert (d.status, d.text, d.queued) == (0, "", ())
    assert len(list((system.directory / "state" / "quarantine" / "entries").glob("*.eml"))) == 2
    assert system.deliver(PLAIN + b"x" * 200, b"a@b.example", b"c@d.example", sender=b"#@[]").only.message


def test_a_bounce_passes_scanners_that_are_down(make_system) -> None:
    nobody = {"backends": ["unix:/nonexistent/socket"]}
    failure = {"clamd": "defer", "spamd": "defer", "signatures": "defer", "too_big": "defer"}
    origin = {"smtp_users": [], "bounce_users": [str(os.getuid())]}
    settings = {"origin": origin, "clamd": nobody, "spamd": nobody, "failure": failure}
    system = make_system(settings=settings)
    assert b"virus=unchecked; spam=unchecked" in system.deliver(PLAIN, sender=b"").only.message


# 6. Nothing is left behind


def test_killed_hooks_and_a_killed_daemon_leave_nothing(make_system, clamd, tmp_path: Path) -> None:
    """Hooks are killed at every stage of their work, then the daemon; what they had is gone with them."""
    spool, temporary = tmp_path / "spool", tmp_path / "tmp"
    spool.mkdir()
    temporary.mkdir()
    system = make_system(clamd=clamd, environ={"TMPDIR": str(temporary)})
    runs = []
    for number in range(30):
        process, standin = system.start_hook(PLAIN + b"x" * 600_000, SPLIT, memory=300_000, spool=spool)
        time.sleep(number * 0.002)  # not a wait for anything: another moment each time
        process.kill()
        runs.append((process, standin))
    held, standin = system.start_hook(PLAIN * 10_000, memory=0, spool=spool, budget=1)
    kill_everything(system.daemon)
    held.wait()
    assert all(process.wait().status in (0, -signal.SIGKILL) for process, _ in runs)
    until(lambda: not any(standin.leftovers() for _, standin in runs), "a queue still waits for its envelope's end")
    assert list(spool.iterdir()) == list(temporary.iterdir()) == []
    state = {path.name.partition("-")[0] for path in (system.directory / "state").rglob("*")}
    assert state <= {"tables.snapshot", "release.key", "journal.sqlite"}
    system.daemon.start()
    assert system.deliver(PLAIN).status == 0
