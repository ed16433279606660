"""Override store: ``bypass.json``, ``allow.json`` and the audit trail ``audit.jsonl`` in the state directory.

The supervisor writes it; the command line does so only while no daemon runs. The JSON files are replaced as a whole,
one writer at a time; lines are only added to ``audit.jsonl``, which becomes ``audit.jsonl.1`` when it is large. No
override of a damaged file is in force. Drains are not stored: a restart accepts mail again.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from contentfilter.errors import ConfigError, Problem
from contentfilter.files import replace_file
from contentfilter.policy.overrides import SCANNERS, AllowEntry, Bypass

BYPASS_FILE = "bypass.json"
ALLOW_FILE = "allow.json"
AUDIT = "audit.jsonl"
SIZE_MAX = {BYPASS_FILE: 1 << 16, ALLOW_FILE: 1 << 20}
AUDIT_MAX = 1 << 20  # bytes: some thousand orders; one older file is kept
LOCK_WAIT = 5.0  # seconds

T = TypeVar("T")

_NONE = {BYPASS_FILE: "nothing is bypassed", ALLOW_FILE: "nothing is allowed"}
_REPEAT = {
    BYPASS_FILE: "order it again with contentfilter bypass",
    ALLOW_FILE: "repeat it with contentfilter allow add",
}


def read_bypasses(state: str) -> tuple[Bypass, ...]:
    """All stored bypasses, expired ones included. Raises ConfigError for a file that cannot be used."""
    path = os.path.join(state, BYPASS_FILE)
    found = _read(path, tuple[Bypass, ...])
    names = [bypass.scanner for bypass in found]
    if len(set(names)) < len(names) or not set(names) <= set(SCANNERS):
        raise _damaged(path, "not written by the daemon")
    for bypass in found:
        if why := Bypass.objection(bypass.until - bypass.since, bypass.reason):
            raise _damaged(path, why)
    return found


def read_allowed(state: str) -> tuple[AllowEntry, ...]:
    """All stored allow entries, expired ones included. Raises ConfigError for a file that cannot be used."""
    return _read(os.path.join(state, ALLOW_FILE), tuple[AllowEntry, ...])


def read_usable(state: str) -> tuple[tuple[Bypass, ...], tuple[AllowEntry, ...], tuple[Problem, ...]]:
    """Both kinds; none of a kind whose file cannot be used, and the problems."""
    problems: list[Problem] = []
    bypasses: tuple[Bypass, ...] = ()
    allowed: tuple[AllowEntry, ...] = ()
    try:
        bypasses = read_bypasses(state)
    except ConfigError as error:
        problems += error.problems
    try:
        allowed = read_allowed(state)
    except ConfigError as error:
        problems += error.problems
    return bypasses, allowed, tuple(problems)


def save(
    state: str,
    bypasses: tuple[Bypass, ...] | None,
    allowed: tuple[AllowEntry, ...] | None,
    events: Iterable[Mapping[str, Any]],
) -> None:
    """Write the files and the audit lines; all are on the disk afterwards. The audit is tried in any case.

    None leaves the file of that kind unchanged.

    Raises OSError; TimeoutError where another writer holds the lock.
    """
    try:
        with _one_writer(state):
            if bypasses is not None:
                _replace(os.path.join(state, BYPASS_FILE), bypasses)
            if allowed is not None:
                _replace(os.path.join(state, ALLOW_FILE), allowed)
    finally:
        audit(state, events)


def audit(state: str, events: Iterable[Mapping[str, Any]]) -> None:
    """Append one line for each event to the audit trail; durable on return. Raises OSError."""
    _append(os.path.join(state, AUDIT), b"".join(msgspec.json.encode(event) + b"\n" for event in events))


def change_allowed(state: str, change: Callable[[tuple[AllowEntry, ...]], tuple[AllowEntry, ...]], now: float) -> None:
    """Replace the allow entries by ``change(entries)``, without those expired at ``now``.

    Raises OSError (TimeoutError where another writer holds the lock) or ConfigError.
    """
    with _one_writer(state):
        kept = tuple(entry for entry in change(read_allowed(state)) if entry.until > now)
        _replace(os.path.join(state, ALLOW_FILE), kept)


def _read(path: str, kind: type[T]) -> T:
    limit = SIZE_MAX[os.path.basename(path)]
    try:
        with open(path, "rb", opener=_open_nonblocking) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise _damaged(path, f"more than {limit} bytes")
        return msgspec.json.decode(data, type=kind)
    except FileNotFoundError:
        return msgspec.json.decode(b"[]", type=kind)
    except OSError as error:
        none = _NONE[os.path.basename(path)]
        raise ConfigError((Problem(path, 0, f"cannot read it: {error.strerror}; {none}"),)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: str, why: str) -> ConfigError:
    name = os.path.basename(path)
    return ConfigError((Problem(path, 0, f"damaged ({why}); {_NONE[name]}; {_REPEAT[name]}"),))


def _replace(path: str, overrides: tuple[Bypass, ...] | tuple[AllowEntry, ...]) -> None:
    replace_file(path, (msgspec.json.format(msgspec.json.encode(overrides)), b"\n"), 0o600)


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


@contextmanager
def _one_writer(state: str) -> Iterator[None]:
    """Lock on the directory, not on a file: each change replaces the file."""
    fd = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    end = time.monotonic() + LOCK_WAIT
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise TimeoutError(0, "another process has held its lock for too long") from None
            time.sleep(0.05)
        yield
    finally:
        os.close(fd)


def _append(path: str, lines: bytes) -> None:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, 0o600)
    try:
        if os.fstat(fd).st_size + len(lines) > AUDIT_MAX:
            os.rename(path, f"{path}.1")
            os.close(fd)
            fd = os.open(path, flags, 0o600)
        os.write(fd, lines)
        os.fsync(fd)
    finally:
        os.close(fd)
