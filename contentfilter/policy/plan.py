"""Who wants what, and what is skipped: tables, H-Sphere's switches and the origin become a ScanPlan.

Recipients that are treated alike for the same reasons are one group, so a message with 100,000
recipients costs one decision per distinct table row. Facts: domain-spec 2.2 and 2.3.

The order of the rules, for each of the two checks:

1. skipcachk / skipsachk: 1 skips for authenticated clients, 2 for those and for relays;
2. clamglobal / spamglobal: everybody is checked, whatever the tables say, and gets the configuration's actions;
3. the most specific row of the table, with its options; an exempting row means no;
4. no row: no check.

The virus check is chksignature and chkloadertype (where switched on) and clamd; the spam check is spamd, which is
asked once for each owner of SpamAssassin preferences among those who want it, and once for all others together.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from contentfilter.model import Envelope, Origin, OriginKind, Scanner, Want, readable
from contentfilter.policy.options import DEFAULTS, Options, read_options
from contentfilter.settings import Settings


@dataclass(frozen=True, slots=True)
class Switches:
    """H-Sphere's parameters as far as they decide who is checked. Sizes in bytes; 0: no limit."""

    clamglobal: bool = False
    spamglobal: bool = False
    skipcachk: int = 0
    skipsachk: int = 0
    samsgsize: int = 0
    chksignature: bool = False
    chkloadertype: bool = False
    databytes: int = 0
    maxrecipients: int = 0
    xoriginatingip: bool = True
    xenveloptoheader: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """The table row that decided for a recipient: its key as written, without the ``!``."""

    key: bytes
    exempt: bool
    options: bytes = b""  # the row's own actions and scores: see :mod:`contentfilter.policy.options`


Lookup = Callable[[bytes], tuple[Row | None, Row | None]]
"""recipient -> (row of clamavclients, row of spamdclients)."""
Owners = Callable[[bytes], tuple[bytes, bytes]]
"""recipient -> (owner of its SpamAssassin preferences, the address that spamd finds them by); both empty: none."""

FULL_REWRITES = 64 << 20
"""Bytes of rewritten messages, for all owners together, above which ``rewrite = "full"`` is done by headers alone."""


class RecipientPolicy(msgspec.Struct, frozen=True):
    """What one recipient gets, and the rule that said so."""

    virus: bool
    spam: bool
    virus_rule: str
    spam_rule: str
    options: Options = DEFAULTS
    owner: bytes = b""  # of the SpamAssassin preferences that hold; empty: nobody's own


class PlanStep(msgspec.Struct, frozen=True):
    """Whether a scanner is asked, and why (not)."""

    scanner: Scanner
    run: bool
    reason: str


class ScanPlan(msgspec.Struct, frozen=True):
    """The whole plan for one message. ``groups`` pairs a treatment with indices into the recipients."""

    groups: tuple[tuple[RecipientPolicy, tuple[int, ...]], ...]
    steps: tuple[PlanStep, ...]
    users: tuple[tuple[bytes, bytes], ...] = ()  # for spamd: each owner, and the address that stands for it
    left_out: int = 0  # recipients whose own preferences do not count, because there are too many of them
    want: Want = Want.CHECK
    limit: str = ""  # databytes or maxrecipients, when one of them is exceeded
    hold: str = ""  # why nobody can say now who wants what
    released: str = ""  # the incident under which this message was in quarantine, when an operator let it go

    def runs(self, scanner: Scanner) -> bool:
        """Whether ``scanner`` is to be asked."""
        return any(step.run for step in self.steps if step.scanner is scanner)

    def released_by(self, incident: str) -> "ScanPlan":
        """The plan for a message that was released: nobody is asked again."""
        why = f"released from quarantine ({incident})"
        steps = tuple(PlanStep(scanner, run=False, reason=why) for scanner in Scanner)
        return msgspec.structs.replace(self, steps=steps, hold="", released=incident)


NO_TABLES = "the recipient tables are not loaded yet"

_SMTP = (OriginKind.STRANGER, OriginKind.RELAY, OriginKind.AUTHENTICATED)
_SKIPPED_FROM = {
    0: frozenset[OriginKind](),
    1: frozenset((OriginKind.AUTHENTICATED,)),
    2: frozenset((OriginKind.AUTHENTICATED, OriginKind.RELAY)),
}


def _general(origin: Origin, switches: Switches) -> tuple[tuple[bool, str] | None, tuple[bool, str] | None]:
    """What holds for all recipients alike, for both checks; None where the table decides."""
    return (
        _check("clamglobal", switches.clamglobal, "skipcachk", switches.skipcachk, origin.kind),
        _check("spamglobal", switches.spamglobal, "skipsachk", switches.skipsachk, origin.kind),
    )


def _check(everybody: str, globally: bool, skip: str, level: int, kind: OriginKind) -> tuple[bool, str] | None:
    if kind in _SKIPPED_FROM[level]:
        return False, f"{skip}={level}, client is {kind.value}"
    if globally:
        return True, everybody
    return None


def _by_row(table: str, row: Row | None) -> tuple[bool, str]:
    if row is None:
        return False, f"no row in {table}"
    if row.exempt:
        return False, f"exempt by !{readable(row.key)} in {table}"
    options = f" with {readable(row.options)}" if row.options else ""
    return True, f"{readable(row.key)} in {table}{options}"


def _own(row: Row | None, decided: object) -> bytes:
    """The row's options, where it is the row that decides."""
    return row.options if row is not None and decided is None else b""


class _Users:
    """The owners of preferences met so far, each with the address that stands for it. No more than ``most``."""

    def __init__(self, owners: Owners | None, most: int) -> None:
        self.most = most
        self.addresses: dict[bytes, bytes] = {b"": b""}
        self.left_out = 0
        self._owners = owners

    def __bool__(self) -> bool:
        """Whether anybody can have preferences."""
        return self._owners is not None

    def owner(self, recipient: bytes) -> bytes | None:
        """Whose preferences hold; None where there is no room for them any more."""
        if self._owners is None:
            return b""
        owner, address = self._owners(recipient)
        if owner not in self.addresses:
            if len(self.addresses) > self.most:
                self.left_out += 1
                return None
            self.addresses[owner] = address
        return owner


def _users(settings: Settings, owners: Owners | None) -> _Users:
    if settings.spamd.user == "recipient":
        owners = _everybody_their_own
    return _Users(None if settings.spamd.user == "none" else owners, settings.spamd.max_users)


def _everybody_their_own(recipient: bytes) -> tuple[bytes, bytes]:
    address = recipient.lower()
    return address, address


def _nobody(_: bytes) -> tuple[None, None]:
    return None, None


def _group(
    recipients: tuple[bytes, ...], origin: Origin, switches: Switches, lookup: Lookup, users: _Users
) -> dict[RecipientPolicy, list[int]]:
    """Sort recipients into groups of equal treatment. One look-up each, none where no table can matter."""
    virus, spam = _general(origin, switches)
    if virus is not None and spam is not None:
        if not (spam[0] and users):
            return {_treatment((None, None), virus, spam, b"", 0): list(range(len(recipients)))}
        lookup = _nobody
    groups: dict[RecipientPolicy, list[int]] = {}
    members_of: dict[tuple[Row | None, Row | None, bytes | None], list[int]] = {}
    own = bool(users)
    for index, recipient in enumerate(recipients):
        rows = lookup(recipient)
        wanted = own and (rows[1] is not None and not rows[1].exempt if spam is None else spam[0])
        key = (*rows, users.owner(recipient) if wanted else b"")
        members = members_of.get(key)
        if members is None:
            treatment = _treatment(rows, virus, spam, key[2], users.most)
            members = members_of[key] = groups.setdefault(treatment, [])
        members.append(index)
    return groups


def _treatment(
    rows: tuple[Row | None, Row | None],
    virus: tuple[bool, str] | None,
    spam: tuple[bool, str] | None,
    owner: bytes | None,
    most: int,
) -> RecipientPolicy:
    virus_now = virus or _by_row("clamavclients", rows[0])
    spam_now = spam or _by_row("spamdclients", rows[1])
    left_out = f", own preferences left out: [spamd] max_users={most}" if owner is None else ""
    options = read_options(_own(rows[0], virus), _own(rows[1], spam))
    return RecipientPolicy(virus_now[0], spam_now[0], virus_now[1], spam_now[1] + left_out, options, owner or b"")


def make_plan(
    envelope: Envelope,
    size: int,
    origin: Origin,
    settings: Settings,
    switches: Switches,
    lookup: Lookup | None,
    owners: Owners | None = None,
) -> ScanPlan:
    """Decide what is done with a message of ``size`` bytes, before anybody looks at it.

    Without ``lookup`` there are no tables yet: what they would have to decide is held back, but for bounces.
    ``owners`` says who has preferences of their own; None: nobody.
    """
    limit = ""
    if origin.kind in _SMTP:
        if switches.databytes and size > switches.databytes:
            limit = f"databytes={switches.databytes}"
        elif switches.maxrecipients and len(envelope.recipients) > switches.maxrecipients:
            limit = f"maxrecipients={switches.maxrecipients}"
    if lookup is None:
        if not limit and origin.kind is not OriginKind.BOUNCE and _needs_tables(_general(origin, switches), settings):
            steps = tuple(PlanStep(scanner, False, NO_TABLES) for scanner in Scanner)
            unknown = RecipientPolicy(False, False, NO_TABLES, NO_TABLES)
            return ScanPlan(((unknown, tuple(range(len(envelope.recipients)))),), steps, hold=NO_TABLES)
        lookup = _nobody
    users = _users(settings, owners)
    found = _group(envelope.recipients, origin, switches, lookup, users)
    groups = tuple((treatment, tuple(members)) for treatment, members in found.items())
    if limit:
        return ScanPlan(groups, tuple(PlanStep(scanner, False, limit) for scanner in Scanner), limit=limit)

    virus = next((t.virus_rule for t in found if t.virus), "")
    spam = next((t.spam_rule for t in found if t.spam), "")
    no_virus = next(iter({t.virus_rule for t in found}), "no recipients") if len(found) == 1 else "nobody wants it"
    no_spam = next(iter({t.spam_rule for t in found}), "no recipients") if len(found) == 1 else "nobody wants it"
    cap = switches.samsgsize or settings.spamd.max_size
    if spam and size > cap:
        name = "samsgsize" if switches.samsgsize else "[spamd] max_size"
        spam, no_spam = "", f"size {size} > {name}={cap}"
    elif spam and size == 0:
        spam, no_spam = "", "empty message"
    steps = (
        _step(Scanner.SIGNATURES, virus, no_virus, switches.chksignature, "chksignature=0"),
        _step(Scanner.LOADERTYPES, virus, no_virus, switches.chkloadertype, "chkloadertype=0"),
        _step(Scanner.CLAMD, virus, no_virus, bool(settings.clamd.backends), "[clamd] backends is empty"),
        _step(Scanner.SPAMD, spam, no_spam, bool(settings.spamd.backends), "[spamd] backends is empty"),
    )
    asked = tuple((owner, users.addresses[owner]) for owner in dict.fromkeys(t.owner for t in found if t.spam))
    return ScanPlan(groups, steps, asked, users.left_out, _want(found, settings, size * len(asked)))


def _step(scanner: Scanner, wanted: str, unwanted: str, on: bool, off: str) -> PlanStep:
    if not wanted:
        return PlanStep(scanner, False, unwanted)
    return PlanStep(scanner, True, wanted) if on else PlanStep(scanner, False, off)


def _needs_tables(general: tuple[tuple[bool, str] | None, tuple[bool, str] | None], settings: Settings) -> bool:
    """Whether tables that are not there would have a say: about who is checked, or about whose preferences hold."""
    spam, db = general[1], settings.mariadb
    listed = settings.tables.source == "mariadb" and (db.prefs_table or db.prefs_query)
    return None in general or bool(listed and settings.spamd.user == "table" and spam and spam[0])


def _want(treatments: Iterable[RecipientPolicy], settings: Settings, rewritten: int) -> Want:
    """No more than is used: SpamAssassin's headers only where somebody may get spam, marked or moved.

    ``rewritten``: bytes of all messages that spamd would give back.
    """
    actions = {t.options.spam or settings.spamd.action for t in treatments if t.spam}
    if actions.isdisjoint(("mark", "move")):
        return Want.CHECK
    return Want.PROCESS if settings.spamd.rewrite == "full" and rewritten <= FULL_REWRITES else Want.HEADERS
