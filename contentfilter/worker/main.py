"""Entry point of a worker process: command line, privileges, event loop.

Started by exec with the listening socket, the lifeline, the configuration, the overrides and the crash table as
inherited descriptors.
"""

import argparse
import asyncio
import os
import resource
import select
import selectors
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from contentfilter.hardening import give_up_privileges, give_way
from contentfilter.log import adopt_standard_logging, make_logger
from contentfilter.log_target import open_target
from contentfilter.settings import Settings
from contentfilter.worker.crashes import SlotPlace
from contentfilter.worker.lease import Build
from contentfilter.worker.worker import Options, run_worker

OOM_SCORE = 300  # before the supervisor, which starts another one
DESCRIPTORS = ("listen", "lifeline", "runtime", "orders", "suspects", "receiver")


class ExclusiveSelector(selectors.EpollSelector):
    """Wakes one idle worker per connection instead of all: EPOLLEXCLUSIVE, epoll_ctl(2), for the listening socket."""

    def __init__(self, listener: int) -> None:
        super().__init__()
        self._listener = listener

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = super().register(fileobj, events, data)
        if key.fd == self._listener:
            epoll: select.epoll = self._selector  # type: ignore[attr-defined]
            epoll.unregister(key.fd)
            epoll.register(key.fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)
        return key


def command_line(
    worker: Sequence[str],
    settings: Settings,
    facility: str,
    slot: int,
    generation: int,
    place: SlotPlace,
    fds: dict[str, int],
) -> list[str]:
    """Command line of a worker process; ``worker``: the program and its first arguments, ``fds``: by DESCRIPTORS."""
    options: dict[str, Any] = {
        "run": settings.service.run,
        "log": settings.log.format,
        "level": settings.log.level,
        "to": settings.log.to,
        "syslog": settings.log.socket,
        "facility": facility,
        "slot": slot,
        "generation": generation,
        "place": place.index,
        "life": place.life,
        **fds,
    }
    return [*worker, *(f"--{name}={value}" for name, value in options.items())]


def main(build: Build, arguments: Sequence[str] | None = None) -> None:
    """Run a worker until it ends. ``arguments``: instead of the process's own."""
    parser = argparse.ArgumentParser(prog="contentfilter worker", description="Started by contentfilter serve only.")
    for name in ("run", "log", "level", "to", "syslog", "facility"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("slot", "generation", "place", "life", *DESCRIPTORS):
        parser.add_argument(f"--{name}", type=int, required=True)
    parsed = parser.parse_args(arguments)
    fds = {name: getattr(parsed, name) for name in DESCRIPTORS}
    options = Options(parsed.run, parsed.generation, SlotPlace(parsed.place, parsed.life), **fds)
    give_way(OOM_SCORE)
    give_up_privileges()
    with suppress(OSError):  # the service's unit forbids it, and has set enough
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # messages have several; nothing uses select(2)
    for fd in fds.values():
        os.set_inheritable(fd, False)
    target = open_target(parsed.to, parsed.syslog, parsed.facility, os.environ)
    log = make_logger(parsed.log, parsed.level, target, worker=parsed.slot, pid=os.getpid())
    adopt_standard_logging(log)
    selector = ExclusiveSelector(options.listen)
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(run_worker(options, build, log))
