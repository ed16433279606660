"""Whatever comes in: the right status or a clear error, nothing lost, no crash, no forged line, no descriptor left."""

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from e2e.mails import PLAIN, VIRUS, with_program
from e2e.test_promises import OURS
from e2e.trouble import Load, open_files, own_memory, watched
from lab.hook import until
from lab.offer import ENVELOPE, MESSAGE, Offer, sealed
from lab.system import System

from contentfilter.model import Action
from contentfilter.wire import hook

TOLD = 82
ONE, NOBODY = b"virus-only@mixed.example", b"none@mixed.example"
MEGA = 1 << 20


# Messages


def test_a_message_of_200_megabytes(system: System, tmp_path: Path) -> None:
    """Above clamd's limit it is unchecked, even with a virus in it; the signature scanners still see all of it."""
    lines = (b"A harmless line, as long as they are in most messages that people write to others\r\n" * 13_000)[:MEGA]
    body = b"Subject: huge\n\n" + VIRUS + lines * 199
    grown = 64 * MEGA
    with watched(lambda: own_memory(system.daemon)) as memory:
        d = system.deliver(body, ONE, spool=tmp_path)
        assert (d.status, len(d.queued)) == (0, 1)
        assert b"virus=unchecked" in d.only.message[:200]
        assert d.only.message.endswith(body)
        d = system.deliver(body + b"\n\n" + with_program(), ONE, spool=tmp_path)
        assert (d.status, d.queued) == (TOLD, ())
        assert "Windows program" in d.text
    assert max(memory) - memory[0] < grown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [MEGA - 50, MEGA, MEGA + 50, 3 * MEGA])
def test_a_header_of_one_long_line(system: System, size: int) -> None:
    line = b"X-Long: " + b"a: " * (size // 3)
    for message in line, line + b"\nSubject: s\n\nbody\n", b"Subject: s\n" + line + b"\n\n" + VIRUS:
        d = system.deliver(message, NOBODY)
        if message.find(b"\n\n", 0, MEGA) < 0 and len(message) > MEGA:
            assert (d.status, "header exceeds the size limit" in d.text) == (TOLD, True)
        else:
            assert d.only.message.endswith(message)
    assert system.deliver(b"Subject: s\n" + line + b"\n\n" + VIRUS, ONE).status == TOLD


def test_hostile_structures_take_a_bounded_time(system: System) -> None:
    """Nesting, boundaries, and folding without end; each a few megabytes."""
    head = b"MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=b\n\n"
    messages = [
        (b"--b\n" + head) * 40_000,
        head + b"--b\n" * 500_000,
        head + b"--b\nContent-Transfer-Encoding: base64\n\n" + b"TVqQ\n" * 400_000,
        b"Content-Type: message/rfc822\n\n" * 70_000,
        b"Subject:" + b"\n " * 1_000_000,
        b"Content-Type: " + b"multipart/mixed;" * 100_000 + b"\n\n",
        b"\n" * 3_000_000,
        b"begin 644 x\n" * 200_000,
        b"=" * 3_000_000,
    ]
    for message in messages:
        started = time.monotonic()
        d = system.deliver(message, ONE)
        assert d.status == 0 or "Windows program" in d.text or "header exceeds the size limit" in d.text, message[:40]
        assert time.monotonic() - started < 20, message[:40]


# Envelopes


def test_a_hundred_thousand_recipients_with_different_wishes(system: System) -> None:
    wanting = [b"user%d@protected.example" % n for n in range(50_000)]
    others = [b"user%d@elsewhere.example" % n for n in range(50_000)]
    both = [address for pair in zip(wanting, others, strict=True) for address in pair]
    started = time.monotonic()
    d = system.deliver(PLAIN, *both)
    assert time.monotonic() - started < 20
    assert (d.status, d.stderr) == (0, "")
    assert sorted(q.envelope.recipients[0] for q in d.queued) == [others[0], wanting[0]]
    for q in d.queued:
        assert q.envelope.recipients == tuple(wanting if q.envelope.recipients[0] == wanting[0] else others)
    d = system.deliver(VIRUS, *both)
    assert [q.envelope.recipients for q in d.queued] == [tuple(others)]
    record = system.daemon.wait_for("mail.done", where=lambda r: r["recipient_count"] == 100_000 and r["quarantined"])[
        0
    ]
    assert record["quarantined"] == 50_000


def test_addresses_at_the_limit(system: System) -> None:
    tail = b"@protected.example"
    longest = b"x" * (1002 - len(tail)) + tail
    for sender, to in ((b"a@b.example", longest), (longest, b"user" + tail)):
        queued = system.deliver(PLAIN, to, sender=sender).only
        assert (queued.envelope.sender, queued.envelope.recipients) == (sender, (to,))
        assert b"virus=clean" in queued.message
        for block in b"F%b\0Tx%b\0\0" % (sender, longest), b"Fx%b\0T%b\0\0" % (longest, to):
            d = system.deliver(PLAIN, block=block)
            assert (d.status, d.queued) == (11, ())


def test_envelopes_that_are_none(system: System) -> None:
    for block, status in (
        (b"X\0Ta\0\0", 91),
        (b"Fa\0Xb\0\0", 91),
        (b"Fa\0Tb\0c\0\0", 91),
        (b"Ta\0Fb\0\0", 91),
        (b"\0", 91),
        (b"F" + b"x" * 5_000_000, 11),
        (b"Fa\0" + b"Tb\0" * 100_000, 54),
    ):
        d = system.deliver(PLAIN, block=block)
        assert (d.status, d.queued) == (status, ()), block[:20]
    assert system.deliver(PLAIN, block=b"Fa\0\0").only.envelope.recipients == ()


HOSTILE = (
    b"a b@protected.example",
    b"a\r\nX-Forged: yes@protected.example",
    b"a\nX-Forged: yes\n\n@protected.example",
    b"\xff\xfe\x80@protected.example",
    b'"quoted \\" @"@protected.example',
    b'{"event":"mail.done"}@protected.example',
    b"a\x1b[2J\x07\x7f@protected.example",
    b"@protected.example",
    b"@@@protected.example",
    b"user@",
    b"@",
    b"",
    b"%s%n$(id)`id`;|&@protected.example",
    "ж\u2028\u202e@protected.example".encode(),
)


@pytest.mark.parametrize("style", ["json", "logfmt"])
def test_no_address_and_no_claim_forges_a_header_or_a_log_line(make_system, style: str) -> None:
    controls = {"xenveloptoheader": "1\n", "clamavclients": "@protected.example\n"}
    system = make_system(controls=controls, settings={"log": {"format": style}})
    claims = {"TCPREMOTEIP": "192.0.2.7]\nX-Forged: yes\r\n\0"[:-1] + "\x1b\xff", "SMTPAUTHUSER": "u\nX-Forged: 1"}
    queued = []
    for address in HOSTILE:
        queued.append(system.deliver(PLAIN, address, sender=address, env=claims).only)
        assert (queued[-1].envelope.sender, queued[-1].envelope.recipients) == (address, (address,))
    for q in queued:
        ours = q.message.removesuffix(PLAIN)
        names = [line.partition(b":")[0] for line in ours.splitlines()]
        assert names == [b"X-ContentFilter", b"X-Originating-IP", b"X-Envelope-To"]
        assert all(32 <= byte < 127 or byte == 10 for byte in ours)
        assert ours.count(b"\n") == 3
    if style == "json":
        assert len(system.daemon.wait_for("mail.done", len(HOSTILE))) == len(HOSTILE)
        assert system.daemon.log("text") == []  # not one line that is no JSON
    else:
        until(lambda: len(lines_of(system, "event=mail.done")) >= len(HOSTILE), "a line is missing")
        assert all(line.isprintable() and line.startswith("time=") for line in lines_of(system, ""))
        assert len(lines_of(system, "event=mail.done")) == len(HOSTILE)


def lines_of(system: System, part: str) -> list[str]:
    """The log lines with ``part`` in them, where the log is not JSON."""
    return [line["text"] for line in system.daemon.log("text") if part in line["text"]]


# Hooks that are none


@contextmanager
def wrong_descriptors(directory: Path) -> Iterator[dict[str, list[int]]]:
    """Descriptors that might be passed in place of message and envelope."""
    envelope_fd, message_fd = sealed(ENVELOPE), sealed(MESSAGE)
    path = directory / "message"
    path.write_bytes(MESSAGE)
    with ExitStack() as stack:
        for fd in (envelope_fd, message_fd):
            stack.callback(os.close, fd)

        def opened(target: str | Path, flags: int) -> int:
            fd = os.open(target, flags, 0o600)
            stack.callback(os.close, fd)
            return fd

        ours, theirs = (stack.enter_context(closing(end)) for end in socket.socketpair())
        pipe = os.pipe()
        for fd in pipe:
            stack.callback(os.close, fd)
        odd = {
            "directory": opened(directory, os.O_RDONLY),
            "socket": theirs.fileno(),
            "pipe": pipe[0],
            "write only": opened(path, os.O_WRONLY),
            "append only": opened(path, os.O_WRONLY | os.O_APPEND),
            "path only": opened(path, os.O_PATH),
            "device": opened("/dev/zero", os.O_RDONLY),
            "proc": opened("/proc/self/mem", os.O_RDONLY),
            "too short": sealed(MESSAGE[:-1]),
            "too long": sealed(MESSAGE + b"x"),
        }
        stack.callback(os.close, odd["too short"])
        stack.callback(os.close, odd["too long"])
        assert ours
        kinds = {name: [fd, envelope_fd] for name, fd in odd.items()}
        kinds |= {f"{name} as envelope": [message_fd, fd] for name, fd in odd.items()}
        kinds |= {"none": [], "one": [message_fd], "three": [message_fd, envelope_fd, pipe[0]]}
        kinds["many"] = [message_fd] * 250
        yield kinds


def test_garbage_and_wrong_descriptors_while_mail_flows(make_system, tmp_path: Path) -> None:
    """Each is deferred or hung up on; mail, workers and their descriptors do not notice."""
    system = make_system()
    request = hook.encode_request(hook.Request(0, 20.0, len(MESSAGE), len(ENVELOPE), {}))
    system.deliver(PLAIN, NOBODY)
    before, workers = open_files(system.daemon), system.daemon.workers()
    with Load(system, senders=2) as load, wrong_descriptors(tmp_path) as kinds:
        for name, fds in kinds.items():
            with Offer(system.daemon.socket) as offer:
                answer = offer.send_raw(request, fds).answer()
                assert answer is None or answer.action is Action.DEFER, name
        good = kinds["one"][0]
        for packet in (b"x", request[:-1], request + b"x", b"CFQ1" + b"\xff" * 28, b"\0" * 60_000, os.urandom(200)):
            for fds in [], [good], [good] * 2:
                with Offer(system.daemon.socket) as offer:
                    assert offer.send_raw(packet, fds).answer() is None
        idle = [Offer(system.daemon.socket) for _ in range(50)]  # they say nothing and stay
        for content in (b"", b"garbage", b"F", b"Fa\0Tb\0"):
            with Offer(system.daemon.socket) as offer:
                answer = offer.send(MESSAGE, content).answer()
                assert answer is not None
                assert answer.action is Action.DEFER
        load.more(20)
        for offer in idle:
            offer.close()
    load.nothing_went_wrong()
    until(lambda: open_files(system.daemon) <= before, "descriptors were left")
    assert system.daemon.workers() == workers


def test_a_file_that_changes_after_it_was_offered(make_system) -> None:
    """A root-owned file that grows is taken at its size; the mapping does not move."""
    system = make_system()
    request = hook.encode_request(hook.Request(0, 20.0, len(MESSAGE), len(ENVELOPE), {}))
    with tempfile.TemporaryFile() as growing, Offer(system.daemon.socket) as offer:
        growing.write(MESSAGE)
        growing.flush()
        offer.send_raw(request, [growing.fileno(), sealed(ENVELOPE)])
        growing.write(b"more " * 100_000)
        growing.flush()
        answer = offer.answer()
        assert answer is not None
        assert answer.action in (Action.QUEUE, Action.DEFER)
    assert system.deliver(PLAIN, NOBODY).status == 0


def test_headers_that_speak_in_our_name_are_renamed(system: System) -> None:
    forged = b"X-ContentFilter: 0; virus=clean\nX-Virus-Status: Clean\nx-virus-scanned : me\nSubject: s\n\nbody\n"
    received = system.deliver(forged, ONE).only.message
    match = OURS.match(received)
    assert match
    rest = received[match.end() :]
    assert rest == forged.replace(b"X-C", b"X-Received-X-C").replace(b"X-V", b"X-Received-X-V").replace(
        b"x-v", b"X-Received-x-v"
    )
