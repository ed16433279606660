"""Targets: what comes over a socket. The hook's protocol, envelopes, answers of clamd and spamd, frames of the bus."""

from collections.abc import Iterator
from typing import Any

from fuzz.hook_library import hook_parsers

from contentfilter.bus import messages
from contentfilter.errors import EnvelopeError, RemoteProtocolError
from contentfilter.model import Action, Reason, Scanner, ScanOutcome, ScanStatus
from contentfilter.policy.decide import Decision, Match, RecipientAction
from contentfilter.verdict import headers
from contentfilter.verdict.reply import text_for
from contentfilter.wire import clamd, envelope, hook, spamd


def printable(text: str) -> None:
    assert text.isprintable() or not text, text[:100]
    assert text.isascii(), text[:100]


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


# The hook's protocol


def request(data: bytes) -> None:
    """Any packet; and what the hook makes of any environment must be legal."""
    try:
        read = hook.decode_request(data)
    except RemoteProtocolError:
        pass
    else:
        assert hook.decode_request(hook.encode_request(read)) == read
    variables = [variable for variable in data.split(b"\0") if variable]
    block = b"".join(variable + b"\0" for variable in variables)
    sent = hook.decode_request(hook_parsers().request(block, 7, 1000))
    given = [variable.partition(b"=") for variable in variables]
    for name, value in sent.environ.items():
        assert any(n == name and v[:1024] == value for n, _, v in given)
        assert b"PASS" not in name or name == b"EXTRA"


def answer(data: bytes) -> None:
    """A packet, and whether its body comes apart: hook and daemon read the same, or both nothing."""
    if len(data) < 3:
        return
    cut = int.from_bytes(data[1:3], "big")
    packet, body = (data[3 : 3 + cut], data[3 + cut :]) if data[0] & 1 else (data[3:], None)
    if len(packet) > hook.PACKET_MAX:
        return
    said = hook_parsers().answer(packet, body, 1000)
    try:
        read = hook.decode_answer(packet, body)
    except RemoteProtocolError:
        assert said is None
        return
    if any(submission.skip > 1000 for submission in read.submissions):  # only the hook knows the message's size
        assert said is None
        return
    if body == b"":  # nothing to map
        return
    assert said == described(read)
    printable(read.text)
    encoded = hook.encode_answer(read)
    assert hook.decode_answer(encoded.packet, encoded.body) == read
    assert hook_parsers().answer(encoded.packet, encoded.body, 1000) == said


def described(read: hook.Answer) -> str:
    """An answer as hook_parsers.c writes it down."""
    lines = [f"{hook.ACTION_CODES[read.action]} {hook.REASON_CODES[read.reason]} {read.text}\n"]
    for submission in read.submissions:
        total = 0
        for byte in submission.prepend + (submission.envelope or b""):
            total = (total * 31 + byte) % 2**64
        size = -1 if submission.envelope is None else len(submission.envelope)
        lines.append(f"{submission.skip} {len(submission.prepend)} {size} {total}\n")
    return "".join(lines)


def report(data: bytes) -> None:
    try:
        read = hook.decode_report(data)
    except RemoteProtocolError:
        return
    assert hook.decode_report(hook.encode_report(read)) == read


def envelopes(data: bytes) -> None:
    """Hook and daemon agree on every envelope and on what is wrong with it, in whatever pieces it comes."""
    seen = {hook_parsers().envelope(data, size) for size in (1, 2, 7, len(data) + 1)}
    assert len({status for status, _ in seen}) == 1
    status = next(iter(seen))[0]
    refused = 0
    try:
        read = envelope.parse(data)
    except EnvelopeError as error:
        refused = error.status
    assert refused == status
    if refused:
        return
    ((_, used),) = seen
    assert envelope.parse(data[:used]) == read
    built = envelope.build(read.sender, read.recipients)
    assert envelope.parse(built) == read
    assert hook_parsers().envelope(built, 5) == (0, len(built))


# What scanners answer


def clamd_answer(data: bytes) -> None:
    """The same event or error in one feed and in many; nothing in it that could end a line."""
    for make in (clamd.scan_reader, clamd.version_reader):
        heard = [outcome(make(), data, size) for size in (len(data) + 1, 1, 13)]
        if isinstance(heard[0], str) and "more than one answer" in heard[0]:
            continue  # fed byte by byte the first answer is taken before the second one is seen
        assert heard[0] == heard[1] == heard[2]
        if isinstance(heard[0], clamd.Found):
            printable(heard[0].name)
            clamd.signature_class(heard[0].name)
            refusal(heard[0].name)
        elif isinstance(heard[0], clamd.Failed):
            printable(heard[0].text)
        elif isinstance(heard[0], clamd.Version):
            printable(heard[0].product)


def outcome(reader: Any, data: bytes, size: int) -> object:
    """Final result of the reader; an error as its text."""
    try:
        for piece in pieces(data, size):
            event = reader.feed(piece)
            if event is not None:
                return event
        return reader.end()
    except RemoteProtocolError as error:
        printable(str(error))
        return str(error)


def refusal(name: str) -> None:
    """The SMTP reply about a finding of that name fits into the hook's answer."""
    found = Match(RecipientAction.REJECT, Reason.VIRUS, "clamd", ScanOutcome(Scanner.CLAMD, ScanStatus.FOUND, name))
    text = text_for(Decision(Action.REJECT, Reason.VIRUS, "clamd", found), "0123456789abcdef")
    assert hook.encode_answer(hook.Answer(Action.REJECT, Reason.VIRUS, text)).body is None


def spamd_response(data: bytes) -> None:
    """As clamd's; and what of its header block goes into a delivery is X-Spam- lines only."""
    for command in ("CHECK", "HEADERS", "PROCESS", "PING"):
        heard = [outcome(spamd.ResponseReader(command, 100_000), data, size) for size in (len(data) + 1, 1, 13)]
        if isinstance(heard[1], spamd.Response) and (
            heard[1].code or command == "PING" or "after the end" in str(heard[0])
        ):
            continue  # what follows is not looked at, or is seen only in one feed
        assert heard[0] == heard[1] == heard[2]
        if isinstance(heard[0], spamd.Response):
            printable(heard[0].text)
            spam_fields(heard[0].body)


def spam_fields(block: bytes) -> None:
    """Whatever spamd says the header is: only fields of its own, and nobody sees another line begin."""
    own = block.replace(b"|", b"\nX-Spam-")  # the name is hard to come upon by chance
    for said in (block, own):
        for fields in (headers.spam_fields(said), headers.overruled(headers.spam_fields(said), True)):
            for field in fields:
                assert field.endswith(b"\n")
                assert not set(b"\r\0") & set(field)
                first, *folded = field.split(b"\n")[:-1]
                assert first[:7].lower() == b"x-spam-"
                assert all(line[:1] in b" \t" for line in folded)


def frame(data: bytes) -> None:
    """Frames of the bus, from any process that can open the socket."""
    for decoder in (messages.REPORTS, messages.OVERRIDES, messages.COMMANDS, messages.QUESTIONS, messages.REPLIES):
        try:
            read = messages.decode(b"\x01" + data, decoder)
        except RemoteProtocolError:
            continue
        assert messages.decode(messages.encode(read), decoder) == read
