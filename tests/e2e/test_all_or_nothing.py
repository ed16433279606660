"""A split message is queued whole or not at all, or the log says so, whatever is killed and whatever is full.

And nobody is lost: after every mishap the client's retry reaches all recipients.
"""

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import hook as hook_lab
from lab.compiler import compiled
from lab.scripted import scripted
from lab.standin import Standin
from lab.system import Delivered, System

CONTROLS = {
    "clamavclients": "virus@x.example\n",
    "spamdclients": "spam@x.example spam=mark\nmoved@x.example spam=move:jail@x.example\n",
    "options": "xenveloptoheader 1\n",
}
TO = (b"virus@x.example", b"spam@x.example", b"none@x.example", b"moved@x.example", b"other@x.example")
COPIES = {
    (b"virus@x.example",),
    (b"spam@x.example",),
    (b"jail@x.example",),
    (b"none@x.example", b"other@x.example"),
}
HEAD = b"From: a@example.net\nX-Test: spamd=9/5\nSubject: offer\n\n"
TOLD = {-signal.SIGKILL, 51, 52, 53, 54, 63, 66, 71, 74, 81}


@dataclass
class Lab:
    """A system whose hook can be killed at any of its steps."""

    system: System
    killer: Path
    count: int = 0

    def deliver(self, message: bytes, *to: bytes, env: dict[str, str] | None = None, **options: object) -> Delivered:
        """As often as wanted. Returns when everything that was started has ended, orphans too."""
        self.count += 1
        self.sender = b"s%d@example.net" % self.count
        process, standin = self.system.start_hook(message, to or TO, sender=self.sender, env=env, **options)
        recorded = (env or {}).get("STANDIN_DIR")
        self.standin = Standin(standin.program, Path(recorded)) if recorded else standin
        everybody = os.dup(process._readers[2])  # all have it as their stderr
        result = process.wait()
        poll = select.poll()
        poll.register(everybody, 0)  # the end of the last one is reported without asking
        assert poll.poll(hook_lab.FINAL * 1000), "something that the hook started is still there"
        os.close(everybody)
        return self.system.delivered(result, self.standin)

    def killed_at(self, step: int, message: bytes, *to: bytes, who: str = "hook") -> Delivered:
        env = {"LD_PRELOAD": str(self.killer), "KILL_AT": str(step), "KILL_WHO": who}
        return self.deliver(message, *to, env=env)

    def report(self) -> list[str] | None:
        """Results of the parts of the last message, from the log; None: the hook never reported."""
        done = self.system.daemon.wait_for("mail.done", where=lambda r: r["sender"] == self.sender.decode())
        line = self.system.daemon.wait_for("mail.report", where=lambda r: r["id"] == done[0]["id"])[0]
        return line["results"]

    def check(self, d: Delivered, message: bytes) -> int:
        """All or nothing, or a log that says so. Returns how many copies were queued."""
        assert all(q.message.endswith(message.partition(b"\n\n")[2]) for q in d.queued)
        found = [q.envelope.recipients for q in d.queued]
        assert len(set(found)) == len(found)
        assert set(found) <= COPIES
        assert self.standin.leftovers() == []
        if d.status == 0:
            assert set(found) == COPIES
        else:
            assert d.status in TOLD
        if found and d.status:
            report = self.report()
            if d.status == -signal.SIGKILL:
                assert report is None or [r for r in report if r == "0+"] == ["0+"] * len(found)
            else:
                assert report is not None
                assert report.count("0+") == len(found)
                assert f"{len(found)} of {len(COPIES)} parts are queued" in d.stderr
        return len(found)

    def retry(self, message: bytes) -> None:
        d = self.deliver(message)
        assert (d.status, d.stderr) == (0, "")
        assert self.check(d, message) == len(COPIES)


@pytest.fixture(scope="module")
def lab(lab_directory: Path) -> Iterator[Lab]:
    place = lab_directory / "all"
    place.mkdir()
    source = Path(hook_lab.__file__).with_name("kill.c")
    killer = compiled(place, "kill.so", ["cc", "-D_GNU_SOURCE", "-O1", "-w", "-shared", "-fPIC", source, "-ldl"])
    program = hook_lab.build(place, "impatient", counts=False)  # dynamically linked
    with scripted(place) as (clamd, spamd):
        options = {"program": program, "clamd": clamd, "spamd": spamd, "controls": CONTROLS}
        with System(place, settings={"service": {"workers": 1}}, **options) as system:
            yield Lab(system, killer)


def message_of(size: int) -> bytes:
    return HEAD + os.urandom(size)


def test_each_copy_has_its_own_headers_and_the_same_bytes(lab: Lab) -> None:
    message = message_of(100_000)
    copies = {q.envelope.recipients: q.message for q in lab.deliver(message).queued}
    assert set(copies) == COPIES
    lines = {}
    for to, copy in copies.items():
        assert copy.endswith(message), to  # no subject tag here: marked or not, every byte of it
        lines[to] = copy[: -len(message)].decode()
    assert "virus=clean; spam=skipped" in lines[(b"virus@x.example",)]
    assert "virus=skipped; spam=found" in lines[(b"spam@x.example",)]
    assert "X-Spam-Flag: YES" in lines[(b"jail@x.example",)]
    alone = {to: [line for line in text.splitlines() if "Envelope" in line] for to, text in lines.items()}
    assert alone == {
        (b"virus@x.example",): ["X-Envelope-To: virus@x.example"],
        (b"spam@x.example",): ["X-Envelope-To: spam@x.example"],
        (b"jail@x.example",): ["X-Envelope-To: moved@x.example"],
        (b"none@x.example", b"other@x.example"): [],
    }


@pytest.mark.parametrize("size", [200, 150_000], ids=["small", "large"])
def test_the_hook_is_killed_at_every_step(lab: Lab, size: int) -> None:
    message, queued = message_of(size), []
    for step in range(1, 3000):
        d = lab.killed_at(step, message)
        queued.append(lab.check(d, message))
        if d.status == 0:
            break
        assert d.status == -signal.SIGKILL
        if queued[-1] or step % 10 == 0:
            lab.retry(message)
    assert d.status == 0, "it was still killed at the last step"
    assert len(queued) > 80
    assert {0, len(COPIES)} <= set(queued)


def test_the_hook_is_killed_at_every_moment_of_the_commit(lab: Lab) -> None:
    message = message_of(5000)
    for done in range(len(COPIES)):
        d = lab.killed_at(done + 1, message, who="commit")
        assert (d.status, lab.check(d, message)) == (-signal.SIGKILL, done)
        assert lab.report() is None, "the log has to warn"
        lab.retry(message)
    assert lab.killed_at(len(COPIES) + 1, message, who="commit").status == 0


def test_a_part_is_killed_at_every_step_before_it_is_the_real_queue(lab: Lab) -> None:
    message = message_of(5000)
    for step in range(1, 100):
        d = lab.killed_at(step, message, who="part")
        if d.status == 0:
            break
        assert (d.status, lab.check(d, message)) == (81, 0)
    assert lab.check(d, message) == len(COPIES)
    assert step > 3


def test_the_hook_of_one_copy_is_killed_at_every_step(lab: Lab) -> None:
    """Before it became the real qmail-queue nothing is queued; afterwards it is no longer there to be killed."""
    message = message_of(150_000)
    for step in range(1, 1000):
        d = lab.killed_at(step, message, b"none@x.example")
        if d.status == 0:
            break
        assert (d.status, d.queued) == (-signal.SIGKILL, ())
    assert len(d.queued) == 1
    assert step > 20


MISHAPS = {"killed": {"signal": "9"}, "crashed": {"signal": "11"}, "full": {"exit": "53"}, "trouble": {"exit": "71"}}


@pytest.mark.parametrize("point", ["message", "envelope", "end"])
@pytest.mark.parametrize("mishap", MISHAPS.values(), ids=MISHAPS)
def test_the_real_queue_of_one_copy_or_of_all_fails(lab: Lab, point: str, mishap: dict[str, str]) -> None:
    message = message_of(70_000)
    for which in ("virus=clean", "spam=found", "X-Envelope-To: moved", "X-Test"):
        d = lab.deliver(message, knobs={"at": point, "when": which, **mishap})
        assert d.status not in (0, 31), "a mishap is never a success and never a permanent refusal"
        queued = lab.check(d, message)
        assert (point == "end") or queued == 0
        lab.retry(message)


@contextlib.contextmanager
def disk(place: Path, options: str) -> Iterator[Path]:
    """A small file system of its own."""
    place.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o {options} none {place} 2>/dev/null"):
        pytest.skip("cannot mount a small file system here")
    try:
        yield place
    finally:
        os.system(f"umount {place}")


def test_no_more_files_fit_on_the_disk(lab: Lab, tmp_path: Path) -> None:
    message, outcomes = message_of(1000), set()
    for files in range(1, 40):
        with disk(tmp_path / str(files), f"nr_inodes={files}") as full:
            full.chmod(0o1777)
            d = lab.deliver(message, env={"STANDIN_DIR": str(full)})
            outcomes.add((d.status, lab.check(d, message)))
        if d.status == 0:
            break
    assert outcomes == {(63, 0), (0, len(COPIES))}


def test_no_more_bytes_fit_on_the_disk(lab: Lab, tmp_path: Path) -> None:
    """Also where the last page is missing only when the commit has begun."""
    outcomes = {}
    for pages in range(1, 80):
        with disk(tmp_path / str(pages), f"size={pages * 4096}") as full:
            full.chmod(0o1777)
            message = message_of(40_000)
            d = lab.deliver(message, env={"STANDIN_DIR": str(full)})
            outcomes[pages] = (d.status, lab.check(d, message))
        if d.status == 0:
            break
    assert d.status == 0
    assert (53, 0) in outcomes.values()
    lab.retry(message)
