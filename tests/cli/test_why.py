"""``contentfilter why`` as an administrator uses it: an id from a bounce, a search, text, JSON, exit statuses."""

import json
import os
import pty
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

import contentfilter.cli.why as why_module
from contentfilter.cli.main import cli
from contentfilter.doors.admission import new_incident
from contentfilter.store.journal import FILE, Journal
from contentfilter.verdict.record import MailDetail

NOON = 1_700_000_000.0
STORY = (
    ("message", "5 bytes from <joe@example.net>, 1 recipient(s)"),
    ("decision", "reject: refused; rule: clamd: Eicar"),
)
FIRST, SECOND, THIRD = "1k7tr2fnsi7a1nlq", "1k7tr2fnsi7a1nlr", "1k7tr9999999999v"


class Place:
    """A state directory with a journal, its settings, and the command run on it."""

    def __init__(self, directory: Path) -> None:
        self.state = directory / "state"
        self.state.mkdir()
        self.config = directory / "contentfilter.toml"
        self.config.write_text(f'[service]\nstate = "{self.state}"\n')

    def add(self, incident: str, at: float = NOON, account: MailDetail = MailDetail(STORY), **more: Any) -> None:  # noqa: B008 - frozen
        fields = {
            "id": incident, "sender": "joe@example.net", "recipients": ["user@here.example"], "recipient_count": 1,
            "remote": "192.0.2.7", "user": "", "decision": "reject", "rule": "clamd: Eicar", "scans": [], "attempt": 0,
            "ms": 12.5,
        }  # fmt: skip
        with Journal.open(self.state / FILE) as journal:
            assert journal.append([(at, "mail.done", fields | more, msgspec.json.encode(account))]) == 0

    def report(self, incident: str, results: list[str] | None) -> None:
        with Journal.open(self.state / FILE) as journal:
            journal.append([(NOON, "mail.report", {"id": incident, "results": results}, b"")])

    def why(self, *words: str) -> Result:
        return CliRunner().invoke(cli, ["--config", str(self.config), "why", *words], catch_exceptions=False)

    def json(self, *words: str) -> Any:
        result = self.why(*words, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def incidents(self, *words: str) -> list[str]:
        result = self.why(*words, "--json")
        return [mail["id"] for mail in json.loads(result.stdout)]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    made.add(FIRST, NOON, MailDetail(STORY, "refused [x] (#5.7.1)", "<first@host>"))
    made.add(SECOND, NOON + 60, sender="", decision="queue", rule="clean", remote="2001:db8::1")
    made.add(THIRD, NOON + 120, MailDetail(STORY, more_recipients=("last@list.example",)), recipients=["A@b", "c@d"],
             recipient_count=30)  # fmt: skip
    return made


def lines(result: Result) -> dict[str, str]:
    """The printed story, by its first word."""
    return {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in result.stdout.splitlines()}


# One message


def test_an_incident_is_shown_in_full(place: Place) -> None:
    result = place.why(FIRST)
    assert result.exit_code == 0
    printed = lines(result)
    assert printed["incident"] == FIRST
    assert printed["message-id"] == "<first@host>"
    assert printed["client"] == "192.0.2.7"
    assert printed["message"] == STORY[0][1]
    assert printed["decision"] == STORY[1][1]
    assert printed["SMTP text"] == "refused [x] (#5.7.1)"
    assert list(printed)[-3:] == ["message", "decision", "SMTP text"]


def test_a_copy_in_the_quarantine_is_shown_with_its_releases(place: Place) -> None:
    entries = place.state / "quarantine" / "entries"
    entries.mkdir(parents=True)
    place.add("1k7tr8000000000a", quarantined=1)
    sidecar: dict[str, Any] = {"incident": "1k7tr8000000000a", "sha256": "0" * 64, "time": NOON}
    path = entries / "1k7tr8000000000a.json"
    assert "not in the quarantine; it may have expired or been deleted" in lines(place.why("1k7tr8"))["quarantine"]
    assert place.json("1k7tr8")["quarantine"]["kept"] is False
    path.write_text(json.dumps(sidecar))
    assert lines(place.why("1k7tr8"))["quarantine"] == "kept, not released"
    sidecar["released"] = [{"time": NOON + 60, "by": "ann", "to": ["user@here.example"]}]
    path.write_text(json.dumps(sidecar))
    released = lines(place.why("1k7tr8"))["released"]
    assert released.startswith(("2023-11-14T", "2023-11-15T"))
    assert released.endswith(" by ann to user@here.example")
    assert place.json("1k7tr8")["quarantine"]["released"][0]["by"] == "ann"
    assert "quarantine" not in lines(place.why(FIRST))
    assert place.json(FIRST)["quarantine"] is None


def test_times_are_local_and_say_their_offset(place: Place) -> None:
    words = [sys.executable, "-m", "contentfilter", "--config", str(place.config), "why", FIRST]
    environ = {**os.environ, "TZ": "XXX-05:30"}
    printed = subprocess.run(words, capture_output=True, text=True, env=environ, timeout=60, check=True).stdout
    assert "2023-11-15T03:43:20+05:30" in printed


@pytest.mark.parametrize("prefix", [FIRST, FIRST.upper(), "1k7tr9", THIRD[:15]])
def test_a_prefix_that_only_one_has_is_enough(place: Place, prefix: str) -> None:
    assert place.json(prefix)["id"] in (FIRST, THIRD)


def test_a_prefix_of_several_lists_them_and_is_no_answer(place: Place) -> None:
    result = place.why("1k7tr2fn")
    assert result.exit_code == 2
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == ["Incident", SECOND, FIRST]
    assert "several incident IDs begin with 1k7tr2fn" in result.stderr


@pytest.mark.parametrize(
    "pasted",
    [
        f"554 mail refused: virus Eicar found [{FIRST}] (#5.7.1)",
        f"<user@here.example>: host mx [192.0.2.25] said: 554 abcdefghijklmnop [{FIRST}] (#5.7.1) (in reply to DATA)",
        f"X-ContentFilter: {FIRST}; virus=clean; spam=skipped",
        f'{{"time":"2026-11-21T01:20:59Z","level":"info","event":"mail.done","id":"{FIRST}","sender":"x"}}',
        f"time=2026 event=mail.done id={FIRST} origin=stranger",
        f"  {FIRST.upper()}\n",
    ],
)
def test_whatever_holds_the_incident_may_be_pasted(place: Place, pasted: str) -> None:
    assert place.json(pasted)["id"] == FIRST
    assert place.json(*pasted.split())["id"] == FIRST  # without quotes


def test_a_text_with_several_incidents_tells_of_each(place: Place) -> None:
    assert place.incidents(f"[{FIRST}] and [{THIRD}]") == [FIRST, THIRD]


def test_the_one_in_brackets_is_meant(place: Place) -> None:
    assert place.json(f"{THIRD} said: 554 no [{FIRST}] (#5.7.1)")["id"] == FIRST


def test_every_real_incident_is_recognized(place: Place) -> None:
    incident = new_incident()
    place.add(incident)
    assert place.json(f"554 no [{incident}] (#5.7.1)")["id"] == incident


@pytest.mark.parametrize(
    ("results", "words"),
    [
        (["0+", "0+"], "all 2 submissions were queued"),
        (["0+", "53+"], "partly queued, 1 of 2"),
        (["54", "-1000"], "nothing was queued"),
        (None, "none: the hook ended"),
    ],
)
def test_what_the_hook_reported_ends_the_story(place: Place, results: list[str] | None, words: str) -> None:
    place.report(FIRST, results)
    assert lines(place.why(FIRST))["report"].startswith(words)
    assert place.json(FIRST)["report"] == (results or [])


# Searching


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--sender", "JOE@example.net"], [THIRD, FIRST]),
        (["--sender", "@example.net"], [THIRD, FIRST]),
        (["--sender", "example"], [THIRD, FIRST]),
        (["--sender", "<>"], [SECOND]),
        (["--sender", ""], [SECOND]),
        (["--recipient", "last@list.example"], [THIRD]),
        (["--recipient", "C@D"], [THIRD]),
        (["--message-id", "<FIRST@host>"], [FIRST]),
        (["--message-id", "first"], [FIRST]),
        (["--signature", "clamd: eicar"], [THIRD, FIRST]),
        (["--signature", "*eicar*", "--recipient", "a@b"], [THIRD]),
        (["--decision", "queue"], [SECOND]),
        (["--remote", "2001:db8::1"], [SECOND]),
        (["--remote", "192.0.2.*"], [THIRD, FIRST]),
        (["--since", "2020-01-01", "--limit", "2"], [THIRD, SECOND]),
        (["--until", datetime.fromtimestamp(NOON + 60).astimezone().isoformat()], [FIRST]),
        (["--since", "1h"], []),
        (["--sender", "joe@example"], []),
    ],
    ids=lambda value: " ".join(value),
)
def test_messages_are_found_newest_first(place: Place, options: list[str], expected: list[str]) -> None:
    assert place.incidents(*options) == expected
    assert place.why(*options).exit_code == (0 if expected else 1)


def test_many_are_a_table_and_one_is_shown_in_full(place: Place) -> None:
    rows = [line.split("\t") for line in place.why("--since", "2020-01-01").stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == [THIRD, SECOND, FIRST]
    assert rows[0][2:] == ["joe@example.net", "A@b +29", "reject", "clamd: Eicar"]
    assert rows[1][2] == "<>"
    assert lines(place.why("--decision", "queue"))["incident"] == SECOND


def test_what_the_limit_hides_is_said(place: Place) -> None:
    assert "more than 2" in place.why("--since", "2020-01-01", "--limit", "2").stderr
    assert place.why("--since", "2020-01-01", "--limit", "3").stderr == ""


def test_json_has_everything(place: Place) -> None:
    (mail,) = place.json("--recipient", "last@list.example")
    assert mail["recipients"] == ["A@b", "c@d", "last@list.example"]
    assert mail["story"] == [list(line) for line in STORY]
    assert datetime.fromisoformat(mail["time"]).timestamp() == NOON + 120
    assert isinstance(place.json(FIRST), dict)


def test_on_a_terminal_it_is_a_table(place: Place) -> None:
    place.add("1k7tr9999999999u", sender="[bold]x[/bold]@y")
    master, slave = pty.openpty()
    words = [sys.executable, "-m", "contentfilter", "--config", str(place.config), "why", "--since", "2020-01-01"]
    environ = {**os.environ, "COLUMNS": "200", "TERM": "xterm"}
    subprocess.run(words, stdout=slave, env=environ, timeout=60, check=True)
    os.close(slave)
    shown = os.read(master, 65536).decode()
    os.close(master)
    assert "Incident" in shown
    assert "[bold]x[/bold]@y" in shown


def test_nothing_in_the_journal_drives_the_terminal(place: Place) -> None:
    evil = "\x1b]0;x\x07\r\n\t\x9b31m"
    printed = MailDetail((("message", evil), (evil, "x")), evil, evil)
    place.add("evil000000000000", account=printed, sender=evil, recipients=[evil], rule=evil, user=evil, remote=evil)
    place.add("evil000000000001", sender=evil, recipients=[evil], rule=evil)
    whole, table = place.why("evil000000000000"), place.why("--sender", f"*{evil}*")
    assert (whole.exit_code, table.exit_code) == (0, 0)
    for text in (whole.stdout, table.stdout.replace("\t", " ")):
        assert all(c.isprintable() or c == "\n" for c in text)
    assert len(table.stdout.splitlines()) == 3, "a header and two rows"


def test_without_a_question_the_latest_messages_are_listed(place: Place) -> None:
    result = place.why()
    assert result.exit_code == 0
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == ["Incident", THIRD, SECOND, FIRST]
    assert place.why("--limit", "1").stdout.split()[:2] == ["incident", THIRD]


# What cannot be answered


@pytest.mark.parametrize("words", [["zzzz"], [f"[{FIRST[:-1]}z]"], ["--recipient", "nobody@nowhere"]])
def test_nothing_found_is_status_1(place: Place, words: list[str]) -> None:
    result = place.why(*words)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no message in the journal matches" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        [FIRST, "--sender", "x"],
        ["no id in here"],
        ["--since", "yesterday"],
        ["--decision", "maybe"],
        ["--limit", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(place: Place, words: list[str]) -> None:
    result = place.why(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage:" in result.stderr


def test_without_a_journal_it_says_so(tmp_path: Path) -> None:
    place = Place(tmp_path)
    result = place.why(FIRST)
    assert result.exit_code == 1
    assert "there is no journal yet" in result.stderr
    assert list(place.state.iterdir()) == []


@pytest.mark.parametrize("damage", ["text", "row"])
def test_a_damaged_journal_is_an_error_message(place: Place, damage: str) -> None:
    if damage == "text":
        (place.state / FILE).write_bytes(b"rubbish" * 1000)
    else:
        with Journal.open(place.state / FILE) as journal:
            journal._connection.execute("UPDATE mail SET fields = '[1'")
    result = place.why("--since", "2020-01-01")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("contentfilter: ")


def test_an_incident_that_is_pasted_too_early_is_waited_for(place: Place) -> None:
    """The journal has a message a moment after its answer went out."""
    fresh = new_incident()
    later = threading.Timer(0.5, lambda: place.add(fresh))
    later.start()
    result = place.why(f"451 try again [{fresh}] (#4.3.0)")
    later.join()
    assert result.exit_code == 0
    assert fresh in result.output


def test_the_first_message_of_all_is_waited_for_too(tmp_path: Path) -> None:
    place, fresh = Place(tmp_path), new_incident()
    later = threading.Timer(0.5, lambda: place.add(fresh))
    later.start()
    result = place.why(fresh)
    later.join()
    assert result.exit_code == 0, result.output


def test_an_old_or_made_up_incident_is_not_waited_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(why_module.time, "sleep", lambda seconds: pytest.fail("it waited"))
    for incident in ("1k7tr2fnsi7a1nlz", "zzzzzzzzzzzzzzzz", "1k7"):
        assert place.why(incident).exit_code in (0, 1, 2)
