"""Hook installation in qmail: replace qmail-queue, restore it, show the state.

The original is kept as ``qmail-queue.real``: the same file with its owner and setuid bit. ``qmail-queue`` exists at
every moment: the original gets its second name first, then the hook is renamed over the first one. Uninstalling
renames the original back.
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
    """One change of the system: its description, the change, and its reversal."""

    text: str
    do: Callable[[], object]
    undo: Callable[[], object] = lambda: None


@dataclass(slots=True)
class HookState:
    """Output of ``contentfilter hook status``."""

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
    """Owner of installed files; None if we may not change the owner."""
    return (0, 0) if os.geteuid() == 0 else None


def keep_original(paths: QmailPaths) -> None:
    """Give the original its second name, atomically replacing an older file of that name."""
    name = paths.real.with_name(f".qmail-queue.real.{os.getpid()}")
    os.link(paths.queue, name, follow_symlinks=False)
    os.replace(name, paths.real)
    with contextlib.suppress(FileNotFoundError):
        name.unlink()  # rename does nothing if both names are the same file
    sync_directory(paths.real.parent)


def check_original(program: Path) -> list[str]:
    """Warnings about ``program``. Raises RefusedError if it cannot be a qmail-queue."""
    if not program.is_file():
        raise RefusedError(f"{program}: does not exist; check the directory of qmail (--qmail DIR)")
    mode = program.stat().st_mode
    if not mode & stat.S_IXOTH:
        raise RefusedError(f"{program}: not executable for all users, so it is not a working qmail-queue")
    if version_of(program) is not None:
        raise RefusedError(
            f"{program}: is a contentfilter-queue itself, which would be a loop; restore the program of qmail"
        )
    if not mode & stat.S_ISUID:
        return [f"{program}: not setuid; qmail's own qmail-queue is (mode 4711, owner qmailq)"]
    return []


def plan_install(
    paths: QmailPaths, conf: Path, dialect: str, binary: Path, *, force: bool
) -> tuple[list[InstallStep], list[str]]:
    """Steps (none if the hook is installed) and warnings. Raises RefusedError."""
    steps: list[InstallStep] = []
    warnings: list[str] = []
    present = version_of(paths.queue)
    if present is None and (paths.queue.exists() or not paths.real.exists()):
        warnings += check_original(paths.queue)
        if paths.real.exists() and not same_file(paths.queue, paths.real):
            if not force:
                raise RefusedError(
                    f"{paths.queue} and {paths.real} are two different programs (was qmail installed over the hook?); "
                    f"--force makes the first one the original and discards the second"
                )
            steps.append(InstallStep(f"make {paths.queue} the new {paths.real}", lambda: keep_original(paths)))
        else:
            undo = (lambda: None) if paths.real.exists() else paths.real.unlink
            steps.append(InstallStep(f"link {paths.queue} to {paths.real}", lambda: keep_original(paths), undo))
    else:
        warnings += check_original(paths.real)
    if not conf.exists():
        text = conf_text(paths.real, dialect).encode()
        steps.append(InstallStep(f"write {conf}", lambda: write_conf(conf, text), conf.unlink))
    else:
        warnings += check_conf(read_conf(binary, conf), paths, conf, dialect)
    if str(conf) != DEFAULT_CONF:
        warnings.append(f"the hook reads {DEFAULT_CONF} unless CONTENTFILTER_QUEUE_CONF={conf} is in its environment")
    if not same_bytes(paths.queue, binary):
        verb = "install" if present is None else f"replace version {present} of"
        steps.append(
            InstallStep(
                f"{verb} the hook as {paths.queue}",
                lambda: replace_file(paths.queue, (binary.read_bytes(),), 0o755, root()),
            )
        )
    return steps, warnings


def write_conf(conf: Path, text: bytes) -> None:
    conf.parent.mkdir(parents=True, exist_ok=True)
    replace_file(conf, (text,), 0o644, root())


def check_conf(read: Conf, paths: QmailPaths, conf: Path, dialect: str) -> list[str]:
    if read.problem:
        raise RefusedError(read.problem)
    if same_file(read.target(), paths.queue):
        raise RefusedError(
            f"{conf}: `queue {read.target()}` is the hook itself, which would be a loop; it must be {paths.real}"
        )
    warnings = []
    if not same_file(read.target(), paths.real) and read.target() != paths.real:
        warnings.append(f"{conf}: mail goes to {read.target()}, not to {paths.real}")
    if dialect not in ("auto", read.values["dialect"]):
        warnings.append(f"{conf}: unchanged, with dialect {read.values['dialect']}; edit it to use {dialect}")
    return warnings


def plan_uninstall(paths: QmailPaths, conf: Path) -> tuple[list[InstallStep], list[str]]:
    """Steps that rename the original back and remove an unchanged queue.conf. Raises RefusedError."""
    steps: list[InstallStep] = []
    warnings: list[str] = []
    if version_of(paths.queue) is not None or (paths.real.exists() and not paths.queue.exists()):
        check_original(paths.real)
        steps.append(InstallStep(f"rename {paths.real} to {paths.queue}", lambda: restore(paths)))
    elif same_file(paths.queue, paths.real):  # an install that was interrupted
        steps.append(InstallStep(f"remove the second name {paths.real}", paths.real.unlink))
    if conf.is_file():
        if conf.read_text(errors="replace") in {conf_text(paths.real, dialect) for dialect in DIALECTS}:
            steps.append(InstallStep(f"remove {conf}", conf.unlink))
        elif steps:
            warnings.append(f"{conf}: kept, it was edited")
    return steps, warnings


def restore(paths: QmailPaths) -> None:
    os.replace(paths.real, paths.queue)
    sync_directory(paths.queue.parent)


def carry_out(steps: list[InstallStep]) -> None:
    """Carry out all steps, or, if one fails, none. Raises RefusedError."""
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


def examine(paths: QmailPaths, conf: Path, binary: Path | None) -> HookState:
    version = version_of(paths.queue)
    read = read_conf(paths.queue, conf) if version and os.access(paths.queue, os.X_OK) else Conf({})
    real = paths.real if paths.real.exists() else None
    path = read.values.get("socket")
    state = HookState(
        installed=version is not None,
        hook=str(paths.queue),
        hook_version=version,
        packaged_version=version_of(binary) if binary else None,
        current=binary is not None and same_bytes(paths.queue, binary),
        original=str(real) if real else None,
        original_setuid=bool(real and real.stat().st_mode & stat.S_ISUID),
        conf=str(conf),
        target=str(read.target()) if version and not read.problem else None,
        socket=path,
        socket_answers=path is not None and answers(path),
    )
    if version is None:
        state.problems.append(f"{paths.queue} is not the hook; install it with `contentfilter hook install`")
        return state
    if read.problem:
        state.problems.append(read.problem)
    elif same_file(read.target(), paths.queue) or version_of(read.target()) is not None:
        state.problems.append(f"loop: {read.target()} is the hook itself; set `queue` in {conf}")
    elif not read.target().exists():
        state.problems.append(f"{read.target()} is missing: no mail can be queued; set `queue` in {conf}")
    if binary and not state.current:
        state.problems.append(f"{paths.queue} differs from {binary}; update it with `contentfilter hook install`")
    if path and not state.socket_answers:
        state.problems.append(f"no process listens on {path}; start `contentfilter serve`")
    return state


def answers(path: str) -> bool:
    """True if connections are accepted. The daemon treats an empty one as a hook that was killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.settimeout(2)
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
