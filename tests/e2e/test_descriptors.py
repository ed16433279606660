"""A clamd that has been taken over tries to change the message through its descriptor: it is delivered exactly."""

import array
import hashlib
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from lab.abuse import abuse
from lab.peers import Peer
from lab.system import System

HEAD = b"From: sender@example.net\nX-ContentFilter: forged\nSubject: large\n\n"
SIZES = {"small": 1_000, "a file of the hook": 5 << 20, "a file of the hook and one of the worker": 17 << 20}
BODY = b"0123456789abcde\n"


def abuses(as_root: bool) -> Callable[[Peer, socket.socket], None]:
    def talk(peer: Peer, sock: socket.socket) -> None:
        data, ancillary, _, _ = sock.recvmsg(65_536, socket.CMSG_SPACE(4))
        peer.seen.append(data)
        for _, _, raw in ancillary:
            for fd in array.array("i", raw):
                abuse(fd, as_root=as_root)
                socket.close(fd)
        sock.sendall(b"fd[5]: OK\0")

    return talk


@pytest.mark.parametrize(
    ("size", "as_root"), [*((size, False) for size in SIZES), ("small", True), ("a file of the hook", True)]
)
def test_a_hostile_clamd_changes_nothing(
    size: str, as_root: bool, make_system: Callable[..., System], tmp_path: Path
) -> None:
    message = HEAD + BODY * (SIZES[size] // len(BODY))
    with Peer(tmp_path, abuses(as_root), lambda sock: b"") as peer:
        system = make_system(clamd=peer)
        workers = system.daemon.workers()
        rewritten = system.deliver(message).only.message
        assert peer.seen.count(b"zFILDES\0\0") == 1
        received = system.deliver(message, b"exempt@protected.example").only.message
        assert system.daemon.workers() == workers, "no worker has died"
    for delivered in (rewritten, received):
        body = delivered.partition(b"\n\n")[2]
        assert hashlib.sha256(body).digest() == hashlib.sha256(message.partition(b"\n\n")[2]).digest()
    assert b"\nX-Received-X-ContentFilter: forged\n" in rewritten
