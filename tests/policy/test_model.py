"""Tables, recipients and outcomes at random: the decision is the one of a plain model of the rules (design 6)."""

import tempfile
from pathlib import Path

from hypothesis import event, given, settings
from hypothesis import strategies as st

from contentfilter.errors import Cause
from contentfilter.model import Action, Envelope, Origin, OriginKind, Scanner, ScanOutcome, ScanStatus
from contentfilter.policy.decide import decide, open_checks
from contentfilter.policy.failure import failure_action
from contentfilter.policy.plan import Switches, make_plan
from contentfilter.settings import (
    ClamdSettings,
    FailureSettings,
    Settings,
    SignatureSettings,
    SpamdSettings,
    TableSettings,
)
from contentfilter.tables.rows import Rows, parse_table
from contentfilter.tables.snapshot import Snapshot, compile_snapshot

KEYS = ["a@x.example", "b@x.example", "@x.example", "@sub.x.example", ".x.example", ".example", "*"]
RECIPIENTS = ["a@x.example", "B@X.example", "c@x.example", "a@sub.x.example", "a@y.example", "lone"]
VIRUS = ["", "virus=mark", "virus=remove", "virus=reject", "virus=move:jail@x.example"]
SPAM = [
    "", "spam=mark", "spam=remove", "spam=reject", "spam=move:jail@x.example", "score=2",
    "score=permissive spam=reject", "reject_score=9", "reject_score=0", "spam=remove score=aggressive reject_score=12",
]  # fmt: skip
OWNERS = ["a@x.example", "b@x.example", "@x.example", "@sub.x.example", "a@y.example"]
LEVELS = {"permissive": 14.0, "aggressive": 4.0}


def table(options):
    return st.dictionaries(st.sampled_from(KEYS), st.one_of(st.just("!"), st.sampled_from(options)), max_size=6)


@st.composite
def outcomes(draw):
    """What each scanner would say if it were asked."""
    said = {}
    for scanner in Scanner:
        status = draw(st.sampled_from([ScanStatus.CLEAN, ScanStatus.CLEAN, ScanStatus.FOUND, ScanStatus.UNCHECKED]))
        if status is ScanStatus.UNCHECKED:
            said[scanner] = ScanOutcome(scanner, status, cause=draw(st.sampled_from([Cause.DOWN, Cause.TOO_BIG])))
        elif scanner is not Scanner.SPAMD:
            said[scanner] = ScanOutcome(scanner, status, "Name")
        said |= {owner: draw(answers(owner)) for owner in ["", *OWNERS]}
    return said


@st.composite
def answers(draw, owner):
    """What spamd would say by somebody's preferences; headers where a message may be marked."""
    name = owner.encode()
    if draw(st.integers(0, 9)) == 0:
        cause = draw(st.sampled_from([Cause.DOWN, Cause.TOO_BIG]))
        return ScanOutcome(Scanner.SPAMD, ScanStatus.UNCHECKED, cause=cause, owner=name)
    score = draw(st.sampled_from([0.0, 2.0, 3.9, 4.0, 5.0, 9.0, 12.0, 14.0, 20.0]))
    threshold = draw(st.sampled_from([5.0, 5.0, 2.0, 10.0]))
    status = ScanStatus.FOUND if score >= threshold else ScanStatus.CLEAN
    headers = b"X-Spam-Score: %.1f/%.1f\n\n" % (score, threshold)
    return ScanOutcome(Scanner.SPAMD, status, score=score, threshold=threshold, owner=name, rewritten=headers)


ACTIONS = st.sampled_from(["mark", "remove", "reject"])
FAULTS = st.sampled_from(["defer", "pass"])
SETTINGS = st.builds(
    lambda *choice: Settings(
        tables=TableSettings(recipients=choice[0]),
        clamd=ClamdSettings(action=choice[1]),
        signatures=SignatureSettings(action=choice[2]),
        spamd=SpamdSettings(action=choice[3], reject_score=choice[4], user=choice[8], max_users=choice[9]),
        failure=FailureSettings(clamd=choice[5], spamd=choice[6], signatures=choice[7], too_big="pass"),
    ),
    st.sampled_from(["split", "strictest"]), ACTIONS, ACTIONS, ACTIONS, st.sampled_from([0.0, 10.0]),
    FAULTS, FAULTS, FAULTS, st.sampled_from(["table", "table", "none"]), st.sampled_from([1, 2, 16]),
)  # fmt: skip
SWITCHES = st.builds(
    Switches,
    clamglobal=st.booleans(),
    spamglobal=st.booleans(),
    chksignature=st.just(True),
    chkloadertype=st.just(True),
)


# The model: one recipient after the other, in the words of the documentation.


def row_for(rows, recipient):
    """The most specific row."""
    address = recipient.lower()
    domain = address.partition("@")[2]
    if domain:
        labels = domain.split(".")
        parents = ["." + ".".join(labels[n:]) for n in range(1, len(labels))]
        for key in (address, "@" + domain, *parents):
            if key in rows:
                return rows[key]
    return rows.get("*")


def wish(rows, everybody, recipient):
    """Whether the recipient is checked, and the options."""
    if everybody:
        return True, {}
    row = row_for(rows, recipient)
    if row is None or row == "!":
        return False, {}
    return True, dict(word.split("=") for word in row.split())


def fate_of(scanner, said, options, config, origin):
    """deliver, mark, move, remove, reject or defer, by one scanner's word alone."""
    if said.status is ScanStatus.UNCHECKED:
        return "defer" if failure_action(scanner, said.cause, origin, config) == "defer" else "deliver"
    if scanner is not Scanner.SPAMD:
        default = config.clamd.action if scanner is Scanner.CLAMD else config.signatures.action
        return options.get("virus", default) if said.status is ScanStatus.FOUND else "deliver"
    limit = float(options.get("reject_score", config.spamd.reject_score))
    if limit and said.score >= limit:
        return "reject"
    score = options.get("score")
    if said.score >= (said.threshold if score is None else LEVELS[score] if score in LEVELS else float(score)):
        return options.get("spam", config.spamd.action)
    return "deliver"


ORDER = ["deliver", "mark", "move", "remove", "reject", "defer"]


def owner_for(owners, recipient):
    """Whose preferences are the recipient's."""
    address = recipient.lower()
    domain = "@" + address.partition("@")[2]
    return address if address in owners else domain if domain in owners else ""


def model(clamav, spamd, owners, switches, recipients, said, config, origin):
    """The fate of each recipient and whose preferences hold, or the one word for the whole message."""
    people, known = [], []
    for recipient in recipients:
        virus, virus_options = wish(clamav, switches.clamglobal, recipient)
        spam, spam_options = wish(spamd, switches.spamglobal, recipient)
        owner = owner_for(owners, recipient) if spam and config.spamd.user == "table" else ""
        if owner and owner not in known:
            if len(known) == config.spamd.max_users:
                owner = ""
            else:
                known.append(owner)
        people.append([virus, spam, virus_options | spam_options, "deliver", owner])
    for scanner in Scanner:
        for person in people:
            virus, spam, options, fate, owner = person
            wanted = spam if scanner is Scanner.SPAMD else virus
            if not wanted or fate in ("remove", "reject"):
                continue
            word = said[owner] if scanner is Scanner.SPAMD else said[scanner]
            new = fate_of(scanner, word, options, config, origin)
            rank = ORDER.index(new.partition(":")[0])
            if rank > ORDER.index(fate.partition(":")[0]):
                person[3] = new
        fates = [person[3] for person in people]
        if config.tables.recipients == "strictest" and "reject" in fates:  # whatever a fault hides from the others
            return "drop" if origin is OriginKind.BOUNCE else "reject"
        if "defer" in fates:
            return "defer"
    if set(fates) == {"reject"}:
        return "drop" if origin is OriginKind.BOUNCE else "reject"
    return [(fate, owner if spam else None) for _, spam, _, fate, owner in people]


@settings(max_examples=400, deadline=None)
@given(
    clamav=table(VIRUS),
    spamd=table(SPAM),
    owners=st.sets(st.sampled_from(OWNERS)),
    switches=SWITCHES,
    recipients=st.lists(st.sampled_from(RECIPIENTS), min_size=1, max_size=6),
    said=outcomes(),
    config=SETTINGS,
    origin=st.sampled_from(list(OriginKind)),
)
def test_every_recipient_gets_what_the_rules_say(clamav, spamd, owners, switches, recipients, said, config, origin):
    snapshot = compiled(clamav, spamd, owners)
    envelope = Envelope(b"s@x.example", tuple(r.encode() for r in recipients))
    plan = make_plan(envelope, 100, Origin(origin, 1), config, switches, snapshot.lookup, snapshot.owners)
    heard = ()
    for scanner in Scanner:
        asked = open_checks(plan, heard, origin, config)[scanner.check] if plan.runs(scanner) else ()
        if asked:
            assert asked <= {owner for owner, _ in plan.users} or scanner is not Scanner.SPAMD
            heard += tuple(said[owner.decode()] for owner in asked) if scanner is Scanner.SPAMD else (said[scanner],)
    decision = decide(plan, heard, origin, len(recipients), config)

    expected = model(clamav, spamd, owners, switches, recipients, said, config, origin)
    event(expected if isinstance(expected, str) else "each their own")
    if expected in ("defer", "reject"):
        assert decision.action.value == expected
        return
    if expected == "drop":
        assert decision.action is Action.DROP
        assert decision.withheld == tuple(range(len(recipients)))
        return
    assert decision.action in (Action.QUEUE, Action.DROP)
    got = dict.fromkeys(decision.withheld, "kept")
    for delivery in decision.deliveries:
        for index in delivery.recipients:
            assert index not in got, "twice"
            marked = delivery.match.action.value if delivery.match else "deliver"
            got[index] = f"move:{delivery.moved_to.decode()}" if delivery.moved_to else marked
            owner = expected[index][1]
            if owner is not None and delivery.spam is not ScanStatus.SKIPPED:  # nobody reads another one's headers
                shown = next(o for o in heard if o.scanner is Scanner.SPAMD and o.owner == delivery.owner)
                assert shown.rewritten == said[owner].rewritten
    wanted = {index: "kept" if fate in ("remove", "reject") else fate for index, (fate, _) in enumerate(expected)}
    assert got == wanted
    headers = {o.owner: o.rewritten for o in heard if o.scanner is Scanner.SPAMD}
    forms = [
        (d.virus, d.spam, d.match and d.match.action, d.moved_to, d.spam is not ScanStatus.SKIPPED and headers[d.owner])
        for d in decision.deliveries
    ]
    assert len(set(forms)) == len(forms), "equal ones travel apart"
    assert (decision.action is Action.DROP) is (set(wanted.values()) == {"kept"})


def compiled(clamav, spamd, owners):
    """Through the text form and the snapshot, as in life."""
    parsed = []
    for rows in (clamav, spamd):
        text = "".join(f"!{key}\n" if value == "!" else f"{key} {value}\n" for key, value in rows.items())
        found, problems = parse_table(text.encode(), "table")
        assert problems == ()
        parsed.append(found)
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "snapshot")
        compile_snapshot(Rows(*parsed, prefs=sorted(owner.encode() for owner in owners)), path)
        return Snapshot.open(path)
