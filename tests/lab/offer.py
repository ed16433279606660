"""A hook for tests, in Python and blocking: offers a message to the daemon and reads the answer."""

import fcntl
import os
import socket
import struct
import tempfile
import time
from collections.abc import Mapping
from types import TracebackType

from contentfilter.wire import hook

ENVELOPE = b"Fsender@example.org\0Trecipient@example.net\0\0"
MESSAGE = b"From: sender@example.org\nSubject: test\n\nHello.\n"
WAIT = 20.0  # seconds for any one answer


def sealed(content: bytes) -> int:
    """A memfd as the hook makes it."""
    fd = os.memfd_create("spool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    written = 0
    while written < len(content):
        written += os.write(fd, content[written:])
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def unnamed(content: bytes) -> int:
    """An unnamed file on disk, which nobody can seal."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return os.dup(file.fileno())


class Offer:
    """One connection to the daemon. The request goes out in :meth:`send`, as one packet."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(WAIT)
        self.socket.connect(path)

    def send(
        self,
        message: bytes = MESSAGE,
        envelope: bytes = ENVELOPE,
        *,
        environ: Mapping[bytes, bytes] | None = None,
        budget: float = 60.0,
        attempt: int = 0,
    ) -> "Offer":
        """A proper offer."""
        request = hook.Request(attempt, budget, len(message), len(envelope), dict(environ or {}))
        fds = [sealed(message), sealed(envelope)]
        try:
            return self.send_raw(hook.encode_request(request), fds)
        finally:
            for fd in fds:
                os.close(fd)

    def send_raw(self, packet: bytes, fds: list[int]) -> "Offer":
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
        self.socket.sendmsg([packet], rights)
        return self

    def answer(self) -> hook.Answer | None:
        """None when the daemon closed the connection without an answer."""
        try:
            packet, fds, _, _ = socket.recv_fds(self.socket, hook.PACKET_MAX, 1)
        except ConnectionResetError:
            return None
        if not packet:
            return None
        if not fds:
            return hook.decode_answer(packet)
        with os.fdopen(fds[0], "rb") as file:
            file.seek(0)
            return hook.decode_answer(packet, file.read())

    def report(self, *results: hook.Result) -> None:
        self.socket.send(hook.encode_report(hook.CommitReport(results)))

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> "Offer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def offer(path: str, message: bytes = MESSAGE, envelope: bytes = ENVELOPE, **more: object) -> hook.Answer | None:
    """Offer once."""
    with Offer(path) as once:
        return once.send(message, envelope, **more).answer()  # type: ignore[arg-type]


def offer_until_answered(
    path: str, message: bytes = MESSAGE, envelope: bytes = ENVELOPE, seconds: float = WAIT
) -> hook.Answer:
    """As the real hook does: again and again until there is an answer."""
    end = time.monotonic() + seconds
    attempt = 0
    while True:
        try:
            answer = offer(path, message, envelope, attempt=attempt)
        except (ConnectionError, FileNotFoundError, BrokenPipeError):
            answer = None
        if answer is not None:
            return answer
        if time.monotonic() > end:
            raise TimeoutError(f"no answer after {attempt + 1} offers")
        attempt += 1
        time.sleep(min(0.02 * attempt, 0.2))  # the hook's own back-off, not a wait for a condition
