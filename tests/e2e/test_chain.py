"""Every way to break the chain from the hook to the scanners: first line of ``status``, typed remedy, recovery."""

import os
import re
import shlex
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e import mails
from e2e.test_status import command, status, status_until
from lab import hook as hook_lab
from lab.clamd import Clamd
from lab.spamd import Spamd
from lab.system import System
from style.tree import ROOT

SEEN, RECOVERED = 65.0, 10.0  # seconds
HEADINGS = re.findall(r"^## (.+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
MakeSystem = Callable[..., System]


@dataclass
class Chain:
    """A system whose canary goes through a hook and a queue.conf of its own."""

    system: System
    directory: Path

    @property
    def hook(self) -> Path:
        return self.directory / "hook"

    @property
    def conf(self) -> Path:
        return self.directory / "canary.conf"


@pytest.fixture
def chain(make_system: MakeSystem, clamd: Clamd, spamd: Spamd, lab_directory: Path, tmp_path: Path) -> Chain:
    hook, conf = tmp_path / "hook", tmp_path / "canary.conf"
    hook.write_bytes(hook_lab.build(lab_directory).read_bytes())
    hook.chmod(0o755)
    settings = {
        "canary": {"enabled": True, "every": 1.0, "hook": str(hook), "conf": str(conf)},
        "service": {"stuck_after": 30.0},
    }
    conf.write_text("queue /nonexistent\n")
    system = make_system(clamd=clamd, spamd=spamd, settings=settings)
    conf.write_text(f"socket {system.daemon.socket}\nqueue /nonexistent\n")
    status_until(system, lambda s: bool(s["canary"]) and s["ok"])
    return Chain(system, tmp_path)


def misspelt(chain: Chain) -> Callable[[], None]:
    good = chain.conf.read_text()
    chain.conf.write_text(good.replace("socket ", "sokcet "))
    return lambda: void(chain.conf.write_text(good))


def other_socket(chain: Chain) -> Callable[[], None]:
    good = chain.conf.read_text()
    chain.conf.write_text(good.replace("queue.sock", "cue.sock"))
    return lambda: void(chain.conf.write_text(good))


def missing(chain: Chain) -> Callable[[], None]:
    away = chain.hook.rename(chain.directory / "away")
    return lambda: void(away.rename(chain.hook))


def not_executable(chain: Chain) -> Callable[[], None]:
    chain.hook.chmod(0o644)
    return lambda: chain.hook.chmod(0o755)


def closed_socket(chain: Chain) -> Callable[[], None]:
    Path(chain.system.daemon.socket).chmod(0o600)
    return lambda: type_remedy(chain.system)


def removed_socket(chain: Chain) -> Callable[[], None]:
    path = Path(chain.system.daemon.socket)
    away = path.rename(path.with_suffix(".away"))
    return lambda: void(away.rename(path))


def stopped_worker(chain: Chain) -> Callable[[], None]:
    (worker,) = (each["pid"] for each in status(chain.system)[1]["workers"])  # hooks are children, too
    os.kill(worker, signal.SIGSTOP)
    return lambda: os.kill(worker, signal.SIGCONT)


def void(result: object) -> None:
    """For a lambda that returns nothing."""


def remedies(found: dict[str, Any]) -> list[str]:
    return [trouble["remedy"] for trouble in found["troubles"] if trouble["effect"] == "stops"]


def type_remedy(system: System) -> None:
    """The first remedy, as an administrator would type it."""
    subprocess.run(shlex.split(remedies(status(system)[1])[0]), check=True, timeout=30)


UNREACHED, UNREACHED_HEADING = "MAIL DOES NOT REACH THE FILTER: ", "The hook cannot reach the daemon"
BREAKS: dict[str, tuple[Callable[[Chain], Callable[[], None]], str, str]] = {
    "queue.conf: unknown name": (misspelt, UNREACHED, UNREACHED_HEADING),
    "queue.conf: another socket": (other_socket, UNREACHED, UNREACHED_HEADING),
    "hook missing": (missing, UNREACHED, UNREACHED_HEADING),
    "hook not executable": (not_executable, UNREACHED, UNREACHED_HEADING),
    "socket mode": (closed_socket, UNREACHED, UNREACHED_HEADING),
    "socket removed": (removed_socket, UNREACHED, UNREACHED_HEADING),
    "worker stuck": (stopped_worker, "MAIL WAITS: no worker accepts mail", "The daemon is not ready"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_chain_is_the_first_line_and_its_repair_shows_soon(chain: Chain, name: str) -> None:
    break_it, verdict, heading = BREAKS[name]
    repair = break_it(chain)
    found = status_until(chain.system, lambda s: not s["flowing"], seconds=SEEN)
    assert found["verdict"].startswith(verdict)
    assert heading in HEADINGS
    assert next(t["runbook"] for t in found["troubles"] if t["effect"] == "stops") == heading
    done = command(chain.system, "status")
    assert (done.returncode, done.stdout.splitlines()[0].startswith(verdict)) == (1, True)
    repair()
    began = time.monotonic()
    status_until(chain.system, lambda s: s["flowing"], seconds=RECOVERED)
    assert time.monotonic() - began < RECOVERED
    assert len(chain.system.deliver(mails.PLAIN, b"nobody@elsewhere.example").queued) == 1
    assert stat.S_IMODE(os.stat(chain.system.daemon.socket).st_mode) == 0o666


def test_the_last_minutes_survive_a_restart_and_backends_have_events(
    make_system: MakeSystem, lab_directory: Path, spamd: Spamd
) -> None:
    with Clamd(lab_directory / f"chain{os.getpid()}") as own:
        system = make_system(clamd=own, spamd=spamd)
        system.deliver(mails.PLAIN)
        system.deliver(mails.VIRUS)
        own.stop()
        assert system.deliver(mails.PLAIN).status != 0
        (down,) = system.daemon.wait_for("backend.down")
        assert (down["scanner"], down["backend"], down["why"][:4]) == ("clamd", own.backend, "down")
        own.start()
        (up,) = system.daemon.wait_for("backend.up")
        assert (up["scanner"], up["seconds"] > 0) == ("clamd", True)
        before = status_until(system, lambda s: s["window"]["messages"] == 3)["window"]
        assert system.daemon.stop() == 0
        system.daemon.start()
        after = status_until(system, lambda s: s["window"]["messages"] == 3)["window"]
        for name in ("bytes", "decisions", "deferred", "rejected", "unchecked"):
            assert after[name] == before[name]
        assert system.deliver(mails.PLAIN).status == 0
        status_until(system, lambda s: s["window"]["messages"] == 4)
