"""Things that an installation makes, and how each is made and removed: directories, files, links, a user.

A thing knows only itself: whether it is there, whether it is still as it was made. What was made is
written down in an :class:`Manifest`, so that removing touches nothing else. Paths are those of the
finished system; ``root`` in front of them is ``/`` but in tests.
"""

import grp
import hashlib
import json
import os
import pwd
import shutil
import stat
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from contentfilter.admin.qmail import root
from contentfilter.errors import RefusedError
from contentfilter.files import replace_file, sync_directory

USER = "contentfilter"
STATE = "/var/lib/contentfilter"
USERADD = ("useradd", "--system", "--user-group", "--no-create-home", "--home-dir", STATE,
           "--shell", "/usr/sbin/nologin", "--comment", "Content filter for qmail")  # fmt: skip
ItemKind = Literal["directory", "file", "link", "user"]


@dataclass(frozen=True, slots=True)
class InstallItem:
    """One thing. ``keep``: an uninstallation leaves it, unless everything is to go (configuration, state, the user)."""

    kind: ItemKind
    path: str  # absolute; the name of a user
    mode: int = 0o755
    owner: str = "root:root"
    content: bytes = b""  # of a file; where a link points
    keep: bool = False
    whole: bool = False  # of a directory: what the daemon put into it goes with it

    @property
    def digest(self) -> str:
        """Of what is in it; directories and users have none."""
        if self.kind in ("directory", "user"):
            return ""
        return hashlib.sha256(self.content).hexdigest()

    def __str__(self) -> str:
        return f"the user {self.path}" if self.kind == "user" else self.path


@dataclass(frozen=True, slots=True)
class System:
    """The machine, or the directory that stands for one: there no command is run and nothing is given away."""

    root: Path = Path("/")

    @property
    def real(self) -> bool:
        return self.root == Path("/")

    @property
    def systemd(self) -> bool:
        return self.at("/run/systemd/system").is_dir()

    def at(self, path: str | Path) -> Path:
        return self.root / str(path).lstrip("/")

    def run(self, *words: str) -> None:
        """Raises OSError with what the command said."""
        if not self.real:
            return
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip() or done.returncode}")

    def there(self, thing: InstallItem) -> bool:
        if thing.kind == "user":
            return not self.real or known_user(thing.path)
        return os.path.lexists(self.at(thing.path))

    def current(self, thing: InstallItem) -> str | None:
        """The digest of what a file says or where a link points; None when it is something else."""
        path = self.at(thing.path)
        try:
            content = os.fsencode(os.readlink(path)) if thing.kind == "link" else path.read_bytes()
        except OSError:
            return None
        return hashlib.sha256(content).hexdigest()

    def make(self, thing: InstallItem) -> None:
        path = self.at(thing.path)
        if thing.kind == "user":
            self.run(*USERADD, thing.path)
        elif thing.kind == "link":
            temporary = path.with_name(f".{path.name}.new")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(os.fsdecode(thing.content))
            os.replace(temporary, path)
        elif thing.kind == "file":
            replace_file(path, (thing.content,), thing.mode, root())
        else:
            path.mkdir(mode=thing.mode)
            path.chmod(thing.mode)  # whatever the umask is
            os.chown(path, *self._ids(thing.owner))

    def remove(self, thing: InstallItem) -> None:
        """What is gone already is fine; a directory that others use stays."""
        path = self.at(thing.path)
        if thing.kind == "user":
            if self.real and known_user(thing.path):
                self.run("userdel", thing.path)
        elif thing.kind != "directory":
            path.unlink(missing_ok=True)
        elif thing.whole:
            if path.exists():
                shutil.rmtree(path)
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()

    def _ids(self, owner: str) -> tuple[int, int]:
        if not self.real:
            return os.geteuid(), os.getegid()
        user, _, group = owner.partition(":")
        try:
            return pwd.getpwnam(user).pw_uid, grp.getgrnam(group).gr_gid
        except KeyError:
            raise OSError(f"no such user or group: {owner}") from None


def known_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


@dataclass(slots=True)
class Manifest:
    """What was made here, in the order in which it was made, and for which qmail."""

    PATH = "/etc/contentfilter/installed.json"

    qmail: str = ""
    made: dict[str, tuple[InstallItem, str]] = field(default_factory=dict)  # by path; the digest of what was written

    @classmethod
    def read(cls, system: System) -> "Manifest":
        """Empty where nothing was made. Raises RefusedError for a file that another user could have written."""
        path = system.at(cls.PATH)
        try:
            status = path.lstat()
            if system.real and (status.st_uid != 0 or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
                raise RefusedError(f"{path}: not written by root alone, so it is not believed")
            stored = json.loads(path.read_bytes())
            made = {row["path"]: (_item(row), str(row["digest"])) for row in stored["made"]}
            return cls(str(stored["qmail"]), made)
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError, KeyError) as error:
            raise RefusedError(f"{path}: cannot be understood ({error})") from None

    def write(self, system: System) -> None:
        rows = [
            {"kind": t.kind, "path": t.path, "keep": t.keep, "whole": t.whole, "digest": digest}
            for t, digest in self.made.values()
        ]
        text = json.dumps({"qmail": self.qmail, "made": rows}, indent=1) + "\n"
        replace_file(system.at(self.PATH), (text.encode(),), 0o644, root())

    def with_things(self, qmail: str, things: Iterable[InstallItem]) -> "Manifest":
        """This one and ``things``; a thing made again keeps its place."""
        return Manifest(qmail, self.made | {thing.path: (thing, thing.digest) for thing in things})

    def remove_file(self, system: System) -> None:
        path = system.at(self.PATH)
        path.unlink(missing_ok=True)
        sync_directory(path.parent)


def _item(row: dict[str, Any]) -> InstallItem:
    if row["kind"] not in ("directory", "file", "link", "user") or ".." in Path(row["path"]).parts:
        raise ValueError(f"{row['path']!r}")
    return InstallItem(row["kind"], str(row["path"]), keep=bool(row["keep"]), whole=bool(row["whole"]))


def with_missing_parents(system: System, things: Sequence[InstallItem]) -> list[InstallItem]:
    """``things``, in front of each the directories above it that are not there yet."""
    found: dict[str, InstallItem] = {}
    for thing in things:
        above = reversed(Path(thing.path).parents) if thing.kind != "user" else ()
        for parent in map(str, above):
            if parent not in found and not system.at(parent).exists():
                found[parent] = InstallItem("directory", parent)
        found[thing.path] = thing
    return list(found.values())
