"""Runs the hook with a canary sample so that nothing can ever be queued.

The hook is the installed program and works as for any mail, but under a configuration of its own: the socket is the one
that mail goes to, and `queue` is /dev/null, a device, which not even root can execute. It is given in a memfd, so no
file is left behind. :func:`prepare` has the hook itself confirm that it reads it; a setuid one would not.
"""

import asyncio
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from contentfilter.deadline import Deadline
from contentfilter.doors import canary
from contentfilter.errors import ContentFilterError
from contentfilter.files import memory_file
from contentfilter.model import readable
from contentfilter.monitor import samples

NOWHERE = "/dev/null"
ANSWER_WAIT = 30.0  # seconds for the hook to get an answer
AGAIN_WAIT = 6.0  # the same, after a round without one
HOOK_WAIT = 10.0  # further seconds for the hook to end
STDERR_SHOWN = 300  # characters
NOT_STARTED = 120
"""Status of a hook that was answered with queue: it could not start NOWHERE."""


class CanaryError(ContentFilterError):
    """No sample can be sent."""


@dataclass(frozen=True, slots=True)
class Ended:
    """End of the hook: its status (negative: a signal) and its output."""

    status: int
    said: str


async def prepare(program: Path, conf_path: str, seconds: float) -> int:
    """A descriptor with a configuration under which ``program`` queues nothing. Raises CanaryError.

    ``conf_path``: the configuration that mail goes by. ``seconds``: for the hook to get an answer.
    """
    if not stat.S_ISCHR(os.stat(NOWHERE).st_mode):
        raise CanaryError(f"{NOWHERE} is no device")
    theirs = await _checked(program, {"CONTENTFILTER_QUEUE_CONF": conf_path})
    values = {name: theirs[name] for name in ("socket", "memory", "spool") if name in theirs} | {
        "queue": NOWHERE,
        "dialect": "stock",
        "unavailable": "defer",
        "budget": f"{int(seconds)}",
    }
    text = "".join(f"{name} {value}\n" for name, value in values.items())
    conf = memory_file("canary.conf", f"{text}environ {canary.VARIABLE}\n".encode())
    try:
        ours = await _checked(program, _environ(conf), conf)
        if any(ours.get(name) != value for name, value in values.items()):
            raise CanaryError(f"{program} does not read the configuration that it is given; is it setuid?")
    except BaseException:
        os.close(conf)
        raise
    return conf


def _environ(conf: int) -> dict[str, str]:
    return {"CONTENTFILTER_QUEUE_CONF": f"/proc/self/fd/{conf}"}


async def _checked(program: Path, environ: Mapping[str, str], *keep: int) -> dict[str, str]:
    """The configuration as the hook reads it. Raises CanaryError."""
    process = await _started(program, "--check", environ=environ, keep=keep)
    ended, out = await _ended(process, HOOK_WAIT)
    if ended.status:
        raise CanaryError(f"{program} --check: status {ended.status} {ended.said}".rstrip())
    lines = (line.partition(" ") for line in out.decode("utf-8", "replace").splitlines())
    return {name: value for name, _, value in lines}


async def hand_over(program: Path, conf: int, mark: str, message: bytes) -> Ended:
    """Run the hook as qmail-smtpd does: the message on descriptor 0, the envelope on 1. Raises CanaryError."""
    environ = _environ(conf) | {canary.VARIABLE: mark}
    ends = [_pipe_with(message), _pipe_with(samples.ENVELOPE)]
    try:
        process = await _started(program, environ=environ, keep=(conf,), stdin=ends[0], stdout=ends[1])
    finally:
        for end in ends:
            os.close(end)
    return (await _ended(process, ANSWER_WAIT + HOOK_WAIT))[0]


def _pipe_with(content: bytes) -> int:
    """The read end of a pipe that holds ``content``."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        os.set_blocking(writer, False)
        if os.write(writer, content) != len(content):
            raise CanaryError("a sample does not fit into a pipe")
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    return reader


async def _started(
    program: Path,
    *arguments: str,
    environ: Mapping[str, str],
    keep: tuple[int, ...],
    stdin: int = asyncio.subprocess.DEVNULL,
    stdout: int = asyncio.subprocess.PIPE,
) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    try:
        return await asyncio.create_subprocess_exec(
            program, *arguments, stdin=stdin, stdout=stdout, stderr=pipe, env=environ, pass_fds=keep, process_group=0
        )
    except OSError as error:
        raise CanaryError(f"{program}: {error.strerror or error}") from None


async def _ended(process: asyncio.subprocess.Process, seconds: float) -> tuple[Ended, bytes]:
    """Wait for its end and output; kill it after ``seconds``. Raises CanaryError."""
    try:
        async with Deadline.after(seconds).timeout():
            out, err = await process.communicate()
    except TimeoutError:
        raise CanaryError(f"the hook did not end within {seconds:g} s") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    said = readable(err[-STDERR_SHOWN:].strip().replace(b"\n", b"; ")).removeprefix("contentfilter-queue: ")
    return Ended(process.returncode if process.returncode is not None else -1, said), out or b""
