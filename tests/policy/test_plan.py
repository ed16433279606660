"""Who is checked: H-Sphere's switches, the tables and the origin (domain-spec 2.2, 2.3)."""

import itertools

import pytest

from contentfilter.model import STAGES, Action, Check, Envelope, Origin, OriginKind, Scanner, Want
from contentfilter.policy.decide import decide
from contentfilter.policy.plan import FULL_REWRITES, Row, Switches, disabled, make_plan
from contentfilter.settings import MariaDbSettings, Settings, SpamdSettings, TableSettings

ROW = Row(b"@protected.example", exempt=False)
EXEMPT = Row(b"boss@protected.example", exempt=True)


def lookup(recipient):
    if recipient.startswith(b"boss@"):
        return EXEMPT, EXEMPT
    if recipient.endswith(b"@protected.example"):
        return ROW, ROW
    return None, None


def plan_for(kind=OriginKind.STRANGER, to=(b"a@protected.example",), size=1000, settings=None, **switches):
    origin = Origin(kind, uid=1)
    return make_plan(Envelope(b"s@x", to), size, origin, settings or Settings(), Switches(**switches), lookup)


def wants(plan):
    return [(t.virus, t.spam) for t, _ in plan.groups]


AUTH, RELAY = OriginKind.AUTHENTICATED, OriginKind.RELAY


def test_the_stages_are_the_scanners_in_their_order_and_so_are_the_steps():
    assert tuple(scanner for stage in STAGES for scanner in stage) == tuple(Scanner)
    assert [step.scanner for step in plan_for().steps] == list(Scanner)
    assert [scanner for scanner, _ in disabled(Settings(), Switches())] == list(Scanner)


def test_a_scanner_runs_for_the_recipients_of_its_check(monkeypatch):
    monkeypatch.setattr(Scanner.LOADERTYPES, "check", Check.SPAM)
    spam_only = plan_for(skipcachk=1, kind=AUTH, chksignature=True, chkloadertype=True)
    assert [step.scanner for step in spam_only.steps if step.run] == [Scanner.LOADERTYPES, Scanner.SPAMD]


@pytest.mark.parametrize(
    ("level", "kind"), list(itertools.product((0, 1, 2), OriginKind)), ids=lambda v: getattr(v, "value", str(v))
)
def test_skip_levels_are_hspheres(level, kind):
    skipped = {0: set(), 1: {AUTH}, 2: {AUTH, RELAY}}[level]
    assert wants(plan_for(kind, skipcachk=level)) == [(kind not in skipped, True)]
    assert wants(plan_for(kind, skipsachk=level)) == [(True, kind not in skipped)]


def test_no_row_means_no_check():
    plan = plan_for(to=(b"u@elsewhere.example",))
    assert wants(plan) == [(False, False)]
    assert [step.run for step in plan.steps] == [False] * 4
    assert "no row in clamavclients" in plan.steps[0].reason


def test_exempting_row_means_no_check_and_names_itself():
    plan = plan_for(to=(b"boss@protected.example",))
    assert wants(plan) == [(False, False)]
    assert "!boss@protected.example" in plan.groups[0][0].virus_rule


@pytest.mark.parametrize("to", [b"u@elsewhere.example", b"boss@protected.example"])
def test_global_switches_check_everybody_whatever_the_tables_say(to):
    assert wants(plan_for(to=(to,), clamglobal=True)) == [(True, False)]
    assert wants(plan_for(to=(to,), spamglobal=True)) == [(False, True)]
    assert wants(plan_for(to=(to,), clamglobal=True, spamglobal=True)) == [(True, True)]


def test_skip_beats_global():
    assert wants(plan_for(AUTH, clamglobal=True, spamglobal=True, skipcachk=1, skipsachk=2)) == [(False, False)]


def test_tables_are_not_asked_where_they_cannot_matter():
    def fail(recipient):
        raise AssertionError(recipient)

    switches = Switches(clamglobal=True, spamglobal=True)
    envelope = Envelope(b"", (b"a@x", b"b@x"))
    plan = make_plan(envelope, 1, Origin(OriginKind.LOCAL, 1), Settings(), switches, fail)
    assert plan.groups[0][1] == (0, 1)


def test_equal_recipients_are_one_group_with_their_indices():
    to = (b"a@protected.example", b"u@elsewhere.example", b"b@protected.example", b"boss@protected.example")
    groups = {t.virus_rule: members for t, members in plan_for(to=to).groups}
    assert sorted(groups.values()) == [(0, 2), (1,), (3,)]


@pytest.mark.parametrize(("size", "asked"), [(999, True), (1000, True), (1001, False)])
def test_samsgsize_skips_only_what_is_larger(size, asked):
    plan = plan_for(size=size, samsgsize=1000)
    assert plan.runs(Scanner.SPAMD) is asked
    assert plan.runs(Scanner.CLAMD)
    if not asked:
        assert "samsgsize=1000" in plan.steps[3].reason


def test_without_samsgsize_the_safety_cap_holds():
    settings = Settings(spamd=SpamdSettings(max_size=500))
    assert not plan_for(size=501, settings=settings).runs(Scanner.SPAMD)
    assert plan_for(size=501, settings=settings, samsgsize=600).runs(Scanner.SPAMD)


def test_an_empty_message_never_goes_to_spamd():
    plan = plan_for(size=0)
    assert not plan.runs(Scanner.SPAMD)
    assert plan.steps[3].reason == "empty message"


@pytest.mark.parametrize(("chksignature", "chkloadertype"), list(itertools.product((False, True), repeat=2)))
def test_signature_scanners_need_their_switch_and_a_virus_check(chksignature, chkloadertype):
    plan = plan_for(chksignature=chksignature, chkloadertype=chkloadertype)
    assert (plan.runs(Scanner.SIGNATURES), plan.runs(Scanner.LOADERTYPES)) == (chksignature, chkloadertype)
    nobody = plan_for(to=(b"u@elsewhere.example",), chksignature=True, chkloadertype=True)
    assert not nobody.runs(Scanner.SIGNATURES)
    assert not nobody.runs(Scanner.LOADERTYPES)


@pytest.mark.parametrize("kind", OriginKind, ids=lambda k: k.value)
def test_size_and_recipient_limits_hold_for_smtp_only(kind):
    smtp = kind in (OriginKind.STRANGER, RELAY, AUTH)
    assert bool(plan_for(kind, size=11, databytes=10).limit) is smtp
    assert bool(plan_for(kind, to=(b"a@x", b"b@x"), maxrecipients=1).limit) is smtp
    assert plan_for(kind, size=10, databytes=10).limit == ""


def owners(recipient):
    """Anna and Ben have preferences of their own, the others of the domain share its."""
    address = recipient.lower()
    if address.startswith((b"anna@", b"ben@")):
        return address, address
    return (b"@protected.example", address) if address.endswith(b"@protected.example") else (b"", b"")


def asked(*to, owners=owners, switches=None, size=1000, **keys):
    names = tuple(name if b"@" in name else name + b"@protected.example" for name in to)
    config = Settings(spamd=SpamdSettings(**keys))
    origin = Origin(OriginKind.STRANGER, uid=1)
    return make_plan(Envelope(b"s@x", names), size, origin, config, switches or Switches(), lookup, owners)


def test_spamd_is_asked_once_for_each_owner_of_preferences():
    plan = asked(b"Anna", b"carl", b"ANNA", b"dora", b"boss", b"u@elsewhere.example")
    assert plan.users == (
        (b"anna@protected.example", b"anna@protected.example"),
        (b"@protected.example", b"carl@protected.example"),  # one mailbox stands for all that the domain speaks for
    )
    members = {t.owner: indices for t, indices in plan.groups if t.spam}
    assert members == {b"anna@protected.example": (0, 2), b"@protected.example": (1, 3)}


def test_those_without_preferences_share_one_question_without_a_user():
    plan = asked(b"anna", b"a@elsewhere.example", b"b@elsewhere.example", switches=Switches(spamglobal=True))
    assert plan.users == ((b"anna@protected.example",) * 2, (b"", b""))
    assert asked(b"anna", b"ben", owners=None).users == ((b"", b""),)


@pytest.mark.parametrize("switches", [Switches(spamglobal=True), Switches(clamglobal=True, spamglobal=True)])
def test_a_global_switch_leaves_everybody_their_preferences(switches):
    assert asked(b"anna", switches=switches).users == ((b"anna@protected.example",) * 2,)


def test_preferences_of_those_who_want_no_spam_check_cost_nothing():
    assert asked(b"boss", b"anna@elsewhere.example").users == ()
    assert [t.owner for t, _ in asked(b"boss", b"anna@elsewhere.example").groups] == [b"", b""]


def test_the_setting_says_whose_preferences_count():
    assert asked(b"anna", b"ben", user="none").users == ((b"", b""),)
    everybody = asked(b"Anna", b"carl", b"dora", owners=None, user="recipient")
    names = [name + b"@protected.example" for name in (b"anna", b"carl", b"dora")]
    assert everybody.users == tuple((name, name) for name in names)


def test_owners_beyond_the_limit_are_treated_like_those_without_and_counted():
    plan = asked(b"anna", b"ben", b"carl", b"dora", b"anna", max_users=1)
    assert plan.users == ((b"anna@protected.example",) * 2, (b"", b""))
    assert plan.owners_ignored == 3
    members = {t.owner: indices for t, indices in plan.groups}
    assert members == {b"anna@protected.example": (0, 4), b"": (1, 2, 3)}
    (rule,) = [t.spam_rule for t, _ in plan.groups if not t.owner]
    assert rule.endswith("own preferences not used: [spamd] max_users=1")
    assert asked(b"anna", b"ben", max_users=2).owners_ignored == 0


def test_a_full_rewrite_for_many_owners_is_bounded():
    sizes = {"rewrite": "full", "size": FULL_REWRITES // 2}
    assert asked(b"anna", b"ben", **sizes).want is Want.PROCESS
    assert asked(b"anna", b"ben", b"carl", **sizes).want is Want.HEADERS


def test_without_tables_nobody_guesses_who_has_preferences():
    def plan(**sections):
        config = Settings(
            **{"tables": TableSettings(source="mariadb"), "mariadb": MariaDbSettings(prefs_table="userpref")} | sections
        )
        switches = Switches(clamglobal=True, spamglobal=True)
        return make_plan(Envelope(b"", (b"a@x",)), 9, Origin(OriginKind.STRANGER, 1), config, switches, None)

    assert plan().hold
    assert not plan(mariadb=MariaDbSettings()).hold
    assert not plan(spamd=SpamdSettings(user="none")).hold


@pytest.mark.parametrize(
    ("action", "rewrite", "want"),
    [
        ("mark", "headers", Want.HEADERS),
        ("mark", "full", Want.PROCESS),
        ("reject", "headers", Want.CHECK),
        ("remove", "full", Want.CHECK),
    ],
)
def test_spamd_is_asked_for_no_more_than_is_used(action, rewrite, want):
    assert plan_for(settings=Settings(spamd=SpamdSettings(action=action, rewrite=rewrite))).want is want


def test_no_recipients_is_a_legal_plan():
    plan = plan_for(to=())
    assert plan.groups == ()
    assert not any(step.run for step in plan.steps)


def options_of(switches=None, origin=OriginKind.STRANGER, settings=None):
    rows = Row(b"@x", False, b"virus=remove"), Row(b"@x", False, b"spam=reject score=4")
    envelope = Envelope(b"s@x", (b"a@x",))
    plan = make_plan(
        envelope, 100, Origin(origin, 1), settings or Settings(), switches or Switches(), lambda recipient: rows
    )
    return plan, plan.groups[0][0].options


def test_a_rows_options_are_its_recipients_and_stand_in_the_rule():
    plan, options = options_of()
    assert (options.virus, options.spam, options.score, options.reject_score) == ("remove", "reject", 4.0, None)
    assert plan.groups[0][0].spam_rule == "@x in spamdclients with spam=reject score=4"


def test_who_is_checked_by_a_global_switch_gets_the_configurations_actions():
    _, options = options_of(Switches(clamglobal=True))
    assert (options.virus, options.spam) == ("", "reject")


@pytest.mark.parametrize(
    ("action", "default", "want"),
    [
        (b"", "mark", Want.HEADERS),
        (b"", "reject", Want.CHECK),
        (b"spam=mark", "reject", Want.HEADERS),
        (b"spam=move:j@x", "reject", Want.HEADERS),
        (b"spam=remove", "mark", Want.CHECK),
    ],
)
def test_headers_are_wanted_only_where_a_row_lets_spam_through(action, default, want):
    def row(recipient):
        return None, Row(b"@x", False, action)

    config = Settings(spamd=SpamdSettings(action=default))
    envelope = Envelope(b"s@x", (b"a@x",))
    assert make_plan(envelope, 100, Origin(OriginKind.LOCAL, 1), config, Switches(), row).want is want


@pytest.mark.parametrize("kind", OriginKind, ids=lambda kind: kind.value)
def test_without_tables_everything_that_needs_them_is_held_but_bounces(kind):
    def plan(**switches):
        return make_plan(Envelope(b"", (b"a@x",)), 100, Origin(kind, 1), Settings(), Switches(**switches), None)

    held = plan()
    decision = decide(held, (), kind, 1, Settings())
    assert decision.action is (Action.QUEUE if kind is OriginKind.BOUNCE else Action.DEFER)
    freed = decide(held.released_by("x"), (), kind, 1, Settings())
    assert (freed.action, freed.deliveries[0].recipients) == (Action.QUEUE, (0,))
    assert bool(held.hold) is (kind is not OriginKind.BOUNCE)
    assert bool(plan(clamglobal=True).hold) is (kind is not OriginKind.BOUNCE)
    everybody = plan(clamglobal=True, spamglobal=True)
    assert not everybody.hold
    assert everybody.runs(Scanner.CLAMD)
    skipped = plan(skipcachk=2, skipsachk=2)
    assert bool(skipped.hold) is (kind not in (OriginKind.BOUNCE, AUTH, RELAY))
