"""Quarantine of withheld messages: message and sidecar, complete or absent, readable only by their owner.

``DIR/messages/ab/SHA256.eml`` holds bytes under their hash, ``DIR/entries/INCIDENT.eml`` is a hard link to
them, ``DIR/entries/INCIDENT.json`` says what they were and is written last: an entry exists when its
sidecar exists, and then it is complete. Because each entry has a link of its own, nothing that is
removed elsewhere can take its message away, and no process has to lock out another. A sidecar's
modification time is the time of keeping, so expiry reads no files.

Any failure is raised as OSError and turns into a deferral: what cannot be kept is not removed.
"""

import asyncio
import errno
import fcntl
import hashlib
import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

import msgspec

from contentfilter.deadline import Deadline
from contentfilter.errors import QuarantineError
from contentfilter.files import sync_directory
from contentfilter.model import Message
from contentfilter.settings import Settings
from contentfilter.store.retention import NEW, RetentionLimits, outdated, scan, survey, unreferenced
from contentfilter.store.sidecar import Release, Search, Sidecar, described, parse, valid_incident
from contentfilter.threads import DaemonExecutor

DAY = 86_400.0
RECOUNT = 60.0
"""Seconds for which the bytes in use are remembered rather than counted."""
SIDECAR_LIMIT = 64 << 20

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Expired:
    """Result of :meth:`Quarantine.expire`: removed entries and remaining bytes."""

    entries: tuple[str, ...]  # incidents
    stray: int  # unreferenced messages and unfinished files
    used: int  # bytes of messages and sidecars that remain


class Quarantine:
    """The quarantine below one directory. Several processes may use it simultaneously."""

    def __init__(
        self,
        directory: Path,
        quota: int = 0,
        retention: float = 30.0,
        protect: float = 0.0,
        clock: Callable[[], float] = time.time,
        disk: Executor | None = None,
    ) -> None:
        """``quota`` in bytes (0: none), ``retention`` and ``protect`` in days.

        ``disk``: threads for calls that a hung disk may block; None: its own.
        """
        self._disk = disk or DaemonExecutor("quarantine", 4)
        self.directory = directory
        self._entries = directory / "entries"
        self._messages = directory / "messages"
        self._quota = quota
        self._limits = RetentionLimits(quota, retention * DAY, protect * DAY)
        self._clock = clock
        self._counting = threading.Lock()
        self._used, self._counted, self._full = 0, float("-inf"), float("-inf")

    @classmethod
    def of(cls, settings: Settings, disk: Executor | None = None) -> "Quarantine":
        """The one below the state directory."""
        rules = settings.quarantine
        return cls(Path(settings.service.state) / "quarantine", rules.quota, rules.retention, rules.protect, disk=disk)

    # Keeping

    async def keep(self, incident: str, message: Message, facts: dict[str, Any], deadline: Deadline) -> str:
        """Store ``message`` and its sidecar; returns the SHA-256 in hex.

        Raises OSError (disk full, over the quota and nothing old enough to make room, an incident that
        is there already) or TimeoutError.
        """
        if not valid_incident(incident):
            raise OSError(errno.EINVAL, f"not a file name: incident {incident!r}")
        call = self._disk.submit(self._keep, incident, message, message.data, facts)
        try:
            async with deadline.timeout():
                return await asyncio.wrap_future(call)
        except BaseException:
            call.add_done_callback(partial(self._undo, incident))
            raise

    def _undo(self, incident: str, call: Future[str]) -> None:
        """Remove what a call stored after its caller had given up: that message was deferred."""
        if not call.cancelled() and call.exception() is None:
            self._disk.submit(self._drop, incident, call.result())

    def _keep(self, incident: str, message: Message, data: mmap.mmap | bytes, facts: dict[str, Any]) -> str:
        """Off the loop. The view keeps ``data`` valid even if the message is closed meanwhile."""
        with message.view() as view:
            kept = self._clock()
            sidecar = {"incident": incident, "size": len(view), "time": kept} | described(data) | facts
            self._make_room(len(view), sidecar)
            name = self._keep_bytes(incident, view)
        try:
            self._put_sidecar(incident, sidecar | {"sha256": name}, kept)
        except BaseException:
            self._drop(incident, name)
            raise
        return name

    def _keep_bytes(self, incident: str, view: memoryview) -> str:
        """Hash, then link the very bytes that are here already, or copy."""
        digest = hashlib.sha256()
        for start in range(0, len(view), _PIECE):
            digest.update(view[start : start + _PIECE])
        name = digest.hexdigest()
        entries = self._below("entries")
        master = self._below("messages", name[:2]) / f"{name}.eml"
        link = entries / f"{incident}.eml"
        if (entries / f"{incident}.json").exists():
            raise FileExistsError(errno.EEXIST, f"incident {incident} is in the quarantine already")
        link.unlink(missing_ok=True)  # of an earlier attempt that ended half-way
        try:
            os.link(master, link, follow_symlinks=False)
            if link.lstat().st_size == len(view):
                return name
            link.unlink()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EMLINK):
                raise
        temporary = master.with_name(NEW + secrets.token_hex(8))
        try:
            with open(temporary, "xb", opener=_private) as file:
                written = sum(file.write(view[start : start + _PIECE]) for start in range(0, len(view), _PIECE))
                if written != len(view):
                    raise OSError(errno.EIO, f"{written} of {len(view)} bytes written")
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, link)  # before the master has its name: never seen without a reference
            os.rename(temporary, master)
        except BaseException:
            temporary.unlink(missing_ok=True)
            link.unlink(missing_ok=True)
            raise
        return name

    def _put_sidecar(self, incident: str, sidecar: dict[str, Any], kept: float) -> None:
        """Write or replace a sidecar in one step; the entry is durable when this returns."""
        content = msgspec.json.encode(sidecar) + b"\n"
        temporary = self._entries / (NEW + secrets.token_hex(8))
        try:
            with open(temporary, "xb", opener=_private) as file:
                if (written := file.write(content)) != len(content):
                    raise OSError(errno.EIO, f"{written} of {len(content)} bytes written")
                file.flush()
                os.utime(file.fileno(), (kept, kept))
                os.fsync(file.fileno())
            os.rename(temporary, self._entries / f"{incident}.json")
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(self._entries)

    def _below(self, *names: str) -> Path:
        """The folder of that name; each level is ours alone, whatever the umask, and no symbolic link."""
        folder = self.directory
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
        for name in names:
            folder /= name
            try:
                folder.mkdir(mode=0o700)
                sync_directory(folder.parent)
            except FileExistsError:
                if folder.is_symlink():
                    raise OSError(errno.ELOOP, f"{folder} is a symbolic link") from None
        return folder

    # Room

    def _make_room(self, size: int, sidecar: dict[str, Any]) -> None:
        """Off the loop: account for ``size`` more bytes and their sidecar, expiring the oldest if the quota is full."""
        if not self._quota:
            return
        size += len(msgspec.json.encode(sidecar))
        full = OSError(errno.EDQUOT, f"quarantine is full: {size} bytes do not fit into the quota of {self._quota}")
        if size > self._quota:
            raise full
        with self._counting:
            now = self._clock()
            if not 0 <= now - self._counted < RECOUNT:
                self._used, self._counted = survey(self.directory, now).used, now
            if self._used + size > self._quota:
                if 0 <= now - self._full < RECOUNT:  # a flood must not make us look again for each message
                    raise full
                self._used = self.expire(room=max(size, self._quota // 20), aged=False).used
                if self._used + size > self._quota:
                    self._full = now
                    raise full
            self._used += size

    def expire(self, room: int = 0, dry_run: bool = False, aged: bool = True) -> Expired:
        """Remove entries past their retention (where ``aged``), then the oldest until ``room`` bytes are free below
        the quota; then unreferenced messages and unfinished files. Entries younger than *protect* never make room.
        """
        now = self._clock()
        found = survey(self.directory, now)
        limits = self._limits if aged else replace(self._limits, retention=float("inf"))
        gone, used = outdated(found, now, limits, room)
        if dry_run:
            return Expired(gone, len(found.orphans) + len(unreferenced(self.directory, now)), used)
        stray = 0
        for path in found.orphans:
            path.unlink(missing_ok=True)
            stray += 1
        removed = tuple(incident for incident in gone if self._try_delete(incident))
        for path in unreferenced(self.directory, now):
            path.unlink(missing_ok=True)
            stray += 1
        return Expired(removed, stray, used)

    def _try_delete(self, incident: str) -> bool:
        """Delete; False where it is gone, or is being released just now: then the next expiry takes it."""
        try:
            self.delete(incident)
        except QuarantineError:
            return False
        return True

    # Finding

    def entries(self, search: Search | None = None) -> Iterator[Sidecar]:
        """Those that match, newest incident first. One that is damaged comes with ``damaged`` set."""
        search = search or Search()
        for incident in self._incidents():
            if not incident.startswith(search.incident):
                continue
            entry = self._look(incident)
            if entry is not None and search.matches(entry):
                yield entry

    def find(self, prefix: str) -> Sidecar:
        """The entry whose incident is ``prefix`` or, alone, starts with it. Raises QuarantineError."""
        self._path(prefix, "json")
        names = [name for name in self._incidents() if name.startswith(prefix)]
        if len(names) > 1 and prefix not in names:
            raise QuarantineError(f"{prefix}: {len(names)} incidents start with this")
        entry = self._look(prefix if prefix in names else names[0]) if names else None
        if entry is None:
            raise QuarantineError(f"{prefix}: not in the quarantine")
        return entry

    def _look(self, incident: str) -> Sidecar | None:
        """The entry, marked where it is damaged; None when it has gone meanwhile."""
        try:
            return self.get(incident)
        except QuarantineError as error:
            try:
                kept = self._path(incident, "json").lstat().st_mtime
            except FileNotFoundError:
                return None
            return Sidecar(incident, time=kept, damaged=str(error))

    def get(self, incident: str) -> Sidecar:
        """The entry of exactly that incident. Raises QuarantineError when it is not there or damaged."""
        return parse(incident, self._sidecar(incident))

    def _incidents(self) -> list[str]:
        names = (name.removesuffix(".json") for name, _ in scan(self._entries) if name.endswith(".json"))
        return sorted(filter(valid_incident, names), reverse=True)

    def _sidecar(self, incident: str) -> bytes:
        try:
            with open(self._path(incident, "json"), "rb", opener=_private) as file:
                return file.read(SIDECAR_LIMIT)
        except FileNotFoundError:
            raise QuarantineError(f"{incident}: not in the quarantine") from None

    def _path(self, incident: str, kind: str) -> Path:
        """A file of an entry. The name may come from a command line: whatever could lead elsewhere is refused."""
        if not valid_incident(incident):
            raise QuarantineError(f"not an incident: {incident[:80]!r}")
        return self._entries / f"{incident}.{kind}"

    def message(self, incident: str) -> BufferedReader:
        """The kept bytes, open for reading. Raises QuarantineError."""
        try:
            return open(self._path(incident, "eml"), "rb", opener=_private)
        except FileNotFoundError:
            raise QuarantineError(f"{incident}: the message is not in the quarantine") from None

    # Changing

    def delete(self, incident: str) -> None:
        """Remove an entry, and its message where no other entry has the same. Raises QuarantineError."""
        with self._locked(incident):
            try:
                name = self.get(incident).sha256
            except QuarantineError:  # damaged
                name = ""
            self._drop(incident, name)

    def _drop(self, incident: str, name: str) -> None:
        for kind in ("json", "eml"):  # in this order: an entry is never without its message
            (self._entries / f"{incident}.{kind}").unlink(missing_ok=True)
        master = self._messages / name[:2] / f"{name}.eml"
        with suppress(FileNotFoundError):
            if name and master.lstat().st_nlink == 1:
                master.unlink()

    @contextmanager
    def held(self, incident: str) -> Iterator[Sidecar]:
        """The entry, while nobody else may release or remove it. Raises QuarantineError."""
        with self._locked(incident):
            yield self.get(incident)

    @contextmanager
    def _locked(self, incident: str) -> Iterator[None]:
        path = self._path(incident, "json")
        with ExitStack() as stack:
            try:
                while True:
                    file = stack.enter_context(open(path, "rb", opener=_private))
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(file.fileno()).st_ino == path.lstat().st_ino:  # not replaced meanwhile
                        break
            except BlockingIOError:
                raise QuarantineError(f"{incident}: somebody is releasing or removing it just now") from None
            except FileNotFoundError:
                raise QuarantineError(f"{incident}: not in the quarantine") from None
            yield

    async def note_release(self, incident: str, release: Release) -> None:
        """Write into the sidecar of a held entry that it was handed to qmail-queue. Raises OSError."""
        sidecar = msgspec.json.decode(self._sidecar(incident))
        sidecar["released"] = [*sidecar.get("released", []), msgspec.to_builtins(release)]
        kept = self._path(incident, "json").lstat().st_mtime
        await asyncio.wrap_future(self._disk.submit(self._put_sidecar, incident, sidecar, kept))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
