"""Parts die, stop, restart and lie, while mail is on its way: none is lost, doubled, refused, or left behind."""

import os
import resource
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
from e2e.mails import PLAIN, SPAM, VIRUS, with_program
from e2e.trouble import Load, kill_everything, open_files, targets, waiting_in
from lab.clamd import Clamd
from lab.hook import until
from lab.offer import Offer
from lab.peers import Peer, alive, floods, in_turn, read_clamd, read_spamd, says, says_and_stays

TOLD = 82
CLEAN = says(b"fd[10]: OK\0")
ONE = b"virus-only@mixed.example"


# Promise 3: restart without refusing


@pytest.mark.parametrize("victim", ["worker", "everything"])
def test_killed_while_it_holds_a_message(make_system, tmp_path: Path, victim: str) -> None:
    with Peer(tmp_path, alive(in_turn(says_and_stays(b""), CLEAN)), read_clamd) as peer:
        system = make_system(clamd=peer)
        process, standin = system.start_hook(PLAIN, (ONE,))
        waiting_in(system.daemon, peer)
        if victim == "worker":
            os.kill(system.daemon.workers()[0], signal.SIGKILL)
        else:
            kill_everything(system.daemon)
            system.daemon.start()
        d = system.delivered(process.wait(), standin)
        assert (d.status, d.text, d.stderr) == (0, "", "")
        assert d.only.message.endswith(PLAIN)
        assert d.only.pid == process.pid
        assert [record["attempt"] > 0 for record in system.daemon.wait_for("mail.done")] == [True]


def test_a_supervisor_that_is_killed_alone_lets_its_worker_finish(make_system, tmp_path: Path) -> None:
    with Peer(
        tmp_path, lambda peer, sock: (says_and_stays(b"")(peer, sock), sock.sendall(b"fd[10]: OK\0")), read_clamd
    ) as peer:
        system = make_system(clamd=peer)
        process, standin = system.start_hook(PLAIN, (ONE,))
        waiting_in(system.daemon, peer)
        system.daemon.kill()
        system.daemon.wait_for("worker.orphaned")
        peer.over.set()
        d = system.delivered(process.wait(), standin)
        assert (d.status, len(d.queued)) == (0, 1)
        system.daemon.wait_exit()
        system.daemon.start()
        assert system.deliver(PLAIN, b"a@elsewhere.example").status == 0


def test_a_worker_that_hangs_is_replaced_and_its_message_goes_on(make_system, tmp_path: Path) -> None:
    with Peer(tmp_path, alive(in_turn(says_and_stays(b""), CLEAN)), read_clamd) as peer:
        system = make_system(clamd=peer, settings={"service": {"stuck_after": 2.0}})
        process, standin = system.start_hook(PLAIN, (ONE,))
        waiting_in(system.daemon, peer)
        os.kill(system.daemon.workers()[0], signal.SIGSTOP)
        d = system.delivered(process.wait(), standin)
        assert (d.status, d.stderr, len(d.queued)) == (0, "", 1)
        assert len(system.daemon.log("worker.stuck")) == 1


def test_too_few_descriptors_defer_at_worst_and_lose_nothing(make_system, clamd) -> None:
    system = make_system(clamd=clamd)
    assert system.deliver(PLAIN, ONE).status == 0
    (worker,) = system.daemon.workers()
    limit = max(int(path.name) for path in Path(f"/proc/{worker}/fd").iterdir()) + 4
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (limit, limit))
    with Load(system, senders=6) as load:
        load.more(20)
    for message, to, d in load.results:
        assert len(d.queued) == (len(to) if d.status == 0 else 0)
        assert (d.status, d.text[:1]) in ((0, ""), (TOLD, "Z")), (message, d.text)
    assert system.deliver(PLAIN, ONE).status == 0
    assert system.daemon.workers() == [worker]
    assert len(system.daemon.log("intake.accept-failed") + system.daemon.log("intake.garbage")) > 0


@pytest.mark.parametrize("activated", [False, True], ids=["own socket", "systemd's socket"])
def test_mail_that_comes_while_no_daemon_runs_waits_for_it(make_system, activated: bool) -> None:
    system = make_system(activated=activated)
    assert system.daemon.stop() == 0
    waiting = [system.start_hook(PLAIN, (b"r%d@elsewhere.example" % n,)) for n in range(5)]
    system.daemon.start()
    for process, standin in waiting:
        d = system.delivered(process.wait(), standin)
        assert (d.status, d.stderr, len(d.queued)) == (0, "", 1)
    assert len(system.daemon.wait_for("mail.done", 5)) == 5


@pytest.mark.parametrize("activated", [False, True], ids=["own socket", "systemd's socket"])
def test_reloads_restarts_and_deaths_under_load_go_unnoticed(make_system, clamd, activated: bool) -> None:
    """SIGHUP, SIGTERM and a new start, a worker killed, everything killed: each with mail under way."""
    system = make_system(clamd=clamd, activated=activated, settings={"service": {"workers": 2}})
    with Load(system) as load:
        for _ in range(2):
            system.daemon.reload()
            load.more()
        os.kill(system.daemon.workers()[0], signal.SIGKILL)
        load.more()
        assert system.daemon.stop() == 0
        system.daemon.start()
        load.more()
        kill_everything(system.daemon)
        system.daemon.start()
        load.more()
    assert len(load.results) >= 50
    load.nothing_went_wrong()
    assert max(line["generation"] for line in system.daemon.log("service.reload")) == 3


def test_a_clamd_that_ends_in_the_middle_of_a_scan_lets_no_virus_pass(make_system, lab_directory: Path) -> None:
    """Killed or asked to stop: refused where it had found the virus by then, deferred where not."""
    message = b"Subject: long\n\n" + (b"y" * 75 + b"\n") * 200_000 + VIRUS
    with Clamd(lab_directory / "mortal") as mortal:
        system = make_system(clamd=mortal, controls={"clamglobal": "1\n"})

        def scanning() -> bool:
            return any("(deleted)" in target for target in targets(mortal.pid))

        seen = set()
        for number in (signal.SIGKILL, signal.SIGTERM) * 2:
            process, standin = system.start_hook(message)
            until(scanning, "clamd never saw the message")
            mortal.signal(number)
            d = system.delivered(process.wait(90), standin)
            seen.add((d.status, d.text[:1], d.queued))
            mortal.kill()
            mortal.start()
            assert system.deliver(PLAIN).status == 0
        assert (TOLD, "Z", ()) in seen
        assert seen <= {(TOLD, "Z", ()), (TOLD, "D", ())}


# What scanners may say


NO_ANSWERS = (
    b"",
    b"\0",
    b"OK\0",
    b"fd[10]: OK",
    b"fd[10]: NOT OK\0",
    b"fd[10]: FOUND\0",
    b"fd[10]: lstat() failed: No such file or directory. ERROR\0",
    b"\xff" * 3000 + b"\0",
)


def test_what_is_no_answer_from_clamd_defers(make_system, tmp_path: Path) -> None:
    with ExitStack() as stack:
        talks = [*map(says, NO_ANSWERS), floods(b"fd[10]: ", b"x" * 65_536)]
        peers = [stack.enter_context(Peer(tmp_path, talk, read_clamd)) for talk in talks]
        system = make_system(settings={"clamd": {"backends": [peer.backend for peer in peers]}})
        for _ in peers:
            d = system.deliver(PLAIN, ONE)
            assert (d.status, d.text[:1], d.queued) == (TOLD, "Z", ())
        assert all(peer.connections for peer in peers)


def test_names_from_scanners_forge_no_header_and_no_line(make_system, tmp_path: Path) -> None:
    evil = b"fd[10]: Evil\r\nX-Forged: by clamd\n\x1b[31m\xff FOUND\0"
    lines = b"X-Spam-Flag: YES\r\nX-Forged: by spamd\r\nX-Spam-Level: *\r\n\r\nforged body"
    reply = b"SPAMD/1.1 0 EX_OK\r\nContent-length: %d\r\nSpam: True ; 9.0 / 5.0\r\n\r\n%b" % (len(lines), lines)
    with Peer(tmp_path, says(evil), read_clamd) as clamd, Peer(tmp_path, says(reply), read_spamd) as spamd:
        system = make_system(clamd=clamd, spamd=spamd, settings={"clamd": {"action": "mark"}})
        marked = system.deliver(PLAIN, ONE)
        assert b"X-Forged" not in b"".join(q.message for q in marked.queued)
        assert len(marked.text.splitlines()) <= 1
        message = system.deliver(PLAIN, b"spam-only@mixed.example").only.message
        ours = message.removesuffix(PLAIN)
        assert ours.endswith(b"\nX-Spam-Flag: YES\nX-Spam-Level: *\n")
        assert b"X-Forged" not in ours
        records = system.daemon.wait_for("mail.done", 2)
        assert all(str(record).isprintable() for record in records)


# Nothing is left


def test_three_hundred_messages_of_all_kinds_leave_no_descriptor(system) -> None:
    large = PLAIN + b"x" * 5_000_000
    kinds = [
        lambda: system.deliver(PLAIN).status == 0,
        lambda: system.deliver(VIRUS).status == TOLD,
        lambda: system.deliver(with_program()).status == TOLD,
        lambda: system.deliver(SPAM, b"a@elsewhere.example").status == 0,
        lambda: len(system.deliver(PLAIN, ONE, b"none@mixed.example").queued) == 2,
        lambda: system.deliver(b"", ONE).status == 0,
    ]

    def gone() -> None:
        process, _ = system.start_hook(PLAIN)
        process.kill()
        process.wait()

    def some(count: int) -> None:
        for number in range(count):
            assert kinds[number % len(kinds)]()
            if number % 10 == 0:
                gone()
                with Offer(system.daemon.socket) as offer:
                    offer.send_raw(b"garbage", [0, 1, 2])
        assert system.deliver(large, ONE).status == 0

    some(40)
    workers = system.daemon.workers()
    before = open_files(system.daemon)
    some(260)
    assert system.daemon.workers() == workers
    until(
        lambda: open_files(system.daemon) <= before, f"{open_files(system.daemon)} descriptors, before it were {before}"
    )


def test_what_cannot_be_kept_is_not_removed(make_system, clamd) -> None:
    """A quarantine that cannot be written: deferred, until it can."""
    system = make_system(clamd=clamd, settings={"clamd": {"action": "remove"}})
    place = system.directory / "state" / "quarantine"
    place.write_text("no directory")
    for to in (ONE,), (ONE, b"none@mixed.example"):
        d = system.deliver(VIRUS, *to)
        assert (d.status, d.text[:1], d.queued) == (TOLD, "Z", ())
    place.unlink()
    assert system.deliver(VIRUS, ONE).status == 0
    assert [path.read_bytes() for path in (place / "entries").glob("*.eml")] == [VIRUS]
