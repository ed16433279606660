"""Items of an installation (user, directories, files, links) and the manifest of those that were made.

sysusers.d and tmpfiles.d create the user and its directories; useradd and mkdir do where systemd is missing. The
manifest lists what did not exist before, so that uninstalling removes nothing else. Paths are those of the finished
system; ``System.root`` is put in front of them, and is ``/`` except in tests.
"""

import grp
import hashlib
import json
import os
import pwd
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from contentfilter.admin.qmail import root
from contentfilter.errors import RefusedError
from contentfilter.files import replace_file, sync_directory

USER = "contentfilter"
STATE = "/var/lib/contentfilter"
SYSUSERS = "/usr/local/lib/sysusers.d/contentfilter.conf"
TMPFILES = "/usr/local/lib/tmpfiles.d/contentfilter.conf"
_USERADD = ("useradd", "--system", "--no-create-home", "--home-dir", STATE,
            "--shell", "/usr/sbin/nologin", "--comment", "Content filter for qmail")  # fmt: skip
ItemKind = Literal["directory", "file", "link", "user"]


@dataclass(frozen=True, slots=True)
class InstallItem:
    """One item. ``keep``: removed by ``uninstall --purge`` only (configuration, state, the user)."""

    kind: ItemKind
    path: str  # absolute; of a user, the name
    mode: int = 0o755
    content: bytes = b""  # of a link: its target
    keep: bool = False
    whole: bool = False  # directory of the daemon's user, removed with everything in it

    @property
    def digest(self) -> str:
        """SHA-256 of the content; empty for directories and users."""
        return hashlib.sha256(self.content).hexdigest() if self.kind in ("file", "link") else ""

    def __str__(self) -> str:
        return f"the user {self.path}" if self.kind == "user" else self.path


@dataclass(frozen=True, slots=True)
class System:
    """The machine, or a directory in its place, where no command is run and no owner is changed."""

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
        """Run a command. Raises OSError with its output."""
        if not self.real:
            return
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip() or done.returncode}")

    def there(self, item: InstallItem) -> bool:
        if item.kind == "user":
            return not self.real or _known(pwd.getpwnam, item.path)
        return os.path.lexists(self.at(item.path))

    def content(self, item: InstallItem) -> bytes | None:
        """The bytes of a file or the target of a link as it is now; None for anything else."""
        path = self.at(item.path)
        try:
            return os.fsencode(os.readlink(path)) if item.kind == "link" else path.read_bytes()
        except OSError:
            return None

    def current(self, item: InstallItem) -> str | None:
        """The digest of :meth:`content`."""
        content = self.content(item)
        return None if content is None else hashlib.sha256(content).hexdigest()

    @property
    def lacks_group(self) -> bool:
        """The user exists without the group that units and tmpfiles.d name."""
        return self.real and _known(pwd.getpwnam, USER) and not _known(grp.getgrnam, USER)

    def make(self, item: InstallItem) -> None:
        path = self.at(item.path)
        if item.kind == "user":
            self._add_user(item.path)
        elif item.kind == "link":
            temporary = path.with_name(f".{path.name}.new")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(os.fsdecode(item.content))
            os.replace(temporary, path)
        elif item.kind == "file":
            replace_file(path, (item.content,), item.mode, root())
        elif item.whole and self._has("systemd-tmpfiles"):
            self.run("systemd-tmpfiles", "--create", f"--prefix={item.path}", TMPFILES)
        else:
            path.mkdir(mode=item.mode)
            path.chmod(item.mode)  # regardless of the umask
            if item.whole and self.real:
                shutil.chown(path, USER, USER)

    def _add_user(self, name: str) -> None:
        """Create the user; a group of that name that is left from an earlier installation becomes its group."""
        if self._has("systemd-sysusers"):
            self.run("systemd-sysusers", SYSUSERS)
        else:
            group = ("--gid", name) if _known(grp.getgrnam, name) else ("--user-group",)
            self.run(*_USERADD, *group, name)

    def _has(self, program: str) -> bool:
        return self.real and self.systemd and shutil.which(program) is not None

    def remove(self, item: InstallItem) -> None:
        """Remove it if it is there. A directory that contains other files stays."""
        path = self.at(item.path)
        if item.kind == "user":
            if self.real and self.there(item):
                self.run("userdel", item.path)
        elif item.kind != "directory":
            path.unlink(missing_ok=True)
        elif item.whole:
            if path.exists():
                shutil.rmtree(path)
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _known(look_up: Callable[[str], object], name: str) -> bool:
    try:
        look_up(name)
    except KeyError:
        return False
    return True


@dataclass(slots=True)
class Manifest:
    """The items that were made, in that order, and the qmail that they were made for."""

    PATH = "/etc/contentfilter/installed.json"

    qmail: str = ""
    made: dict[str, tuple[InstallItem, str]] = field(default_factory=dict)  # by path; with the digest as written

    @classmethod
    def read(cls, system: System) -> "Manifest":
        """Empty where nothing was made. Raises RefusedError for a file that another user could have written."""
        path = system.at(cls.PATH)
        try:
            status = path.lstat()
            if system.real and (status.st_uid != 0 or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
                raise RefusedError(f"{path}: not trusted, because users other than root can write it")
            stored = json.loads(path.read_bytes())
            made = {row["path"]: (_item(row), str(row["digest"])) for row in stored["made"]}
            return cls(str(stored["qmail"]), made)
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError, KeyError) as error:
            raise RefusedError(f"{path}: not a manifest ({error})") from None

    def write(self, system: System) -> None:
        rows = [
            {"kind": item.kind, "path": item.path, "keep": item.keep, "whole": item.whole, "digest": digest}
            for item, digest in self.made.values()
        ]
        text = json.dumps({"qmail": self.qmail, "made": rows}, indent=1) + "\n"
        replace_file(system.at(self.PATH), (text.encode(),), 0o644, root())

    def with_items(self, qmail: str, items: Iterable[InstallItem]) -> "Manifest":
        """This one and ``items``; an item that is made again keeps its position."""
        return Manifest(qmail, self.made | {item.path: (item, item.digest) for item in items})

    def remove_file(self, system: System) -> None:
        path = system.at(self.PATH)
        path.unlink(missing_ok=True)
        sync_directory(path.parent)


def _item(row: dict[str, Any]) -> InstallItem:
    if row["kind"] not in get_args(ItemKind) or ".." in Path(row["path"]).parts:
        raise ValueError(f"{row['path']!r}")
    return InstallItem(row["kind"], str(row["path"]), keep=bool(row["keep"]), whole=bool(row["whole"]))
