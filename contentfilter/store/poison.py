"""A message that killed workers: it is kept for study, and decided without a look at it.

The decision is made over an empty stand-in of the same size, so not a byte of the message is parsed, searched or
rewritten in this process: every scanner counts as *unchecked* with the cause ``poison``, and the failure table says
what that does. The copies are limited, the oldest go first, and nobody else can read them.
"""

import asyncio
import os
import time
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from contentfilter.errors import Cause
from contentfilter.files import replace_file
from contentfilter.model import Envelope, Message, Origin, Scanner, ScanOutcome, ScanStatus
from contentfilter.policy.decide import decide
from contentfilter.policy.plan import PlanStep, RecipientPolicy, ScanPlan, Switches
from contentfilter.settings import Settings
from contentfilter.verdict.context import MessageContext
from contentfilter.verdict.record import MailDetail, MailRecord, fields, make_detail, make_record
from contentfilter.verdict.reply import answer
from contentfilter.wire import hook

DIRECTORY = "poison"  # in the state directory
KEPT = 16  # messages
ROOM = 256 * 1024 * 1024  # bytes of all of them
DETAIL = "it killed two workers"
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Isolated:
    """What became of such a message."""

    answer: hook.Answer
    record: MailRecord
    account: MailDetail
    kept: str  # where its copy is; empty: there is none
    trouble: str = ""  # why it could not be kept


async def isolate(
    incident: str,
    envelope: Envelope,
    message: Message,
    origin: Origin,
    attempt: int,
    fingerprint: str,
    settings: Settings,
    switches: Switches,
    disk: Executor | None = None,
) -> Isolated:
    """Decide, and keep a copy. Mail does not wait for the copy's sake: a full disk is only told.

    ``disk``: threads for calls that a hung disk may block; None: the event loop's.
    """
    began = time.monotonic()
    case = poison_case(incident, envelope, message.size, origin, settings, switches)
    reply, record = answer(case), make_record(case, attempt, time.monotonic() - began)
    account = make_detail(case, reply.text)
    try:
        facts = (settings.service.state, fingerprint, message, fields(record))
        kept = await asyncio.get_running_loop().run_in_executor(disk, keep_poison, *facts)
    except OSError as error:
        return Isolated(reply, record, account, "", str(error))
    return Isolated(reply, record, account, kept)


def poison_case(
    incident: str, envelope: Envelope, size: int, origin: Origin, settings: Settings, switches: Switches
) -> MessageContext:
    """What is decided about such a message. Whoever may want a check counts as one who does."""
    everybody = (RecipientPolicy(True, True, DETAIL, DETAIL), tuple(range(len(envelope.recipients))))
    plan = ScanPlan((everybody,), tuple(PlanStep(scanner, False, DETAIL) for scanner in Scanner))
    outcomes = tuple(
        ScanOutcome(scanner, ScanStatus.UNCHECKED, detail=DETAIL, cause=Cause.POISON) for scanner in Scanner
    )
    decision = decide(plan, outcomes, origin.kind, len(envelope.recipients), settings)
    stand_in = Message(-1, size, b"")
    return MessageContext(incident, origin, envelope, stand_in, settings, switches, plan, outcomes, decision)


def keep_poison(state: str, fingerprint: str, message: Message, facts: dict[str, Any]) -> str:
    """Where the copy is: made now, or there already. Empty: it is larger than all may be. Raises OSError."""
    directory = Path(state) / DIRECTORY
    directory.mkdir(mode=0o700, exist_ok=True)
    path = directory / f"{fingerprint}.eml"
    if path.exists():
        return str(path)
    if message.size > ROOM:
        return ""
    others = poison_kept(state)
    while others and (len(others) >= KEPT or sum(size for _, size, _ in others) + message.size > ROOM):
        name, _, _ = others.pop(0)
        for kind in ("eml", "json"):
            (directory / f"{name}.{kind}").unlink(missing_ok=True)
    replace_file(directory / f"{fingerprint}.json", (msgspec.json.encode(facts | {"time": time.time()}), b"\n"), 0o600)
    replace_file(path, (message.data[at : at + _PIECE] for at in range(0, message.size, _PIECE)), 0o600)
    return str(path)


def poison_kept(state: str) -> list[tuple[str, int, float]]:
    """Fingerprint, size and time of each copy, the oldest first. Raises OSError."""
    found = []
    directory = os.path.join(state, DIRECTORY)
    if os.path.isdir(directory):
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.endswith(".eml") and not entry.name.startswith("."):
                    about = entry.stat(follow_symlinks=False)
                    found.append((entry.name.removesuffix(".eml"), about.st_size, about.st_mtime))
    return sorted(found, key=lambda each: each[2])
