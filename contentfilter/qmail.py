"""Paths of qmail and the hook, versions, and the configuration as the hook itself reads it."""

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
    """Home directory of qmail, and programs in its bin directory."""

    qmail: Path

    @property
    def queue(self) -> Path:
        return self.qmail / "bin" / "qmail-queue"

    @property
    def real(self) -> Path:
        return self.qmail / "bin" / "qmail-queue.real"


@dataclass(frozen=True, slots=True)
class Conf:
    """Values of a queue.conf as the hook reads it; ``problem`` if it rejects the file."""

    values: dict[str, str]
    problem: str = ""

    def target(self) -> Path:
        return Path(self.values.get("queue", "/var/qmail/bin/qmail-queue.real"))


def version_of(program: Path) -> str | None:
    """Version of the hook; None if ``program`` is not a hook or does not exist."""
    try:
        found = _VERSION.search(program.read_bytes())
    except OSError:
        return None
    return found[1].decode("ascii", "replace") if found else None


def packaged_hook(given: str | None) -> Path:
    """The hook of this package: beside the interpreter, or in its scripts directory. Raises RefusedError."""
    if given is not None:
        candidates = [Path(given)]
    else:
        directories = [sysconfig.get_path("scripts"), os.path.dirname(sys.executable), os.path.dirname(sys.argv[0])]
        candidates = [Path(d, "contentfilter-queue") for d in directories]
        candidates += [Path(found) for found in [shutil.which("contentfilter-queue")] if found]
    for path in candidates:
        if version_of(path) is not None:
            return path.resolve()
    raise RefusedError(f"no contentfilter-queue in {', '.join(map(str, candidates))}; use --binary FILE")


def read_conf(program: Path, conf: Path) -> Conf:
    """Read a queue.conf with ``contentfilter-queue --check``. Raises OSError and SubprocessError."""
    environ = os.environ | {"CONTENTFILTER_QUEUE_CONF": str(conf)}
    run = subprocess.run([program, "--check"], env=environ, capture_output=True, text=True, timeout=10, check=False)
    if run.returncode:
        problem = run.stderr.strip().removeprefix("contentfilter-queue: ")
        return Conf({}, problem or f"{program} --check: status {run.returncode}")
    return Conf(dict(line.split(" ", 1) for line in run.stdout.splitlines() if not line.startswith("environ ")))
