"""More mail than the machine can scan: all of it is accepted or deferred, and soon all is as before."""

import time
from pathlib import Path

import pytest
from e2e.mails import PLAIN, with_program
from lab.crowd import Crowd, Outcome, most_memory
from lab.peers import Peer, Talk, read_clamd, read_spamd

HOOKS = 2_000
AV = b"virus-only@mixed.example"
SPAM = b"spam-only@mixed.example"
MEMORY = 120_000_000  # bytes that a worker may have had at most; 45 MB is usual
TEMPORARY = (71, 82)  # 82: with a text that begins with Z


def slow(seconds: float, answer: bytes) -> Talk:
    """A scanner that takes its time, as real ones do."""

    def talk(peer: Peer, sock) -> None:  # type: ignore[no-untyped-def]
        peer.read(sock)
        peer.over.wait(seconds)
        sock.sendall(answer)

    return talk


def body(number: int) -> bytes:
    return b"a line of text\n" * (10 + number % 300)


def network(number: int) -> dict[str, str]:
    return {"TCPREMOTEIP": f"10.{number % 7}.{number % 11}.5"}


def nothing_bad(outcome: Outcome, count: int) -> None:
    assert len(outcome.statuses) == count
    assert outcome.lost == set()
    assert outcome.doubled == set()
    assert {status for status in outcome.statuses.values() if status not in (0, *TEMPORARY)} == set()
    assert [text for text in outcome.texts if not text.startswith("Z")] == [], "none may be refused permanently"


def test_two_thousand_simultaneous_hooks(make_system, tmp_path: Path) -> None:
    """Two workers, a slow clamd, a short backlog: nothing lost, nothing refused, memory bounded, and soon over."""
    with Peer(tmp_path, slow(0.1, b"fd[10]: OK\0"), read_clamd, backlog=64) as clamd:
        settings = {
            "service": {"workers": 2, "max_in_flight": 64, "max_waiting": 300, "admission_wait": 3.0},
            "listen": {"backlog": 256},
        }
        system = make_system(clamd=clamd, settings=settings)
        workers = system.daemon.workers()
        crowd = Crowd(system, "crowd", budget=60)
        crowd.start(range(HOOKS), body, network, AV)
        outcome = crowd.wait(90)
        began = time.monotonic()
        fresh = system.deliver(PLAIN, AV)
        answered = time.monotonic() - began
    nothing_bad(outcome, HOOKS)
    deferred = HOOKS - len(outcome.accepted)
    busy = [text for text in outcome.texts if "content filter busy, please try again [" in text and "#4.3.2" in text]
    assert len(busy) == deferred, "each deferral gives its reason"
    assert len(outcome.accepted) > HOOKS / 10, "work goes on meanwhile"
    assert (fresh.status, len(fresh.queued)) == (0, 1)
    assert answered < 2.0, "back to normal immediately"
    assert system.daemon.workers() == workers, "nobody died"
    peaks = [most_memory(pid) for pid in workers]
    assert max(peaks) < MEMORY
    lines = {line["id"]: line for line in system.records() if line["decision"] == "defer"}
    assert len(lines) == deferred
    assert all(line["rule"].startswith("busy: ") and line["recipients"] for line in lines.values())
    shed = system.daemon.log("load.shed")
    assert bool(shed) == bool(deferred)
    print(f"{HOOKS} hooks in {outcome.seconds:.1f} s, {deferred} deferred, fresh {answered:.2f} s, peak {peaks}")


def test_a_flood_from_one_network_does_not_delay_the_mail_of_others(make_system, tmp_path: Path) -> None:
    with Peer(tmp_path, slow(0.1, b"fd[10]: OK\0"), read_clamd, backlog=64) as clamd:
        settings = {"service": {"max_in_flight": 32, "max_waiting": 200}, "clamd": {"concurrency": 4}}
        system = make_system(clamd=clamd, settings=settings)
        crowd = Crowd(system, "flood", budget=60)
        crowd.start(range(160), body, lambda number: {"TCPREMOTEIP": f"198.51.100.{number % 250}"}, AV)
        took = []
        for ip in ("192.0.2.1", "203.0.113.1", "2001:db8::1"):
            began = time.monotonic()
            d = system.deliver(PLAIN, AV, env={"TCPREMOTEIP": ip})
            took.append(time.monotonic() - began)
            assert (d.status, len(d.queued)) == (0, 1)
        under_way = len(system.records())
        outcome = crowd.wait(90)
    nothing_bad(outcome, 160)
    assert len(outcome.accepted) == 160
    assert under_way < 110, "the flood was not over when the others were through"
    assert max(took) < 2.5, f"{took}: behind 160 messages, 40 in a second, it would have been 4"


def test_spamd_is_skipped_before_clamd_large_mail_first_and_the_signatures_never(make_system, tmp_path: Path) -> None:
    answer = b"SPAMD/1.1 0 EX_OK\r\nContent-length: 2\r\nSpam: False ; 0.0 / 5.0\r\n\r\n\r\n"
    with (
        Peer(tmp_path, slow(0.02, b"fd[10]: OK\0"), read_clamd, backlog=64) as clamd,
        Peer(tmp_path, slow(0.5, answer), read_spamd, backlog=64) as spamd,
    ):
        controls = {
            "options": "chksignature 1\nchkloadertype 1\nspamdchildren 2\n",
            "clamavclients": "*\n",
            "spamdclients": "*\n",
        }
        settings = {"spamd": {"max_wait": 4.0}, "headers": {"scanned": True}}
        system = make_system(clamd=clamd, spamd=spamd, controls=controls, settings=settings)
        assert system.deliver(PLAIN).status == 0  # now it knows how long spamd takes
        crowd = Crowd(system, "crowd", budget=60)

        def large_or_small(number: int) -> bytes:
            return b"a line of text\n" * (20_000 if number % 4 == 0 else 20)

        crowd.start(range(80), large_or_small, network, SPAM)
        program = system.deliver(with_program(), SPAM)
        outcome = crowd.wait(90)
        nothing_bad(outcome, 80)
        assert len(outcome.accepted) == 80, "spamd's fault lets mail pass by default"
        assert (program.text[:1], program.queued) == ("D", ()), "a program is found however busy the scanners are"
        busy = {"large": 0, "small": 0}
        for record in system.daemon.wait_for("mail.done", 82):
            causes = {scan["scanner"]: scan.get("cause", "") for scan in record["scans"]}
            assert causes["signatures"] == ""
            assert causes.get("clamd", "") == ""
            if causes.get("spamd") == "busy":
                busy["large" if record["size"] > 262_144 else "small"] += 1
        assert busy["large"] / 20 > busy["small"] / 60 > 0, busy
        begin, *_ = system.daemon.wait_for("load.shed")
        assert "spamd" in begin["why"]
        assert "clamd" not in begin["why"]


@pytest.mark.parametrize("floor", ["memory", "disk"])
def test_below_the_floor_mail_is_deferred_with_the_reason_and_flows_again_above_it(make_system, floor: str) -> None:
    def settings(at: int) -> dict[str, dict[str, object]]:
        return {"service": {f"{floor}_floor": at, "admission_wait": 0.3, "workers": 1}}

    system = make_system(settings=settings(1 << 60))
    system.daemon.wait_for("load.short", where=lambda line: line["why"] == floor)
    d = system.deliver(PLAIN, AV)
    assert (d.status, d.queued) == (82, ())
    assert d.text.startswith(f"Zcontent filter is short of {floor}, please try again [")
    system.daemon.configure(system.daemon._settings | settings(0))
    system.daemon.reload()
    system.daemon.wait_for("load.enough")
    assert system.deliver(PLAIN, b"a@elsewhere.example").status == 0
