"""The CURVE keys of the event feed: a file with our secret key, and a list of those who may listen.

A key is 40 characters of Z85 (ZeroMQ's spelling of 32 bytes, its RFC 32). The secret's file holds nothing else. The
list has a key in each line, then whatever helps to tell whose it is; lines that begin with "# " are comments.
"""

import ipaddress
import os
import re
from dataclasses import dataclass

import zmq

from contentfilter.errors import ConfigError, Problem
from contentfilter.files import read_file
from contentfilter.settings import EventSettings

MAX_SIZE = 1 << 16
_KEY = re.compile(rb"[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{40}")
_LISTEN = re.compile(r"tcp://(\*|[0-9.]{7,15}|\[[0-9a-fA-F:.]{2,45}\]):([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Keys:
    secret: bytes
    clients: frozenset[bytes]  # public keys of those who may listen

    def __repr__(self) -> str:
        return f"Keys({len(self.clients)} clients)"  # a log must not show the secret


def listens(text: str) -> bool:
    """Return True if the feed goes over the network. Raises ValueError that says what ``[events] listen`` takes."""
    if text == "off":
        return False
    match = _LISTEN.fullmatch(text)
    if match is None or not 0 < int(match[2]) < 65_536:
        raise ValueError(f'expected "off" or "tcp://address:port" with an IP address or *, got {text!r}')
    if match[1] != "*":
        ipaddress.ip_address(match[1].strip("[]"))
    return True


def load_keys(config: EventSettings) -> Keys | None:
    """None where the feed stays on this machine. Raises ConfigError: over the network only with keys."""
    if not listens(config.listen):
        return None
    secret, mode = _read(config.key, "key")
    if mode & 0o007:
        raise _wrong(config.key, 0, "[events] key: everybody here can read it; chmod 600")
    clients, _ = _read(config.clients, "clients")
    found = set()
    for number, line in enumerate(clients.splitlines(), 1):
        word = line.split(maxsplit=1)[:1]
        if not word or word[0] == b"#":
            continue
        if not sound(word[0]):
            raise _wrong(config.clients, number, "not a public key of 40 characters (a comment begins with '# ')")
        found.add(word[0])
    return Keys(_only_key(config.key, secret), frozenset(found))


def read_secret(path: str) -> bytes:
    """The key in a file that :func:`write_secret` made. Raises ConfigError."""
    return _only_key(path, _read(path, "key")[0])


def write_secret(path: str) -> bytes:
    """Make a new secret key, which nobody else can read. Raises OSError; FileExistsError never overwrites one."""
    _, secret = zmq.curve_keypair()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as file:
        file.write(secret + b"\n")
        file.flush()
        os.fsync(fd)
    return secret


def public(secret: bytes) -> bytes:
    """The key to give away."""
    key: bytes = zmq.curve_public(secret)
    return key


def _read(path: str, name: str) -> tuple[bytes, int]:
    if not path:
        raise _wrong(
            "[events]", 0, f"{name}: the feed goes over the network only with keys; see contentfilter events-key"
        )
    try:
        data, _ = read_file(path, MAX_SIZE)
        return data, os.stat(path).st_mode
    except ConfigError as error:
        raise _wrong(path, 0, f"[events] {name}: {error.problems[0].text}") from error
    except OSError as error:
        raise _wrong(path, 0, f"[events] {name}: cannot read it: {error.strerror}") from error


def _only_key(path: str, data: bytes) -> bytes:
    key = data.strip()
    if not sound(key):
        raise _wrong(path, 0, "[events] key: not a key of 40 characters; contentfilter events-key makes one")
    return key


def sound(key: bytes) -> bool:
    """Z85 of 32 bytes. Not every five characters are valid: the largest exceed 32 bits."""
    if not _KEY.fullmatch(key):
        return False
    try:
        zmq.curve_public(key)
    except zmq.ZMQError:
        return False
    return True


def _wrong(path: str, line: int, text: str) -> ConfigError:
    return ConfigError((Problem(path, line, text),))
