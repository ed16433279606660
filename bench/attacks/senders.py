"""Hostile mail through the hook of a trusted user, as an SMTP server submits it: four messages at a time."""

import base64
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from lab.hostile import SHAPES

from attacks.kit import Place
from contentfilter.wire import envelope

AT_ONCE = 4
PACE = 0.2  # seconds between two messages
VICTIM = b"victim@protected.example"


def submit(
    place: Place,
    make: Callable[[int], bytes],
    recipients: tuple[bytes, ...] = (VICTIM,),
    recorded: str = "",
) -> None:
    """One message after the other, ``make`` gets its number. Files in place of pipes: they may be large.

    ``recorded``: a directory in which the stand-in for qmail-queue writes down what is delivered.
    """
    block = envelope.build(b"sender@example.net", recipients)
    running: set[int] = set()
    environ = place.recorded() | {"PROTO": "TCP", "TCPREMOTEIP": "198.51.100.9"}
    if recorded:
        os.mkdir(recorded)
        environ["STANDIN_DIR"] = recorded
    number = 0
    while True:
        reap_ended(running)
        if len(running) >= AT_ONCE:
            time.sleep(0.01)
            continue
        number += 1
        fds = []
        for data in (make(number), block):
            fd = os.memfd_create("x")
            with open(fd, "wb", closefd=False) as made:
                made.write(data)
            os.lseek(fd, 0, os.SEEK_SET)
            fds.append(fd)
        actions = [(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in enumerate(fds)]
        quiet = (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)
        running.add(os.posix_spawn(place.hook, [place.hook], environ, file_actions=[*actions, quiet]))
        for fd in fds:
            os.close(fd)
        time.sleep(PACE)


def reap_ended(running: set[int]) -> None:
    for pid in list(running):
        if os.waitpid(pid, os.WNOHANG)[0]:
            running.discard(pid)


def charsets(place: Place) -> None:
    """Sender: a Subject of encoded words, each with a character set that does not exist, new in every message."""

    def make(number: int) -> bytes:
        words = b"\n ".join(b"=?x-%d-%d?q?a?=" % (number, n) for n in range(9000))
        return b"Subject: " + words + b"\nX-Test: spamd=9/5\n\nGTUBE\n"

    submit(place, make)


def long_subject(place: Place) -> None:
    """Sender: a Subject of a mebibyte, as one line, as folded lines, as encoded words."""
    shapes = (
        b"x" * (1 << 20),
        b"x\n " * (1 << 18),
        b"=?utf-8?b?" + base64.b64encode(b"y" * (700 << 10)) + b"?=",
        b"=?utf-8?q?a?= " * 70_000,
        b"=?" * (1 << 19),
    )
    submit(place, lambda n: b"Subject: " + shapes[n % len(shapes)] + b"\nX-Test: spamd=9/5\n\nx\n")


def long_header(place: Place) -> None:
    """Sender: a mebibyte of header, and fields forged in our name behind it."""
    forged = b"X-ContentFilter: clean\nX-Spam-Flag: NO\nX-Virus-Scanned: yes\n" * 200
    shapes = (b"A: b\n" * 220_000, b"X-Virus-Scanned: no\n" * 55_000, b"X-Spam-Status:" + b"\n y" * 350_000 + b"\n")
    submit(place, lambda n: shapes[n % len(shapes)] + forged + b"\nx\n")


def many_recipients(place: Place) -> None:
    """Sender: 100,000 recipients, each protected."""
    submit(place, lambda n: b"Subject: %d\n\nx\n" % n, tuple(b"user%d@protected.example" % n for n in range(100_000)))


def many_differing_recipients(place: Place) -> None:
    """Sender: 100,000 recipients of domains that each need their own look-up."""
    submit(place, lambda n: b"Subject: %d\n\nx\n" % n, tuple(b"u@a.b.c.d%d.mixed.example" % n for n in range(100_000)))


def costly_mime(place: Place) -> None:
    """Sender: mail that is built to cost the signature scan as much as it can, 2 MB each."""
    names = list(SHAPES)
    submit(place, lambda n: SHAPES[names[n % len(names)]](2_000_000))


def deep_mime(place: Place) -> None:
    """Sender: nested messages whose quoted-printable body decodes to nothing, 200 KB each (issue 14's)."""
    head = b"Content-Type: message/rfc822\nContent-Transfer-Encoding: base64 quoted-printable\n\n~~garbage~~\n"
    submit(place, lambda n: head * 28 + b"Q=" * ((200_000 - n % 100) // 2))


def large_mail(place: Place) -> None:
    """Sender: messages of 60 MB, four at a time."""
    body = b"Subject: large\n\n" + b"A line of a large message that is not compressed.\n" * 1_200_000
    submit(place, lambda n: body)


VICTIM_SIZES = (300, 5_000_000, 20_000, 300)


def _victim(number: int) -> bytes:
    line = b"Line of a message that must arrive as it is, number %d.\n" % number
    return b"Subject: victim %d\n\n" % number + line * (VICTIM_SIZES[number % len(VICTIM_SIZES)] // len(line))


def victims(place: Place) -> None:
    """Innocent mail that a hostile scanner sees; what is delivered of it is recorded."""
    submit(place, _victim, recorded=f"{place.scratch}/victims")


def victims_changed(place: Place) -> str:
    """Delivered victims that are not as they were sent, or none delivered."""
    found = [path.read_bytes() for path in Path(f"{place.scratch}/victims").glob("*.msg")]
    wrong = 0
    for message in found:
        number = re.search(rb"^Subject: victim (\d+)$", message, re.MULTILINE)
        wrong += number is None or not message.endswith(_victim(int(number[1])))
    return f"{wrong} of {len(found)} delivered messages were changed" if wrong or not found else ""
