"""``contentfilter quarantine`` as an operator uses it: text, JSON, exit statuses, one release or a thousand."""

import asyncio
import json
import os
import pty
import pwd
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from lab import terminal
from lab.standin import Standin, build

from contentfilter.cli.main import cli
from contentfilter.cli.quarantine import real_queue
from contentfilter.deadline import Deadline
from contentfilter.model import Message
from contentfilter.store.quarantine import Quarantine
from contentfilter.store.release import load_secret
from contentfilter.store.release_token import verify

MAIL = b"Message-ID: <m1@x>\nSubject: \x1b[31mred [bold]\n\nbody\x1b]0;title\x07\xff\0\n"


class Place:
    """A state directory, its settings file, and the command run on it."""

    def __init__(self, directory: Path) -> None:
        self.state = directory / "state"
        self.state.mkdir()
        self.config = directory / "contentfilter.toml"
        self.config.write_text(f'[service]\nstate = "{self.state}"\n')
        self.quarantine = Quarantine(self.state / "quarantine")

    def keep(self, *what, **more):
        asyncio.run(self.store(*what, **more))

    async def store(self, incident, data=MAIL, rule="clamd: Eicar", sender=b"s@there", withheld=(0,)):
        facts = {
            "origin": "stranger",
            "remote": "192.0.2.1",
            "rule": rule,
            "scans": [{"scanner": "clamd", "status": "found", "ms": 1.5, "name": rule.removeprefix("clamd: ")}],
            "envelope_hex": {"sender": sender.hex(), "recipients": [b"a@here".hex(), b"b@here".hex()]},
            "withheld_from": list(withheld),
            "versions": {"clamd": "1.4.2"},
        }
        await self.quarantine.keep(incident, Message(-1, len(data), data), facts, Deadline.after(20))

    def run(self, *arguments, **options):
        return CliRunner().invoke(cli, ["--config", str(self.config), "quarantine", *arguments], **options)

    def json(self, *arguments):
        result = self.run(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def incidents(self):
        return [entry.incident for entry in self.quarantine.entries()]


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def three(place) -> Place:
    for number in "123":
        place.keep(f"0a{number}", MAIL + number.encode(), "clamd: Win.Bad" if number != "3" else "clamd: Eicar")
    return place


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("standin"))


@pytest.fixture
def standin(program, tmp_path, monkeypatch) -> Standin:
    """Found through queue.conf, as the hook finds the real one."""
    standin = Standin(program, tmp_path / "queue")
    for name, value in standin.environ().items():
        monkeypatch.setenv(name, value)
    conf = tmp_path / "queue.conf"
    conf.write_text(f"# ours\nsocket /run/x\n queue  {program} \nspool /var/tmp\n")
    monkeypatch.setenv("CONTENTFILTER_QUEUE_CONF", str(conf))
    return standin


# Looking


def test_list_shows_the_newest_first_one_line_each(three):
    result = three.run("list", "--limit", "2")
    head, *lines = [line.split("\t") for line in result.output.splitlines()]
    assert result.exit_code == 0
    assert head == ["Incident", "Kept", "From", "Withheld from", "Rule", "Bytes", "State"]
    assert [line[0] for line in lines] == ["0a3", "0a2"]
    assert lines[0][2:] == ["s@there", "a@here", "clamd: Eicar", str(len(MAIL) + 1), "kept"]
    assert [entry["incident"] for entry in three.json("list")] == ["0a3", "0a2", "0a1"]


def test_an_empty_quarantine_lists_nothing_and_search_says_no(place):
    assert (place.run("list").exit_code, place.run("list").output) == (0, "")
    assert place.json("list") == []
    assert place.run("search", "--sender", "x").exit_code == 1


def test_search_takes_every_filter(three):
    assert [e["incident"] for e in three.json("search", "--signature", "win.bad", "--sender", "there")] == [
        "0a2",
        "0a1",
    ]
    assert [e["incident"] for e in three.json("search", "0a3", "--since", "1h", "--message-id", "m1")] == ["0a3"]
    assert three.run("search", "--until", "2001-02-03").exit_code == 1
    assert three.run("search", "--since", "yesterday").exit_code == 2


def test_show_tells_all_that_is_known(three):
    text = three.run("show", "0a1").output
    for words in ("<s@there>", "a@here, b@here", "192.0.2.1", "?[31mred [bold]", "Win.Bad", "clamd 1.4.2", "1.5 ms"):
        assert words in text
    entry = three.json("show", "0a1")
    assert (entry["sender"], entry["withheld"], entry["envelope_hex"]["sender"]) == (
        "s@there",
        ["a@here"],
        b"s@there".hex(),
    )


def test_show_gives_the_exact_message_or_header(three):
    assert three.run("show", "0a1", "--message").stdout_bytes == MAIL + b"1"
    assert three.run("show", "0a1", "--headers").stdout_bytes == MAIL[: MAIL.index(b"\n\n") + 1]


def on_a_terminal(place: Place, *arguments: str) -> bytes:
    """Output of the command on a terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm", "COLUMNS": "200"}
        os.execv(sys.executable, [sys.executable, "-m", "contentfilter", "--config", str(place.config), *arguments])
    written = b""
    try:
        while piece := os.read(terminal, 65536):
            written += piece
    except OSError:
        pass  # the other end is closed
    os.close(terminal)
    os.waitpid(pid, 0)
    return written


def test_nothing_that_a_sender_wrote_can_drive_the_terminal(three):
    shown = on_a_terminal(three, "quarantine", "show", "0a1", "--message")
    assert b"?[31mred [bold]" in shown
    assert b"\x1b" not in shown
    assert b"\x07" not in shown
    assert b"\x1b]" not in on_a_terminal(three, "quarantine", "show", "0a1")
    three.keep("0a9", rule="clamd: [red]x")
    table = on_a_terminal(three, "quarantine", "list")
    assert b"Withheld from" in table
    assert b"[red]x" in table


def test_one_that_is_not_there_is_one_line_and_status_1(three):
    for arguments in (
        ["show", "0b"],
        ["show", "../../etc/passwd"],
        ["show", "0a"],
        ["release", "zz"],
        ["delete", "-", ""],
    ):
        result = three.run(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("contentfilter: ")
        assert result.stderr.count("\n") == 1
    assert three.incidents() == ["0a3", "0a2", "0a1"]


def test_bad_settings_are_status_78(place):
    place.config.write_text("[quarantine]\nqota = 1\n")
    result = place.run("list")
    assert result.exit_code == 78
    assert "qota" in result.stderr


# Releasing


def test_release_goes_to_the_queue_of_queue_conf_with_a_token_of_this_place(three, standin):
    result = three.run("release", "0a1")
    assert (result.exit_code, result.stdout) == (0, "0a1\treleased to a@here\n")
    (queued,) = standin.queued()
    assert queued.envelope_bytes == b"Fs@there\0Ta@here\0\0"
    assert queued.message.endswith(b"\n" + MAIL + b"1")
    assert verify(queued.message, load_secret(three.state), time.time(), (b"a@here",))
    assert b"; by=" + pwd.getpwuid(os.getuid()).pw_name.encode() in queued.message
    assert three.run("list").output.count("released") == 1


def test_release_to_somebody_else_and_once_more_only_when_asked(three, standin):
    assert three.run("release", "0a1", "--to", "x@y", "--to", "z@y").exit_code == 0
    assert standin.queued()[0].envelope.recipients == (b"x@y", b"z@y")
    again = three.run("release", "0a1")
    assert again.exit_code == 1
    assert "released before" in again.stderr
    assert three.run("release", "0a1", "--again").exit_code == 0


def test_a_release_names_the_addresses_to_which_the_recipient_forwards(three, standin):
    assert three.run("release", "0a1", "--forward", "final@there").exit_code == 0
    (queued,) = standin.queued()
    assert queued.envelope.recipients == (b"a@here",)
    secret, now = load_secret(three.state), time.time()
    assert verify(queued.message, secret, now, (b"final@there",))
    assert verify(queued.message, secret, now, (b"a@here",)) is None


def audit(place):
    return [json.loads(line) for line in (place.state / "audit.jsonl").read_text().splitlines()]


def test_releases_and_deletions_are_audited_with_who_when_why_and_before(three, standin):
    me = pwd.getpwuid(os.getuid()).pw_name
    three.run("release", "0a1", "--reason", "false positive", "--forward", "f@there")
    three.run("delete", "0a2", "--reason", "asked by the \x1b[31mowner")
    three.run("delete", "0b", "--reason", "not there")
    released, deleted = audit(three)
    common = {"by": me, "sender": "s@there", "rule": "clamd: Win.Bad", "withheld": ["a@here"]}
    assert released["time"].startswith("20")
    assert {name: released[name] for name in common} == common
    assert (released["event"], released["id"], released["reason"]) == ("quarantine.release", "0a1", "false positive")
    assert (released["to"], released["forward"], released["released"]) == (["a@here"], ["f@there"], 0)
    assert (deleted["event"], deleted["id"], deleted["released"]) == ("quarantine.delete", "0a2", 0)
    assert deleted["reason"] == "asked by the ?[31mowner"
    assert {name: deleted[name] for name in common} == common


def test_a_release_that_cannot_be_audited_is_done_and_reported(three, standin):
    (three.state / "audit.jsonl").mkdir()
    result = three.run("release", "0a1")
    assert result.exit_code == 1
    assert "released to a@here, but not audited" in result.stderr
    assert len(standin.queued()) == 1


def test_a_failed_release_is_status_1_and_the_others_still_go(three, standin, monkeypatch):
    monkeypatch.setenv("STANDIN_AT", "end")
    monkeypatch.setenv("STANDIN_EXIT", "53")
    monkeypatch.setenv("STANDIN_WHEN", "X-ContentFilter-Released: 0a1;")
    result = three.run("release", "--signature", "Win.Bad", "--yes")
    assert result.exit_code == 1
    assert result.stderr.startswith("0a1: ")
    assert "disk is full" in result.stderr
    assert result.stdout == "0a2\treleased to a@here\n1 released, 1 failed\n"
    assert len(standin.queued()) == 1
    results = json.loads(three.run("release", "--signature", "Win.Bad", "--yes", "--json").stdout)
    assert [(r["incident"], r["ok"]) for r in results] == [("0a1", False)]


def test_a_mass_action_asks_first_and_can_be_tried_dry(three, standin):
    dry = three.run("release", "--signature", "Win.Bad", "--dry-run")
    assert [line.split("\t")[0] for line in dry.stdout.splitlines()] == ["Incident", "0a1", "0a2"]
    for answer in ("n\n", ""):
        assert three.run("release", "--signature", "Win.Bad", input=answer).exit_code == 1
        assert three.run("delete", "--signature", "Win.Bad", input=answer).exit_code == 1
    assert standin.queued() == []
    assert three.run("release", "--signature", "Win.Bad", input="y\n").exit_code == 0
    assert len(standin.queued()) == 2
    assert three.run("delete", "--signature", "Win.Bad", "--dry-run").exit_code == 0
    assert three.run("delete", "--signature", "Win.Bad", input="y\n").exit_code == 0
    assert three.incidents() == ["0a3"]


@pytest.mark.parametrize("command", ["release", "delete"])
def test_nothing_is_ever_chosen_by_accident(three, standin, command):
    assert three.run(command, "--yes").exit_code == 2
    assert three.run(command, "0a1", "--sender", "s", "--yes").exit_code == 2
    assert three.run(command, "--sender", "nobody", "--yes").exit_code == 1
    assert standin.queued() == []
    assert len(three.incidents()) == 3


def test_a_thousand_are_released_each_exactly_once(place, standin, monkeypatch):
    async def fill():
        for number in range(1000):
            rule = "clamd: Wrong" if number % 100 else "clamd: Right"
            await place.store(f"{number:04x}", MAIL + b"%d" % (number % 50), rule)

    asyncio.run(fill())
    result = place.run("release", "--signature", "Wrong", "--since", "1h", "--yes")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "990 released, 0 failed"
    lines = [queued.message.partition(b";")[0] for queued in standin.queued()]
    assert len(lines) == len(set(lines)) == 990
    assert place.run("release", "--signature", "Wrong", "--yes").exit_code == 1
    assert len(place.json("search", "--signature", "right")) == 10


def test_a_mass_release_on_a_terminal_shows_its_progress(three, standin):
    shown = on_a_terminal(three, "quarantine", "release", "--signature", "Win.Bad", "--yes")
    assert b"100%" in shown
    assert b"2 released, 0 failed" in shown


def test_a_mass_release_into_a_file_has_every_line_there_and_the_bar_on_the_terminal(three, standin):
    words = ["-m", "contentfilter", "--config", str(three.config), "quarantine", "release", "--signature", "Win.Bad"]
    out, shown = terminal.run([*words, "--yes"], {"TERM": "xterm"})
    assert [line.split(b"\t")[0] for line in out.splitlines()] == [b"0a1", b"0a2", b"2 released, 0 failed"]
    assert b"2/2" in shown
    assert b"0a1" not in shown


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("queue /x/q\n", "/x/q"),
        ("# queue /no\n  queue\t/a b \r\n", "/a b"),
        ("queue /one\nqueue /two", "/two"),
        ("queued /no\n", "/var/qmail/bin/qmail-queue.real"),
        (None, "/var/qmail/bin/qmail-queue.real"),
    ],
)
def test_the_real_queue_is_read_as_the_hook_reads_it(tmp_path, text, path):
    conf = tmp_path / "queue.conf"
    if text is not None:
        conf.write_bytes(text.encode())
    assert real_queue(conf) == Path(path)


# Removing


def test_delete_and_expire(three):
    assert three.run("delete", "0a2").stdout == "0a2\tdeleted\n"
    assert three.incidents() == ["0a3", "0a1"]
    three.config.write_text(three.config.read_text() + "[quarantine]\nretention = 1e-12\n")
    assert three.json("expire", "--dry-run")["entries"] == ["0a1", "0a3"]
    assert three.incidents() == ["0a3", "0a1"]
    assert three.run("expire").stdout.splitlines()[:2] == ["0a1", "0a3"]
    assert three.incidents() == []


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, which becomes another user")
def test_root_becomes_the_owner_so_that_the_daemon_can_use_what_is_written(three, standin, lab_directory):
    nobody = pwd.getpwnam("nobody")
    state = lab_directory / "owned"
    subprocess.run(["cp", "-a", str(three.state), str(state)], check=True)
    subprocess.run(["chown", "-R", f"{nobody.pw_uid}:{nobody.pw_gid}", str(state)], check=True)
    config = lab_directory / "owned.toml"
    config.write_text(f'[service]\nstate = "{state}"\n')
    queue = Standin(standin.program, lab_directory / "queue")
    program = lab_directory / "program"
    program.write_bytes(standin.program.read_bytes())
    program.chmod(0o755)
    arguments = ["--config", str(config), "quarantine", "release", "0a1", "--queue", str(program)]
    # Where only root can read the interpreter, what asyncio imports late has to be there before.
    start = "import concurrent.futures.thread; from contentfilter.cli.main import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", start, *arguments],
        env=os.environ | queue.environ() | {"SUDO_USER": "ann"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    (queued,) = queue.queued()
    assert queued.uid == nobody.pw_uid
    assert b"; by=ann; " in queued.message
    for path in (state / "release.key", *state.rglob("*.json")):
        assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (nobody.pw_uid, 0o600)
