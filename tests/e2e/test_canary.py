"""The canary with everything real: hook, daemon, clamd, spamd. Green when mail is scanned, and only then.

A tripwire takes the place of the real qmail-queue, and no test may find it sprung, whatever it did to the daemon.
"""

import hashlib
import itertools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from e2e.mails import EICAR
from lab import hook as hook_lab
from lab.clamd import Clamd
from lab.daemon import PACKAGE
from lab.hook import until
from lab.offer import offer
from lab.peers import Peer, read_clamd, says
from lab.scrape import HTTP, scrape, scrape_until
from lab.spamd import Spamd
from lab.system import System

from contentfilter.bus import messages, sockets
from contentfilter.doors import canary
from contentfilter.model import Action
from contentfilter.monitor import samples
from contentfilter.settings import Settings
from contentfilter.store.release import load_secret

GREEN = {"clean": "passed", "eicar": "caught", "gtube": "caught", "signature": "caught"}
OPTIONS = "chksignature 1\nchkloadertype 1\n"
TRIPWIRE = "#!/bin/sh\necho sprung >>{0}\n"
ONCE = 3600.0  # seconds: after the first round only those that are asked for

_numbers = itertools.count(1)


class Aviary(System):
    """A system whose canary goes through the lab's hook, under a queue.conf that names the tripwire."""

    def __init__(self, directory: Path, *, every: float, **options: Any) -> None:
        directory.mkdir()
        self.conf, self.sprung = directory / "canary.conf", directory / "sprung"
        tripwire = directory / "tripwire"
        tripwire.write_text(TRIPWIRE.format(self.sprung))
        tripwire.chmod(0o755)
        self.conf.write_text(f"socket {directory / 'queue.sock'}\nqueue {tripwire}\n")
        program = hook_lab.build(directory.parent)
        settings = dict(options.pop("settings", {}))
        own = {"enabled": True, "every": every, "hook": str(program), "conf": str(self.conf)}
        settings = settings | {"canary": own | settings.get("canary", {}), "service": {"workers": 1}}
        controls = {"options": OPTIONS} | options.pop("controls", {})
        super().__init__(directory, settings=settings, controls=controls, program=program, **options)

    def canary(self) -> dict[str, messages.CanaryResult]:
        """A round now; the results by sample."""
        reply = sockets.ask(str(self.directory), messages.AskCanary(), 120)
        assert isinstance(reply, messages.CanaryRound)
        assert not reply.problem
        return {result.sample: result for result in reply.results}

    def words(self) -> dict[str, str]:
        return {name: result.result for name, result in self.canary().items()}

    def status(self) -> messages.Status:
        reply = sockets.ask(str(self.directory), messages.AskStatus(), 30)
        assert isinstance(reply, messages.Status)
        return reply

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        whole = [sys.executable, "-P", "-m", "contentfilter", "--config", str(self.daemon.config), *words]
        environ = os.environ | {"PYTHONPATH": str(PACKAGE)}
        return subprocess.run(whole, env=environ, capture_output=True, text=True, timeout=150, check=False)


Make = Callable[..., Aviary]


@pytest.fixture
def make(lab_directory: Path) -> Iterator[Make]:
    made: list[Aviary] = []
    with ExitStack() as stack:

        def start(*, every: float = ONCE, **options: Any) -> Aviary:
            aviary = Aviary(lab_directory / f"a{next(_numbers)}", every=every, **options)
            made.append(aviary)
            return stack.enter_context(aviary)

        yield start
    assert not [aviary for aviary in made if aviary.sprung.exists()], "a canary reached a qmail-queue"


def test_green_when_everything_is_scanned(make: Make, clamd: Clamd, spamd: Spamd) -> None:
    aviary = make(clamd=clamd, spamd=spamd, settings=HTTP)
    done = aviary.command("canary")
    assert done.returncode == 0, done.stdout
    lines = dict(line.split("\t")[1:3] for line in done.stdout.splitlines()[1:])
    assert lines == GREEN
    reply = json.loads(aviary.command("canary", "--json").stdout)
    assert reply["ok"] is True
    texts = {result["sample"]: result["text"] for result in reply["results"]}
    assert texts["clean"] == "signatures, loadertypes, clamd, spamd found nothing"
    assert texts["eicar"].startswith("clamd: Eicar-Test-Signature")
    assert re.match(r"spamd: 100\d(\.\d)? points of 5 ", texts["gtube"])
    assert texts["signature"] == "signatures: TVqQAAMAA"
    samples = scrape(aviary.daemon)
    now = time.time()
    for name, word in GREEN.items():
        assert samples.value("canary_result", sample=name) == 1
        assert 0 < samples.value("canary_seconds", sample=name) < 30
        assert now - 60 < samples.value("canary_last_success_timestamp_seconds", sample=name) <= now
        assert samples.value("canary_runs_total", sample=name, result=word) >= 2  # ours, and the daemon's own
    assert {result.sample: result.ok for result in aviary.status().canary} == dict.fromkeys(GREEN, True)


def test_no_trace_of_it_in_what_is_known_about_mail(make: Make, clamd: Clamd, spamd: Spamd) -> None:
    controls = {"options": OPTIONS + "clamglobal 1\nspamglobal 1\n"}
    aviary = make(clamd=clamd, spamd=spamd, settings=HTTP, controls=controls)
    for _ in range(2):
        assert aviary.words() == GREEN
    aviary.deliver(b"From: a@example.org\nSubject: real\n\nmail\n")
    samples = scrape_until(aviary.daemon, lambda s: s.total("messages_total") >= 1)
    assert samples.total("messages_total") == 1
    assert samples.total("scans_total", scanner="clamd") == 1
    assert samples.total("quarantined_total") == 0
    (mail,) = aviary.daemon.wait_for("mail.done")
    assert aviary.status().window.messages == 1
    assert aviary.command("why", mail["id"]).returncode == 0  # which waits for the journal
    known = json.loads(aviary.command("why", "--since", "1h", "--json").stdout)
    assert [message["recipient_count"] for message in known] == [1]
    quarantine = aviary.directory / "state" / "quarantine"
    assert not quarantine.exists() or not [p for p in quarantine.rglob("*") if p.is_file()]
    assert [line["results"] for line in aviary.daemon.log("canary.done")] == [GREEN]  # three rounds, logged once


def test_clamd_gone_is_red_within_a_round_and_green_again_after_it_is_back(make: Make, lab_directory: Path) -> None:
    with Clamd(lab_directory / "mortal") as clamd:
        aviary = make(clamd=clamd, every=1.0, settings=HTTP)
        scrape_until(aviary.daemon, lambda s: s.total("canary_result", sample="eicar") == 1)
        clamd.kill()
        red = scrape_until(aviary.daemon, lambda s: s.value("canary_result", sample="eicar") == 0)
        assert red.value("canary_result", sample="signature") == 1
        assert red.value("canary_runs_total", sample="eicar", result="unchecked") >= 1
        before = red.value("canary_last_success_timestamp_seconds", sample="eicar")
        (line, *_) = aviary.daemon.wait_for("canary.failed", where=lambda line: line["sample"] == "eicar")
        assert line["result"] == "unchecked"
        assert line["why"].startswith("clamd: down")
        clamd.start()
        green = scrape_until(aviary.daemon, lambda s: s.value("canary_result", sample="eicar") == 1)
        assert green.value("canary_last_success_timestamp_seconds", sample="eicar") > before
        aviary.daemon.wait_for("canary.done", 2)
        failures = aviary.daemon.log("canary.failed")
        assert len(failures) <= 4, "each failure is logged when it begins, not every second"


def test_a_clamd_that_knows_nothing_is_red_although_it_answers_ok(make: Make, lab_directory: Path) -> None:
    nothing = f"Lab.Nothing:0:*:{b'nothing like it'.hex()}\n"
    with Clamd(lab_directory / "blind", database={"other.ndb": nothing}) as clamd:
        aviary = make(clamd=clamd, settings=HTTP | {"clamd": {"proof": 0}})  # else it is not believed
        results = aviary.canary()
        wanted = {"clean": "passed", "eicar": "passed", "gtube": "skipped", "signature": "caught"}
        assert {name: result.result for name, result in results.items()} == wanted, results
        done = aviary.command("canary")
        assert done.returncode == 1
        assert "WRONG\teicar\tpassed" in done.stdout
        assert scrape(aviary.daemon).value("canary_result", sample="eicar") == 0
        assert scrape(aviary.daemon).value("canary_result", sample="clean") == 1


def test_a_clamd_that_knows_it_by_its_hash_only_catches_it(make: Make, lab_directory: Path) -> None:
    """As Win.Test.EICAR_HDB-1 does: clamd must unpack the attachment to the byte."""

    known = f"{hashlib.md5(EICAR).hexdigest()}:{len(EICAR)}:Lab.Hash\n"
    with Clamd(lab_directory / "hashes", database={"other.hdb": known}) as clamd:
        result = make(clamd=clamd).canary()["eicar"]
        assert (result.result, result.text.split()[1]) == ("caught", "Lab.Hash.UNOFFICIAL")


def test_a_failure_that_lets_mail_pass_is_no_catch(make: Make) -> None:
    settings = {"spamd": {"backends": ["unix:/nonexistent/spamd.sock"]}, "failure": {"spamd": "pass"}}
    aviary = make(settings=settings)
    results = aviary.canary()
    assert (results["gtube"].result, results["gtube"].ok) == ("unchecked", False)
    assert (results["clean"].result, results["clean"].ok) == ("unchecked", False)
    assert results["gtube"].text.startswith("spamd: down")


def test_a_scanner_that_finds_something_in_everything_is_red(make: Make) -> None:
    with Peer(None, says(b"stream: Everything.Is.Bad FOUND\0"), read_clamd) as peer:
        aviary = make(settings={"clamd": {"backends": [peer.backend]}})
        results = aviary.canary()
    assert (results["clean"].result, results["clean"].ok) == ("caught", False)
    assert results["eicar"].ok is True


def test_what_is_switched_off_is_skipped_and_said_to_be(make: Make) -> None:
    aviary = make(controls={"options": "chksignature 0\nchkloadertype 0\n"}, settings=HTTP)
    results = aviary.canary()
    assert {(r.result, r.ok) for r in results.values()} == {("skipped", None)}
    assert results["signature"].text == "chksignature and chkloadertype are off"
    assert aviary.command("canary").returncode == 1  # nothing is scanned: that is not green
    assert not [key for key in scrape(aviary.daemon) if key[0].startswith("contentfilter_canary_result")]


@pytest.mark.parametrize(
    ("controls", "rule"),
    [
        ({"options": "chkloadertype 1\n"}, "loadertypes: MzIuZ"),
        ({"badsignatures": "SGVsbG8 text\n/9j/4AAQSkZJ a picture\n"}, "signatures: /9j/4AAQSkZJ"),
    ],
    ids=["loader types only", "a list of one's own"],
)
def test_the_program_is_made_from_the_rules_in_force(make: Make, controls: Mapping[str, str], rule: str) -> None:
    aviary = make(controls=dict(controls))
    result = aviary.canary()["signature"]
    assert (result.ok, result.text) == (True, rule)


def test_new_rules_hold_after_a_reload(make: Make) -> None:
    aviary = make()
    aviary.control("badsignatures", "/9j/4AAQSkZJ a picture\n")
    assert aviary.command("reload").returncode == 0
    assert aviary.canary()["signature"].text == "signatures: /9j/4AAQSkZJ"


def test_a_bypass_shows_and_has_no_result(make: Make, clamd: Clamd) -> None:
    aviary = make(clamd=clamd, settings=HTTP)
    done = aviary.command("bypass", "clamd", "--for", "30m", "--origin", "stranger", "--reason", "false alarms")
    assert done.returncode == 0, done.stderr
    results = aviary.canary()
    assert (results["eicar"].result, results["eicar"].ok) == ("bypassed", False)
    assert "false alarms" in results["eicar"].text
    assert (results["clean"].result, results["signature"].result) == ("bypassed", "caught")
    assert scrape(aviary.daemon).total("canary_runs_total", sample="eicar", result="bypassed") >= 1
    assert not scrape(aviary.daemon).counts("canary_result", "sample").keys() & {("eicar",), ("clean",)}
    assert aviary.command("bypass", "end", "clamd").returncode == 0
    assert aviary.canary()["eicar"].result == "caught"


def test_a_worker_that_dies_under_it_costs_no_green(make: Make, clamd: Clamd) -> None:
    """The hook offers the sample again, with the same mark."""
    aviary = make(clamd=clamd)
    (worker,) = aviary.daemon.workers()
    os.kill(worker, signal.SIGSTOP)
    asked = subprocess.Popen(
        [sys.executable, "-P", "-m", "contentfilter", "--config", str(aviary.daemon.config), "canary", "--json"],
        stdout=subprocess.PIPE,
    )
    until(lambda: _hooks_of(aviary.daemon.pid) >= 3, "the hooks wait")
    os.kill(worker, signal.SIGKILL)
    said, _ = asked.communicate(timeout=90)
    assert json.loads(said)["ok"] is True
    assert aviary.daemon.log("worker.died")


def _hooks_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    names = []
    for child in children:
        try:
            names.append(Path(f"/proc/{child}/comm").read_text())
        except OSError:
            continue
    return sum(name.startswith("contentfilter-q") for name in names)


def test_while_mail_is_drained_nothing_is_sent(make: Make) -> None:
    aviary = make()
    assert aviary.words()["signature"] == "caught"
    assert aviary.command("drain").returncode == 0
    done = aviary.command("canary")
    assert (done.returncode, done.stdout) == (1, "")
    assert "the daemon is drained: nothing was sent" in done.stderr
    assert aviary.command("resume").returncode == 0
    assert aviary.words()["signature"] == "caught"


def test_without_a_daemon_it_says_so(make: Make) -> None:
    aviary = make()
    aviary.daemon.stop()
    done = aviary.command("canary")
    assert done.returncode == 1
    assert "no daemon answers" in done.stderr


# Nobody gets one


def test_a_daemon_that_does_not_know_the_mark_takes_it_for_mail_and_still_nothing_is_queued(make: Make) -> None:
    """The worst mix-up: the hook leads to another daemon, with another key, that would let all of it pass."""
    stranger = make()
    aviary = make(clamd=None)
    aviary.conf.write_text(stranger.conf.read_text())
    results = aviary.canary()
    assert {result.result for result in results.values() if result.ok is not None} == {"unknown"}
    assert results["clean"].ok is False
    taken = stranger.daemon.wait_for("mail.done", 2)
    assert {(line["decision"], line["recipient_count"]) for line in taken} == {("queue", 0)}


def test_a_hook_that_ignores_its_configuration_gets_no_sample(make: Make, lab_directory: Path) -> None:
    """As a setuid one would. This one would hand everything to a qmail-queue."""
    program, got = lab_directory / f"deaf-{next(_numbers)}", lab_directory / f"got-{next(_numbers)}"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = --check ] && printf "socket /x\\nqueue /var/qmail/bin/qmail-queue\\n" && exit 0\n'
        f"echo got >>{got}\n"
    )
    program.chmod(0o755)
    results = make(settings={"canary": {"hook": str(program)}}).canary()
    assert results["clean"].result == "failed"
    assert "setuid" in results["clean"].text
    assert not got.exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hook": "/nonexistent/hook"}, "No such file"),
        ({"hook": "/bin/false"}, "status 1"),
        ({"conf": "/dev"}, "status 5"),
    ],
    ids=["no hook", "another program", "bad configuration"],
)
def test_a_hook_that_cannot_be_run_is_red_and_says_why(make: Make, settings: dict[str, str], words: str) -> None:
    results = make(settings={"canary": settings}).canary()
    assert (results["clean"].result, results["clean"].ok) == ("failed", False)
    assert words in results["clean"].text


# Nobody else's is one


def marked(aviary: Aviary, message: bytes, *, secret: bytes | None = None, ends: float = 60.0) -> str:
    secret = load_secret(aviary.directory / "state") if secret is None else secret
    return canary.sign(secret, "clean", secrets.token_hex(16), int(time.time() + ends), message)


MAIL = b"From: a@example.org\nSubject: hello\n\nThis is mail.\n"


def test_what_only_looks_like_a_canary_is_mail(make: Make) -> None:
    """Each is delivered as what it is, so nobody can make mail vanish, and none is looked at less."""
    aviary = make(controls={"options": OPTIONS + "clamglobal 1\n"})
    sample = next(s for s in samples.make_samples(Settings(), None, None) if s.name == "clean")
    copied = sample.message("0" * 32, time.time())
    for message, mark in (
        (MAIL, "1:clean"),
        (MAIL, marked(aviary, MAIL, secret=b"x" * 32)),  # forged
        (MAIL, marked(aviary, b"another message")),  # cut off another one
        (MAIL, marked(aviary, MAIL, ends=-1)),  # late
        (MAIL, marked(aviary, MAIL)),  # a good one, but in the environment of an SMTP session
        (copied, ""),  # the sample itself
    ):
        got = aviary.deliver(message, env={canary.VARIABLE: mark}, environ=canary.VARIABLE)
        assert got.status == 0
        assert got.only.message.endswith(message)
    assert len(aviary.daemon.wait_for("mail.done", 6)) == 6


def test_a_good_mark_in_another_users_hands_is_mail(make: Make) -> None:
    aviary = make()
    mark = marked(aviary, MAIL)
    environ = {canary.VARIABLE.encode(): mark.encode()}
    assert offer(aviary.daemon.socket, MAIL, b"F\0\0", environ=environ).action is Action.DROP  # ours: it is a canary
    if os.geteuid():
        pytest.skip("only root can be somebody else")
    conf = aviary.directory / "theirs.conf"
    conf.write_text(f"socket {aviary.daemon.socket}\nqueue /dev/null\nenviron {canary.VARIABLE}\n")
    ends = os.pipe()
    os.write(ends[1], b"Fa@example.org\0Tb@example.net\0\0")
    os.close(ends[1])
    done = subprocess.run(
        [aviary.program],
        input=MAIL,
        stdout=ends[0],
        stderr=subprocess.PIPE,
        env={"CONTENTFILTER_QUEUE_CONF": str(conf), canary.VARIABLE: mark},
        user="nobody",
        timeout=60,
        check=False,
    )
    os.close(ends[0])
    assert done.returncode == 120, done.stderr  # it was to be queued, and /dev/null cannot be started
    assert aviary.daemon.wait_for("mail.done")[0]["origin"] == "local"
    assert offer(aviary.daemon.socket, MAIL, environ=environ).action is Action.QUEUE  # with recipients it is mail


def test_spamassassin_learns_nothing_from_it(make: Make, lab_directory: Path) -> None:
    lines = ("use_bayes 1", "bayes_auto_learn 1", "bayes_min_ham_num 1")
    with Spamd(lab_directory / "learner", *lines) as spamd:
        aviary = make(spamd=spamd)
        for _ in range(2):
            assert aviary.words()["gtube"] == "caught"
        results = re.findall(r"result: .*mid=<(\w+)\.\w+@.*autolearn=(\w+)", spamd.log.read_text("latin-1"))
    assert set(results) == {("clean", "no"), ("gtube", "no")}
