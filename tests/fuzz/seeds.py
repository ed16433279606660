"""Seeds: a few legal inputs for each target, made by the product's own encoders.

Inputs found by fuzzing are in corpus/: those that reach further branches, and every finding.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec
from lab.programs import disguises, made

from contentfilter.bus import messages
from contentfilter.model import Action, Reason, Scanner
from contentfilter.policy.overrides import Drain
from contentfilter.store.sidecar import EnvelopeHex, Release, Sidecar
from contentfilter.verdict.record import ScanRecord
from contentfilter.wire import envelope, hook

CORPUS = Path(__file__).with_name("corpus")
ETC = Path(__file__).resolve().parents[2] / "etc"
CLAMD = (
    b"stream: OK\0",
    b"fd[10]: OK\0",
    b"stream: Eicar-Test-Signature FOUND\0",
    b"1: fd[3]: Win.Test-1(0123456789abcdef0123456789abcdef:68) FOUND\n",
    b"INSTREAM size limit exceeded. ERROR\0",
    b"COMMAND READ TIMED OUT\n",
    b"PONG\0",
    b"ClamAV 1.4.6/27500/Tue Dec 24 09:30:00 2024\0",
    b"ClamAV 1.4.6/27500/Tue Dec 24 09:30:00 2024| COMMANDS: SCAN QUIT\0",
    b"POOLS: 1\n\nTHREADS: live 1  idle 0 max 10 idle-timeout 30\nQUEUE: 2 items\n\tSTATS 0.1\nMEMSTATS: N/A\nEND\0",
)
HEADER = b"X-Spam-Flag: YES\r\nX-Spam-Status: Yes, score=7.0 required=5.0\r\n\ttests=A,B\r\nSubject: x\r\n\r\n"
SPAMD = (
    b"SPAMD/1.5 0 PONG\r\n",
    b"SPAMD/1.1 0 EX_OK\r\nContent-length: 0\r\nSpam: True ; 9.0 / 5.0\r\n\r\n",
    b"SPAMD/1.1 0 EX_OK\r\nSpam: no;-1/5\r\nContent-length: %d\r\n\r\n%b" % (len(HEADER), HEADER),
    b"SPAMD/1.0 75 Try later\r\n",
)
MAIL = (
    b"Subject: Re: hello\nMessage-ID: <a@example.org>\nX-Virus-Status: Clean\nx-spam-status: No\n folded\n\nbody\n",
    b"Subject: =?utf-8?q?gr=C3=BC=C3=9Fe?=\r\n =?utf-8?b?QUJD?=\r\nX-ContentFilter : a\r\n\r\nbody\r\n",
    b'Content-Type: multipart/mixed;\n\tboundary*0="a"\n\n--a\nContent-Type: message/rfc822\n\n\n--a--\n--b\n\n',
    b"\nbegin 644 x\n#35J0\n`\nend\nbegin-base64 644 y\nTVqQ\n====\n=3D=\n",
    b"Content-Transfer-Encoding: base64\n\nVFZxUUFBTUFBQUFFQUFBQS8vOEFBTGdBQUFBQQ==\n",
)


def _wire() -> dict[str, list[bytes]]:
    one = hook.Submission(b"X-A: b\n", 3, envelope.build(b"s@example.org", [b"r@example.org"]))
    answers = (
        hook.Answer(Action.QUEUE, submissions=(hook.Submission(),)),
        hook.Answer(Action.QUEUE, submissions=(one, hook.Submission(b"", 0, b"F\0Tr\0\0"))),
        hook.Answer(Action.REJECT, Reason.VIRUS, "no"),
        hook.Answer(Action.DROP),
    )
    packets = [hook.encode_answer(answer).packet for answer in answers]
    apart = bytearray(packets[1])
    apart[12] = 1
    edges = [b"F%b\0T%b\0\0" % (b"s" * first, b"r" * second) for first, second in ((1002, 1), (1003, 1), (1, 1003))]
    orders = messages.Overrides(3, (), Drain(1.0, None, "why", "root"))
    return {
        "request": [hook.encode_request(hook.Request(1, 9.5, 100, 20, {b"TCPREMOTEIP": b"192.0.2.1", b"EXTRA": b""}))],
        "answer": [*(b"\0\0\0" + packet for packet in packets), b"\1\0\x18" + apart],
        "report": [hook.encode_report(hook.CommitReport((hook.Result(0, True), hook.Result(-9, False))))],
        "envelopes": [envelope.build(b"s", [b"a", b"b"]), b"Fs\0Tr\0Q\0", b"Fs\0Tr\0Q1\0Tt\0\0behind", *edges],
        "clamd_answer": list(CLAMD),
        "spamd_response": list(SPAMD),
        "spam_fields": [
            b"|Flag: YES|Status: Yes, score=7.0 required=5.0\r\n\ttests=A|Level: *",
            HEADER,
            HEADER.replace(b"\r", b""),
            b"X-Spam-Report: a\rX-Forged: b\0c\n\n",
        ],
        "frame": [
            messages.encode(frame)[1:]
            for frame in (
                messages.Ping(),
                orders,
                messages.AskBypass(Scanner.CLAMD, 60.0, "test"),
                messages.Done(True, 1),
            )
        ],
    }


def _files() -> dict[str, list[bytes]]:
    entry = Sidecar(
        "0123456789abcdef",
        "0" * 64,
        5,
        1.0,
        scans=(ScanRecord("clamd", "found", 1.0, "Test"),),
        envelope_hex=EnvelopeHex("61", ("62", "63")),
        withheld_from=(1,),
        released=(Release(2.0, "root", ("b",)),),
    )
    conf = b"# c\nsocket /a\nqueue /b\nspool /c\ndialect sqmail\nunavailable accept\nbudget 9\nmemory 0\nenviron A\n"
    return {
        "table": [
            b"a@example.org\n@example.org spam=reject score=4.5\n!.example.org # c\n* virus=move:v@example.org\n"
        ],
        "controls": [b"clamglobal 1\nspamdchildren: 5\nsysfacility=LOG_LOCAL3 # c\nskipcachk 7x\n"],
        "rules": [b"TVqQAAMAA Windows\nTV**AAMAA\n# c\nMzIuZ 32.d\n"],
        "toml": [
            (ETC / "contentfilter.toml").read_bytes()[:3000],
            b'[[failure.rule]]\nscanner = "clamd"\ncause = ["down"]\n',
        ],
        "sidecar": [msgspec.json.encode(entry), b'{"incident":"a"}'],
        "queue_conf": [conf, b"budget 0\n"],
    }


def seeds() -> Mapping[str, list[bytes]]:
    """For each target."""
    hidden = [message for name, message in disguises(made()[:200]) if len(message) < 3000][::6]
    return {
        **_wire(),
        **_files(),
        "scan": [*MAIL, *hidden],
        "decoders": [*MAIL],
        "header_lines": [*MAIL],
        "marks": [*MAIL],
    }


def corpus(target: str) -> list[bytes]:
    """Corpus of this target: one input for each new branch, and every finding."""
    return [path.read_bytes() for path in sorted((CORPUS / target).glob("*"))]


def write_seeds(directory: Path) -> list[str]:
    """All of both, below ``directory``; returns the names of the targets."""
    for target, inputs in seeds().items():
        place = directory / target
        place.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate([*inputs, *corpus(target)]):
            (place / f"seed-{number}").write_bytes(data)
    return list(seeds())
