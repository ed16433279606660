"""Doctor's probes of clamd, spamd and freshclam: they answer, detect, are up to date, and their limits fit ours.

clamd does not report its limits, so they are read from its configuration file, if that is the file of a clamd that
we use. Sources: clamd.conf(5); clamd answers OK, without scanning, for what is above MaxFileSize.
"""

import asyncio
import io
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import clamd as clamd_package

from contentfilter.admin.clamd_conf import is_of, parse_conf, size
from contentfilter.admin.diagnostic import Diagnostic, DiagnosticProbe, Level
from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, ConfigError, RemoteProtocolError
from contentfilter.model import readable
from contentfilter.scanners.spamd import SpamdScanner
from contentfilter.settings import Settings
from contentfilter.wire.clamd import Version, parse_version

OK, WARNING, ERROR = Level.OK, Level.WARNING, Level.ERROR
CLAMD_CONF = "/etc/clamav/clamd.conf"
PATIENCE = 4.0  # seconds for one backend
OLD, TOO_OLD = 2.0, 7.0  # days
DEFAULT_SIZE = 25 << 20  # of older versions of clamd; newer ones have 100 MiB
DEFAULT_THREADS = 10
DEFAULT_QUEUE = 100
FRESHCLAM_UNITS = "etc/systemd/system/*.wants/*freshclam*"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_RESTART_CLAMD = "See why: systemctl status clamav-daemon; then: systemctl restart clamav-daemon"
_RESTART_SPAMD = "See why: systemctl status spamd; then: systemctl restart spamd"


class ClamdClient(clamd_package.ClamdNetworkSocket):  # type: ignore[misc]
    """Blocking client for one backend. The package itself has no time limit for connecting, and no IPv6."""

    def __init__(self, address: Address) -> None:
        super().__init__(address.host, address.port, PATIENCE)
        self._address = address

    def _init_socket(self) -> None:
        if self._address.path:
            self.clamd_socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.clamd_socket.settimeout(self.timeout)
            self.clamd_socket.connect(self._address.path)
        else:
            self.clamd_socket = socket.create_connection((self.host, self.port), self.timeout)


def probes(settings: Settings, workers: int, children: int, clamd_conf: Path) -> dict[str, DiagnosticProbe]:
    found: dict[str, DiagnosticProbe] = {}
    if not settings.clamd.backends:
        found["clamd"] = partial(_switched_off, "clamd")
    for backend in settings.clamd.backends:
        found[f"clamd {backend}"] = partial(clamd, settings, backend)
    if settings.clamd.backends:
        found["clamd limits"] = partial(clamd_limits, settings, workers, clamd_conf)
        found["freshclam"] = partial(freshclam, settings)
    if not settings.spamd.backends:
        found["spamd"] = partial(_switched_off, "spamd")
    for backend in settings.spamd.backends:
        found[f"spamd {backend}"] = partial(spamd, settings, backend)
    if settings.spamd.backends:
        found["spamd children"] = partial(spamd_children, workers, children)
    return found


def _switched_off(scanner: str) -> Iterator[Diagnostic]:
    yield Diagnostic(OK, scanner, f"{scanner} is switched off: no backends")


def clamd(settings: Settings, backend: str) -> Iterator[Diagnostic]:
    client = ClamdClient(Address.parse(backend))
    try:
        version = parse_version(client.version().encode("ascii", "replace"))
        yield freshness(backend, version, datetime.now(UTC))
        if settings.clamd.proof:
            yield detection(backend, client)
    except (OSError, RemoteProtocolError, clamd_package.ClamdError, ValueError) as error:
        yield Diagnostic(ERROR, "clamd", f"{backend}: {_failure(error)}", _RESTART_CLAMD)


def _failure(error: Exception) -> str:
    """The package wraps what happened while it reads in an error of its own."""
    cause = error.__context__ if isinstance(error, clamd_package.ClamdError) else error
    if isinstance(cause, TimeoutError):
        return f"timeout: no answer within {PATIENCE:g} s"
    if isinstance(cause, OSError):
        return f"down: {cause.strerror or cause}"
    return "invalid answer: " + readable(str(error).encode()[:200])


def detection(backend: str, client: ClamdClient) -> Diagnostic:
    """The self-test that workers run, too: clamd must find the EICAR test file. Raises OSError and ClamdError."""
    answer = client.instream(io.BytesIO(clamd_package.EICAR))
    status, text = answer.get("stream", ("no answer", None))
    if status == "FOUND":
        return Diagnostic(OK, "clamd", f"{backend}: detects the EICAR test file")
    said = readable(str(text or status).encode()[:200])
    what = f"{backend}: does not detect the EICAR test file ({said}), so its OK is not trusted and mail is deferred"
    remedy = "Check its database (main and daily) and that TemporaryDirectory is writable, then restart it."
    return Diagnostic(ERROR, "clamd", what, remedy)


def freshness(backend: str, version: Version, now: datetime) -> Diagnostic:
    """Age of the database that clamd has loaded."""
    remedy = "See why it is not updated: systemctl status clamav-freshclam; by hand: freshclam"
    if version.built is None:
        return Diagnostic(WARNING, "clamd", f"{backend}: {version.product}, no official database", remedy)
    age = (now - version.built).total_seconds() / 86_400
    level = ERROR if age > TOO_OLD else WARNING if age > OLD else OK
    what = f"{backend}: {version.product}, database {version.database}, {max(0.0, age):.1f} days old"
    return Diagnostic(level, "clamd", what, "" if level is OK else remedy)


def freshclam(settings: Settings, root: Path = Path("/")) -> Iterator[Diagnostic]:
    """freshclam for a clamd on this machine: a process, or a timer that starts it. ``root``: / except in tests."""
    addresses = [Address.parse(backend) for backend in settings.clamd.backends]
    if not any(address.path or address.host in _LOOPBACK for address in addresses):
        return
    for comm in root.glob("proc/[0-9]*/comm"):
        try:
            if comm.read_bytes().strip() == b"freshclam":
                yield Diagnostic(OK, "freshclam", f"running with pid {comm.parent.name}")
                return
        except OSError:
            continue  # ended meanwhile
    units = sorted(unit.name for unit in root.glob(FRESHCLAM_UNITS))
    if timers := [name for name in units if name.endswith(".timer")]:
        yield Diagnostic(OK, "freshclam", f"started by {timers[0]}")
    elif units:
        what = f"{units[0]} is enabled, but freshclam is not running"
        yield Diagnostic(WARNING, "freshclam", what, f"See why: systemctl status {units[0]}")
    else:
        what = "no freshclam process and no timer; unless cron runs it, the database is not updated"
        yield Diagnostic(WARNING, "freshclam", what, "Enable it: systemctl enable --now clamav-freshclam")


def clamd_limits(settings: Settings, workers: int, path: Path) -> Iterator[Diagnostic]:
    remedy = "Name its configuration with --clamd-conf, or compare by hand."
    try:
        values = parse_conf(path.read_text(errors="replace"))
    except OSError as error:
        yield Diagnostic(WARNING, "clamd", f"clamd's limits are unknown: {path}: {error.strerror}", remedy)
        return
    if not any(is_of(values, Address.parse(backend)) for backend in settings.clamd.backends):
        yield Diagnostic(WARNING, "clamd", f"clamd's limits are unknown: {path} is not of any backend", remedy)
        return
    ours = settings.clamd.max_size
    for name, level, meaning in (
        ("MaxFileSize", ERROR, "for sizes in between, clamd answers OK without scanning"),
        ("StreamMaxLength", WARNING, "clamd refuses streams of sizes in between"),
    ):
        limit = size(values.get(name, ""))
        shown = "not set, 25 MiB in older versions" if limit is None else f"{limit} bytes"
        limit = DEFAULT_SIZE if limit is None else limit
        what = f"{name} in {path} is {shown}; [clamd] max_size is {ours or 'unlimited'}"
        if limit and not 0 < ours <= limit:
            remedy = f"Set max_size to at most {limit}, or raise {name} and restart clamd."
            yield Diagnostic(level, "clamd", f"{what}: {meaning}", remedy)
        else:
            yield Diagnostic(OK, "clamd", what)
    yield _queue(values, path, settings.clamd.concurrency * workers)


def _queue(values: dict[str, str], path: Path, ours: int) -> Diagnostic:
    """Requests above MaxThreads wait in clamd's queue; only those above MaxQueue are a problem."""
    threads = size(values.get("MaxThreads", "")) or DEFAULT_THREADS
    slots = max(size(values.get("MaxQueue", "")) or DEFAULT_QUEUE, threads)
    what = f"concurrency times workers is {ours}; in {path}, MaxThreads is {threads}"
    if ours > slots:
        remedy = "Raise MaxThreads and MaxQueue, or lower concurrency in [clamd]."
        return Diagnostic(WARNING, "clamd", f"{what} and only {slots} may wait (MaxQueue)", remedy)
    return Diagnostic(OK, "clamd", f"{what} and {slots} may wait (MaxQueue)" if ours > threads else what)


def spamd(settings: Settings, backend: str) -> Iterator[Diagnostic]:
    try:
        scanner = SpamdScanner(settings.spamd, 1)
        asyncio.run(scanner.probe(Address.parse(backend), Deadline.after(PATIENCE)))
    except ConfigError as error:
        yield Diagnostic(ERROR, "spamd", str(error), "See docs/fleet.md about certificates; then: contentfilter check")
    except BackendError as error:
        yield Diagnostic(ERROR, "spamd", str(error), _RESTART_SPAMD)
    else:
        yield Diagnostic(OK, "spamd", f"{backend} answers")


def spamd_children(workers: int, children: int) -> Iterator[Diagnostic]:
    """Workers share the children, and each may use at least one. spamd does not report its own number."""
    requests = workers * max(1, children // workers)
    what = f"spamdchildren is {children}; {workers} workers send at most {requests} requests simultaneously"
    if requests > children:
        remedy = f"Set spamdchildren to {requests} and restart spamd with: contentfilter spamd-options"
        yield Diagnostic(WARNING, "spamd", what, remedy)
    else:
        yield Diagnostic(OK, "spamd", f"{what}; spamd must allow as many (contentfilter spamd-options)")
