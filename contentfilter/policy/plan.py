"""Scan plan: who has which check, and which scanners run, from the tables, H-Sphere's switches and the origin.

Recipients with the same policy for the same reasons are one group, so a message with 100,000
recipients costs one decision per distinct table row. Facts: domain-spec 2.2 and 2.3.

The order of the rules, for each of the two checks:

1. skipcachk / skipsachk: 1 skips for authenticated clients, 2 for those and for relays;
2. clamglobal / spamglobal: all recipients are checked, whatever the tables say, with the configuration's actions;
3. the most specific row of the table, with its options; an exempting row means no;
4. no row: no check.

The virus check is chksignature and chkloadertype (where switched on) and clamd; the spam check is spamd, which is
asked once for each owner of SpamAssassin preferences among those who have it, and once for all others together.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from contentfilter.model import RECIPIENTS_MAX, Check, Envelope, Origin, OriginKind, Scanner, Want, readable
from contentfilter.policy.options import DEFAULTS, Options, read_options
from contentfilter.settings import Settings


@dataclass(frozen=True, slots=True)
class Switches:
    """H-Sphere's parameters for checks, limits and headers. Sizes in bytes; 0: no limit."""

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
    """The checks of one recipient, each with the rule that decided, and the options of its rows."""

    virus: bool
    spam: bool
    virus_rule: str
    spam_rule: str
    options: Options = DEFAULTS
    owner: bytes = b""  # of the SpamAssassin preferences in force; empty: none of its own


class PlanStep(msgspec.Struct, frozen=True):
    """One scanner: run or not, and why."""

    scanner: Scanner
    run: bool
    reason: str


class ScanPlan(msgspec.Struct, frozen=True):
    """The whole plan for one message. ``groups`` pairs a policy with indices into the recipients."""

    groups: tuple[tuple[RecipientPolicy, tuple[int, ...]], ...]
    steps: tuple[PlanStep, ...]
    users: tuple[tuple[bytes, bytes], ...] = ()  # for spamd: each owner, and the address that it is asked for
    left_out: int = 0  # recipients whose own preferences are ignored: there are too many owners
    want: Want = Want.CHECK
    limit: str = ""  # databytes or maxrecipients, where one of them is exceeded
    hold: str = ""  # why the policies are not known now
    released: str = ""  # the incident under which an operator released this message from quarantine

    def runs(self, scanner: Scanner) -> bool:
        """True if ``scanner`` is to be asked."""
        return any(step.run for step in self.steps if step.scanner is scanner)

    def for_owners(self, owners: frozenset[bytes]) -> "ScanPlan":
        """The plan without the other owners of preferences."""
        if len(self.users) < 2:
            return self
        return msgspec.structs.replace(self, users=tuple([user for user in self.users if user[0] in owners]))

    def released_by(self, incident: str) -> "ScanPlan":
        """The plan for a message that was released: no scanner runs again."""
        why = f"released from quarantine ({incident})"
        return msgspec.structs.replace(self, steps=_no_steps(why), hold="", released=incident)


NO_TABLES = "the recipient tables are not loaded yet"

_SMTP = (OriginKind.STRANGER, OriginKind.RELAY, OriginKind.AUTHENTICATED)
_SKIPPED_FROM = {
    0: frozenset[OriginKind](),
    1: frozenset((OriginKind.AUTHENTICATED,)),
    2: frozenset((OriginKind.AUTHENTICATED, OriginKind.RELAY)),
}


class _Rule(msgspec.Struct, frozen=True):
    """A recipient has a check or not, and the rule that decided."""

    wanted: bool
    text: str


class _GeneralRules(msgspec.Struct, frozen=True):
    """The rules for all recipients alike. None: the table decides."""

    virus: _Rule | None
    spam: _Rule | None


def _general_rules(origin: Origin, switches: Switches) -> _GeneralRules:
    return _GeneralRules(
        _general_rule("clamglobal", switches.clamglobal, "skipcachk", switches.skipcachk, origin.kind),
        _general_rule("spamglobal", switches.spamglobal, "skipsachk", switches.skipsachk, origin.kind),
    )


def _general_rule(switch: str, on: bool, skip: str, level: int, kind: OriginKind) -> _Rule | None:
    if kind in _SKIPPED_FROM[level]:
        return _Rule(False, f"{skip}={level}, client is {kind.value}")
    return _Rule(True, switch) if on else None


def _row_rule(table: str, row: Row | None) -> _Rule:
    if row is None:
        return _Rule(False, f"no row in {table}")
    if row.exempt:
        return _Rule(False, f"exempt by !{readable(row.key)} in {table}")
    options = f" with {readable(row.options)}" if row.options else ""
    return _Rule(True, f"{readable(row.key)} in {table}{options}")


class _Preferences:
    """The owners of preferences met so far, each with the address that spamd is asked for. No more than ``limit``."""

    def __init__(self, owners: Owners | None, limit: int) -> None:
        self.limit = limit
        self.addresses: dict[bytes, bytes] = {b"": b""}
        self.left_out = 0
        self._owners = owners

    def __bool__(self) -> bool:
        """True if any recipient can have preferences."""
        return self._owners is not None

    def owner(self, recipient: bytes) -> bytes | None:
        """The owner of the recipient's preferences; None where the limit is reached."""
        if self._owners is None:
            return b""
        owner, address = self._owners(recipient)
        if owner not in self.addresses:
            if len(self.addresses) > self.limit:
                self.left_out += 1
                return None
            self.addresses[owner] = address
        return owner


def _preferences(settings: Settings, owners: Owners | None) -> _Preferences:
    if settings.spamd.user == "recipient":
        owners = _each_recipient
    return _Preferences(None if settings.spamd.user == "none" else owners, settings.spamd.max_users)


def _each_recipient(recipient: bytes) -> tuple[bytes, bytes]:
    address = recipient.lower()
    return address, address


def _no_rows(_: bytes) -> tuple[None, None]:
    return None, None


def _group(
    recipients: tuple[bytes, ...], rules: _GeneralRules, lookup: Lookup, preferences: _Preferences
) -> dict[RecipientPolicy, list[int]]:
    """Groups of recipients with equal policies. One look-up each, none where no table can matter."""
    virus, spam = rules.virus, rules.spam
    if virus is not None and spam is not None:
        if not (spam.wanted and preferences):
            return {_policy((None, None), rules, b"", 0): list(range(len(recipients)))}
        lookup = _no_rows
    groups: dict[RecipientPolicy, list[int]] = {}
    members_of: dict[tuple[Row | None, Row | None, bytes | None], list[int]] = {}
    own = bool(preferences)
    for index, recipient in enumerate(recipients):
        rows = lookup(recipient)
        wanted = own and (rows[1] is not None and not rows[1].exempt if spam is None else spam.wanted)
        key = (*rows, preferences.owner(recipient) if wanted else b"")
        members = members_of.get(key)
        if members is None:
            policy = _policy(rows, rules, key[2], preferences.limit)
            members = members_of[key] = groups.setdefault(policy, [])
        members.append(index)
    return groups


def _policy(
    rows: tuple[Row | None, Row | None], rules: _GeneralRules, owner: bytes | None, max_users: int
) -> RecipientPolicy:
    """``owner`` is None where the recipient's preferences are ignored for the sake of ``max_users``."""
    virus = rules.virus or _row_rule("clamavclients", rows[0])
    spam = rules.spam or _row_rule("spamdclients", rows[1])
    ignored = f", own preferences left out: [spamd] max_users={max_users}" if owner is None else ""
    options = read_options(
        rows[0].options if rows[0] is not None and rules.virus is None else b"",
        rows[1].options if rows[1] is not None and rules.spam is None else b"",
    )
    return RecipientPolicy(virus.wanted, spam.wanted, virus.text, spam.text + ignored, options, owner or b"")


def disabled(settings: Settings, switches: Switches) -> tuple[tuple[Scanner, str], ...]:
    """Each scanner in their order with the setting that switches it off; empty where it is on."""
    return (
        (Scanner.SIGNATURES, "" if switches.chksignature else "chksignature=0"),
        (Scanner.LOADERTYPES, "" if switches.chkloadertype else "chkloadertype=0"),
        (Scanner.CLAMD, "" if settings.clamd.backends else "[clamd] backends is empty"),
        (Scanner.SPAMD, "" if settings.spamd.backends else "[spamd] backends is empty"),
    )


def make_plan(
    envelope: Envelope,
    size: int,
    origin: Origin,
    settings: Settings,
    switches: Switches,
    lookup: Lookup | None,
    owners: Owners | None = None,
) -> ScanPlan:
    """The plan for a message of ``size`` bytes, before any scanner runs.

    Without ``lookup`` the tables are not loaded yet: messages that need them are deferred, except bounces.
    ``owners`` finds the preferences of a recipient; None: no recipient has any.
    """
    recipients = envelope.recipients
    limit = _exceeded_limit(envelope, size, origin.kind, switches)
    rules = _general_rules(origin, switches)
    if lookup is None:
        if not limit and origin.kind is not OriginKind.BOUNCE and _needs_tables(rules, settings):
            unknown = RecipientPolicy(False, False, NO_TABLES, NO_TABLES)
            return ScanPlan(((unknown, tuple(range(len(recipients)))),), _no_steps(NO_TABLES), hold=NO_TABLES)
        lookup = _no_rows
    preferences = _preferences(settings, owners)
    found = _group(recipients, rules, lookup, preferences)
    groups = tuple([(policy, tuple(members)) for policy, members in found.items()])
    if limit:
        return ScanPlan(groups, _no_steps(limit), limit=limit)

    virus = _wanted_by([(policy.virus, policy.virus_rule) for policy in found])
    spam = _wanted_by([(policy.spam, policy.spam_rule) for policy in found])
    if spam.wanted and (why := _unfit_for_spam_check(size, settings, switches)):
        spam = _Rule(False, why)
    steps = tuple(
        [
            _step(scanner, spam if scanner.check is Check.SPAM else virus, off)
            for scanner, off in disabled(settings, switches)
        ]
    )
    asked_for = dict.fromkeys([policy.owner for policy in found if policy.spam])
    users = tuple([(owner, preferences.addresses[owner]) for owner in asked_for])
    return ScanPlan(groups, steps, users, preferences.left_out, _want(found, settings, size * len(users)))


def unscanned_plan(envelope: Envelope, kind: OriginKind, switches: Switches, reason: str) -> ScanPlan:
    """The plan for a message that no scanner may read: all recipients have both checks, and none is made."""
    everybody = RecipientPolicy(True, True, reason, reason), tuple(range(len(envelope.recipients)))
    return ScanPlan((everybody,), _no_steps(reason), limit=_exceeded_limit(envelope, 0, kind, switches))


def recipient_limit(kind: OriginKind, switches: Switches) -> int:
    """The number of recipients that a message from such a client may have."""
    configured = switches.maxrecipients if kind in _SMTP else 0
    return min(configured or RECIPIENTS_MAX, RECIPIENTS_MAX)


def _exceeded_limit(envelope: Envelope, size: int, kind: OriginKind, switches: Switches) -> str:
    if kind in _SMTP and 0 < switches.databytes < size:
        return f"databytes={switches.databytes}"
    limit = recipient_limit(kind, switches)
    return f"maxrecipients={limit}" if envelope.count > limit or envelope.surplus else ""


def _no_steps(reason: str) -> tuple[PlanStep, ...]:
    return tuple([PlanStep(scanner, False, reason) for scanner in Scanner])


def _wanted_by(rules: list[tuple[bool, str]]) -> _Rule:
    """A check of the message: the first rule by which a recipient has it, else why none has."""
    rule = next((text for wanted, text in rules if wanted), "")
    if rule:
        return _Rule(True, rule)
    return _Rule(False, "no recipient has this check" if len(rules) != 1 else rules[0][1])


def _unfit_for_spam_check(size: int, settings: Settings, switches: Switches) -> str:
    limit = switches.samsgsize or settings.spamd.max_size
    if size > limit:
        return f"size {size} > {'samsgsize' if switches.samsgsize else '[spamd] max_size'}={limit}"
    return "" if size else "empty message"


def _step(scanner: Scanner, rule: _Rule, off: str) -> PlanStep:
    if not rule.wanted:
        return PlanStep(scanner, False, rule.text)
    return PlanStep(scanner, False, off) if off else PlanStep(scanner, True, rule.text)


def _needs_tables(rules: _GeneralRules, settings: Settings) -> bool:
    """True if the missing tables would matter: they decide who is checked, or whose preferences are in force."""
    if rules.virus is None or rules.spam is None:
        return True
    db = settings.mariadb
    listed = settings.tables.source == "mariadb" and (db.prefs_table or db.prefs_query)
    return bool(listed and settings.spamd.user == "table" and rules.spam.wanted)


def _want(policies: Iterable[RecipientPolicy], settings: Settings, rewritten: int) -> Want:
    """The least that is enough: SpamAssassin's headers only where some recipient may get spam, marked or moved.

    ``rewritten``: bytes of all messages that spamd would return.
    """
    actions = {policy.options.spam or settings.spamd.action for policy in policies if policy.spam}
    if actions.isdisjoint(("mark", "move")):
        return Want.CHECK
    return Want.PROCESS if settings.spamd.rewrite == "full" and rewritten <= FULL_REWRITES else Want.HEADERS
