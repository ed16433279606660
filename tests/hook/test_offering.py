"""The daemon may die, restart, be busy or talk nonsense: the message is offered again until the budget ends."""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lab.hook import CLOSE, SILENT, FakeDaemon, HookLab, Offer, Raw, Reply, accepted, until

from contentfilter.wire import envelope
from contentfilter.wire.hook import Action, Answer, Submission, encode_answer

GOOD = encode_answer(accepted(b"X: y\n")).packet
UNCHECKED = b"X-ContentFilter: unavailable; virus=unchecked; spam=unchecked\n"


def head(  # every field of an answer, to be broken one by one
    magic: bytes = b"CFA1",
    version: int = 1,
    action: int = 1,
    reason: int = 0,
    text: int = 0,
    count: int = 1,
    flags: int = 0,
    length: int | None = None,
    rest: bytes = b"",
) -> bytes:
    size = len(rest) - text if length is None else length
    return struct.pack("<4sHBBHHB3xQ", magic, version, action, reason, text, count, flags, size) + rest


def part(flags: int = 1, skip: int = 0, prepend: int = 0, size: int = 0, rest: bytes = b"") -> bytes:
    return struct.pack("<IQQQ", flags, skip, prepend, size) + rest


GARBAGE = {
    "one byte": b"C",
    "only magic": b"CFA1",
    "short head": GOOD[:23],
    "wrong magic": head(magic=b"CFQ1", rest=part()),
    "wrong version": head(version=2, rest=part()),
    "action 0": head(action=0, rest=part()),
    "action 5": head(action=5, count=0),
    "reason 5": head(action=2, reason=5, count=0),
    "unknown flag": head(flags=2, rest=part()),
    "queue without submission": head(count=0),
    "reject with submission": head(action=2, rest=part()),
    "too many submissions": head(count=129, rest=part() * 129),
    "one submission too few": head(count=2, rest=part()),
    "one submission too many": head(count=1, rest=part() * 2),
    "text longer than the packet": head(action=2, count=0, text=200, length=0, rest=b"x" * 10),
    "text over 250": head(action=2, count=0, text=251, rest=b"x" * 251),
    "newline in the text": head(action=2, count=0, text=3, rest=b"a\nb"),
    "8-bit text": head(action=2, count=0, text=2, rest=b"\xc3\xa4"),
    "body length too small": head(length=3, rest=part()),
    "body length huge": head(length=2**64 - 1, rest=part()),
    "cut submission": head(rest=part()[:-1]),
    "skip beyond the end": head(rest=part(skip=1000)),
    "skip huge": head(rest=part(skip=2**64 - 1)),
    "prepend beyond the end": head(rest=part(prepend=1)),
    "prepend and envelope overflow": head(rest=part(0, 0, 2**64 - 1, 2, b"xx")),
    "unknown submission flag": head(rest=part(flags=2)),
    "envelope though as received": head(rest=part(1, 0, 0, 3, b"F\0\0")),
    "envelope missing": head(rest=part(flags=0)),
    "envelope incomplete": head(rest=part(0, 0, 0, 2, b"F\0")),
    "envelope wrong letter": head(rest=part(0, 0, 0, 6, b"F\0Xa\0\0")),
    "envelope with a tail": head(rest=part(0, 0, 0, 4, b"F\0\0x")),
    "envelope address too long": head(rest=part(0, 0, 0, 1006, b"F" + b"a" * 1003 + b"\0\0")),
    "body flag without descriptor": head(flags=1, length=28),
    "longer than a packet may be": GOOD + b"x" * 70_000,
}


@pytest.mark.parametrize("name", GARBAGE)
def test_nonsense_is_no_answer(both: HookLab, name: str) -> None:
    daemon = both.daemon(Raw(GARBAGE[name]), accepted())
    assert both.run().status == 0
    assert [offer.request.attempt for offer in daemon.offers] == [0, 1]
    assert len(both.standin.queued()) == 1


def unsealed(_: Offer) -> Reply:
    fd = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, part())
    return Raw(head(flags=1, length=28), fds=(fd,))


def pipe(_: Offer) -> Reply:
    reader, writer = os.pipe()
    os.close(writer)
    return Raw(head(flags=1, length=28), fds=(reader,))


def uninvited(_: Offer) -> Reply:
    return Raw(GOOD, fds=(os.dup(0),))


def three(_: Offer) -> Reply:
    return Raw(head(flags=1, length=28), part(), fds=(os.dup(0), os.dup(0)))


def twenty(_: Offer) -> Reply:
    return Raw(GOOD, fds=tuple(os.dup(0) for _ in range(20)))


BROKEN_BODIES: list[Reply | Callable[[Offer], Reply]] = [
    Raw(head(flags=1, length=28), b""),
    Raw(head(flags=1, length=28), part() + b"x"),
    Raw(head(flags=1, length=28), part()[:-1]),
    Raw(head(flags=1, length=28, rest=b"x"), part()),
    unsealed,
    pipe,
    uninvited,
    three,
    twenty,
]


@pytest.mark.parametrize("reply", BROKEN_BODIES)
def test_a_body_that_cannot_be_trusted_is_no_answer(both: HookLab, reply: Reply) -> None:
    daemon = both.daemon(reply, accepted())
    assert both.run(fds={6: "pipe"}).status == 0
    assert len(daemon.offers) == 2
    assert sorted(both.standin.queued()[0].descriptors) == [0, 1, 2, 6]


def test_a_good_body_in_a_descriptor_is_an_answer(both: HookLab) -> None:
    daemon = both.daemon(Raw(head(flags=1, length=28), part()))
    assert both.run().status == 0
    assert len(daemon.offers) == 1


def test_a_connection_closed_without_answer_is_offered_again(both: HookLab) -> None:
    daemon = both.daemon(CLOSE, CLOSE, CLOSE, accepted(b"X: y\n"))
    assert both.run(b"message").status == 0
    assert [offer.request.attempt for offer in daemon.offers] == [0, 1, 2, 3]
    assert {(offer.message, offer.pid) for offer in daemon.offers} == {(b"message", daemon.offers[0].pid)}
    assert both.standin.queued()[0].message == b"X: y\nmessage"


def test_a_restart_in_the_middle_of_a_request_goes_unnoticed(both: HookLab) -> None:
    first = both.daemon(SILENT)
    hook = both.start(b"message")
    first.wait(offers=1)
    first.stop()
    second = both.daemon(accepted())
    assert hook.wait().status == 0
    assert second.offers[0].request.attempt >= 1
    assert both.standin.queued()[0].message == b"message"


def test_a_daemon_that_starts_later_is_found(lab: HookLab) -> None:
    hook = lab.start()
    until(lambda: os.readlink(f"/proc/{hook.pid}/exe") == str(lab.program), "started")
    lab.daemon(accepted())
    assert hook.wait().status == 0


def test_a_stale_socket_is_like_no_daemon(lab: HookLab) -> None:
    lab.daemon(accepted()).stop()
    hook = lab.start()
    lab.daemon(accepted())
    assert hook.wait().status == 0


def test_a_full_listen_queue_means_wait(lab: HookLab) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(lab.socket))
    listener.listen(0)
    waiting = []
    while True:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        waiting.append(client)
        if client.connect_ex(str(lab.socket)):
            break
    hook = lab.start()
    until(lambda: "unix_wait" in Path(f"/proc/{hook.pid}/wchan").read_text(), "waits")
    listener.close()
    for client in waiting:
        client.close()
    lab.daemon(accepted())
    assert hook.wait().status == 0


def test_at_a_full_listen_queue_a_flood_does_not_overtake_the_hook(lab: HookLab) -> None:
    """Who comes back every millisecond got each free place, as long as hooks came back less often than that."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(lab.socket))
    listener.listen(4)
    over = threading.Event()

    def flood() -> None:
        while not over.is_set():
            client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            full = client.connect_ex(str(lab.socket)) != 0
            client.close()
            if full:
                time.sleep(0.001)

    flooding = threading.Thread(target=flood)
    flooding.start()
    time.sleep(0.1)
    hook = lab.start(budget=30)
    until(lambda: "unix_wait" in Path(f"/proc/{hook.pid}/wchan").read_text(), "waits")
    peers = []
    while hook.pid not in peers and len(peers) < 30:
        connection, _ = listener.accept()
        peers.append(struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
        connection.close()
        time.sleep(0.05)
    over.set()
    flooding.join()
    listener.close()
    lab.daemon(accepted())
    assert hook.wait().status == 0
    assert hook.pid in peers


def test_the_budget_ends_with_a_deferral_that_says_why(both: HookLab) -> None:
    started = time.monotonic()
    result = both.run(budget=1, fds={6: "pipe"})
    assert 1 <= time.monotonic() - started < 5
    assert result.status == 82
    assert result.texts[6].startswith(b"Zcontent filter not available")
    assert b"no answer from" in result.stderr
    assert b"No such file" in result.stderr
    assert both.standin.queued() == []


@pytest.mark.parametrize("reply", [SILENT, CLOSE, Raw(b"garbage")])
def test_no_fault_of_the_daemon_is_a_permanent_refusal(both: HookLab, reply: Reply) -> None:
    both.daemon(reply)
    assert both.run(budget=1).status == 71


def test_accept_when_unavailable_marks_the_message_unchecked(both: HookLab) -> None:
    both.daemon(SILENT)
    assert both.run(b"Subject: x\n\n", budget=1, unavailable="accept").status == 0
    assert both.standin.queued()[0].message == UNCHECKED + b"Subject: x\n\n"


def test_the_budget_that_is_offered_shrinks(lab: HookLab) -> None:
    daemon = lab.daemon(CLOSE, CLOSE, CLOSE, CLOSE, accepted())
    lab.run(budget=10)
    left = [offer.request.budget for offer in daemon.offers]
    assert left == sorted(left, reverse=True)
    assert left[-1] < left[0] <= 10


def test_forty_hooks_at_once_on_a_listen_queue_of_one(lab: HookLab) -> None:
    lab.daemons.append(FakeDaemon(lab.socket, accepted(), backlog=1))
    hooks = [lab.start(b"%d" % i) for i in range(40)]
    assert [hook.wait().status for hook in hooks] == [0] * 40
    assert sorted(q.message for q in lab.standin.queued()) == sorted(b"%d" % i for i in range(40))


def test_a_slow_client_does_not_spend_the_budget(lab: HookLab) -> None:
    """The budget starts when the message has been read."""
    daemon = lab.daemon(accepted())
    message, envelope_pipe = os.pipe(), os.pipe()
    conf = lab.configure(budget=1)
    pid = os.posix_spawn(
        lab.program,
        [str(lab.program)],
        {"CONTENTFILTER_QUEUE_CONF": str(conf)} | lab.standin.environ(),
        file_actions=[(os.POSIX_SPAWN_DUP2, message[0], 0), (os.POSIX_SPAWN_DUP2, envelope_pipe[0], 1)],
    )
    os.write(message[1], b"first half, ")
    timer = threading.Timer(1.3, lambda: (os.write(message[1], b"second half"), os.close(message[1])))
    timer.start()
    timer.join()
    os.write(envelope_pipe[1], envelope.build(b"s", [b"r"]))
    os.close(envelope_pipe[1])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(message[0])
    os.close(envelope_pipe[0])
    assert daemon.offers[0].message == b"first half, second half"
    assert daemon.offers[0].request.budget > 0.5


def test_every_action_is_understood(lab: HookLab) -> None:
    answers = {
        Answer(Action.QUEUE, submissions=(Submission(),)): 0,
        Answer(Action.REJECT, text="no"): 31,
        Answer(Action.DEFER, text="later"): 71,
        Answer(Action.DROP): 0,
    }
    for answer, status in answers.items():
        with FakeDaemon(lab.socket, answer):
            assert lab.run(dialect="stock").status == status
    assert len(lab.standin.queued()) == 1
