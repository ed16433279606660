"""Doctor: checks whether this server is set up so that mail flows and is scanned, and names a remedy for each fault.

Read-only: nothing is changed and no mail is sent. The state of the running daemon is passed in as :class:`Daemon`;
:func:`probes` returns independent probes for :func:`contentfilter.admin.diagnostic.examine`.
"""

import os
import pwd
import re
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from contentfilter.admin import doctor_scanners
from contentfilter.admin.diagnostic import AS_ROOT, Diagnostic, DiagnosticProbe, Level
from contentfilter.admin.qmail import answers, examine
from contentfilter.qmail import Conf, QmailPaths, read_conf, version_of
from contentfilter.settings import LogSettings, Settings
from contentfilter.tables.keeper import TableState

OK, WARNING, ERROR = Level.OK, Level.WARNING, Level.ERROR
MIB = 1 << 20
START = "Start it: systemctl start contentfilter; if it ends again: contentfilter check."
DISK = ((64 * MIB, 0.01, ERROR), (512 * MIB, 0.05, WARNING))  # free bytes or share below which, level
MEMORY = ((64 * MIB, 0.02, ERROR), (256 * MIB, 0.05, WARNING))
DESCRIPTORS = 8  # for one message: connection, message, envelope, answer, scanners, and a reserve
WAITING_DESCRIPTORS = 3  # for a waiting one: connection, message, envelope
SPARE_DESCRIPTORS = 64  # of a worker without messages

# Strings in bin/qmail-smtpd, the first found counts: the product, and the dialects that fit it.
# From the sources of indimail-mta, sagredo's qmail, notqmail 1.07 to 1.09, netqmail 1.06, SPAMCONTROL 2.7.33 and a
# fork of s/qmail 3; those of s/qmail 4 were not available. An errors-to-client patch in netqmail or qmail
# cannot be detected, nor the version of notqmail.
MARKS: tuple[tuple[bytes, str, tuple[str, ...]], ...] = (
    (b"indimail-mta", "indimail", ("indimail",)),
    (b"IndiMail", "indimail", ("indimail",)),
    (b"ERROR_FD", "sagredo's qmail", ("sagredo",)),
    (b"fehcom.de/sqmail", "s/qmail", ("sqmail", "stock")),
    (b"control/badloadertypes", "s/qmail or SPAMCONTROL", ("sqmail", "stock")),
    (b"notqmail", "notqmail (1.09 and later: notqmail, before: stock)", ("notqmail", "stock")),
    (b"netqmail", "netqmail (with the custom error patch: simscan)", ("stock", "simscan")),
)


@dataclass(frozen=True, slots=True)
class Daemon:
    """State of the running daemon, as it reports it."""

    pid: int
    state: str
    socket: str
    wanted: int  # workers
    ready: tuple[int, ...]  # their pids
    problems: tuple[str, ...]
    tables: TableState | None


@dataclass(frozen=True, slots=True)
class Site:
    """Everything that the probes look at."""

    settings: Settings
    workers: int  # that the settings ask for
    children: int  # spamdchildren
    unknown_users: tuple[str, ...]  # of [origin]
    daemon: Daemon | None
    paths: QmailPaths
    queue_conf: Path
    hook: Path | None  # the packaged one
    clamd_conf: Path


def probes(site: Site) -> dict[str, DiagnosticProbe]:
    """All probes by name; the first word of a name is the topic of its diagnostics."""
    settings = site.settings
    found: dict[str, DiagnosticProbe] = {
        "daemon": partial(daemon, site),
        "users": partial(users, site),
        "socket": partial(queue_socket, site),
        "directories": partial(directories, site),
        "limits": partial(limits, site),
        "hook": partial(hook, site),
        "dialect": partial(dialect, site),
        "tables": partial(tables, site),
        "disk": partial(disk, site),
        "memory": memory,
        "log": partial(log, settings.log),
    }
    return found | doctor_scanners.probes(settings, site.workers, site.children, site.clamd_conf)


def daemon(site: Site) -> Iterator[Diagnostic]:
    reported, run = site.daemon, site.settings.service.run
    control = Path(run, "control.sock")
    if reported is None:
        forbidden = control.exists() and not os.access(control, os.R_OK | os.W_OK)
        what = f"this user may not use {control}" if forbidden else f"no daemon answers at {control}"
        yield Diagnostic(ERROR, "daemon", what, AS_ROOT if forbidden else START)
        return
    if control.stat().st_mode & 0o002:
        yield Diagnostic(ERROR, "daemon", f"every user may use {control}", f"Restrict it: chmod 660 {control}")
    ready = f"{reported.state}, {len(reported.ready)} of {reported.wanted} workers ready"
    complete = len(reported.ready) >= reported.wanted and reported.state == "ready"
    level = ERROR if not reported.ready else OK if complete else WARNING
    remedy = "" if level is OK else "Wait until it has started or drained; otherwise: journalctl -u contentfilter"
    yield Diagnostic(level, "daemon", ready, remedy)
    for problem in reported.problems:
        yield Diagnostic(WARNING, "daemon", f"not in force: {problem}", "Correct it, then: contentfilter reload")


def users(site: Site) -> Iterator[Diagnostic]:
    for name in site.unknown_users:
        remedy = "Enter the users that run qmail-smtpd and qmail-send in [origin], then: contentfilter reload"
        yield Diagnostic(WARNING, "users", f"[origin] no such user on this system: {name!r}", remedy)
    if not site.unknown_users:
        yield Diagnostic(OK, "users", "the users in [origin] exist")
    if site.daemon is not None:
        uid = _uid(site.daemon.pid)
        remedy = "Start it as the user contentfilter in its unit or run script." if uid == 0 else ""
        yield Diagnostic(OK if uid else WARNING, "users", f"the daemon runs as {_name(uid)}", remedy)


def queue_socket(site: Site) -> Iterator[Diagnostic]:
    path, wanted = Path(site.settings.listen.socket), int(site.settings.listen.mode, 8)
    again = "Create it again: systemctl restart contentfilter.socket contentfilter"
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        yield Diagnostic(ERROR, "socket", f"{path} does not exist", again)
        return
    if not stat.S_ISSOCK(mode):
        yield Diagnostic(ERROR, "socket", f"{path} is not a socket", f"Remove it. {again}")
        return
    mode = stat.S_IMODE(mode)
    if mode & wanted != wanted:
        what = f"{path} has mode {mode:04o}, not {wanted:04o}: some users who send mail cannot reach the daemon"
        yield Diagnostic(ERROR, "socket", what, f"Correct it: chmod {wanted:04o} {path}")
    elif mode != wanted:
        what = f"{path} has mode {mode:04o}, which is more than {wanted:04o}"
        yield Diagnostic(WARNING, "socket", what, f"Restrict it: chmod {wanted:04o} {path}")
    closed = [each for each in path.parents if wanted & 0o002 and not each.stat().st_mode & 0o001]
    for directory in closed:
        what = f"{directory} does not let other users reach {path}"
        yield Diagnostic(ERROR, "socket", what, f"chmod o+x {directory}")
    if not answers(str(path)):
        yield Diagnostic(ERROR, "socket", f"no process listens on {path}", START)
    elif mode == wanted and not closed:
        yield Diagnostic(OK, "socket", f"{path} accepts connections")


def directories(site: Site) -> Iterator[Diagnostic]:
    service = site.settings.service
    owner = _uid(site.daemon.pid) if site.daemon else 0
    for path, private in ((service.state, True), (service.run, False)):
        try:
            about = os.stat(path)
        except FileNotFoundError:
            yield Diagnostic(ERROR, "directories", f"{path} does not exist", "Create it: contentfilter install")
            continue
        mode = stat.S_IMODE(about.st_mode)
        if mode & 0o002 and not mode & stat.S_ISVTX:
            what = f"{path} has mode {mode:04o}: every user can create files in it"
            yield Diagnostic(ERROR, "directories", what, f"Restrict it: chmod {'700' if private else '755'} {path}")
        elif private and mode & 0o077:
            what = f"{path} has mode {mode:04o}; it contains mail"
            yield Diagnostic(WARNING, "directories", what, f"Restrict it: chmod 700 {path}")
        elif owner and about.st_uid != owner:
            what = f"{path} belongs to {_name(about.st_uid)}, the daemon runs as {_name(owner)}"
            yield Diagnostic(ERROR, "directories", what, f"Correct it: chown -R {_name(owner)} {path}")
        else:
            yield Diagnostic(OK, "directories", f"{path} has mode {mode:04o}")


def limits(site: Site) -> Iterator[Diagnostic]:
    """Open files of a worker, which is a process of its own."""
    if site.daemon is None:
        return
    service = site.settings.service
    need = service.max_in_flight * DESCRIPTORS + service.max_waiting * WAITING_DESCRIPTORS + SPARE_DESCRIPTORS
    pid = (*site.daemon.ready, site.daemon.pid)[0]
    match = re.search(r"^Max open files +(\S+)", Path(f"/proc/{pid}/limits").read_text(), re.MULTILINE)
    limit = match[1] if match else "unknown"
    what = f"a worker may open {limit} files, and needs {need} for {service.max_in_flight} messages"
    if limit.isdecimal() and int(limit) < need:
        remedy = "Raise LimitNOFILE (systemctl edit contentfilter) or lower max_waiting in [service]."
        yield Diagnostic(WARNING, "limits", what, remedy)
    else:
        yield Diagnostic(OK, "limits", what)


def hook(site: Site) -> Iterator[Diagnostic]:
    paths = site.paths
    state = examine(paths, site.queue_conf, site.hook)
    if not state.installed:
        lost = paths.real.exists()  # installed once, and replaced since
        remedy = "Install it: contentfilter hook install" + (" --force" if lost and paths.queue.exists() else "")
        unless = "" if lost else ", unless QMAILQUEUE names the hook"
        what = f"{paths.queue} is not the hook: mail is bypassing the filter{unless}"
        yield Diagnostic(ERROR if lost else WARNING, "hook", what, remedy)
    for problem in state.problems if state.installed else ():
        what, _, remedy = problem.partition("; ")
        replaced = state.current or "differs from" not in what
        yield Diagnostic(ERROR if replaced else WARNING, "hook", what, remedy or f"Correct {site.queue_conf}.")
    if state.installed and site.hook is None:
        remedy = "Name the packaged hook with --binary."
        yield Diagnostic(
            WARNING, "hook", "the version of the hook was not checked: the packaged hook was not found", remedy
        )
    program = paths.queue if state.installed else site.hook
    if program is None:
        return
    conf = read_conf(program, site.queue_conf)
    if conf.problem:
        if not state.installed:
            remedy = f"Correct it and try: {program} --check"
            yield Diagnostic(WARNING, "hook", f"{conf.problem}", remedy)
        return
    configured, real = conf.values.get("socket", ""), site.daemon.socket if site.daemon else site.settings.listen.socket
    if configured != real:
        what = f"{site.queue_conf}: the hook connects to {configured}, the daemon listens on {real}"
        yield Diagnostic(ERROR, "hook", what, f"Set `socket {real}` in {site.queue_conf}.")
    elif state.installed and not state.problems:
        yield Diagnostic(OK, "hook", f"{paths.queue} is version {state.hook_version}; {site.queue_conf} is valid")


def dialect(site: Site) -> Iterator[Diagnostic]:
    """Dialect of queue.conf and of qmail-smtpd, which is recognised by strings in it and is not run."""
    program = site.paths.qmail / "bin" / "qmail-smtpd"
    reader = site.paths.queue if version_of(site.paths.queue) else site.hook
    conf = read_conf(reader, site.queue_conf) if reader else Conf({})
    if conf.problem:
        return  # reported by the hook probe
    configured = conf.values.get("dialect", "auto")
    try:
        image = program.read_bytes()
    except FileNotFoundError:
        image = b""
    known = next(((name, right) for mark, name, right in MARKS if mark in image), None)
    if known is None:
        yield Diagnostic(OK, "dialect", f"{configured}; the one of {program} is unknown")
        return
    name, right = known
    if configured in (*right, "auto"):
        yield Diagnostic(OK, "dialect", f"{configured}; {program} looks like {name}")
    else:
        what = f"{configured}, but {program} looks like {name}: clients would not see the reason of a refusal"
        yield Diagnostic(WARNING, "dialect", what, f"Set `dialect {right[0]}` in {site.queue_conf}.")


def tables(site: Site) -> Iterator[Diagnostic]:
    state = site.daemon.tables if site.daemon else None
    if state is None:
        return
    rows = f"{state.clamav_rows} rows in clamavclients, {state.spamd_rows} in spamdclients, read {state.age:.0f} s ago"
    if not state.loaded:
        yield Diagnostic(
            ERROR, "tables", f"no recipient tables: {state.trouble}", "Find the error: contentfilter check"
        )
    elif state.trouble:
        yield Diagnostic(WARNING, "tables", f"{rows}, out of date: {state.trouble}", "See: contentfilter check")
    else:
        yield Diagnostic(OK, "tables", rows)


def disk(site: Site) -> Iterator[Diagnostic]:
    """Free space for the quarantine and the journal."""
    path = site.settings.service.state
    if not os.path.exists(path):
        return  # reported by the directories probe
    about = os.statvfs(path)
    free, size = about.f_bavail * about.f_frsize, about.f_blocks * about.f_frsize
    remedy = "Free some space: contentfilter quarantine expire, or a lower max_size in [journal]."
    yield _floor("disk", f"for quarantine and journal in {path}", free, size, DISK, remedy)
    if about.f_files and about.f_favail < about.f_files * 0.01:
        yield Diagnostic(WARNING, "disk", f"{about.f_favail} inodes are free for {path}", remedy)


def memory() -> Iterator[Diagnostic]:
    sizes = dict(re.findall(r"^(\w+): +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
    available, total = int(sizes["MemAvailable"]) * 1024, int(sizes["MemTotal"]) * 1024
    remedy = "Lower workers or max_in_flight in [service], or add memory."
    yield _floor("memory", "of memory", available, total, MEMORY, remedy)


def log(settings: LogSettings) -> Iterator[Diagnostic]:
    """Only a log in syslog can be examined from here."""
    if settings.to != "syslog":
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            sender.connect(settings.socket)
        except OSError as error:
            what = f"[log] socket {settings.socket}: {error.strerror}: log lines go to standard error"
            yield Diagnostic(WARNING, "log", what, "Start the syslog daemon, or set its socket in [log].")
        else:
            yield Diagnostic(OK, "log", f"a syslog daemon listens on {settings.socket}")


def _floor(
    topic: str, use: str, free: int, size: int, floors: tuple[tuple[int, float, Level], ...], remedy: str
) -> Diagnostic:
    what = f"{free // MIB} of {size // MIB} MiB {use} are free"
    for least, share, level in floors:
        if free < least or free < size * share:
            return Diagnostic(level, topic, what, remedy)
    return Diagnostic(OK, topic, what)


def _uid(pid: int) -> int:
    match = re.search(r"^Uid:\t\d+\t(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(match[1]) if match else 0


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
