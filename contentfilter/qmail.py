"""Where qmail and the hook are: paths, versions, and the hook's reading of its own configuration."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from contentfilter.errors import RefusedError

DEFAULT_CONF = "/etc/contentfilter/queue.conf"


_VERSION = re.compile(rb"contentfilter-queue (\S+) protocol \d+\n")


@dataclass(frozen=True, slots=True)
class QmailPaths:
    """A qmail and what stands in its bin directory."""

    qmail: Path

    @property
    def queue(self) -> Path:
        return self.qmail / "bin" / "qmail-queue"

    @property
    def real(self) -> Path:
        return self.qmail / "bin" / "qmail-queue.real"


@dataclass(frozen=True, slots=True)
class Conf:
    """What the hook itself makes of a queue.conf; ``problem`` where it refuses it."""

    values: dict[str, str]
    problem: str = ""

    def target(self) -> Path:
        return Path(self.values.get("queue", "/var/qmail/bin/qmail-queue.real"))


def version_of(program: Path) -> str | None:
    """The version of the hook that ``program`` is; None: it is something else, or not there."""
    try:
        found = _VERSION.search(program.read_bytes())
    except OSError:
        return None
    return found[1].decode("ascii", "replace") if found else None


def packaged_hook(given: str | None) -> Path:
    """The hook that came with this package: beside the running interpreter, or in its scripts directory."""
    if given is not None:
        places = [Path(given)]
    else:
        directories = [sysconfig.get_path("scripts"), os.path.dirname(sys.executable), os.path.dirname(sys.argv[0])]
        places = [Path(d, "contentfilter-queue") for d in directories]
        places += [Path(found) for found in [shutil.which("contentfilter-queue")] if found]
    for place in places:
        if version_of(place) is not None:
            return place.resolve()
    raise RefusedError(f"no contentfilter-queue in {', '.join(map(str, places))}; name it with --binary")


def read_conf(program: Path, conf: Path) -> Conf:
    """Let the hook read its configuration; it knows best."""
    environ = os.environ | {"CONTENTFILTER_QUEUE_CONF": str(conf)}
    run = subprocess.run([program, "--check"], env=environ, capture_output=True, text=True, timeout=10, check=False)
    if run.returncode:
        problem = run.stderr.strip().removeprefix("contentfilter-queue: ")
        return Conf({}, problem or f"{program} --check: status {run.returncode}")
    return Conf(dict(line.split(" ", 1) for line in run.stdout.splitlines() if not line.startswith("environ ")))
