"""The hook protocol's codec: one table of values and bytes, every cut refused, round trips."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contentfilter.errors import LocalProtocolError, RemoteProtocolError
from contentfilter.wire import hook as wire
from contentfilter.wire.hook import Action, Answer, CommitReport, Reason, Request, Result, Submission

REQUESTS = [
    (Request(0, 240.0, 5, 4, {}), "43465131 0100 0000 80a90300 0500000000000000 0400000000000000 00000000"),
    (
        Request(2, 0.5, 2**33, 3, {b"A": b"", b"TCPREMOTEIP": b"::1"}),
        "43465131 0100 0200 f4010000 0000000002000000 0300000000000000 13000000" + b"A=\0TCPREMOTEIP=::1\0".hex(),
    ),
    (
        Request(65535, 0.0, 0, 0, {b"N": b"=\xff\n"}),
        "43465131 0100 ffff 00000000 0000000000000000 0000000000000000 06000000" + b"N==\xff\n\0".hex(),
    ),
    (
        Request(0, 1.0, 0, 0, {b"A": b"b"}, 12345.678),
        "43465131 0100 0000 e8030000 0000000000000000 0000000000000000 20000000"
        + b"CONTENTFILTER_SENT=12345678\0A=b\0".hex(),
    ),
]
ANSWERS = [
    (Answer(Action.DROP), "43464131 0100 04 00 0000 0000 00 000000 0000000000000000"),
    (Answer(Action.REJECT, Reason.VIRUS, "no"), "43464131 0100 02 01 0200 0000 00 000000 0000000000000000 6e6f"),
    (Answer(Action.DEFER, Reason.SIZE, ""), "43464131 0100 03 04 0000 0000 00 000000 0000000000000000"),
    (
        Answer(Action.QUEUE, submissions=(Submission(),)),
        "43464131 0100 01 00 0000 0100 00 000000 1c00000000000000"
        "01000000 0000000000000000 0000000000000000 0000000000000000",
    ),
    (
        Answer(Action.QUEUE, submissions=(Submission(b"X: y\n", 7), Submission(b"", 0, b"F\0\0"))),
        "43464131 0100 01 00 0000 0200 00 000000 4000000000000000"
        "01000000 0700000000000000 0500000000000000 0000000000000000 583a20790a"
        "00000000 0000000000000000 0000000000000000 0300000000000000 460000",
    ),
]
REPORTS = [
    (CommitReport(()), "43465231 0100 0000"),
    (CommitReport((Result(0, True), Result(-9, False))), "43465231 0100 0200 00000000 01000000 f7ffffff 00000000"),
    (CommitReport((Result(wire.NEVER_STARTED, False),)), "43465231 0100 0100 18fcffff 00000000"),
]


@pytest.mark.parametrize(("value", "data"), REQUESTS)
def test_requests(value: Request, data: str) -> None:
    packet = bytes.fromhex(data)
    assert wire.encode_request(value) == packet
    assert wire.decode_request(packet) == value


@pytest.mark.parametrize(("value", "data"), ANSWERS)
def test_answers(value: Answer, data: str) -> None:
    packet = bytes.fromhex(data)
    assert wire.encode_answer(value) == wire.EncodedAnswer(packet)
    assert wire.decode_answer(packet) == value


@pytest.mark.parametrize(("value", "data"), REPORTS)
def test_reports(value: CommitReport, data: str) -> None:
    packet = bytes.fromhex(data)
    assert wire.encode_report(value) == packet
    assert wire.decode_report(packet) == value


@pytest.mark.parametrize(
    ("decode", "data"),
    [(wire.decode_request, data) for _, data in REQUESTS]
    + [(wire.decode_answer, data) for _, data in ANSWERS]
    + [(wire.decode_report, data) for _, data in REPORTS],
)
def test_every_cut_and_every_tail_is_refused(decode: object, data: str) -> None:
    assert callable(decode)
    packet = bytes.fromhex(data)
    for broken in [packet[:end] for end in range(len(packet))] + [packet + b"\0", packet + b"x=y\0"]:
        with pytest.raises(RemoteProtocolError):
            decode(broken)


@pytest.mark.parametrize("at", [0, 3, 4, 5])
@pytest.mark.parametrize(
    ("decode", "data"),
    [(wire.decode_request, REQUESTS[0][1]), (wire.decode_answer, ANSWERS[0][1]), (wire.decode_report, REPORTS[0][1])],
)
def test_another_magic_or_version_is_refused(decode: object, data: str, at: int) -> None:
    assert callable(decode)
    packet = bytearray(bytes.fromhex(data))
    packet[at] ^= 2
    with pytest.raises(RemoteProtocolError):
        decode(bytes(packet))


@pytest.mark.parametrize("block", [b"A=b", b"=b\0", b"A\0", b"A=b\0\0", b"\0", b"A=b\0=\0"])
def test_a_broken_environment_is_refused(block: bytes) -> None:
    head = wire.encode_request(Request(0, 1.0, 0, 0, {}))[:-4]
    with pytest.raises(RemoteProtocolError):
        wire.decode_request(head + struct.pack("<I", len(block)) + block)


@pytest.mark.parametrize("value", [b"", b"-1", b"1.5", b"now", b"9" * 16, b"\xb2", b"1" * 5000])
def test_a_time_that_is_no_number_counts_as_none(value: bytes) -> None:
    request = wire.decode_request(wire.encode_request(Request(0, 1.0, 0, 0, {wire.SENT: value, b"A": b"b"})))
    assert (request.sent, request.environ) == (None, {b"A": b"b"})


def test_an_environment_over_the_limit_is_refused() -> None:
    block = b"A=" + b"x" * 32766 + b"\0"
    head = wire.encode_request(Request(0, 1.0, 0, 0, {}))[:-4]
    with pytest.raises(RemoteProtocolError):
        wire.decode_request(head + struct.pack("<I", len(block)) + block)
    with pytest.raises(LocalProtocolError):
        wire.encode_request(Request(0, 1.0, 0, 0, {b"A": b"x" * 32766}))


@pytest.mark.parametrize(
    "answer",
    [
        Answer(Action.QUEUE),
        Answer(Action.REJECT, submissions=(Submission(),)),
        Answer(Action.DROP, submissions=(Submission(),)),
        Answer(Action.QUEUE, submissions=(Submission(),) * 129),
        Answer(Action.QUEUE, submissions=(Submission(skip=-1),)),
        Answer(Action.REJECT, text="x" * 251),
        Answer(Action.REJECT, text="line\nbreak"),
        Answer(Action.REJECT, text="carriage\rreturn"),
        Answer(Action.REJECT, text="nul\0"),
    ],
)
def test_an_answer_that_the_hook_would_not_take_is_our_own_fault(answer: Answer) -> None:
    with pytest.raises(LocalProtocolError):
        wire.encode_answer(answer)


def test_text_beyond_ascii_is_replaced_not_refused() -> None:
    """A signature's name comes from a database; the refusal must get out."""
    assert wire.encode_answer(Answer(Action.REJECT, text="Würm")).packet.endswith(b"W?rm")


@pytest.mark.parametrize("size", [65536 - 24 - 28, 65536 - 24 - 27])
def test_a_body_that_does_not_fit_the_packet_goes_apart(size: int) -> None:
    answer = Answer(Action.QUEUE, submissions=(Submission(b"x" * size),))
    encoded = wire.encode_answer(answer)
    assert (encoded.body is None) == (size == 65536 - 24 - 28)
    assert len(encoded.packet) == (65536 if encoded.body is None else 24)
    assert wire.decode_answer(encoded.packet, encoded.body) == answer


def test_a_body_flag_and_a_body_belong_together() -> None:
    encoded = wire.encode_answer(Answer(Action.QUEUE, submissions=(Submission(b"x" * 70_000),)))
    with pytest.raises(RemoteProtocolError):
        wire.decode_answer(encoded.packet)
    with pytest.raises(RemoteProtocolError):
        wire.decode_answer(bytes.fromhex(ANSWERS[3][1]), b"")
    with pytest.raises(RemoteProtocolError):
        wire.decode_answer(encoded.packet + b"x", encoded.body)


names = st.binary(min_size=1, max_size=20).filter(lambda b: b"\0" not in b and b"=" not in b)
values = st.binary(max_size=60).map(lambda b: b.replace(b"\0", b""))
u64 = st.integers(0, 2**64 - 1)
submissions = st.builds(Submission, st.binary(max_size=50), u64, st.sampled_from([None, b"F\0\0", b"Fa\0Tb\0Tc\0\0"]))
texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=250)


@given(st.integers(0, 65535), st.integers(0, 2**32 - 1), u64, u64, st.dictionaries(names, values, max_size=20))
def test_any_request_survives(
    attempt: int, budget: int, message: int, envelope: int, environ: dict[bytes, bytes]
) -> None:
    request = Request(attempt, budget / 1000, message, envelope, environ)
    assert wire.decode_request(wire.encode_request(request)) == request


@given(st.sampled_from(Reason), texts, st.lists(submissions, min_size=1, max_size=5))
def test_any_answer_survives(reason: Reason, text: str, parts: list[Submission]) -> None:
    for answer in (Answer(Action.QUEUE, reason, text, tuple(parts)), Answer(Action.REJECT, reason, text)):
        assert wire.decode_answer(wire.encode_answer(answer).packet) == answer


@given(st.binary(max_size=120))
def test_any_bytes_are_decoded_or_refused(tail: bytes) -> None:
    for decode, magic in ((wire.decode_request, b"CFQ1"), (wire.decode_answer, b"CFA1"), (wire.decode_report, b"CFR1")):
        for packet in (tail, magic + b"\1\0" + tail):
            try:
                value = decode(packet)
            except RemoteProtocolError:
                continue
            assert value is not None
