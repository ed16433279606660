"""The compiled hook in a qmail: put it where qmail-queue stands, take it away, look at it.

The original stays as ``qmail-queue.real``: the same file with its owner and setuid bit. At no
moment is there no ``qmail-queue``: the original gets its second name first, then the hook is
renamed over the first one. Uninstalling renames the original back.
"""

import contextlib
import hashlib
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from contentfilter.errors import RefusedError
from contentfilter.files import replace_file, sync_directory
from contentfilter.qmail import DEFAULT_CONF, Conf, QmailPaths, read_conf, version_of

DIALECTS = ("auto", "stock", "notqmail", "sagredo", "simscan", "indimail", "sqmail")


@dataclass(frozen=True, slots=True)
class InstallStep:
    """One change of the file system, told before it is made, and how to take it back."""

    text: str
    do: Callable[[], object]
    undo: Callable[[], object] = lambda: None


@dataclass(slots=True)
class HookState:
    """Everything that ``status`` shows."""

    installed: bool
    hook: str
    hook_version: str | None
    packaged_version: str | None
    current: bool
    original: str | None
    original_setuid: bool
    conf: str
    target: str | None
    socket: str | None
    socket_answers: bool
    problems: list[str] = field(default_factory=list)


def conf_text(real: Path, dialect: str) -> str:
    return f"# Written by `contentfilter hook install`.\nqueue {real}\ndialect {dialect}\n"


def same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def same_bytes(one: Path, other: Path) -> bool:
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in (one, other) if path.is_file()]
    return len(digests) == 2 and digests[0] == digests[1]


def root() -> tuple[int, int] | None:
    """Who owns what is installed; None where we cannot give it away."""
    return (0, 0) if os.geteuid() == 0 else None


def keep_original(place: QmailPaths) -> None:
    """Give the original its second name; an older one under that name is replaced in one step."""
    name = place.real.with_name(f".qmail-queue.real.{os.getpid()}")
    os.link(place.queue, name, follow_symlinks=False)
    os.replace(name, place.real)
    with contextlib.suppress(FileNotFoundError):
        name.unlink()  # rename does nothing when both names are one file already
    sync_directory(place.real.parent)


def check_original(program: Path) -> list[str]:
    """Raises RefusedError for what cannot be a qmail-queue; returns warnings."""
    if not program.is_file():
        raise RefusedError(f"{program}: not there; is this the right qmail? (--qmail DIR)")
    mode = program.stat().st_mode
    if not mode & stat.S_IXOTH:
        raise RefusedError(f"{program}: not executable for everyone, so it is no working qmail-queue")
    if version_of(program) is not None:
        raise RefusedError(
            f"{program}: is a contentfilter-queue itself: that would loop; put qmail's own program there"
        )
    if not mode & stat.S_ISUID:
        return [f"{program}: not setuid; qmail's own qmail-queue is (mode 4711, owner qmailq)"]
    return []


def plan_install(
    place: QmailPaths, conf: Path, dialect: str, binary: Path, *, force: bool
) -> tuple[list[InstallStep], list[str]]:
    """The steps, none when all is in place, and warnings. Raises RefusedError."""
    steps: list[InstallStep] = []
    warnings: list[str] = []
    present = version_of(place.queue)
    if present is None and (place.queue.exists() or not place.real.exists()):
        warnings += check_original(place.queue)
        if place.real.exists() and not same_file(place.queue, place.real):
            if not force:
                raise RefusedError(
                    f"{place.queue} and {place.real} are two programs (a new qmail over an installed hook?); "
                    f"--force makes the first one the original, and the second is lost"
                )
            steps.append(InstallStep(f"make {place.queue} the new {place.real}", lambda: keep_original(place)))
        else:
            undo = (lambda: None) if place.real.exists() else place.real.unlink
            steps.append(InstallStep(f"link {place.queue} to {place.real}", lambda: keep_original(place), undo))
    else:
        warnings += check_original(place.real)
    if not conf.exists():
        text = conf_text(place.real, dialect).encode()
        steps.append(InstallStep(f"write {conf}", lambda: write_conf(conf, text), conf.unlink))
    else:
        warnings += check_conf(read_conf(binary, conf), place, conf, dialect)
    if str(conf) != DEFAULT_CONF:
        warnings.append(f"the hook reads {DEFAULT_CONF} unless CONTENTFILTER_QUEUE_CONF={conf} is in its environment")
    if not same_bytes(place.queue, binary):
        verb = "install" if present is None else f"replace version {present} of"
        steps.append(
            InstallStep(
                f"{verb} the hook as {place.queue}",
                lambda: replace_file(place.queue, (binary.read_bytes(),), 0o755, root()),
            )
        )
    return steps, warnings


def write_conf(conf: Path, text: bytes) -> None:
    conf.parent.mkdir(parents=True, exist_ok=True)
    replace_file(conf, (text,), 0o644, root())


def check_conf(read: Conf, place: QmailPaths, conf: Path, dialect: str) -> list[str]:
    if read.problem:
        raise RefusedError(read.problem)
    if same_file(read.target(), place.queue):
        raise RefusedError(
            f"{conf}: `queue {read.target()}` is the hook's own place: that would loop; {place.real} is right"
        )
    warnings = []
    if not same_file(read.target(), place.real) and read.target() != place.real:
        warnings.append(f"{conf}: passes mail to {read.target()}, not to {place.real}")
    if dialect not in ("auto", read.values["dialect"]):
        warnings.append(f"{conf}: kept with its dialect {read.values['dialect']}; edit it for {dialect}")
    return warnings


def plan_uninstall(place: QmailPaths, conf: Path) -> tuple[list[InstallStep], list[str]]:
    """Only what install made: the original gets its name back, an unchanged queue.conf goes. Raises RefusedError."""
    steps: list[InstallStep] = []
    warnings: list[str] = []
    if version_of(place.queue) is not None or (place.real.exists() and not place.queue.exists()):
        check_original(place.real)
        steps.append(InstallStep(f"rename {place.real} to {place.queue}", lambda: restore(place)))
    elif same_file(place.queue, place.real):  # an install that was interrupted
        steps.append(InstallStep(f"remove the second name {place.real}", place.real.unlink))
    if conf.is_file():
        if conf.read_text(errors="replace") in {conf_text(place.real, dialect) for dialect in DIALECTS}:
            steps.append(InstallStep(f"remove {conf}", conf.unlink))
        elif steps:
            warnings.append(f"{conf}: kept, it was edited")
    return steps, warnings


def restore(place: QmailPaths) -> None:
    os.replace(place.real, place.queue)
    sync_directory(place.queue.parent)


def carry_out(steps: list[InstallStep]) -> None:
    """All of them, or, when one fails, none."""
    done: list[InstallStep] = []
    try:
        for step in steps:
            step.do()
            done.append(step)
    except OSError as error:
        for finished in reversed(done):
            with contextlib.suppress(OSError):
                finished.undo()
        raise RefusedError(f"{step.text}: {error.strerror or error}; nothing was changed") from None


def examine(place: QmailPaths, conf: Path, binary: Path | None) -> HookState:
    version = version_of(place.queue)
    read = read_conf(place.queue, conf) if version and os.access(place.queue, os.X_OK) else Conf({})
    real = place.real if place.real.exists() else None
    path = read.values.get("socket")
    state = HookState(
        installed=version is not None,
        hook=str(place.queue),
        hook_version=version,
        packaged_version=version_of(binary) if binary else None,
        current=binary is not None and same_bytes(place.queue, binary),
        original=str(real) if real else None,
        original_setuid=bool(real and real.stat().st_mode & stat.S_ISUID),
        conf=str(conf),
        target=str(read.target()) if version and not read.problem else None,
        socket=path,
        socket_answers=path is not None and answers(path),
    )
    if version is None:
        state.problems.append(f"{place.queue} is not the hook; `contentfilter hook install` puts it there")
        return state
    if read.problem:
        state.problems.append(read.problem)
    elif same_file(read.target(), place.queue) or version_of(read.target()) is not None:
        state.problems.append(f"a loop: {read.target()} is the hook itself; set `queue` in {conf}")
    elif not read.target().exists():
        state.problems.append(f"{read.target()} is missing: no mail can be queued; set `queue` in {conf}")
    if binary and not state.current:
        state.problems.append(f"{place.queue} differs from {binary}; `contentfilter hook install` replaces it")
    if path and not state.socket_answers:
        state.problems.append(f"nobody listens on {path}; start `contentfilter serve`")
    return state


def answers(path: str) -> bool:
    """Whether someone accepts connections there. A daemon takes an empty connection for a hook that was killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.settimeout(2)
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
