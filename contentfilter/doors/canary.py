"""The canary's mark: how a worker tells a sample from mail, and what it answers."""

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from contentfilter.model import Action, BytesLike, Scanner, ScanStatus
from contentfilter.verdict.record import ScanRecord

VARIABLE = "CONTENTFILTER_CANARY"


LIFETIME = 120
"""Seconds for which a mark holds."""


CLEAN, EICAR, GTUBE, SIGNATURE = "clean", "eicar", "gtube", "signature"


ASKED: Mapping[str, tuple[Scanner, ...]] = {
    CLEAN: tuple(Scanner),
    EICAR: (Scanner.CLAMD,),
    GTUBE: (Scanner.SPAMD,),
    SIGNATURE: (Scanner.SIGNATURES, Scanner.LOADERTYPES),
}
"""Which scanners look at a sample, as far as they are configured, whatever tables and switches say of recipients."""


_TOKEN = re.compile(rb"(1:([a-z]{1,16}):([0-9a-f]{32}):([0-9]{1,12}):([0-9a-f]{64})):([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class CanaryMark:
    """A canary that proved to be one."""

    sample: str
    nonce: str


def sign(secret: bytes, sample: str, nonce: str, expires: int, message: bytes) -> str:
    """The value of VARIABLE for one message. ``nonce``: 32 hexadecimal digits; ``expires``: seconds since 1970."""
    told = f"1:{sample}:{nonce}:{expires}:{hashlib.sha256(message).hexdigest()}".encode("ascii")
    return (told + b":" + _mac(secret, told)).decode("ascii")


def recognise(environ: Mapping[bytes, bytes], secret: bytes, message: BytesLike, now: float) -> CanaryMark | None:
    """What the hook's environment proves; None: this is mail. The caller has made sure whose hook it is.

    Mail costs one look-up. Without a secret nothing is proved.
    """
    value = environ.get(VARIABLE.encode())
    if value is None or len(environ) != 1 or not secret:  # a variable of an SMTP server beside it: not ours
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


def _mac(secret: bytes, told: bytes) -> bytes:
    return hmac.new(secret, b"contentfilter canary 1\0" + told, "sha256").hexdigest().encode("ascii")


def answer_for(scans: Iterable[ScanRecord]) -> Action:
    """What a worker answers. Never QUEUE."""
    statuses = {scan.status for scan in scans}
    if ScanStatus.FOUND.value in statuses:
        return Action.REJECT
    return Action.DEFER if ScanStatus.UNCHECKED.value in statuses else Action.DROP
