"""Reloads under load: each message is handled by an application that is open, whatever its size and its owner."""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest
from lab.offer import offer

from contentfilter.deadline import Deadline
from contentfilter.doors import hook_work
from contentfilter.doors.admission import AcceptedMessage, PendingMessage
from contentfilter.doors.listener import Listener
from contentfilter.doors.listening_socket import open_socket
from contentfilter.log import make_logger
from contentfilter.model import RECIPIENTS_MAX, Action, Envelope, OriginKind
from contentfilter.settings import OriginSettings, ServiceSettings, Settings
from contentfilter.verdict.disposition import Disposition
from contentfilter.wire import hook
from contentfilter.worker.crashes import CrashAttribution, CrashTable, WorkerSlot
from contentfilter.worker.lease import ApplicationLease

SIZES = (50, 70_000, hook_work.INLINE - 20, hook_work.INLINE + 1, 3 * hook_work.INLINE)


class Closable:
    """An application that fails once it is closed, as one whose table snapshot is closed does."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.closed = False

    def recipient_limit(self, kind: OriginKind) -> int:
        assert not self.closed
        return RECIPIENTS_MAX

    async def handle(self, accepted: AcceptedMessage) -> Disposition:
        for _ in range(3):
            assert not self.closed
            await asyncio.sleep(0)
        return Disposition(Action.DROP)

    async def isolate(self, accepted: AcceptedMessage, fingerprint: str) -> Disposition:
        raise NotImplementedError

    def rejected_busy(self, pending: PendingMessage, envelope: Envelope, why: str, text: str, seconds: float) -> None:
        assert not self.closed

    def backends(self) -> tuple[()]:
        return ()

    async def close(self) -> None:
        self.closed = True


@pytest.mark.asyncio
async def test_no_message_reaches_a_closed_application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = hook_work.open_pair

    def slowly(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.01)  # a copy of a large message, or a busy disk: several reloads long
        return really(*arguments, **named)

    monkeypatch.setattr(hook_work, "open_pair", slowly)
    origin = OriginSettings(smtp_users=(str(os.getuid()),), bounce_users=())
    settings = Settings(service=ServiceSettings(state=str(tmp_path)), origin=origin)
    log = make_logger("json", "error")
    table = CrashTable(log)
    slot = WorkerSlot(os.dup(table.fd), table.enlist())
    attribution = CrashAttribution(slot, asyncio.get_running_loop())
    leases = [ApplicationLease(Closable(settings), 0, slot, attribution)]
    own = open_socket(str(tmp_path / "q"), 0o600, 64)
    listener = Listener(own.socket, leases[0].limits(), log)
    listener.start()

    async def reload() -> None:
        async with asyncio.TaskGroup() as group:
            while not done.is_set():
                leases.append(ApplicationLease(Closable(settings), len(leases), slot, attribution))
                listener.apply(leases[-1].limits())
                group.create_task(leases[-2].release())
                await asyncio.sleep(0.001)

    done = asyncio.Event()
    reloading = asyncio.create_task(reload())
    offers = (asyncio.to_thread(offer, own.path, b"Subject: x\n\n" + b"x" * size) for size in SIZES * 6)
    answers = await asyncio.gather(*offers)
    done.set()
    await reloading
    assert answers == [hook.Answer(Action.DROP)] * len(answers)
    assert listener.counters.errors == 0
    assert len(leases) > 10, "it reloaded all the time"
    assert [lease.application.closed for lease in leases] == [True] * (len(leases) - 1) + [False]
    await listener.drained(Deadline.after(10))
    listener.stop()
    own.close()
    table.close()
