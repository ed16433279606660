"""Measured sizes: of tables, quarantine, journal and disk, and of the listening socket's queue.

A value that cannot be determined is omitted, so that a metric is missing rather than wrong.
"""

import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from contentfilter.errors import ConfigError
from contentfilter.settings import ListenSettings, Settings
from contentfilter.store.journal import journal_path
from contentfilter.store.quarantine import Quarantine
from contentfilter.store.retention import survey
from contentfilter.tables.snapshot import FILE, read_header

Measurement = tuple[str, tuple[str, ...], float]  # metric, label values, number

# linux/netlink.h, linux/sock_diag.h, linux/unix_diag.h
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST = 4, 20, 1
_UDIAG_SHOW_RQLEN, _UNIX_DIAG_RQLEN = 0x10, 4
_ANY = 0xFFFFFFFF
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBHIIIII")
_MESSAGE_SIZE = 16
_ATTRIBUTE = struct.Struct("=HH")
_LENGTHS = struct.Struct("=II")


def measure(settings: Settings) -> tuple[Measurement, ...]:
    """Measure the state directory. Blocks on the disk: call it in a thread."""
    state = Path(settings.service.state)
    found: list[Measurement] = []
    parts: tuple[Callable[[], Iterator[Measurement]], ...] = (
        lambda: _tables(state / FILE),
        lambda: _quarantine(settings),
        lambda: _journal(settings),
        lambda: _disk(state),
    )
    for part in parts:
        try:
            found += part()
        except (OSError, ConfigError):
            continue
    return tuple(found)


def _tables(snapshot: Path) -> Iterator[Measurement]:
    yield "contentfilter_tables_built_timestamp_seconds", (), read_header(str(snapshot)).created


def _quarantine(settings: Settings) -> Iterator[Measurement]:
    found = survey(Quarantine.of(settings).directory, time.time())
    yield "contentfilter_quarantine_entries", (), len(found.entries)
    yield "contentfilter_quarantine_bytes", (), found.used


def _journal(settings: Settings) -> Iterator[Measurement]:
    path = journal_path(settings)
    names = (path, path.with_name(path.name + "-wal"))
    yield "contentfilter_journal_bytes", (), sum(each.stat().st_size for each in names if each.exists())


def _disk(state: Path) -> Iterator[Measurement]:
    found = os.statvfs(state)
    yield "contentfilter_state_free_bytes", (), found.f_bavail * found.f_frsize
    yield "contentfilter_state_size_bytes", (), found.f_blocks * found.f_frsize


def socket_problem(listen: ListenSettings) -> tuple[str, str]:
    """Why hooks of other users cannot connect to our socket, and the command that repairs it; else two empty texts."""
    try:
        found = os.stat(listen.socket)
    except OSError as error:
        return f"{listen.socket}: {error.strerror}", "systemctl restart contentfilter.socket contentfilter"
    lost = int(listen.mode, 8) & ~found.st_mode & 0o222  # connecting needs the right to write
    if lost and stat.S_ISSOCK(found.st_mode):
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        return f"{listen.socket} has mode {mode} instead of {listen.mode}", f"chmod {listen.mode} {listen.socket}"
    return "", ""


def backlog(listener: int) -> tuple[int, int] | None:
    """Connections that wait in a listening Unix socket's queue, and its length. None if the kernel does not tell.

    Netlink's socket diagnosis (sock_diag(7)), which is what ss(8) asks. Takes microseconds.
    """
    try:
        inode = os.fstat(listener).st_ino
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, _NETLINK_SOCK_DIAG) as kernel:
            body = _REQUEST.pack(socket.AF_UNIX, 0, 0, _ANY, inode, _UDIAG_SHOW_RQLEN, _ANY, _ANY)
            kernel.send(_HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + body)
            answer = kernel.recv(8192)
    except OSError:
        return None
    return _queue_length(answer)


def _queue_length(answer: bytes) -> tuple[int, int] | None:
    if len(answer) < _HEADER.size or _HEADER.unpack_from(answer)[1] != _SOCK_DIAG_BY_FAMILY:
        return None
    at = _HEADER.size + _MESSAGE_SIZE
    while at + _ATTRIBUTE.size + _LENGTHS.size <= len(answer):
        length, kind = _ATTRIBUTE.unpack_from(answer, at)
        if kind == _UNIX_DIAG_RQLEN and length >= _ATTRIBUTE.size + _LENGTHS.size:
            waiting, most = _LENGTHS.unpack_from(answer, at + _ATTRIBUTE.size)
            return waiting, most
        at += max(_ATTRIBUTE.size, (length + 3) & ~3)
    return None
