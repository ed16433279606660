"""SpamAssassin's own preferences: real spamd with the sample's query on a real MariaDB, through hook and daemon."""

import asyncio
import email
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from lab.mariadb import MariaDb
from lab.spamd import Spamd
from lab.system import Delivered, System
from tables.conftest import SQL, prepare

from contentfilter.cli.main import cli
from contentfilter.deadline import Deadline
from contentfilter.doors.message import message_of
from contentfilter.errors import BackendError, Cause
from contentfilter.model import Envelope, Message, Origin, OriginKind, Scanner, ScanOutcome, ScanStatus, Want
from contentfilter.pipeline import Pipeline, Scanners
from contentfilter.policy.admission import Priority
from contentfilter.policy.plan import Row, Switches
from contentfilter.scanners.clamd import ClamdScanner
from contentfilter.scanners.limiter import NEUTRAL
from contentfilter.scanners.spamd import SpamdScanner
from contentfilter.scanners.stream import Owner
from contentfilter.settings import ServiceSettings, Settings
from contentfilter.settings import SpamdSettings as Section
from contentfilter.store.quarantine import Quarantine
from contentfilter.verdict.context import MessageContext

SAMPLE = SQL.parent / "spamassassin" / "sql.cf"
WORDS = ("body CF_WORDS /three points of spam/", "score CF_WORDS 3.0", "describe CF_WORDS a rule of this test")
MESSAGE = (
    b"From: Sender <sender@example.net>\nTo: list@example.org\nSubject: offer\nDate: Mon, 1 Jan 2024 00:00:00 +0000\n"
    b"Message-ID: <1@example.net>\n\nThese are three points of spam for you, nothing else.\n"
)
PREFERENCES = [
    ("@GLOBAL", "required_score", "20"),
    ("strict@x.example", "required_score", "2"),
    ("lenient@x.example", "required_score", "50"),
    ("1friend@x.example", "required_score", "2"),
    ("1friend@x.example", "whitelist_from", "*@example.net"),
    ("@strict.example", "required_score", "1.5"),
    ("kind@strict.example", "required_score", "30"),
]
NOBODY = "(unknown)"  # what spamd's log calls the user of a question without User:
SPAMDCLIENTS = "INSERT INTO spamdclients (address) VALUES ('@x.example'), ('@strict.example'), ('@plain.example')"


def sample(db: MariaDb) -> tuple[str, ...]:
    """etc/spamassassin/sql.cf with the database of this test."""
    text = SAMPLE.read_text()
    for old, new in (("database=spamassassin", "database=mail"), ("/run/mysqld/mysqld.sock", db.socket)):
        assert old in text
        text = text.replace(old, new)
    return tuple(text.splitlines())


@pytest.fixture(scope="module")
def db(lab_directory: Path) -> Iterator[MariaDb]:
    with MariaDb(lab_directory / "prefs-db") as db:
        prepare(db)
        db.run((SQL / "userpref.sql").read_text())
        db.run(SPAMDCLIENTS)
        for row in PREFERENCES:
            db.run("INSERT INTO userpref (username, preference, value) VALUES ('{}', '{}', '{}')".format(*row))
        yield db


@pytest.fixture(scope="module")
def sql_spamd(lab_directory: Path, db: MariaDb) -> Iterator[Spamd]:
    with Spamd(lab_directory / "prefs-spamd", *sample(db), *WORDS, sql=True) as spamd:
        yield spamd


Make = Callable[..., System]


@pytest.fixture
def make(make_system: Make, db: MariaDb, sql_spamd: Spamd, tmp_path: Path) -> Make:
    """A system whose tables and preferences are in the database. ``spamd``: more keys of that section."""
    password = tmp_path / "password"
    password.write_text("change me\n")

    def make(spamd: dict[str, Any] | None = None, **sections: dict[str, Any]) -> System:
        settings = {
            "tables": {"source": "mariadb", "refresh": 600.0},
            "mariadb": {"socket": db.socket, "database": "mail", "password_file": str(password)}
            | {"prefs_table": "userpref"},
            "spamd": spamd or {},
        }
        return make_system(controls={"options": "\n"}, settings=settings | sections, spamd=sql_spamd)

    return make


def asked(spamd: Spamd, work: Callable[[], Delivered]) -> tuple[Delivered, list[str]]:
    """Outcome, and the users whose preferences spamd read meanwhile."""
    before = len(spamd.users())
    done = work()
    return done, sorted(spamd.users()[before:])


def status_of(message: bytes) -> tuple[str, float]:
    """The verdict and the threshold in X-Spam-Status."""
    text = email.message_from_bytes(message)["X-Spam-Status"]
    found = re.match(r"(Yes|No), score=-?[\d.]+ required=([\d.]+)", text)
    assert found, text
    return found[1], float(found[2])


def test_each_recipient_gets_what_its_own_preferences_say(make: Make, sql_spamd: Spamd) -> None:
    to = (b"Strict@X.example", b"lenient@x.example", b"1friend@x.example", b"a@plain.example", b"b@plain.example")
    system = make()
    done, users = asked(sql_spamd, lambda: system.deliver(MESSAGE, *to))
    assert done.status == 0
    assert users == [NOBODY, "1friend@x.example", "lenient@x.example", "strict@x.example"]
    got = {queued.envelope.recipients: status_of(queued.message) for queued in done.queued}
    assert (
        got
        == {
            to[:1]: ("Yes", 2.0),
            to[1:2]: ("No", 50.0),
            to[2:3]: ("No", 2.0),  # on its own list of friends
            to[3:]: ("No", 20.0),  # as everybody
        }
    )
    (record,) = system.daemon.wait_for("mail.done")
    said = {scan.get("owner", ""): (scan["status"], scan["threshold"]) for scan in record["scans"]}
    assert said == {
        "": ("clean", 20.0),
        "strict@x.example": ("found", 2.0),
        "lenient@x.example": ("clean", 50.0),
        "1friend@x.example": ("clean", 2.0),
    }
    assert record["submissions"] == 4


def test_the_action_is_each_recipients_too(make: Make, db: MariaDb) -> None:
    system = make({"action": "reject"})
    refused = system.deliver(MESSAGE, b"strict@x.example")
    assert refused.text.startswith("Dmessage looks like spam")
    assert system.deliver(MESSAGE, b"lenient@x.example").status == 0
    both = system.deliver(MESSAGE, b"strict@x.example", b"lenient@x.example")
    assert (both.status, both.only.envelope.recipients) == (0, (b"lenient@x.example",))
    kept = system.daemon.wait_for("mail.done", where=lambda record: record["quarantined"] == 1)
    assert kept[0]["rule"].startswith("spamd: 3")


def test_a_domains_preferences_are_asked_for_once(make: Make, sql_spamd: Spamd) -> None:
    to = (b"a@strict.example", b"kind@strict.example", b"b@Strict.example")
    system = make()
    done, users = asked(sql_spamd, lambda: system.deliver(MESSAGE, *to))
    assert users == ["a@strict.example", "kind@strict.example"]
    got = {queued.envelope.recipients: status_of(queued.message) for queued in done.queued}
    assert got == {(to[0], to[2]): ("Yes", 1.5), (to[1],): ("No", 30.0)}


def test_a_thousand_recipients_without_preferences_cost_one_question(make: Make, sql_spamd: Spamd) -> None:
    to = [b"user%d@plain.example" % number for number in range(1000)]
    system = make()
    done, users = asked(sql_spamd, lambda: system.deliver(MESSAGE, *to))
    assert users == [NOBODY]
    assert done.only.envelope.recipients == tuple(to)


def test_owners_beyond_the_limit_are_checked_like_those_without_preferences(make: Make, sql_spamd: Spamd) -> None:
    to = (b"lenient@x.example", b"a@plain.example", b"strict@x.example", b"1friend@x.example")
    system = make({"max_users": 1})
    done, users = asked(sql_spamd, lambda: system.deliver(MESSAGE, *to))
    assert users == [NOBODY, "lenient@x.example"]
    got = {queued.envelope.recipients: status_of(queued.message) for queued in done.queued}
    assert got == {to[:1]: ("No", 50.0), to[1:]: ("No", 20.0)}
    (record,) = system.daemon.wait_for("mail.done")
    (shared,) = [scan for scan in record["scans"] if "owner" not in scan]
    assert shared["detail"] == "also for 2 with preferences: [spamd] max_users=1"


@pytest.mark.parametrize(
    ("user", "users"), [("none", [NOBODY]), ("recipient", ["a@plain.example", "strict@x.example"])]
)
def test_the_setting_says_whether_the_table_counts(make: Make, sql_spamd: Spamd, user: str, users: list[str]) -> None:
    system = make({"user": user})
    done, seen = asked(sql_spamd, lambda: system.deliver(MESSAGE, b"strict@x.example", b"a@plain.example"))
    assert (done.status, seen) == (0, users)


def test_who_gets_preferences_is_seen_without_a_restart(make: Make, db: MariaDb, sql_spamd: Spamd) -> None:
    system = make()
    db.run("INSERT INTO userpref (username, preference, value) VALUES ('new@plain.example', 'required_score', '1')")
    try:
        system.daemon.reload()
        system.daemon.wait_for("worker.reload")
        done, users = asked(sql_spamd, lambda: system.deliver(MESSAGE, b"new@plain.example"))
        assert (users, status_of(done.only.message)) == (["new@plain.example"], ("Yes", 1.0))
    finally:
        db.run("DELETE FROM userpref WHERE username = 'new@plain.example'")


@pytest.mark.parametrize("action", ["pass", "defer"])
def test_preferences_that_cannot_be_read_go_by_the_failure_table(make: Make, db: MariaDb, action: str) -> None:
    system = make(failure={"spamd": action})
    db.stop()
    try:
        done = system.deliver(MESSAGE, b"strict@x.example", b"lenient@x.example", b"a@plain.example")
        (record,) = system.daemon.wait_for("mail.done")
        assert {scan["owner"] for scan in record["scans"] if "owner" in scan} == {
            "strict@x.example",
            "lenient@x.example",
        }
        assert {(scan["status"], scan["cause"]) for scan in record["scans"]} == {("unchecked", "down")}
        assert any(scan["detail"].startswith("69 ") for scan in record["scans"])
        if action == "pass":
            assert len(done.only.envelope.recipients) == 3
            assert b"spam=unchecked" in done.only.message
        else:
            assert (done.queued, done.text.startswith("Zspam check not possible now (down)")) == ((), True)
    finally:
        db.start()


def test_all_owners_are_asked_at_the_same_time_and_a_fault_is_its_owners_alone(tmp_path: Path) -> None:
    met = asyncio.Barrier(3)  # nobody gets past it alone

    class Asked(SpamdScanner):
        async def scan(
            self,
            message: Message,
            deadline: Deadline,
            priority: Priority = NEUTRAL,
            owner: Owner | None = None,
            *,
            user: bytes = b"",
            want: Want = Want.CHECK,
        ) -> Any:
            async with deadline.timeout():
                await met.wait()
            if user.startswith(b"b"):
                raise BackendError(Cause.DOWN, "here", "69 no preferences")
            return ScanOutcome(Scanner.SPAMD, ScanStatus.CLEAN, score=1.0, threshold=5.0)

    config = Settings(spamd=Section(user="recipient"), service=ServiceSettings(state=str(tmp_path)))
    scanners = Scanners(None, ClamdScanner(config.clamd), Asked(config.spamd, 3))
    row = Row(b"@x", False)
    pipeline = Pipeline(config, Switches(), lambda _: (None, row), scanners, Quarantine.of(config))
    envelope, origin = Envelope(b"", (b"a@x", b"b@x", b"c@x")), Origin(OriginKind.STRANGER, 1)

    async def examined() -> MessageContext:
        message = message_of(MESSAGE)
        try:
            return await pipeline.examine("i", envelope, message, origin, Deadline.after(20))
        finally:
            message.close()

    said = {outcome.owner: outcome.status for outcome in asyncio.run(examined()).outcomes}
    assert said == {b"a@x": ScanStatus.CLEAN, b"b@x": ScanStatus.UNCHECKED, b"c@x": ScanStatus.CLEAN}


def test_explain_tells_whose_preferences_hold(make: Make, tmp_path: Path) -> None:
    system = make()
    (tmp_path / "mail").write_bytes(MESSAGE)
    words = ["--config", str(system.daemon.config), "explain", "--json", str(tmp_path / "mail")]
    recipients = ("strict@x.example", "b@strict.example", "a@plain.example")
    words += [word for address in recipients for word in ("--recipient", address)]
    story = json.loads(CliRunner().invoke(cli, words, catch_exceptions=False).stdout)["story"]
    whose = {"strict@x.example": "strict@x.example", "b@strict.example": "@strict.example"}
    for recipient, owner in whose.items():
        assert any(
            stage == "recipients" and text.startswith(recipient) and f"by the preferences of {owner}" in text
            for stage, text in story
        )
        assert any(
            stage == "spamd" and text.startswith(f"by the preferences of {owner}: found") for stage, text in story
        )
    assert any(stage == "spamd" and text.startswith("clean, 3 of 20 points") for stage, text in story)
