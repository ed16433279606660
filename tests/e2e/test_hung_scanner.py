"""A scanner that accepts and never answers holds up nobody for longer than ``[failure] patience``.

The default of 10 seconds is shortened, and so is everything that is measured against it.
"""

import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from e2e.mails import PLAIN
from lab.clamd import Clamd
from lab.peers import Peer, Talk, read_clamd, read_spamd, says_and_stays
from lab.system import Delivered, System

TOLD = 82
PATIENCE = 2.0
KNOWN = PATIENCE + 3.0  # seconds until the prober and the workers know
ONE = b"virus-only@mixed.example"
SPAM_ONLY = b"spam-only@mixed.example"
NOBODY = b"none@elsewhere.example"
SESSIONS, EVERY, LASTS = 40, 0.25, 14.0  # simultaneous sessions at most; one protected and one other message each time
MakeSystem = Callable[..., System]


def test_a_stopped_clamd_delays_the_first_messages_only_and_nobody_else(make_system: MakeSystem, clamd: Clamd) -> None:
    system = make_system(clamd=clamd, settings={"failure": {"patience": PATIENCE}})
    assert system.deliver(PLAIN, ONE).status == 0
    clamd.signal(signal.SIGSTOP)
    try:
        sent = flood(system)
    finally:
        clamd.signal(signal.SIGCONT)
    unprotected = [line["ms"] / 1000 for line in system.records() if line["decision"] == "queue"][1:]
    protected = [(began, spent, d) for began, spent, to, d in sent if to == ONE]
    assert {(d.status, d.text[:1], d.queued) for _, _, d in protected} == {(TOLD, "Z", ())}
    rules = {line["rule"] for line in system.records() if line["decision"] == "defer"}
    assert rules == {"clamd: timeout"}, "one cause, however far a message had come"
    later = [spent for began, spent, _ in protected if began > KNOWN]
    assert len(later) >= 20
    assert statistics.quantiles(later, n=20)[-1] < 2.0
    assert all(d.status == 0 for _, _, to, d in sent if to == NOBODY)
    assert len(unprotected) >= 40
    assert max(unprotected) < 0.5
    end = time.monotonic() + 10.0
    while system.deliver(PLAIN, ONE).status:
        assert time.monotonic() < end, "its recovery was not noticed"


def flood(system: System) -> list[tuple[float, float, bytes, Delivered]]:
    """(when it began, seconds, recipient, what became of it) for each message."""
    start = time.monotonic()

    def one(to: bytes, number: int) -> tuple[float, float, bytes, Delivered]:
        began = time.monotonic()
        d = system.deliver(PLAIN + b"number %d\r\n" % number, to)
        return began - start, time.monotonic() - began, to, d

    with ThreadPoolExecutor(SESSIONS) as pool:
        futures = []
        for number in range(int(LASTS / EVERY)):
            futures += [pool.submit(one, to, number) for to in (ONE, NOBODY)]
            time.sleep(max(0.0, start + (number + 1) * EVERY - time.monotonic()))
        return [future.result() for future in futures]


def drips(peer: Peer, sock: socket.socket) -> None:
    """A line without an end, a byte each second."""
    peer.seen.append(peer.read(sock))
    while not peer.over.wait(1.0):
        sock.sendall(b"f")


@contextmanager
def full(path: str | None) -> Iterator[str]:
    """A listen queue that is full and never emptied; over TCP that swallows connections like a black hole."""
    with ExitStack() as stack:
        family = socket.AF_UNIX if path else socket.AF_INET
        listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        listener.bind(path or ("127.0.0.1", 0))
        listener.listen(0)
        where = listener.getsockname()
        for _ in range(4):
            client = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            client.setblocking(False)
            client.connect_ex(where)
        yield f"unix:{path}" if path else f"tcp:localhost:{where[1]}"


KINDS: dict[str, tuple[str, Talk | None, str]] = {
    "clamd accepts and never answers": ("clamd", says_and_stays(b""), "timeout"),
    "clamd answers half a line": ("clamd", says_and_stays(b"fd[10]: "), "timeout"),
    "clamd trickles one byte a second": ("clamd", drips, "timeout"),
    "clamd's listen queue is full": ("clamd", None, "busy"),
    "clamd's name leads to a black hole": ("clamd", None, "timeout"),
    "spamd accepts and never answers": ("spamd", says_and_stays(b""), "timeout"),
    "spamd's name leads to a black hole": ("spamd", None, "timeout"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_way_to_hang_is_soon_answered_without_a_wait(make_system: MakeSystem, tmp_path: Path, kind: str) -> None:
    scanner, talk, cause = KINDS[kind]
    with ExitStack() as stack:
        if talk is not None:
            peer = stack.enter_context(Peer(tmp_path, talk, read_clamd if scanner == "clamd" else read_spamd))
            backend = peer.backend
        else:
            backend = stack.enter_context(full(None if "black hole" in kind else str(tmp_path / "full")))
        system = make_system(
            settings={
                "failure": {"patience": 1.0, scanner: "defer"},
                scanner: {"backends": [backend], "connect_timeout": 1.0},
            }
        )
        to = ONE if scanner == "clamd" else SPAM_ONLY
        first = [threading.Thread(target=system.deliver, args=(PLAIN, to)) for _ in range(4)]
        for thread in first:
            thread.start()
        for thread in first:
            thread.join(20)
            assert not thread.is_alive(), "it waits for the whole time-out"
        spent = [deferred(system, to, scanner, cause) for _ in range(5)]
        assert statistics.median(spent) < 1.0
        assert {line["rule"] for line in system.records()} == {f"{scanner}: {cause}"}


def deferred(system: System, to: bytes, scanner: str, cause: str) -> float:
    began = time.monotonic()
    d: Any = system.deliver(PLAIN, to)
    assert (d.status, d.text[:1]) == (TOLD, "Z")
    return time.monotonic() - began
