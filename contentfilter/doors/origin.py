"""Origin of a message: its kind, and the facts about the SMTP client that can be trusted.

The environment counts only if the peer's uid is one of the SMTP users: anyone may call the hook with variables of
their choice. TCPREMOTEINFO never proves a login, because ident servers and clients can set it. Source: domain-spec 1.6
and 2.3. Only :func:`resolve` does I/O (the user database).
"""

import pwd
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from contentfilter.model import Origin, OriginKind
from contentfilter.settings import OriginSettings

PEER = b"CONTENTFILTER_PEER"
"""Set by the receiver process, ``uid pid``: who it offers a message for. Believed from the daemon's own uid only."""


@dataclass(frozen=True, slots=True)
class ResolvedOrigin:
    """The ``[origin]`` section with user names looked up."""

    smtp_uids: frozenset[int]
    bounce_uids: frozenset[int]
    auth: tuple[tuple[bytes, bytes | None], ...]  # variable, and the only value that counts (None: any but empty)

    def system(self, uid: int, own: int) -> bool:
        """True for uids that would not change a message while it is read: root, qmail's users, and ``own``."""
        return uid == 0 or uid == own or uid in self.smtp_uids or uid in self.bounce_uids


def uid_of(name: str) -> int:
    """The uid of a user name or a number. Raises KeyError if there is no such user."""
    return int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid


def resolve(rules: OriginSettings, look_up: Callable[[str], int] = uid_of) -> tuple[ResolvedOrigin, tuple[str, ...]]:
    """The rules with uids, and the names that do not exist (a warning each; the other names hold)."""
    unknown: list[str] = []

    def uids(names: tuple[str, ...]) -> frozenset[int]:
        found = set()
        for name in names:
            try:
                found.add(look_up(name))
            except KeyError:
                unknown.append(name)
        return frozenset(found)

    auth = []
    for text in rules.auth_variables:
        name, equals, value = text.encode().partition(b"=")
        auth.append((name, value if equals else None))
    return ResolvedOrigin(uids(rules.smtp_users), uids(rules.bounce_users), tuple(auth)), tuple(unknown)


def represented(uid: int, pid: int, environ: dict[bytes, bytes], own: int) -> tuple[int, int]:
    """The uid and pid that a message counts for: those that the receiver names, else the peer's. Removes its entry."""
    named = environ.pop(PEER, None)
    if named is None or uid != own:
        return uid, pid
    first, _, second = named.partition(b" ")
    return (int(first), int(second)) if first.isdigit() and second.isdigit() else (uid, pid)


def classify(uid: int, pid: int, environ: Mapping[bytes, bytes], rules: ResolvedOrigin) -> Origin:
    """The origin of a message from process ``pid`` of user ``uid`` with ``environ``, which may be forged."""
    if uid in rules.bounce_uids:  # first, so that a bounce is never refused
        return Origin(OriginKind.BOUNCE, uid, pid)
    if uid not in rules.smtp_uids:
        return Origin(OriginKind.LOCAL, uid, pid)
    kind, user = OriginKind.STRANGER, b""
    for name, wanted in rules.auth:
        value = environ.get(name, b"")
        if value and wanted in (None, value):
            kind, user = OriginKind.AUTHENTICATED, value if wanted is None else b""
            break
    else:
        if b"RELAYCLIENT" in environ:  # present is enough: the usual value is empty
            kind = OriginKind.RELAY
    return Origin(
        kind,
        uid,
        pid,
        remote_ip=_tcp(environ, b"REMOTEIP"),
        remote_host=_tcp(environ, b"REMOTEHOST"),
        helo=environ.get(b"HELOHOST", b"") or environ.get(b"SMTPHELOHOST", b""),
        user=user,
    )


def _tcp(environ: Mapping[bytes, bytes], name: bytes) -> bytes:
    """tcpserver's variable: TCP6… if PROTO says that the session is IPv6, else TCP…, else whichever is set."""
    four, six = environ.get(b"TCP" + name, b""), environ.get(b"TCP6" + name, b"")
    return (six or four) if environ.get(b"PROTO") == b"TCP6" else (four or six)
