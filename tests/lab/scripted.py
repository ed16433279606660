"""clamd and spamd that read their answer in the message: real protocols, no work.

The header line ``X-Test: clamd=WORD spamd=WORD ...`` says what each of them shall say. clamd: ``clean``, a signature's
name, or a fault of CLAMD_FAULTS. spamd: ``score/threshold`` or a fault of SPAMD_FAULTS; ``USER=score/threshold``
holds for that user's preferences.
"""

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from lab.peers import WAIT, Peer, read_clamd, read_spamd

from contentfilter.scanners.clamd import TEST_VIRUS

LATE = "late"  # either of them: no answer at all

CLAMD_FAULTS = {
    "limits": b"fd[10]: Heuristics.Limits.Exceeded.MaxScanSize FOUND\0",
    "too-big": b"fd[10]: Size limit exceeded. ERROR\0",
    "memory": b"fd[10]: Can't allocate memory ERROR\0",
    "reloading": b"fd[10]: Database reloading ERROR\0",
    "nonsense": b"hello\0",
    "gone": b"",
}
SPAMD_FAULTS = {
    "busy": b"SPAMD/1.1 75 EX_TEMPFAIL\r\n",
    "database": b"SPAMD/1.1 69 EX_UNAVAILABLE\r\n",
    "memory": b"SPAMD/1.1 71 Cannot allocate memory\r\n",
    "nonsense": b"220 hello\r\n",
    "cut": b"SPAMD/1.1 0 EX_OK\r\nSpam: True ; 9.0 / 5.0\r\nContent-length: 100\r\n\r\nhalf of it",
    "gone": b"",
}


def script(message: bytes) -> dict[str, str]:
    """Script of the scanners in the message's header."""
    found = re.search(rb"^X-Test: (.*)$", message, re.MULTILINE)
    return dict(word.rpartition("=")[::2] for word in found.group(1).decode().split()) if found else {}


def spam_fields(score: float, threshold: float) -> bytes:
    """The header lines of this SpamAssassin."""
    found = score >= threshold
    flag = b"X-Spam-Flag: YES\n" if found else b""
    word = b"Yes" if found else b"No"
    return flag + b"X-Spam-Status: %s, score=%.1f required=%.1f tests=A,\n\tB version=4.0\n" % (word, score, threshold)


def wrapped(message: bytes, score: float, threshold: float) -> bytes:
    """Message as PROCESS returns it: spam goes into a report, as with report_safe."""
    fields = spam_fields(score, threshold)
    if score < threshold:
        head, _, body = message.partition(b"\n\n")
        return fields + _without_copies(head) + b"\n\n" + body
    return fields + b"Subject: offer\nContent-Type: multipart/mixed; boundary=b\n\n--b\n\nreport\n--b\n\n" + message


def _without_copies(head: bytes) -> bytes:
    """SpamAssassin takes out what looks like its own lines."""
    return re.sub(rb"^X-Spam-[^\n]*\n", b"", head, flags=re.MULTILINE)


def _clamd(peer: Peer, sock: socket.socket) -> None:
    data, fds, _, _ = socket.recv_fds(sock, 4096, 4)
    with contextlib.ExitStack() as stack:
        for fd in fds:
            stack.callback(os.close, fd)
        if b"PING" in data:
            return sock.sendall(b"PONG\0")
        if b"VERSION" in data:
            return sock.sendall(b"ClamAV 1.4.0/27000/Mon Jan  1 00:00:00 2024\0")
        message = os.pread(fds[0], 65536, 0)
        word = "Eicar" if message == TEST_VIRUS else script(message).get("clamd", "clean")
    if word == "clean":
        return sock.sendall(b"fd[10]: OK\0")
    if word == LATE:
        peer.over.wait(WAIT)
        return None
    return sock.sendall(CLAMD_FAULTS.get(word, b"fd[10]: %s FOUND\0" % word.encode()))


def _spamd(peer: Peer, sock: socket.socket) -> None:
    head, _, message = read_spamd(sock).partition(b"\r\n\r\n")
    command = head.split(b" ", 1)[0]
    if command == b"PING":
        return sock.sendall(b"SPAMD/1.5 0 PONG\r\n")
    user = re.search(rb"^User: ([^\r]*)", head, re.MULTILINE)
    words = script(message)
    word = words.get(user.group(1).decode(), "") if user else ""
    word = word or words.get("spamd", "0/5")
    if word == LATE:
        peer.over.wait(WAIT)
        return None
    if word in SPAMD_FAULTS:
        return sock.sendall(SPAMD_FAULTS[word])
    score, threshold = map(float, word.split("/"))
    body = {
        b"CHECK": b"",
        b"HEADERS": spam_fields(score, threshold) + _without_copies(message.partition(b"\n\n")[0]) + b"\n\n",
        b"PROCESS": wrapped(message, score, threshold),
    }[command]
    length = b"Content-length: %d\r\n" % len(body) if body else b""
    verdict = b"Spam: %s ; %.1f / %.1f\r\n" % (b"True" if score >= threshold else b"False", score, threshold)
    return sock.sendall(b"SPAMD/1.1 0 EX_OK\r\n" + length + verdict + b"\r\n" + body)


@contextlib.contextmanager
def scripted(directory: Path) -> Iterator[tuple[Peer, Peer]]:
    """Both, listening in ``directory``."""
    with Peer(directory, _clamd, read_clamd) as clamd, Peer(directory, _spamd, read_spamd) as spamd:
        yield clamd, spamd
