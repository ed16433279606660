"""A server set up around the installed package, and taken down again.

``pip install`` brings programs and samples; this adds the user, directories, configuration, units, and links to
the command and the manual pages. What is there already is left alone, whoever made it. qmail is not touched:
that is ``contentfilter hook install``.
"""

import os
import re
import stat
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import contentfilter
from contentfilter.admin.install_items import STATE, USER, InstallItem, Manifest, System, with_missing_parents
from contentfilter.admin.qmail import InstallStep
from contentfilter.errors import RefusedError
from contentfilter.qmail import QmailPaths, version_of

CONFIG = "/etc/contentfilter"
RUN = "/run/contentfilter"
UNITS = "/usr/local/lib/systemd/system"
SOCKET, SERVICE = "contentfilter.socket", "contentfilter.service"
MANUAL = ("man8/contentfilter.8", "man8/contentfilter-queue.8", "man5/contentfilter.toml.5")
_SAMPLE_COMMAND = b"/opt/contentfilter/bin/contentfilter"
_SAMPLE_QMAIL = b'"/var/qmail/control"'
_PLAIN = re.compile(r"/[A-Za-z0-9/._+-]+")


@dataclass(frozen=True, slots=True)
class Package:
    """What ``pip install`` has put where."""

    command: Path
    samples: Path
    manual: Path  # with man5 and man8 in it

    @classmethod
    def find(cls, command: str | None) -> "Package":
        """Raises RefusedError where there is no installed command."""
        data = Path(sysconfig.get_path("data"), "share")
        source = Path(contentfilter.__file__).resolve().parents[1]
        samples = source / "etc" if (source / "meson.build").exists() else data / "contentfilter"
        scripts = (sysconfig.get_path("scripts"), os.path.dirname(sys.executable))
        places = [Path(command)] if command else [Path(each, "contentfilter") for each in scripts]
        for place in places:
            if os.access(place, os.X_OK) and place.is_file():
                return cls(Path(os.path.abspath(place)), samples, data / "man")
        raise RefusedError(f"no contentfilter in {', '.join(map(str, places))}; pip install it, or use --command FILE")

    def text(self, name: str) -> bytes:
        """A sample, with the path of the command in it."""
        return (self.samples / name).read_bytes().replace(_SAMPLE_COMMAND, os.fsencode(self.command))


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in their order, none when there is nothing to do."""

    steps: list[InstallStep]
    warnings: list[str]


def plan_install(package: Package, system: System, qmail: str) -> Plan:
    """Raises RefusedError."""
    for what in (str(package.command), qmail):
        if not _PLAIN.fullmatch(what):
            raise RefusedError(f"{what}: only absolute paths of letters, digits and ._+- can stand in a unit")
    before = Manifest.read(system)
    things = wanted(package, system, qmail)
    to_make: list[InstallItem] = []
    warnings: list[str] = []
    for thing in things:
        if not system.there(thing):
            to_make.append(thing)
        elif thing.kind in ("file", "link") and not thing.keep and system.current(thing) != thing.digest:
            if thing.path in before.made and system.current(thing) == before.made[thing.path][1]:
                to_make.append(thing)  # of an earlier version
            else:
                why = "edited since it was installed" if thing.path in before.made else "not made by this command"
                warnings.append(f"{thing.path}: kept, it was {why}")
    to_make = with_missing_parents(system, to_make)
    return Plan(_install_steps(system, before, qmail, to_make), warnings)


def wanted(package: Package, system: System, qmail: str) -> list[InstallItem]:
    """Everything that makes a server, in the order in which it is made."""
    settings = package.text("contentfilter.toml").replace(_SAMPLE_QMAIL, f'"{qmail}/control"'.encode())
    ours = f"{USER}:{USER}"
    things = [
        InstallItem("directory", CONFIG, keep=True),  # first, for the inventory lies in it
        InstallItem("user", USER, keep=True),
        InstallItem("file", f"{CONFIG}/contentfilter.toml", 0o644, content=settings, keep=True),
        InstallItem("directory", STATE, 0o700, ours, keep=True, whole=True),
        InstallItem("directory", RUN, 0o755, ours, whole=True),
    ]
    if system.systemd:
        for path, sample in (
            (f"{UNITS}/{SOCKET}", f"systemd/{SOCKET}"),
            (f"{UNITS}/{SERVICE}", f"systemd/{SERVICE}"),
            ("/usr/local/lib/sysusers.d/contentfilter.conf", "systemd/sysusers.conf"),
            ("/usr/local/lib/tmpfiles.d/contentfilter.conf", "systemd/tmpfiles.conf"),
        ):
            things.append(InstallItem("file", path, 0o644, content=package.text(sample)))
    links = {"/usr/local/sbin/contentfilter": package.command}
    links |= {f"/usr/local/share/man/{page}": package.manual / page for page in MANUAL}
    for path, target in links.items():
        # A package installed below /usr or /usr/local needs no links.
        if not str(target).startswith("/usr/") and target.exists():
            things.append(InstallItem("link", path, content=os.fsencode(target)))
    return things


def _install_steps(system: System, before: Manifest, qmail: str, to_make: list[InstallItem]) -> list[InstallStep]:
    steps = [_make(system, before, thing) for thing in to_make]
    if to_make:
        after = before.with_things(qmail, to_make)
        undo = (lambda: before.write(system)) if before.made else (lambda: before.remove_file(system))
        # Written as soon as its directory is there, so that an interrupted installation is known, too.
        first = next((i for i, thing in enumerate(to_make) if thing.path == CONFIG), -1) + 1
        steps.insert(first, InstallStep(f"write {Manifest.PATH}", lambda: after.write(system), undo))
    if any(thing.path.startswith(UNITS) and thing.kind == "file" for thing in to_make):
        steps.append(_command(system, "systemctl", "daemon-reload"))
    return steps


def start_step(system: System) -> InstallStep:
    """Not one of plan_install's: a daemon that does not start is no reason to take everything back."""
    return _command(system, "systemctl", "enable", "--now", SOCKET, SERVICE)


def _make(system: System, before: Manifest, thing: InstallItem) -> InstallStep:
    replaced = system.at(thing.path).read_bytes() if thing.kind == "file" and thing.path in before.made else None
    if replaced is not None:
        old = InstallItem("file", thing.path, thing.mode, thing.owner, replaced)
        return InstallStep(f"replace {thing}", lambda: system.make(thing), lambda: system.make(old))
    verb = {"directory": "make", "file": "write", "link": "link", "user": "add"}[thing.kind]
    target = f" to {os.fsdecode(thing.content)}" if thing.kind == "link" else ""
    return InstallStep(f"{verb} {thing}{target}", lambda: system.make(thing), lambda: system.remove(thing))


def _command(system: System, *words: str) -> InstallStep:
    return InstallStep(" ".join(("run" if system.real else "leave out (--prefix)", *words)), lambda: system.run(*words))


def plan_uninstall(system: System, *, purge: bool) -> Plan:
    """Raises RefusedError while a qmail still hands its mail to the daemon."""
    inventory = Manifest.read(system)
    place = QmailPaths(system.at(inventory.qmail or "/var/qmail"))
    if inventory.made and version_of(place.queue) is not None:
        raise RefusedError(
            f"{place.queue} is the hook and would defer all mail without the daemon; "
            f"first: contentfilter hook uninstall --qmail {inventory.qmail}"
        )
    warnings: list[str] = []
    left: list[str] = []
    gone: list[InstallItem] = []
    for thing, digest in reversed(inventory.made.values()):
        edited = thing.kind in ("file", "link") and system.there(thing) and system.current(thing) != digest
        if edited and not (purge or thing.keep):
            warnings.append(f"{thing}: kept, it was edited since it was installed")
        needed = any(path.startswith(f"{thing.path}/") for path in left)
        if needed or (not purge and (thing.keep or edited)):
            left.append(thing.path)
        else:
            gone.append(thing)
    if not gone:
        return Plan([], warnings)
    rest = Manifest(inventory.qmail, {path: made for path, made in inventory.made.items() if path in left})
    steps = [InstallStep(_removal(thing), lambda thing=thing: system.remove(thing)) for thing in gone]  # type: ignore[misc]
    last = next((i for i, thing in enumerate(gone) if thing.path == CONFIG), len(steps))
    if rest.made:
        steps.append(InstallStep(f"write {Manifest.PATH}", lambda: rest.write(system)))
    else:
        steps.insert(last, InstallStep(f"remove {Manifest.PATH}", lambda: rest.remove_file(system)))
    units = [path for path in inventory.made if path in (f"{UNITS}/{SOCKET}", f"{UNITS}/{SERVICE}")]
    if system.systemd and (names := [os.path.basename(path) for path in units if system.at(path).exists()]):
        steps.insert(0, _command(system, "systemctl", "disable", "--now", *names))
        steps.append(_command(system, "systemctl", "daemon-reload"))
    return Plan(steps, warnings)


def _removal(thing: InstallItem) -> str:
    shared = thing.kind == "directory" and not thing.whole
    return f"remove {thing}" + (", if nothing else is in it" if shared else "")


def unreachable(paths: list[Path]) -> str | None:
    """Why the daemon's user could not run what is at ``paths``; None when it can."""
    for path in paths:
        real = path.resolve()
        for each in (real, *real.parents):
            if str(each) in ("/root", "/home", "/run/user"):
                return f"{real} lies below {each}, where the service cannot look"
            if not each.stat().st_mode & stat.S_IXOTH:
                return f"{each} is not open to other users, so the service cannot run {real}"
    return None
