"""Where bypasses survive a restart, and who ordered what: ``bypass.json`` and ``audit.jsonl`` in the state directory.

The supervisor writes both. The first is replaced as a whole; to the second, lines are only ever added, until it is
large and becomes ``audit.jsonl.1``. A damaged ``bypass.json`` bypasses nothing.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from contentfilter.errors import ConfigError, Problem
from contentfilter.files import replace_file
from contentfilter.policy.bypass import SCANNERS, Bypass, objection

FILE = "bypass.json"
AUDIT = "audit.jsonl"
SIZE_MAX = 1 << 16
AUDIT_MAX = 1 << 20  # bytes: some thousand orders; the ones before are kept once


def read_bypasses(state: str) -> tuple[Bypass, ...]:
    """All of them, ended ones too. Raises ConfigError for a file that cannot be used."""
    path = os.path.join(state, FILE)
    try:
        with open(path, "rb") as file:
            data = file.read(SIZE_MAX + 1)
        found = msgspec.json.decode(data, type=tuple[Bypass, ...])
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ConfigError((Problem(path, 0, f"cannot read it: {error.strerror}; nothing is bypassed"),)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError((_damaged(path, str(error)),)) from error
    names = [bypass.scanner for bypass in found]
    if len(data) > SIZE_MAX or len(set(names)) < len(names) or not set(names) <= set(SCANNERS):
        raise ConfigError((_damaged(path, "not what the daemon wrote"),))
    for bypass in found:
        if why := objection(bypass.until - bypass.since, bypass.reason):
            raise ConfigError((_damaged(path, why),))
    return found


def _damaged(path: str, why: str) -> Problem:
    return Problem(path, 0, f"damaged ({why}); nothing is bypassed; order it again with contentfilter bypass")


def save(state: str, bypasses: tuple[Bypass, ...], events: Iterable[Mapping[str, Any]]) -> None:
    """Write both files; they are on the disk afterwards. Tries both. Raises OSError."""
    try:
        replace_file(os.path.join(state, FILE), (msgspec.json.format(msgspec.json.encode(bypasses)), b"\n"), 0o600)
    finally:
        _append(os.path.join(state, AUDIT), b"".join(msgspec.json.encode(event) + b"\n" for event in events))


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
