"""Context of a decided message: the input of reply, record and explain."""

import msgspec

from contentfilter.model import Envelope, Message, Origin, ScanOutcome
from contentfilter.policy.decide import Decision
from contentfilter.policy.plan import ScanPlan, Switches
from contentfilter.settings import Settings


class MessageContext(msgspec.Struct, frozen=True):
    """One message with its plan, outcomes and decision."""

    incident: str
    origin: Origin
    envelope: Envelope
    message: Message
    settings: Settings
    switches: Switches
    plan: ScanPlan
    outcomes: tuple[ScanOutcome, ...]
    decision: Decision
