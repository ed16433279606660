"""The doctor's examinations of clamd and spamd: reachable, fresh, and with limits that fit ours.

clamd does not tell its limits, so they are read from its configuration file, where that is the file of a clamd that
we ask. Sources: clamd.conf(5); clamd says OK, without a look, to what is above MaxFileSize.
"""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from contentfilter.admin.clamd_conf import is_of, parse_conf, size
from contentfilter.admin.diagnostic import Diagnostic, DiagnosticProbe, Level
from contentfilter.admin.doctor_freshclam import freshclam
from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, ConfigError
from contentfilter.scanners.clamd import ClamdScanner
from contentfilter.scanners.spamd import SpamdScanner
from contentfilter.settings import Settings
from contentfilter.wire.clamd import Version

OK, WARNING, ERROR = Level.OK, Level.WARNING, Level.ERROR
CLAMD_CONF = "/etc/clamav/clamd.conf"
PATIENCE = 4.0  # seconds for one backend
OLD, TOO_OLD = 2.0, 7.0  # days
DEFAULT_SIZE = 25 << 20  # of older versions of clamd; newer ones have 100 MiB
DEFAULT_THREADS = 10
DEFAULT_QUEUE = 100
_RESTART_CLAMD = "See why: systemctl status clamav-daemon; then: systemctl restart clamav-daemon"
_RESTART_SPAMD = "See why: systemctl status spamd; then: systemctl restart spamd"


def probes(
    settings: Settings, workers: int, children: int, clamd_conf: Path, freshclam_conf: Path
) -> dict[str, DiagnosticProbe]:
    found: dict[str, DiagnosticProbe] = {}
    if not settings.clamd.backends:
        found["clamd"] = partial(_switched_off, "clamd")
    for backend in settings.clamd.backends:
        found[f"clamd {backend}"] = partial(clamd, settings, backend)
    if settings.clamd.backends:
        found["clamd limits"] = partial(clamd_limits, settings, workers, clamd_conf)
        found["freshclam"] = partial(freshclam, settings, clamd_conf, freshclam_conf)
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
    scanner = ClamdScanner(settings.clamd)
    try:
        version = asyncio.run(scanner.version(Address.parse(backend), Deadline.after(PATIENCE)))
    except BackendError as error:
        yield Diagnostic(ERROR, "clamd", str(error), _RESTART_CLAMD)
        return
    yield freshness(backend, version, datetime.now(UTC))


def freshness(backend: str, version: Version, now: datetime) -> Diagnostic:
    """Of clamd's database."""
    remedy = "See what keeps it: systemctl status clamav-freshclam; by hand: freshclam"
    if version.built is None:
        return Diagnostic(WARNING, "clamd", f"{backend}: {version.product}, no official database", remedy)
    age = (now - version.built).total_seconds() / 86_400
    level = ERROR if age > TOO_OLD else WARNING if age > OLD else OK
    what = f"{backend}: {version.product}, database {version.database}, {max(0.0, age):.1f} days old"
    return Diagnostic(level, "clamd", what, "" if level is OK else remedy)


def clamd_limits(settings: Settings, workers: int, path: Path) -> Iterator[Diagnostic]:
    try:
        values = parse_conf(path.read_text(errors="replace"))
    except OSError as error:
        what = f"clamd's limits cannot be known: {path}: {error.strerror}"
        yield Diagnostic(WARNING, "clamd", what, "Name its configuration with --clamd-conf, or compare by hand.")
        return
    asked = [Address.parse(backend) for backend in settings.clamd.backends]
    if not any(is_of(values, address) for address in asked):
        what = f"clamd's limits cannot be known: {path} is of none of the backends"
        yield Diagnostic(WARNING, "clamd", what, "Name its configuration with --clamd-conf, or compare by hand.")
        return
    ours = settings.clamd.max_size
    for name, level, meaning in (
        ("MaxFileSize", ERROR, "clamd says OK without a look in between"),
        ("StreamMaxLength", WARNING, "clamd refuses streams in between"),
    ):
        limit = size(values.get(name, ""))
        shown = "not set, 25 MiB in older versions" if limit is None else f"{limit} bytes"
        limit = DEFAULT_SIZE if limit is None else limit
        what = f"{name} in {path} is {shown}; [clamd] max_size is {ours or 'without limit'}"
        if limit and not 0 < ours <= limit:
            remedy = f"Set max_size to at most {limit}, or raise {name} and restart clamd."
            yield Diagnostic(level, "clamd", f"{what}: {meaning}", remedy)
        else:
            yield Diagnostic(OK, "clamd", what)
    yield _queue(values, path, settings.clamd.concurrency * workers)


def _queue(values: dict[str, str], path: Path, ours: int) -> Diagnostic:
    """What is above MaxThreads waits in clamd; only what its queue has no place for is trouble."""
    threads = size(values.get("MaxThreads", "")) or DEFAULT_THREADS
    places = max(size(values.get("MaxQueue", "")) or DEFAULT_QUEUE, threads)
    what = f"concurrency times workers is {ours}; in {path}, MaxThreads is {threads}"
    if ours > places:
        remedy = "Raise MaxThreads and MaxQueue, or lower concurrency in [clamd]."
        return Diagnostic(WARNING, "clamd", f"{what} and only {places} may wait (MaxQueue)", remedy)
    return Diagnostic(OK, "clamd", f"{what} and {places} may wait (MaxQueue)" if ours > threads else what)


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
    """Workers share them (app.py); each asks at least one question at once. spamd's own number it does not tell."""
    at_once = workers * max(1, children // workers)
    what = f"spamdchildren is {children}; {workers} workers ask at most {at_once} questions at once"
    if at_once > children:
        remedy = f"Set spamdchildren to {at_once} and restart spamd with: contentfilter spamd-options"
        yield Diagnostic(WARNING, "spamd", what, remedy)
    else:
        yield Diagnostic(OK, "spamd", f"{what}; spamd itself must allow as many (contentfilter spamd-options)")
