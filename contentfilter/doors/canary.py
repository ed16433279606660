"""Canary marks: recognise a signed sample among the mail, and answer it."""

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from contentfilter.model import Action, BytesLike, Scanner, ScanStatus
from contentfilter.verdict.record import ScanRecord

VARIABLE = "CONTENTFILTER_CANARY"


LIFETIME = 120
"""Seconds for which a mark is valid."""


CLEAN, EICAR, GTUBE, SIGNATURE = "clean", "eicar", "gtube", "signature"


ASKED: Mapping[str, tuple[Scanner, ...]] = {
    CLEAN: tuple(Scanner),
    EICAR: (Scanner.CLAMD,),
    GTUBE: (Scanner.SPAMD,),
    SIGNATURE: (Scanner.SIGNATURES, Scanner.LOADERTYPES),
}
"""Scanners for each sample, as far as they are configured; tables and switches of recipients do not count."""


_TOKEN = re.compile(rb"(1:([a-z]{1,16}):([0-9a-f]{32}):([0-9]{1,12}):([0-9a-f]{64})):([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class CanaryMark:
    """The verified mark of a sample."""

    sample: str
    nonce: str


def sign(secret: bytes, sample: str, nonce: str, expires: int, message: bytes) -> str:
    """The value of VARIABLE for one message. ``nonce``: 32 hexadecimal digits; ``expires``: seconds since 1970."""
    signed = f"1:{sample}:{nonce}:{expires}:{hashlib.sha256(message).hexdigest()}".encode("ascii")
    return (signed + b":" + _mac(secret, signed)).decode("ascii")


def recognise(environ: Mapping[bytes, bytes], secret: bytes, message: BytesLike, now: float) -> CanaryMark | None:
    """The mark in the hook's environment; None: this is mail. The caller has checked the hook's uid.

    Mail costs one look-up. Without a secret there are no valid marks.
    """
    value = environ.get(VARIABLE.encode())
    if value is None or len(environ) != 1 or not secret:  # an SMTP server's variables beside it: no canary
        return None
    token = _TOKEN.fullmatch(value)
    if token is None or not hmac.compare_digest(_mac(secret, token[1]), token[6]):
        return None
    sample, expires = token[2].decode("ascii"), int(token[4])
    if sample not in ASKED or not now <= expires <= now + LIFETIME:
        return None
    with memoryview(message) as whole:
        if hashlib.sha256(whole).hexdigest().encode("ascii") != token[5]:
            return None
    return CanaryMark(sample, token[3].decode("ascii"))


def _mac(secret: bytes, signed: bytes) -> bytes:
    return hmac.new(secret, b"contentfilter canary 1\0" + signed, "sha256").hexdigest().encode("ascii")


def answer_for(scans: Iterable[ScanRecord]) -> Action:
    """The worker's answer to a sample; never QUEUE."""
    statuses = {scan.status for scan in scans}
    if ScanStatus.FOUND.value in statuses:
        return Action.REJECT
    return Action.DEFER if ScanStatus.UNCHECKED.value in statuses else Action.DROP
