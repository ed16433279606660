"""The allow-list: signatures that pass for a while, in ``allow.json`` in the state directory.

The command line writes it, the supervisor reads it with the configuration and ships it to the workers. It is
replaced as a whole, one writer at a time, and readable by its owner only.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from contentfilter.errors import ConfigError, Problem
from contentfilter.files import replace_file
from contentfilter.policy.tolerance import AllowEntry

FILE = "allow.json"
SIZE_MAX = 1 << 20


def read_allowed(state: str) -> tuple[AllowEntry, ...]:
    """Every entry, expired ones too. Raises ConfigError for a file that cannot be used."""
    path = os.path.join(state, FILE)
    try:
        with open(path, "rb") as file:
            data = file.read(SIZE_MAX + 1)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ConfigError((Problem(path, 0, f"cannot read it: {error.strerror}"),)) from error
    if len(data) > SIZE_MAX:
        raise ConfigError((Problem(path, 0, f"more than {SIZE_MAX} bytes"),))
    try:
        return msgspec.json.decode(data, type=tuple[AllowEntry, ...])
    except msgspec.DecodeError as error:
        text = f"damaged ({error}); remove it, or write it again with contentfilter allow add"
        raise ConfigError((Problem(path, 0, text),)) from error


def change_allowed(
    state: str, change: Callable[[tuple[AllowEntry, ...]], tuple[AllowEntry, ...]], now: float
) -> tuple[AllowEntry, ...]:
    """Replace the list by ``change(list)``, without what has expired at ``now``. Raises OSError or ConfigError."""
    with _one_writer(state):
        kept = tuple(a for a in change(read_allowed(state)) if a.expires > now)
        replace_file(os.path.join(state, FILE), (msgspec.json.format(msgspec.json.encode(kept)), b"\n"), 0o600)
    return kept


@contextmanager
def _one_writer(state: str) -> Iterator[None]:
    """The directory is locked: the file itself is another one after every change."""
    fd = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
