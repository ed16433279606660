#!/usr/bin/env python3
"""``make attack``: honest mail at 50 messages per second while one hostile party after the other attacks the daemon.

Each attack of bench/attacks gets a private daemon with two workers and a real clamd. The load runs for half the time
before the attack, for the whole time during it, and for half the time after it. Bounds:

    p99        of honest mail at most doubles against the better one of the quiet halves, where it exceeds --floor
               milliseconds
    deferred   no honest message is deferred or refused
    lost       none is lost, none is queued twice
    named      ``contentfilter status`` names the uid of a local user who attacks
    metric     a metric counts the attack
    died       no worker and no supervisor dies
    memory     no process exceeds --memory MiB
    leak       descriptors of the processes are as many as before, give or take a few
    other      the attack's own check, and no traceback in the log

Root only: the attackers run as another user. Exit status 0 only if every bound holds.
"""

import argparse
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

from attack_result import HEADING, Bounds, Course, Row, Sample, Seen  # noqa: E402
from attacks.kit import Place  # noqa: E402  (tests/ and bench/ are on the path only now)
from attacks.machine import HANG  # noqa: E402
from attacks.peers import PASSWORD  # noqa: E402
from attacks.table import ATTACKS, NOBODY  # noqa: E402
from lab.clamd import Clamd  # noqa: E402
from lab.compiler import compiled  # noqa: E402
from lab.lifeline import end_with_us  # noqa: E402
from lab.process import exit_on_sigterm, free_port  # noqa: E402
from lab.scrape import address, scrape  # noqa: E402
from lab.system import System, installed_hook  # noqa: E402
from observe import Observer  # noqa: E402

from contentfilter.config.keys import public, read_secret, write_secret  # noqa: E402

WARM_UP, SETTLE = 2.0, 3.0  # seconds
SPARE_DESCRIPTORS = 12
NOBODY_NAME = pwd.getpwuid(NOBODY).pw_name
REFUSE = ROOT / "tests" / "lab" / "refuse.c"
CONTROLS = {
    "options": "chksignature 1\nchkloadertype 1\n",
    "clamavclients": "@protected.example\nmarked@mixed.example virus=mark\nkept@mixed.example virus=remove\n",
    "spamdclients": "",
}


class Trial:
    """One attack on a system of its own in ``directory``."""

    def __init__(self, name: str, directory: Path, clamd: Clamd) -> None:
        self._attack = ATTACKS[name]
        self._directory, self._scratch = directory, directory / "scratch"
        self._clamd = clamd
        self._peer = str(directory / "peer") if self._attack.needs & {"clamd", "spamd"} else str(free_port())
        for path in (directory, self._scratch):
            path.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)
        self._scratch.chmod(0o1777)
        self.row = Row(name)

    def run(self, course: Course, bounds: Bounds) -> Row:
        with ExitStack() as stack:
            if "small disk" in self._attack.needs:
                stack.enter_context(small_disk(self._directory / "system" / "state"))
            system = self._system()
            system.__enter__()
            stack.callback(self._stop, system)
            place = self._place(system)
            observer = Observer(system.daemon.pid).start()
            stack.callback(observer.stop)
            samples, seen = self._measure(system, place, observer, course)
            self._judge(samples, seen, bounds)
            self._judge_daemon(system, place, observer, seen, bounds)
        return self.row

    def _system(self) -> System:
        needs, settings = self._attack.needs, self._settings()
        system = self._directory / "system"
        environ = {}
        if "hang" in needs:
            library = compiled(self._directory, "refuse.so", ["gcc", "-shared", "-fPIC", "-O1", REFUSE, "-ldl"])
            environ = {
                "LD_PRELOAD": str(library),
                "REFUSE_UNDER": str(system / "state"),
                "REFUSE_WITH": str(self._scratch / HANG),
            }
        controls = CONTROLS | ({"spamdclients": "victim@protected.example\n"} if "spamd" in needs else {})
        made = System(
            system,
            controls=controls,
            settings=settings,
            clamd=self._clamd,
            environ=environ,
            program=self._hook(),
            tracebacks_allowed=True,
        )
        system.chmod(0o755)
        return made

    def _settings(self) -> dict[str, dict[str, Any]]:
        needs = self._attack.needs
        settings: dict[str, dict[str, Any]] = {
            "service": {"workers": 2},
            "http": {"listen": "127.0.0.1:0", "page": "on"},
            "tables": {"source": "files", "refresh": 5.0},
        }
        if "clamd" in needs:
            settings["clamd"] = {"backends": [f"unix:{self._peer}"], "proof": 0.0, "timeout_base": 10.0}
        if "spamd" in needs:
            settings["spamd"] = {"backends": [f"unix:{self._peer}"], "timeout_base": 10.0}
        if "small disk" in needs:
            settings["service"]["disk_floor"] = 0
        if "mariadb" in needs:
            password = self._scratch / "password-file"
            password.write_bytes(PASSWORD)
            password.chmod(0o600)
            settings["mariadb"] = {"port": int(self._peer), "password_file": str(password)}
        if "feed" in needs:
            secret = write_secret(str(self._directory / "feed.key"))
            (self._directory / "collectors").write_bytes(public(secret) + b"  collector\n")
            settings["events"] = {
                "listen": f"tcp://127.0.0.1:{self._peer}",
                "key": str(self._directory / "feed.key"),
                "clients": str(self._directory / "collectors"),
            }
        for section, keys in self._attack.settings.items():
            settings.setdefault(section, {}).update(keys)
        return settings

    def _hook(self) -> Path:
        """A copy that every user may run."""
        installed = installed_hook()
        assert installed is not None, "make attack installs it"
        return Path(shutil.copy2(installed, self._directory / "hook"))

    def _place(self, system: System) -> Place:
        key = self._directory / "feed.key"
        secret = read_secret(str(key)) if key.exists() else b""
        return Place(
            queue=system.daemon.socket,
            run=str(system.directory),
            state=str(system.directory / "state"),
            control=str(system.directory / "control"),
            config=str(system.daemon.config),
            hook=str(system.program),
            hook_conf=str(system.queue_conf()),
            scratch=str(self._scratch),
            http=int(address(system.daemon).rpartition(":")[2]),
            daemon=system.daemon.pid,
            clamd=self._clamd.pid,
            feed=f"tcp://127.0.0.1:{self._peer}" if secret else "",
            feed_key=secret.decode(),
            peer=self._peer,
        )

    # The phases

    def _measure(self, system: System, place: Place, observer: Observer, course: Course) -> tuple[list[Sample], Seen]:
        out = self._directory / "honest"
        seen = Seen()
        seconds = course.seconds
        with self._load(place, out, course.rate) as load:
            time.sleep(WARM_UP)
            used = observer.cpu()
            seen.quiet.append(_phase(seconds / 2))
            quiet = (observer.cpu() - used) / (seconds / 2)
            seen.pids, seen.descriptors = observer.lasting(), observer.descriptors()
            seen.before = self._metrics(system)
            with self._attacker(place):
                used = observer.cpu()
                seen.attacked = _phase(seconds)
                self.row.cpu = quiet, (observer.cpu() - used) / seconds
                seen.status = _status(place)
                seen.after = self._metrics(system)
            time.sleep(SETTLE)
            seen.quiet.append(_phase(seconds / 2))
            assert load.stdin is not None
            load.stdin.close()
            try:
                load.wait(120)
            except subprocess.TimeoutExpired:
                self.row.broken.append("honest hooks still wait")
        words = [line.split() for line in out.read_text().splitlines()]
        return [Sample(float(due), float(took), int(code), int(n)) for due, took, code, n in words], seen

    @contextmanager
    def _load(self, place: Place, out: Path, rate: float) -> Iterator["subprocess.Popen[bytes]"]:
        queued = self._directory / "queued"
        queued.mkdir()
        queued.chmod(0o1777)
        protected = "1" if self._attack.protected else "0"
        words = [sys.executable, str(ROOT / "bench" / "honest.py")]
        words += [place.hook, place.hook_conf, str(queued), str(rate), protected, str(out)]
        with _group(words, subprocess.PIPE) as process:
            yield process

    @contextmanager
    def _attacker(self, place: Place) -> Iterator[None]:
        attack = self._attack
        words = [sys.executable, str(ROOT / "bench" / "attacks"), self.row.name]
        words += [str(attack.uid), str(attack.gid), json.dumps(asdict(place))]
        with _group(words) as process:
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                self.row.broken.append("the attacker could not start")
            yield
            if process.poll() is not None:
                self.row.broken.append(f"the attacker ended with {process.returncode}")
        if attack.undo is not None:
            attack.undo(place)

    def _metrics(self, system: System) -> dict[str, float]:
        try:
            samples = scrape(system.daemon)
        except OSError:
            self.row.broken.append("no answer from /metrics")
            return {}
        return {name: samples.total(name) for name in self._attack.metrics}

    # Judgement

    def _judge(self, samples: list[Sample], seen: Seen, bounds: Bounds) -> None:
        row, attack = self.row, self._attack
        before, attacked, after = (
            sorted(s.seconds for s in samples if start <= s.due < end)
            for start, end in (seen.quiet[0], seen.attacked, seen.quiet[1])
        )
        row.messages = len(samples)
        row.before, row.attacked, row.after = map(_percentiles, (before, attacked, after))
        row.longest = 1000 * max(attacked, default=0.0)
        queued = Counter(map(_number, (self._directory / "queued").glob("*.msg")))
        accepted = {s.number for s in samples if s.status == 0}
        row.deferred = len(samples) - len(accepted)
        row.lost = sum(not queued[number] for number in accepted)
        row.doubled = sum(count > 1 or number not in accepted for number, count in queued.items())
        grown = {name: seen.after.get(name, 0) - seen.before.get(name, 0) for name in attack.metrics}
        if best := max(grown, key=lambda name: grown[name], default=""):
            row.metric = f"{best} +{grown[best]:.0f}"
        if attack.named:
            row.named = re.search(rf"\b(?:{NOBODY_NAME}|{NOBODY})\b", seen.status) is not None
        limit = max(2 * min(row.before[1], row.after[1]), bounds.floor)
        checks = {
            f"p99 {row.attacked[1]:.0f} above {limit:.0f}": row.attacked[1] > limit,
            "deferred": bool(row.deferred),
            "lost": bool(row.lost or row.doubled),
            "not named": row.named is False,
            "no metric": bool(grown) and max(grown.values()) <= 0,
        }
        row.broken += [what for what, broken in checks.items() if broken]

    def _judge_daemon(self, system: System, place: Place, observer: Observer, seen: Seen, bounds: Bounds) -> None:
        row = self.row
        row.memory, row.together, row.processes = dict(observer.memory), observer.together, dict(observer.most)
        if died := len(seen.pids - observer.lasting()) + len(system.daemon.log("receiver.died")):
            row.broken.append(f"{died} processes died")
        row.broken += [f"{role} {size} MiB" for role, size in row.memory.items() if size > bounds.memory]
        for role, count in observer.descriptors().items():
            if count > seen.descriptors.get(role, count) + SPARE_DESCRIPTORS:
                row.broken.append(f"{role} has {count} descriptors, {seen.descriptors[role]} before")
        if found := system.daemon.tracebacks():
            row.broken.append(f"{len(found)} tracebacks: {json.dumps(found[0])[-300:]}")
        if self._attack.check is not None and (problem := self._attack.check(place)):
            row.broken.append(problem)

    def _stop(self, system: System) -> None:
        try:
            system.__exit__(None, None, None)
        except (AssertionError, TimeoutError, subprocess.TimeoutExpired) as error:
            self.row.broken.append(f"end: {error}"[:200])


def _phase(seconds: float) -> tuple[float, float]:
    began = time.monotonic()
    time.sleep(seconds)
    return began, time.monotonic()


def _percentiles(ordered: list[float]) -> tuple[float, float]:
    if not ordered:
        return 0.0, 0.0
    return 1000 * ordered[len(ordered) // 2], 1000 * ordered[len(ordered) * 99 // 100]


def _number(path: Path) -> int:
    found = re.search(rb"^X-Number: (\d+)$", path.read_bytes(), re.MULTILINE)
    return int(found[1]) if found else -1


def _status(place: Place) -> str:
    words = [sys.executable, "-P", "-m", "contentfilter", "--config", place.config, "status"]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False).stdout


@contextmanager
def _group(words: list[str], stdin: int = subprocess.DEVNULL) -> Iterator["subprocess.Popen[bytes]"]:
    """A process group that is killed at the end."""
    path = os.pathsep.join(map(str, (ROOT / "tests", ROOT / "bench")))
    environ = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(words, stdin=stdin, stdout=subprocess.PIPE, env=environ, start_new_session=True)
    end_with_us(process.pid)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def small_disk(place: Path) -> Iterator[None]:
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=0700", "none", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="an attack, or a part of its name")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of each attack (60)")
    parser.add_argument("--rate", type=float, default=50.0, help="honest messages per second (50)")
    parser.add_argument("--floor", type=float, default=0.0, metavar="MS", help="a p99 below it is never too high (0)")
    parser.add_argument("--memory", type=int, default=512, metavar="MIB", help="bound for each process (512)")
    parser.add_argument("--list", action="store_true", help="list the attacks")
    parser.add_argument("--json", action="store_true", help="a JSON object for each attack")
    options = parser.parse_args()
    chosen = [n for n in ATTACKS if not options.only or any(part in n for part in options.only)]
    if options.list:
        for name in chosen:
            print(f"{name:26} {ATTACKS[name].kind}")
        return 0
    if os.geteuid():
        parser.error("only root can act as another user, mount file systems, and stop clamd")
    course, bounds = Course(options.seconds, options.rate), Bounds(options.floor, options.memory)
    broken = 0
    with tempfile.TemporaryDirectory(prefix="cf-attack-", dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        print(HEADING, file=sys.stderr)
        with Clamd(directory / "clamd") as clamd:
            for number, attack in enumerate(chosen):
                place = directory / str(number)
                row = Trial(attack, place, clamd).run(course, bounds)
                print(json.dumps(asdict(row)) if options.json else row.text(), flush=True)
                broken += bool(row.broken) and not ATTACKS[attack].recorded_only
                shutil.rmtree(place, ignore_errors=True)
    return 1 if broken else 0


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
