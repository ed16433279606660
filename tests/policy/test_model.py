"""Tables, recipients and outcomes at random: the decision is the one of a plain model of the rules (design 6)."""

import tempfile
from pathlib import Path

from hypothesis import event, given, settings
from hypothesis import strategies as st

from contentfilter.config.settings import Clamd, Failure, Settings, Signatures, Spamd, Tables
from contentfilter.errors import Cause
from contentfilter.model import Envelope, Origin, OriginKind, Scanner, ScanOutcome, ScanStatus
from contentfilter.policy.decide import Action, decide, needed
from contentfilter.policy.failure import on_fault
from contentfilter.policy.plan import Switches, make_plan
from contentfilter.tables.rows import Rows, parse_table
from contentfilter.tables.snapshot import Snapshot, compile_snapshot

KEYS = ["a@x.example", "b@x.example", "@x.example", "@sub.x.example", ".x.example", ".example", "*"]
RECIPIENTS = ["a@x.example", "B@X.example", "c@x.example", "a@sub.x.example", "a@y.example", "lone"]
VIRUS = ["", "virus=mark", "virus=remove", "virus=reject", "virus=move:jail@x.example"]
SPAM = [
    "", "spam=mark", "spam=remove", "spam=reject", "spam=move:jail@x.example", "score=2",
    "score=permissive spam=reject", "reject_score=9", "reject_score=0", "spam=remove score=aggressive reject_score=12",
]  # fmt: skip
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
        elif scanner is Scanner.SPAMD:
            score = draw(st.sampled_from([0.0, 2.0, 3.9, 4.0, 5.0, 9.0, 12.0, 14.0, 20.0]))
            status = ScanStatus.FOUND if score >= 5 else ScanStatus.CLEAN
            said[scanner] = ScanOutcome(scanner, status, score=score, threshold=5.0)
        else:
            said[scanner] = ScanOutcome(scanner, status, "Name")
    return said


ACTIONS = st.sampled_from(["mark", "remove", "reject"])
FAULTS = st.sampled_from(["defer", "pass"])
SETTINGS = st.builds(
    lambda *choice: Settings(
        tables=Tables(recipients=choice[0]),
        clamd=Clamd(action=choice[1]),
        signatures=Signatures(action=choice[2]),
        spamd=Spamd(action=choice[3], reject_score=choice[4]),
        failure=Failure(clamd=choice[5], spamd=choice[6], signatures=choice[7], too_big="pass"),
    ),
    st.sampled_from(["split", "strictest"]), ACTIONS, ACTIONS, ACTIONS, st.sampled_from([0.0, 10.0]),
    FAULTS, FAULTS, FAULTS,
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
        return "defer" if on_fault(scanner, said.cause, origin, config) == "defer" else "deliver"
    if scanner is not Scanner.SPAMD:
        default = config.clamd.action if scanner is Scanner.CLAMD else config.signatures.action
        return options.get("virus", default) if said.status is ScanStatus.FOUND else "deliver"
    limit = float(options.get("reject_score", config.spamd.reject_score))
    if limit and said.score >= limit:
        return "reject"
    score = options.get("score", "5")  # 5 is what spamd itself compares with here
    if said.score >= (LEVELS[score] if score in LEVELS else float(score)):
        return options.get("spam", config.spamd.action)
    return "deliver"


ORDER = ["deliver", "mark", "move", "remove", "reject", "defer"]


def model(clamav, spamd, switches, recipients, said, config, origin):
    """The fate of each recipient, or the one word for the whole message."""
    people = []
    for recipient in recipients:
        virus, virus_options = wish(clamav, switches.clamglobal, recipient)
        spam, spam_options = wish(spamd, switches.spamglobal, recipient)
        people.append([virus, spam, virus_options | spam_options, "deliver"])
    for scanner in Scanner:
        for person in people:
            virus, spam, options, fate = person
            wanted = spam if scanner is Scanner.SPAMD else virus
            if not wanted or fate in ("remove", "reject"):
                continue
            new = fate_of(scanner, said[scanner], options, config, origin)
            rank = ORDER.index(new.partition(":")[0])
            if rank > ORDER.index(fate.partition(":")[0]):
                person[3] = new
        fates = [person[3] for person in people]
        if "defer" in fates:
            return "defer"
        if config.tables.recipients == "strictest" and "reject" in fates:
            return "drop" if origin is OriginKind.BOUNCE else "reject"
    if set(fates) == {"reject"}:
        return "drop" if origin is OriginKind.BOUNCE else "reject"
    return fates


@settings(max_examples=400, deadline=None)
@given(
    clamav=table(VIRUS),
    spamd=table(SPAM),
    switches=SWITCHES,
    recipients=st.lists(st.sampled_from(RECIPIENTS), min_size=1, max_size=6),
    said=outcomes(),
    config=SETTINGS,
    origin=st.sampled_from(list(OriginKind)),
)
def test_every_recipient_gets_what_the_rules_say(clamav, spamd, switches, recipients, said, config, origin):
    lookup = compiled(clamav, spamd)
    envelope = Envelope(b"s@x.example", tuple(r.encode() for r in recipients))
    plan = make_plan(envelope, 100, Origin(origin, 1), config, switches, lookup)
    heard = ()
    for scanner in Scanner:
        if needed(scanner, plan, heard, origin, config):
            heard += (said[scanner],)
    decision = decide(plan, heard, origin, len(recipients), config)

    expected = model(clamav, spamd, switches, recipients, said, config, origin)
    event(expected if isinstance(expected, str) else "each their own")
    if expected in ("defer", "reject"):
        assert decision.action.value == expected
        return
    if expected == "drop":
        assert decision.action is Action.DROP
        assert decision.quarantined == tuple(range(len(recipients)))
        return
    assert decision.action in (Action.QUEUE, Action.DROP)
    got = dict.fromkeys(decision.quarantined, "kept")
    for delivery in decision.deliveries:
        for index in delivery.recipients:
            assert index not in got, "twice"
            marked = delivery.marked.fate.value if delivery.marked else "deliver"
            got[index] = f"move:{delivery.moved_to.decode()}" if delivery.moved_to else marked
    wanted = {index: "kept" if fate in ("remove", "reject") else fate for index, fate in enumerate(expected)}
    assert got == wanted
    assert (decision.action is Action.DROP) is (set(wanted.values()) == {"kept"})


def compiled(clamav, spamd):
    """Through the text form and the snapshot, as in life."""
    parsed = []
    for rows in (clamav, spamd):
        text = "".join(f"!{key}\n" if value == "!" else f"{key} {value}\n" for key, value in rows.items())
        found, problems = parse_table(text.encode(), "table")
        assert problems == ()
        parsed.append(found)
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "snapshot")
        compile_snapshot(Rows(*parsed), path)
        return Snapshot.open(path).lookup
