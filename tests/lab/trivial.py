"""A daemon without scanners: the real supervisor and workers around an application that obeys the message.

As a program: ``trivial.py SETTINGS.toml``. The first line of the message is a command: WAIT, STUCK, BURN or WHO.
"""

import asyncio
import os
import sys
import time
import tomllib
from pathlib import Path

import msgspec

from contentfilter.bus.messages import Event
from contentfilter.doors.admission import AcceptedMessage, PendingMessage
from contentfilter.doors.listening_socket import SocketError
from contentfilter.errors import ConfigError, Problem
from contentfilter.model import RECIPIENTS_MAX, Action, Envelope, OriginKind
from contentfilter.scanners.health import BackendHealth
from contentfilter.settings import Settings
from contentfilter.supervisor.source import Loaded
from contentfilter.supervisor.supervisor import Supervisor
from contentfilter.verdict.disposition import Delivery, Disposition
from contentfilter.worker.lease import WorkerContext
from contentfilter.worker.main import main as worker_main

QUEUE = Disposition(Action.QUEUE, deliveries=(Delivery(),))


class Trivial:
    """Answers with the worker's pid and generation in the text where it defers."""

    def __init__(self, settings: Settings, context: WorkerContext) -> None:
        self.settings = settings
        self._context = context

    def recipient_limit(self, kind: OriginKind) -> int:
        return RECIPIENTS_MAX

    async def handle(self, accepted: AcceptedMessage) -> Disposition:
        self._context.emit(Event("mail.done", {"id": accepted.incident, "attempt": accepted.attempt}))
        words = bytes(accepted.message.data[:4096]).split(b"\n", 1)[0].decode("latin-1").split(" ")
        if words[0] == "WAIT":  # report to the test, and continue when it answers
            reader, writer = await asyncio.open_unix_connection(words[1])
            writer.write(str(os.getpid()).encode())
            try:
                await reader.read(1)
            finally:
                writer.close()
        elif words[0] == "STUCK":
            while True:
                time.sleep(1)
        elif words[0] == "BURN":
            end = time.thread_time() + 0.3
            while time.thread_time() < end:
                pass
        elif words[0] == "WHO":
            return Disposition(Action.DEFER, text=f"{os.getpid()} {self.settings.service.budget}")
        return QUEUE

    async def isolate(self, accepted: AcceptedMessage, fingerprint: str) -> Disposition:
        return Disposition(Action.DEFER, text=f"isolated {fingerprint}")

    def learn(self, results: object) -> None:
        pass

    def backends(self) -> tuple[BackendHealth, ...]:
        return ()

    def rejected_busy(self, pending: PendingMessage, envelope: Envelope, why: str, text: str, seconds: float) -> None:
        pass

    async def close(self) -> None:
        self._context.log.debug("worker.reload", closed=True)


async def build(blob: bytes, context: WorkerContext) -> Trivial:
    settings = msgspec.msgpack.decode(blob, type=Settings)
    if settings.tables.extension == "!":
        raise RuntimeError("this worker cannot build that")
    if settings.tables.extension == "?" and context.log is not None:
        os._exit(3)
    return Trivial(settings, context)


class TomlSource:
    def __init__(self, path: str) -> None:
        self._path = path
        self._seen = 0.0

    async def load(self) -> Loaded:
        self._seen = os.stat(self._path).st_mtime
        try:
            settings = msgspec.convert(tomllib.loads(Path(self._path).read_text()), Settings)
        except (tomllib.TOMLDecodeError, msgspec.ValidationError) as e:
            raise ConfigError((Problem(self._path, 1, str(e)),)) from e
        return Loaded(settings, msgspec.msgpack.encode(settings))

    async def refresh(self) -> Loaded | None:
        return None if os.stat(self._path).st_mtime == self._seen else await self.load()

    def tables(self) -> None:
        return None


def main() -> int:
    try:
        return asyncio.run(
            Supervisor(TomlSource(sys.argv[1]), (sys.executable, "-P", __file__, "worker"), os.environ).run()
        )
    except (ConfigError, SocketError) as error:
        print(f"contentfilter: {error}", file=sys.stderr)
        return 78 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        worker_main(build, sys.argv[2:])
    else:
        sys.exit(main())
