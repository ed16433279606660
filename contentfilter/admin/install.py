"""Server set-up around the installed package, and its removal.

``pip install`` brings programs and samples; this adds the user, directories, configuration, units, and links to the
command and the manual pages. Existing files are never changed. qmail is not touched: that is
``contentfilter hook install``.
"""

import os
import re
import stat
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

import contentfilter
from contentfilter.admin.install_items import STATE, SYSUSERS, TMPFILES, USER, InstallItem, Manifest, System
from contentfilter.admin.qmail import InstallStep
from contentfilter.errors import RefusedError
from contentfilter.qmail import QmailPaths, version_of

CONFIG = "/etc/contentfilter"
RUN = "/run/contentfilter"
UNITS = "/usr/local/lib/systemd/system"
SOCKET, SERVICE = "contentfilter.socket", "contentfilter.service"
_SAMPLES = {
    f"{UNITS}/{SOCKET}": f"systemd/{SOCKET}",
    f"{UNITS}/{SERVICE}": f"systemd/{SERVICE}",
    SYSUSERS: "sysusers.d/contentfilter.conf",
    TMPFILES: "tmpfiles.d/contentfilter.conf",
}
_MANUAL = ("man8/contentfilter.8", "man8/contentfilter-queue.8", "man5/contentfilter.toml.5")
_SAMPLE_COMMAND = b"/opt/contentfilter/bin/contentfilter"
_SAMPLE_QMAIL = b'"/var/qmail/control"'
_PLAIN = re.compile(r"/[A-Za-z0-9/._+-]+")
_VERBS = {"directory": "make", "file": "write", "link": "link", "user": "add"}


@dataclass(frozen=True, slots=True)
class Package:
    """Files of the installed package."""

    command: Path
    samples: Path
    manual: Path  # directory of man5 and man8

    @classmethod
    def find(cls, command: str | None) -> "Package":
        """Raises RefusedError where there is no installed command."""
        data = Path(sysconfig.get_path("data"), "share")
        source = Path(contentfilter.__file__).resolve().parents[1]
        samples = source / "etc" if (source / "meson.build").exists() else data / "contentfilter"
        scripts = (sysconfig.get_path("scripts"), os.path.dirname(sys.executable))
        candidates = [Path(command)] if command else [Path(each, "contentfilter") for each in scripts]
        for path in candidates:
            if os.access(path, os.X_OK) and path.is_file():
                return cls(Path(os.path.abspath(path)), samples, data / "man")
        names = ", ".join(map(str, candidates))
        raise RefusedError(f"no contentfilter in {names}; pip install it, or use --command FILE")

    def text(self, name: str) -> bytes:
        """A sample, with the path of the command filled in."""
        return (self.samples / name).read_bytes().replace(_SAMPLE_COMMAND, os.fsencode(self.command))


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in their order, none when there is nothing to do."""

    steps: list[InstallStep]
    warnings: list[str]


def plan_install(package: Package, system: System, qmail: str) -> Plan:
    """Raises RefusedError."""
    for path in (str(package.command), qmail):
        if not _PLAIN.fullmatch(path):
            raise RefusedError(f"{path}: a unit can hold only absolute paths of letters, digits and ._+-")
    before = Manifest.read(system)
    to_make: dict[str, InstallItem] = {}
    warnings: list[str] = []
    for item in wanted(package, system, qmail):
        if not system.there(item):
            for parent in reversed(Path(item.path).parents):  # none for a user
                if not system.at(parent).exists():
                    to_make.setdefault(str(parent), InstallItem("directory", str(parent)))
            to_make[item.path] = item
        elif item.kind in ("file", "link") and not item.keep and system.current(item) != item.digest:
            if item.path in before.made and system.current(item) == before.made[item.path][1]:
                to_make[item.path] = item  # of an earlier version
            else:
                why = "edited since it was installed" if item.path in before.made else "not made by this command"
                warnings.append(f"{item.path}: kept, it was {why}")
    return Plan(_install_steps(system, before, qmail, to_make), warnings)


def wanted(package: Package, system: System, qmail: str) -> list[InstallItem]:
    """All items of a server, in the order in which they are made."""
    settings = package.text("contentfilter.toml").replace(_SAMPLE_QMAIL, f'"{qmail}/control"'.encode())
    samples = _SAMPLES if system.systemd else {}
    links = {"/usr/local/sbin/contentfilter": package.command}
    links |= {f"/usr/local/share/man/{page}": package.manual / page for page in _MANUAL}
    return [
        InstallItem("directory", CONFIG, keep=True),  # first, because the manifest is in it
        InstallItem("file", f"{CONFIG}/contentfilter.toml", 0o644, content=settings, keep=True),
        *(InstallItem("file", path, 0o644, content=package.text(sample)) for path, sample in samples.items()),
        InstallItem("user", USER, keep=True),  # systemd-sysusers and systemd-tmpfiles read the files above
        InstallItem("directory", STATE, 0o700, keep=True, whole=True),
        InstallItem("directory", RUN, whole=True),
        *(
            InstallItem("link", path, content=os.fsencode(target))
            for path, target in links.items()
            # A package installed below /usr or /usr/local needs no links.
            if not str(target).startswith("/usr/") and target.exists()
        ),
    ]


def _install_steps(system: System, before: Manifest, qmail: str, to_make: dict[str, InstallItem]) -> list[InstallStep]:
    steps = [_make(system, before, item) for item in to_make.values()]
    if to_make:
        after = before.with_items(qmail, to_make.values())
        undo = (lambda: before.write(system)) if before.made else (lambda: before.remove_file(system))
        # Written as soon as its directory is there, so that an interrupted installation can be removed, too.
        first = list(to_make).index(CONFIG) + 1 if CONFIG in to_make else 0
        steps.insert(first, InstallStep(f"write {Manifest.PATH}", lambda: after.write(system), undo))
    if system.lacks_group:
        steps.insert(0, _command(system, "groupadd", "--system", USER))
    if any(path.startswith(UNITS) and item.kind == "file" for path, item in to_make.items()):
        steps.append(_command(system, "systemctl", "daemon-reload"))
    return steps


def start_step(system: System) -> InstallStep:
    """Separate from plan_install's steps, because a daemon that does not start must not undo the installation."""
    return _command(system, "systemctl", "enable", "--now", SOCKET, SERVICE)


def _make(system: System, before: Manifest, item: InstallItem) -> InstallStep:
    old = system.content(item) if item.path in before.made and item.digest else None
    target = f" to {os.fsdecode(item.content)}" if item.kind == "link" else ""
    verb = "replace" if old is not None and item.kind == "file" else _VERBS[item.kind]
    text = f"{verb} {item}{target}"
    if old is None:
        return InstallStep(text, lambda: system.make(item), lambda: system.remove(item))
    return InstallStep(text, lambda: system.make(item), lambda: system.make(replace(item, content=old)))


def _command(system: System, *words: str) -> InstallStep:
    return InstallStep(" ".join(("run" if system.real else "skip (--prefix)", *words)), lambda: system.run(*words))


def plan_uninstall(system: System, *, purge: bool) -> Plan:
    """Raises RefusedError while a qmail still hands its mail to the daemon."""
    manifest = Manifest.read(system)
    paths = QmailPaths(system.at(manifest.qmail or "/var/qmail"))
    if manifest.made and version_of(paths.queue) is not None:
        raise RefusedError(
            f"{paths.queue} is the hook and would defer all mail without the daemon; "
            f"first: contentfilter hook uninstall --qmail {manifest.qmail}"
        )
    warnings: list[str] = []
    kept: list[str] = []
    removed: list[InstallItem] = []
    for item, digest in reversed(manifest.made.values()):
        edited = item.kind in ("file", "link") and system.there(item) and system.current(item) != digest
        if edited and not (purge or item.keep):
            warnings.append(f"{item}: kept, it was edited since it was installed")
        needed = any(path.startswith(f"{item.path}/") for path in kept)
        if needed or (not purge and (item.keep or edited)):
            kept.append(item.path)
        else:
            removed.append(item)
    if not removed:
        return Plan([], warnings)
    steps = [_remove(system, item) for item in removed]
    rest = Manifest(manifest.qmail, {path: made for path, made in manifest.made.items() if path in kept})
    if rest.made:
        steps.append(InstallStep(f"write {Manifest.PATH}", lambda: rest.write(system)))
    else:
        last = next((i for i, item in enumerate(removed) if item.path == CONFIG), len(steps))
        steps.insert(last, InstallStep(f"remove {Manifest.PATH}", lambda: rest.remove_file(system)))
    units = [name for name in (SOCKET, SERVICE) if f"{UNITS}/{name}" in manifest.made]
    if system.systemd and (names := [name for name in units if system.at(f"{UNITS}/{name}").exists()]):
        steps.insert(0, _command(system, "systemctl", "disable", "--now", *names))
        steps.append(_command(system, "systemctl", "daemon-reload"))
    return Plan(steps, warnings)


def _remove(system: System, item: InstallItem) -> InstallStep:
    shared = item.kind == "directory" and not item.whole
    return InstallStep(f"remove {item}" + (", if it is empty" if shared else ""), lambda: system.remove(item))


def unreachable(paths: list[Path]) -> str | None:
    """Why the daemon's user could not run the programs at ``paths``; None when it can."""
    for path in paths:
        real = path.resolve()
        for each in (real, *real.parents):
            if str(each) in ("/root", "/home", "/run/user"):
                return f"{real} is below {each}, which the service cannot access"
            if not each.stat().st_mode & stat.S_IXOTH:
                return f"{each} is not open to other users, so the service cannot run {real}"
    return None
