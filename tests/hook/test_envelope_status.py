"""The envelope on fd 1: qmail-queue's grammar, its limits, its statuses, and the caller's way to give up."""

import pytest
from lab.hook import HookLab, accepted

TOO_LONG, INCOMPLETE, WRONG = 11, 54, 91


@pytest.mark.parametrize(
    "block",
    [
        b"F\0\0",
        b"F\0Tr@example.org\0\0",
        b"Fs@example.org\0\0",
        b"F#@[]\0Tpostmaster\0\0",
        b"Flist-@example.org-@[]\0Tr\0\0",
        b"Fs\0T\0\0",
        b"F\xff\xfe\r\n\0T\x01\0\0",
        b"F" + b"s" * 1002 + b"\0T" + b"r" * 1002 + b"\0\0",
        b"Fs\0" + b"Tr\0" * 50_000 + b"\0",
    ],
    ids=["bare", "bounce", "no recipient", "double bounce", "verp", "empty", "octets", "longest", "many"],
)
def test_legal_envelopes_reach_the_real_program_unchanged(both: HookLab, block: bytes) -> None:
    daemon = both.daemon(accepted())
    assert both.run(b"m\n", block).status == 0
    assert daemon.offers[0].envelope == block
    assert both.standin.queued()[0].envelope_bytes == block


@pytest.mark.parametrize(
    ("block", "status"),
    [
        (b"", INCOMPLETE),
        (b"F", INCOMPLETE),
        (b"Fs@example.org", INCOMPLETE),
        (b"Fs\0", INCOMPLETE),
        (b"Fs\0T", INCOMPLETE),
        (b"Fs\0Tr", INCOMPLETE),
        (b"Fs\0Tr\0", INCOMPLETE),
        (b"Fs\0" + b"Tr\0" * 50_000, INCOMPLETE),
        (b"F" + b"s" * 1002, INCOMPLETE),
        (b"F" + b"s" * 1003, TOO_LONG),
        (b"F" + b"s" * 1003 + b"\0Tr\0\0", TOO_LONG),
        (b"Fs\0T" + b"r" * 1003 + b"\0\0", TOO_LONG),
        (b"Fs\0Tr\0T" + b"r" * 200_000, TOO_LONG),
        (b"\0", WRONG),
        (b"\0\0", WRONG),
        (b"Ts\0\0", WRONG),
        (b"fs\0Tr\0\0", WRONG),
        (b"Fs\0Fr\0\0", WRONG),
        (b"Fs\0Tr\0x\0\0", WRONG),
        (b"Qs\0Tr\0\0", WRONG),
    ],
)
def test_what_qmail_queue_would_refuse_is_refused_before_anyone_is_asked(
    both: HookLab, block: bytes, status: int
) -> None:
    daemon = both.daemon(accepted())
    assert both.run(b"m\n", block).status == status
    assert (daemon.offers, both.standin.queued()) == ([], [])


@pytest.mark.parametrize("end", [b"Q\0\0", b"Q\0", b"Q1\0\0"])
def test_a_q_record_is_tolerated_and_passed_on(both: HookLab, end: bytes) -> None:
    daemon = both.daemon(accepted())
    both.run(b"m\n", b"Fs\0Tr\0" + end)
    assert daemon.offers[0].envelope == b"Fs\0Tr\0" + end


def test_bytes_behind_the_final_nul_are_not_looked_at(both: HookLab) -> None:
    both.daemon(accepted())
    assert both.run(b"m\n", b"Fs\0Tr\0\0garbage\0\0").status == 0
    assert both.standin.queued()[0].envelope_bytes == b"Fs\0Tr\0\0"


@pytest.mark.parametrize("pieces", [1, 3, 1003])
def test_the_stand_in_agrees(lab: HookLab, pieces: int) -> None:
    """The stand-in's own strictness, without the hook: an address at the limit, and one above it."""
    for length, status in ((1002, 0), (1003, TOO_LONG)):
        block = b"Fs\0" + (b"T" + b"r" * length + b"\0") * pieces + b"\0"
        assert lab.run(b"m\n", block, program=lab.standin.program).status == status
    assert len(lab.standin.queued()) == 1
    assert lab.standin.leftovers() == []
