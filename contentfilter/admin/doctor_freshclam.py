"""The doctor's examination of freshclam: does it run, did it succeed, does clamd learn of it and load what it brought.

For a clamd on this machine only. Files and /proc are read and clamd is asked for its version; nothing is sent to
any other host. Sources: freshclam.conf(5), clamd.conf(5); a database begins with 512 bytes of text,
``ClamAV-VDB:DATE:VERSION:…``.
"""

import asyncio
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from contentfilter.admin.clamd_conf import is_of, parse_conf, size
from contentfilter.admin.diagnostic import AS_ROOT, Diagnostic, Level
from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError
from contentfilter.model import readable
from contentfilter.scanners.clamd import ClamdScanner
from contentfilter.settings import Settings
from contentfilter.wire.clamd import Version

OK, WARNING, ERROR = Level.OK, Level.WARNING, Level.ERROR
FRESHCLAM_CONF = "/etc/clamav/freshclam.conf"
DATABASE = "/var/lib/clamav"
SELF_CHECK = 600  # seconds; clamd's own look at the directory, where SelfCheck is not set
GRACE = 300.0  # seconds for loading
PATIENCE = 4.0  # seconds for clamd
LOG_READ = 1 << 16  # bytes at the end of freshclam's log
SHOWN = 200  # characters of a line of it
_START = b"update process started at"
_TROUBLE = re.compile(rb"(?:ERROR: *|-> !)\s*(.+)|(Clamd was NOT notified.*)|(.*\bcool-down\b.*)")
_CRON = ("etc/crontab", "etc/cron.d/*", "etc/cron.hourly/*", "etc/cron.daily/*", "var/spool/cron/crontabs/*")
_UNITS = "etc/systemd/system/*.wants/*freshclam*"


def freshclam(settings: Settings, clamd_conf: Path, conf: Path, root: Path = Path("/")) -> Iterator[Diagnostic]:
    """``root``: where processes, cron tables and units are looked for."""
    try:
        clamd = parse_conf(clamd_conf.read_text(errors="replace"))
    except OSError:
        return  # told with clamd's limits
    ours = [backend for backend in settings.clamd.backends if is_of(clamd, Address.parse(backend))]
    if not ours:
        return
    directory = clamd.get("DatabaseDirectory", "")
    self_check = size(clamd.get("SelfCheck", ""))
    yield from loaded(settings, ours[0], Path(directory or DATABASE), SELF_CHECK if self_check is None else self_check)
    try:
        values = parse_conf(conf.read_text(errors="replace"))
    except FileNotFoundError:
        remedy = "Install clamav-freshclam, or name its configuration with --freshclam-conf."
        yield Diagnostic(WARNING, "freshclam", f"there is no {conf}: what keeps the database new is not known", remedy)
        return
    except OSError as error:
        yield Diagnostic(WARNING, "freshclam", f"{conf}: {error.strerror}", AS_ROOT)
        return
    yield from configuration(settings, values, conf, directory, self_check)
    yield schedule(root)
    yield outcome(values.get("UpdateLogFile", ""))


def loaded(settings: Settings, backend: str, directory: Path, self_check: int) -> Iterator[Diagnostic]:
    """Whether clamd has what lies in its directory."""
    remedy = "Let it load: clamdscan --reload, or: systemctl restart clamav-daemon"
    try:
        newest = on_disk(directory)
    except FileNotFoundError:
        return  # not where it usually is
    except OSError as error:
        yield Diagnostic(WARNING, "freshclam", f"{error.filename}: {error.strerror}", AS_ROOT)
        return
    if newest is None:
        return  # clamd without a database is told under clamd
    number, path = newest
    try:
        asked = ClamdScanner(settings.clamd).version(Address.parse(backend), Deadline.after(PATIENCE))
        version: Version = asyncio.run(asked)
    except BackendError:
        return  # told under clamd
    waits = time.time() - path.stat().st_mtime
    if version.database is not None and version.database > number:
        what = f"clamd has database {version.database}, {path} is only {number}: it reads another directory"
        yield Diagnostic(WARNING, "freshclam", what, f"Compare DatabaseDirectory with what clamd says: {backend}")
    elif version.database == number:
        yield Diagnostic(OK, "freshclam", f"clamd has loaded database {number} of {directory}")
    elif waits < self_check + GRACE:
        yield Diagnostic(
            OK, "freshclam", f"database {number} came {waits:.0f} s ago; clamd still has {version.database}"
        )
    else:
        what = f"clamd has database {version.database or 'none'}; {path}, number {number}, lies there since "
        yield Diagnostic(WARNING, "freshclam", what + f"{waits / 3600:.1f} hours and is not loaded", remedy)


def on_disk(directory: Path) -> tuple[int, Path] | None:
    """Number and file of the newest daily database. Raises OSError."""
    found = []
    for path in directory.iterdir():
        if path.name in ("daily.cvd", "daily.cld", "daily.cud"):
            with path.open("rb") as file:
                words = file.read(512).split(b":")
            if words[0] == b"ClamAV-VDB" and len(words) > 2 and re.fullmatch(rb"[0-9]{1,9}", words[2]):
                found.append((int(words[2]), path))
    return max(found, default=None)


def configuration(
    settings: Settings, values: dict[str, str], conf: Path, directory: str, self_check: int | None
) -> Iterator[Diagnostic]:
    """Whether it feeds this clamd, and tells it. A directory that is not set was chosen when ClamAV was compiled."""
    theirs = values.get("DatabaseDirectory", "")
    if theirs and directory and os.path.realpath(theirs) != os.path.realpath(directory):
        what = f"{conf}: freshclam keeps {theirs} new, but clamd reads {directory}"
        yield Diagnostic(ERROR, "freshclam", what, "Set DatabaseDirectory alike in both, and restart both.")
    told = values.get("NotifyClamd")
    if told is None:
        if self_check == 0:
            what = f"{conf} has no NotifyClamd, and SelfCheck is 0: clamd never loads what freshclam brings"
            yield Diagnostic(WARNING, "freshclam", what, f"Set NotifyClamd in {conf} to clamd's configuration.")
        else:
            seconds = SELF_CHECK if self_check is None else self_check
            yield Diagnostic(OK, "freshclam", f"clamd looks for a new database every {seconds} s")
        return
    try:
        clamd = parse_conf(Path(told).read_text(errors="replace"))
    except OSError as error:
        what = f"{conf}: NotifyClamd {told}: {error.strerror}"
        remedy = AS_ROOT if isinstance(error, PermissionError) else "Let it name clamd's configuration."
        yield Diagnostic(WARNING, "freshclam", what, remedy)
        return
    if any(is_of(clamd, Address.parse(backend)) for backend in settings.clamd.backends):
        yield Diagnostic(OK, "freshclam", f"it tells clamd of a new database (NotifyClamd {told})")
    else:
        what = f"{conf}: NotifyClamd {told} is the configuration of another clamd than we ask"
        yield Diagnostic(WARNING, "freshclam", what, "Let it name the configuration of the clamd in [clamd] backends.")


def schedule(root: Path) -> Diagnostic:
    """Whether anything runs it: itself in the background, a timer, or cron."""
    for comm in root.glob("proc/[0-9]*/comm"):
        try:
            if comm.read_bytes().strip() == b"freshclam":
                return Diagnostic(OK, "freshclam", f"it runs, with pid {comm.parent.name}")
        except OSError:
            continue  # it has ended meanwhile
    units = [unit.name for unit in root.glob(_UNITS)]
    timers = [name for name in units if name.endswith(".timer")]
    if timers:
        return Diagnostic(OK, "freshclam", f"{timers[0]} starts it")
    for pattern in _CRON:
        for table in sorted(root.glob(pattern)):
            try:
                text = table.read_text(errors="replace")
            except OSError:
                continue
            if table.name.startswith("freshclam") or re.search(r"^(?![ \t]*#).*freshclam", text, re.MULTILINE):
                return Diagnostic(OK, "freshclam", f"cron starts it ({table})")
    if units:
        what, remedy = f"{units[0]} is enabled, but freshclam does not run", f"See why: systemctl status {units[0]}"
    else:
        what, remedy = (
            "nothing runs it: no process, no timer, no cron table",
            "Run it: systemctl enable --now clamav-freshclam",
        )
    return Diagnostic(WARNING, "freshclam", what, remedy)


def outcome(log: str) -> Diagnostic:
    """What its log says of the last run."""
    if not log:
        return Diagnostic(OK, "freshclam", "it keeps no log of its own (UpdateLogFile)")
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - LOG_READ))
            text = file.read(LOG_READ)
    except FileNotFoundError:
        return Diagnostic(OK, "freshclam", f"{log} is not there yet")
    except OSError as error:
        return Diagnostic(WARNING, "freshclam", f"{log}: {error.strerror}", AS_ROOT)
    _, started, last = text.rpartition(_START)
    if not started:
        return Diagnostic(OK, "freshclam", f"{log} does not tell of an update")
    first, *lines = last.split(b"\n")
    when = readable(first.strip()[:40])
    for line in lines:
        if trouble := _TROUBLE.search(line):
            said = readable(next(filter(None, trouble.groups())).strip()[:SHOWN])
            remedy = f"Read {log}; try by hand: freshclam"
            return Diagnostic(WARNING, "freshclam", f"the update of {when} had trouble: {said}", remedy)
    return Diagnostic(OK, "freshclam", f"the update of {when} had no trouble")
