"""Mail that passes arrives byte for byte, in the same process, and nothing else does."""

import hashlib
import os
import random
import struct
import time
from pathlib import Path

import pytest
from lab.hook import CLOSE, HookLab, Offer, accepted, split

from contentfilter.wire import envelope
from contentfilter.wire import hook as wire
from contentfilter.wire.hook import Answer, Submission

TRACE = b"X-ContentFilter: 1; virus=clean\n"
MIB = 1 << 20  # up to here, less a page for what goes in front, a message goes on in a pipe
SIZES = [0, 1, 4095, 4096, 4097, 65535, 65536, 65537, 131072, 300_000, MIB - 4096, MIB - 4095, MIB]


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("prepend", [b"", TRACE, b"X: y\n" * 20_000], ids=["bare", "trace", "large"])
def test_every_size_arrives_byte_for_byte(both: HookLab, size: int, prepend: bytes) -> None:
    message = noise(size)
    both.daemon(accepted(prepend))
    result = both.run(message)
    (queued,) = both.standin.queued()
    assert (result.status, result.stderr) == (0, b"")
    assert queued.message == prepend + message


@pytest.mark.parametrize(
    "message",
    [b"", b"\0", b"\0\0\r\r\n\n\xff", b"Subject: x", b"no header at all", b"\n\nbody only", b"a\rb\nc\r\nd"],
)
def test_odd_messages_arrive_untouched(both: HookLab, message: bytes) -> None:
    daemon = both.daemon(accepted())
    assert both.run(message).status == 0
    assert both.standin.queued()[0].message == message
    assert daemon.offers[0].message == message


@pytest.mark.parametrize("skip", [0, 1, 100, 65536, 99_999, 100_000])
def test_leading_bytes_are_replaced(both: HookLab, skip: int) -> None:
    message = noise(100_000)
    both.daemon(split(Submission(b"Subject: [SPAM] x\n", skip)))
    assert both.run(message).status == 0
    assert both.standin.queued()[0].message == b"Subject: [SPAM] x\n" + message[skip:]


@pytest.mark.parametrize(("size", "kind"), [(MIB - 4096, "pipe:"), (MIB - 4095, "/memfd:")])
def test_only_what_no_pipe_can_hold_is_copied(lab: HookLab, size: int, kind: str) -> None:
    lab.daemon(accepted(TRACE))
    assert lab.run(noise(size)).status == 0
    assert lab.standin.queued()[0].descriptors[0].startswith(kind)


@pytest.mark.parametrize("size", [8_000, 4 * MIB])
def test_a_waiting_hook_has_little_memory_of_its_own(lab: HookLab, size: int) -> None:
    private = []

    def look(offer: Offer) -> Answer:
        lines = Path(f"/proc/{offer.pid}/smaps_rollup").read_text().splitlines()
        private.append(sum(int(line.split()[1]) for line in lines if line.startswith("Private_")))
        return accepted()

    lab.daemon(look)
    assert lab.run(noise(size)).status == 0
    assert 0 < private[0] <= 512  # KiB; the message is in a memfd


def test_the_real_program_has_the_hooks_pid_user_name_and_nothing_more(lab: HookLab) -> None:
    lab.daemon(accepted(TRACE))
    result = lab.run(fds={6: "pipe"}, env={"TCPREMOTEIP": "192.0.2.1"})
    (queued,) = lab.standin.queued()
    assert queued.pid == result.pid
    assert queued.uid == os.getuid()
    assert queued.arguments == (str(lab.standin.program),)
    assert queued.environ["TCPREMOTEIP"] == "192.0.2.1"
    # The caller's own error pipe goes along, as it would without the hook; the rest of ours does not.
    assert sorted(queued.descriptors) == [0, 1, 2, 6]


@pytest.mark.parametrize("size", [1000, 200_000])
def test_no_descriptor_leaks_into_split_submissions(lab: HookLab, size: int) -> None:
    lab.daemon(split(Submission(b"A: 1\n"), Submission(b"A: 2\n"), Submission(b"A: 3\n")))
    assert lab.run(noise(size), fds={4: "pipe", 6: "pipe"}).status == 0
    assert [sorted(queued.descriptors) for queued in lab.standin.queued()] == [[0, 1, 2]] * 3


def test_without_stderr_nothing_of_ours_lands_there(lab: HookLab) -> None:
    lab.daemon(accepted(TRACE))
    assert lab.run(fds={2: "closed"}).status == 0
    assert lab.standin.queued()[0].descriptors[2] == "/dev/null"


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_input_is_a_read_error(both: HookLab, missing: int) -> None:
    daemon = both.daemon(accepted())
    assert both.run(fds={missing: "closed"}).status == 54
    assert daemon.offers == []


def test_a_large_message_goes_through_an_unnamed_file(both: HookLab) -> None:
    spool = both.directory / "spool"
    spool.mkdir()
    message = noise(3_000_000)
    daemon = both.daemon(accepted(TRACE))
    assert both.run(message, memory=100_000, spool=spool).status == 0
    assert both.standin.queued()[0].message == TRACE + message
    offer = daemon.offers[0]
    assert (offer.seals, offer.links, offer.digest) == (-1, 0, hashlib.sha256(message).hexdigest())
    assert list(spool.iterdir()) == []


def test_a_memfd_is_sealed(lab: HookLab) -> None:
    daemon = lab.daemon(accepted())
    lab.run()
    assert daemon.offers[0].seals == 15  # SEAL, SHRINK, GROW, WRITE


def test_200_megabytes(lab: HookLab) -> None:
    message = noise(1 << 20) * 200
    lab.daemon(accepted(TRACE))
    assert lab.start(message).wait(90).status == 0
    (queued,) = lab.standin.queued()
    assert len(queued.message) == len(TRACE) + len(message)
    assert hashlib.sha256(queued.message[len(TRACE) :]).digest() == hashlib.sha256(message).digest()


@pytest.mark.parametrize("memory", [0, 1_000_000, 1 << 30])
def test_100_000_recipients(both: HookLab, memory: int) -> None:
    block = envelope.build(b"s@example.org", [b"recipient%d@example.com" % i for i in range(100_000)])
    daemon = both.daemon(accepted(TRACE))
    assert both.run(b"x\n", block, memory=memory).status == 0
    assert both.standin.queued()[0].envelope_bytes == block
    assert daemon.offers[0].envelope == block


def test_an_envelope_of_the_daemons_own(both: HookLab) -> None:
    given = envelope.build(b"", [b"quarantine@example.org"] * 5000)
    both.daemon(split(Submission(TRACE, 0, given)))
    assert both.run().status == 0
    assert both.standin.queued()[0].envelope_bytes == given


def test_an_answer_whose_body_comes_in_a_descriptor(both: HookLab) -> None:
    given = envelope.build(b"s@example.org", [b"r%d@example.org" % i for i in range(10_000)])
    prepend = b"X-Long: y\n" * 10_000
    message = noise(70_000)
    both.daemon(split(Submission(prepend, 10, given)))
    assert both.run(message).status == 0
    (queued,) = both.standin.queued()
    assert (queued.message, queued.envelope_bytes) == (prepend + message[10:], given)


def test_the_request_carries_sizes_budget_and_the_listed_environment(lab: HookLab) -> None:
    daemon = lab.daemon(accepted())
    lab.run(
        b"12345",
        b"Fa\0\0",
        env={
            "TCPREMOTEIP": "192.0.2.1",
            "RELAYCLIENT": "",
            "SMTPAUTHUSER": "joe",
            "SMTPAUTHPASS": "secret",
            "HOME": "/root",
            "OURS": "yes",
            "PROTO": "x" * 3000,
        },
        environ="OURS",
        budget=7,
    )
    request = daemon.offers[0].request
    assert (request.attempt, request.message_size, request.envelope_size) == (0, 5, 4)
    assert 5 < request.budget <= 7
    assert request.environ == {
        b"TCPREMOTEIP": b"192.0.2.1",
        b"RELAYCLIENT": b"",
        b"SMTPAUTHUSER": b"joe",
        b"OURS": b"yes",
        b"PROTO": b"x" * 1024,
    }


@pytest.mark.parametrize("canary", [False, True])
def test_the_time_of_sending_goes_where_an_older_daemon_looks_over_it(
    lab: HookLab, monkeypatch: pytest.MonkeyPatch, canary: bool
) -> None:
    """Version 1 as it was: a head, and variables of which unknown ones are ignored; a canary's mark is alone."""
    packets: list[bytes] = []
    decode = wire.decode_request
    monkeypatch.setattr(wire, "decode_request", lambda packet: (packets.append(packet), decode(packet))[1])
    daemon = lab.daemon(CLOSE, accepted())
    before = time.monotonic()
    mark = {"CONTENTFILTER_CANARY": "mark"} if canary else {"PROTO": "TCP"}
    assert lab.run(env=mark, environ="CONTENTFILTER_CANARY", budget=9).status == 0
    after = time.monotonic()
    for packet, offer in zip(packets, daemon.offers, strict=True):
        magic, version, _, budget, _, _, length = struct.unpack_from("<4sHHIQQI", packet)
        assert (magic, version, length) == (b"CFQ1", 1, len(packet) - 32)
        names = [variable.partition(b"=")[0] for variable in packet[32:-1].split(b"\0")]
        sent = offer.request.sent
        if canary:
            assert (names, sent) == ([b"CONTENTFILTER_CANARY"], None)
        else:
            assert names == [b"CONTENTFILTER_SENT", b"PROTO"]
            assert offer.request.environ == {b"PROTO": b"TCP"}
            assert sent is not None
            assert before - 0.001 <= sent <= after
            assert before + 9 - 0.001 <= sent + budget / 1000 <= after + 9, "the hook's end, whichever offer it is"


def test_an_environment_that_is_too_large_is_cut_not_sent(lab: HookLab) -> None:
    daemon = lab.daemon(accepted())
    assert lab.run(env={f"TCP{i:03}": "v" * 1100 for i in range(100)}).status == 0
    environ = daemon.offers[0].request.environ
    assert 30 <= len(environ) <= 32
    assert sum(len(name) + len(value) + 2 for name, value in environ.items()) <= 32768
