"""The canary's samples. Nothing here waits or sends.

Four messages show that mail is really scanned: a clean one that every scanner must pass, and three harmless
ones that one scanner each must detect: EICAR (clamd), GTUBE (spamd), and the beginning of a program (chksignature
or chkloadertype, made from a rule in force). The test strings are in pieces, so that no scanner detects this file.
"""

import base64
from dataclasses import dataclass
from email.utils import formatdate

from contentfilter.doors.canary import CLEAN, EICAR, GTUBE, SIGNATURE
from contentfilter.policy.overrides import AllowEntry
from contentfilter.scanners.signatures.rules import LIBRARY, Fragment, Rule, Rules, Signature
from contentfilter.settings import Settings

ENVELOPE = b"F\0\0"
"""No sender, no recipient: even a real qmail-queue could not deliver it."""


_EICAR = (b"X5O!P%@AP[4\\PZX5", b"4(P^)7CC)7}$EI", b"CAR-STANDARD-ANTIV", b"IRUS-TEST-FILE!$H+H*")
_GTUBE = (b"XJS*C4JDBQADN1.N", b"SBN3*2IDNEN*GTUBE-STAN", b"DARD-ANTI-UBE-TEST", b"-EMAIL*C.34X")
_WORDS = b"A sample that the content filter sends to itself, to see that mail is scanned.\n"
_PROGRAM = ("T", "VqQAAM", "AAAAEAAAA")  # MZ, as the usual linker writes it, in base64
_ALIGNED = {0: 0, 2: 1, 4: 2, 6: 3}  # bits of a pattern in the byte before -> its place in a group of four letters


@dataclass(frozen=True, slots=True)
class Sample:
    """A message that tests one scanner, or all of them. ``skip``: why it is not sent."""

    name: str
    body: bytes = b""  # with the header fields that describe it
    skip: str = ""

    @property
    def wanted(self) -> str:
        """The expected result."""
        return "passed" if self.name == CLEAN else "caught"

    def message(self, nonce: str, now: float) -> bytes:
        """The message with a current date.

        It has no To: that gives a clean message about one point in SpamAssassin, enough to keep it from being
        learned. Its first field is From, by which clamd recognises mail.
        """
        head = (
            f"From: canary@contentfilter.invalid\nDate: {formatdate(now)}\n"
            f"Message-ID: <{self.name}.{nonce}@contentfilter.invalid>\n"
            f"Subject: contentfilter canary: {self.name}\nMIME-Version: 1.0\n"
        )
        return head.encode("ascii") + self.body


def make_samples(
    settings: Settings, signatures: Rules | None, loadertypes: Rules | None, allowed: tuple[AllowEntry, ...] = ()
) -> tuple[Sample, ...]:
    """All four under this configuration; those whose scanner is switched off are skipped.

    ``signatures`` and ``loadertypes``: None if the switch is off. Rules that ``allowed`` lets through are not used.
    """
    passing = {entry.signature for entry in allowed}
    clamd, spamd = settings.clamd.backends, settings.spamd.backends
    if any((clamd, spamd, signatures, loadertypes)):
        clean = Sample(CLEAN, _text(b"No scanner should detect anything in it.\n"))
    else:
        clean = Sample(CLEAN, skip="no scanner is configured")
    return (
        clean,
        Sample(EICAR, _attachment(_lines(base64.b64encode(b"".join(_EICAR)))))
        if clamd
        else Sample(EICAR, skip="[clamd] backends is empty"),
        Sample(GTUBE, _text(b"".join(_GTUBE) + b"\n")) if spamd else Sample(GTUBE, skip="[spamd] backends is empty"),
        _program(signatures, loadertypes, passing),
    )


def _program(signatures: Rules | None, loadertypes: Rules | None, passing: set[str]) -> Sample:
    if signatures is None and loadertypes is None:
        return Sample(SIGNATURE, skip="chksignature and chkloadertype are off")
    rules = [rule for rule in signatures.rules if rule.pattern not in passing] if signatures else []
    for rule in sorted(rules, key=_unfit):
        if not Signature.compile(rule).text:
            return Sample(SIGNATURE, _attachment(_lines(_begins(rule))))
    for rule in loadertypes.rules if loadertypes else ():
        if rule.pattern not in passing:
            return Sample(SIGNATURE, _attachment(_lines(_holds(rule))))
    return Sample(SIGNATURE, skip="no rule in force that a sample can be made from")


def _unfit(rule: Rule) -> tuple[bool, bool]:
    """False first: whole rules, which the compatible mode also takes."""
    return ("*" in rule.pattern, len(rule.pattern) < 9)


def _begins(rule: Rule) -> bytes:
    """Base64 of content that begins as a rule of badsignatures says."""
    return rule.pattern.replace("*", "A").ljust(160, "A").encode("ascii")


def _holds(rule: Rule) -> bytes:
    """Base64 of a program that has a rule of badloadertypes in it, and a library's name if it is a piece of one."""
    fragment = Fragment.compile(rule)[0]
    letters = "".join(_PROGRAM).ljust(64, "A") + "A" * _ALIGNED[fragment.lead] + rule.pattern
    letters += "A" * (-len(letters) % 4) + "AAAA"
    name = base64.b64encode(b"KERNEL" + LIBRARY + b"\0" * 3) if fragment.library else b""
    return (letters.encode("ascii") + name).ljust(160, b"A")


def _text(text: bytes) -> bytes:
    return b"Content-Type: text/plain; charset=us-ascii\n\n" + _WORDS + b"\n" + text


def _attachment(lines: bytes) -> bytes:
    name = b'Content-Disposition: attachment; filename="canary.bin"\n'
    return b"Content-Type: application/octet-stream\nContent-Transfer-Encoding: base64\n" + name + b"\n" + lines


def _lines(letters: bytes) -> bytes:
    return b"".join(letters[at : at + 76] + b"\n" for at in range(0, len(letters), 76))
