"""Orders of operators: only from those who may give them, in force in every worker, and ended by the clock."""

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lab.daemon import WAIT, Daemon
from lab.hook import until
from lab.offer import Offer, offer

from contentfilter.bus import messages, sockets
from contentfilter.model import Action, OriginKind, Scanner
from contentfilter.settings import ServiceSettings, Settings
from contentfilter.supervisor import overrides
from contentfilter.supervisor.overrides import OverrideManager
from contentfilter.supervisor.workers import Workers

Make = Callable[..., Daemon]
NOBODY = 65534
ORDERS = (
    messages.AskBypass(Scanner.CLAMD, 600.0, "r", (OriginKind.LOCAL,)),
    messages.AskBypassEnd(),
    messages.AskDrain(),
    messages.AskResume(),
    messages.AskAllow("Win.Bad-1", 60.0, "r", "anna"),
    messages.AskAllowEnd("Win.Bad-1"),
)


def ask(running: Daemon, question: messages.Question) -> messages.Reply:
    reply = sockets.ask(str(running.directory), question, WAIT)
    assert reply is not None
    return reply


def status(running: Daemon) -> messages.Status:
    reply = ask(running, messages.AskStatus())
    assert isinstance(reply, messages.Status)
    return reply


def ask_as(uid: int, running: Daemon, *questions: messages.Question) -> list[str]:
    """The types of the replies to a process of that user, which has dropped root's rights for good."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            said = [type(sockets.ask(str(running.directory), question, WAIT)).__name__ for question in questions]
            os.write(writing, " ".join(said).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read().split()
    os.waitpid(child, 0)
    return said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_orders_of_another_user_are_refused_though_the_socket_lets_it_in(daemon: Make) -> None:
    with daemon() as running:
        running.directory.chmod(0o711)
        (running.directory / "control.sock").chmod(0o666)
        assert ask_as(NOBODY, running, messages.AskStatus(), *ORDERS) == ["Status", *["Refused"] * len(ORDERS)]
        lines = running.wait_for("control.refused", len(ORDERS))
        assert {(line["uid"], line["question"]) for line in lines} == {(NOBODY, type(o).__name__) for o in ORDERS}
        now = status(running)
        assert (now.state, now.bypasses, now.drain) == ("ready", (), None)


@pytest.mark.parametrize(
    "order",
    [
        messages.AskBypass(Scanner.CLAMD, 59.0, "r"),
        messages.AskBypass(Scanner.CLAMD, 1e9, "r"),
        messages.AskBypass(Scanner.CLAMD, 600.0, " "),
        messages.AskBypass(Scanner.CLAMD, 600.0, "\x1b[2J"),
        messages.AskBypass(Scanner.LOADERTYPES, 600.0, "r"),
        messages.AskDrain(1.0),
        messages.AskDrain(None, "\n"),
    ],
)
def test_the_daemon_itself_refuses_what_is_out_of_bounds(order: messages.Question, daemon: Make) -> None:
    with daemon({"service": {"workers": 1}}) as running:
        assert isinstance(ask(running, order), messages.Refused)
        assert status(running).state == "ready"


def test_drained_workers_finish_what_they_have_and_accept_nothing(daemon: Make, gate: Any) -> None:
    with daemon() as running, Offer(running.socket) as held, Offer(running.socket) as waiting:
        held.send(gate.message)
        gate.wait()
        until(lambda: sum(w.open for w in status(running).workers) == 2, "both are accepted")
        assert isinstance(reply := ask(running, messages.AskDrain(600.0, "disk", "eve\n")), messages.Ordered)
        assert (reply.problems, reply.in_flight) == ((), 2)
        assert reply.drain is not None
        assert reply.drain.by.endswith("(says it is eve?)")
        waiting.send()
        assert waiting.answer(), "who was let in is served"
        gate.open()
        assert held.answer()
        with Offer(running.socket) as late:
            late.send()
            until(lambda: status(running).waiting == 1, "it waits in the queue")
            assert "DRAINED" in running.wait_notified("STATUS")["STATUS"]
            assert isinstance(ask(running, messages.AskResume()), messages.Ordered)
            answer = late.answer()
            assert answer is not None
            assert answer.action is Action.QUEUE


def test_a_drained_daemon_is_alive_for_the_watchdog(daemon: Make) -> None:
    with daemon(watchdog=0.4) as running:
        ask(running, messages.AskDrain())
        running.notified_now()
        for _ in range(3):
            assert running.wait_notified("WATCHDOG") == {"WATCHDOG": "1"}
        assert status(running).restarts == 0


def test_a_killed_supervisor_leaves_no_drain_behind(daemon: Make) -> None:
    running = daemon()
    try:
        running.start()
        ask(running, messages.AskDrain())
        running.kill()
        running.wait_exit()
        running.start()
        answer = offer(running.socket)
        assert answer is not None
        assert answer.action is Action.QUEUE
    finally:
        running.clean()


# In one process, with a clock of our own


class Fake:
    """A break-glass with nobody around it."""

    def __init__(self, state: Path) -> None:
        self.sent: list[messages.Overrides] = []
        self.told: list[messages.Event] = []
        self.logged: list[tuple[str, dict[str, Any]]] = []
        settings = Settings(service=ServiceSettings(state=str(state)))

        def log(name: str, **fields: Any) -> None:
            self.logged.append((name, fields))

        logger: Any = SimpleNamespace(warning=log, error=log, info=log)
        bus: Any = SimpleNamespace(command=lambda command, pids: self.sent.append(command))
        self.workers = Workers(bus)
        self.glass = OverrideManager(logger, lambda: settings, self.workers, self.told.append)

    async def ask(self, question: messages.Question) -> messages.Reply:
        return await self.glass.answers()[type(question)](question, os.geteuid())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1_800_000_000.0, ticks=5000.0)
    fake = SimpleNamespace(time=lambda: clock.now, monotonic=lambda: clock.ticks)
    monkeypatch.setattr(overrides, "time", fake)
    return clock


async def until_true(true: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT):
        while not true():
            await asyncio.sleep(0.005)


@pytest.mark.asyncio
async def test_orders_end_by_the_clock(tmp_path: Path, clock: SimpleNamespace) -> None:
    fake = Fake(tmp_path)
    await fake.ask(messages.AskDrain(60.0))
    await fake.ask(messages.AskBypass(Scanner.SPAMD, 60.0, "r"))
    await fake.ask(messages.AskBypass(Scanner.CLAMD, 3600.0, "r"))
    running = asyncio.create_task(fake.glass.run())
    clock.now += 60
    await until_true(lambda: fake.glass.orders.drain is None)
    running.cancel()
    assert [b.scanner for b in fake.glass.bypasses()] == [Scanner.CLAMD]
    assert fake.sent[-1] == fake.glass.orders
    assert [(e.name, e.fields["ended"]) for e in fake.told[3:]] == [("bypass.end", "expired"), ("drain.end", "expired")]
    numbers = [orders.number for orders in fake.sent]
    assert numbers == sorted(set(numbers))


@pytest.mark.asyncio
async def test_what_ended_while_no_daemon_ran_is_told_at_the_start(tmp_path: Path, clock: SimpleNamespace) -> None:
    await Fake(tmp_path).ask(messages.AskBypass(Scanner.CLAMD, 600.0, "r"))
    clock.now += 601
    fake = Fake(tmp_path)
    assert fake.glass.bypasses() == ()
    running = asyncio.create_task(fake.glass.run())
    await until_true(lambda: fake.told)
    running.cancel()
    assert (fake.told[0].name, fake.told[0].fields["ended"]) == ("bypass.end", "expired")


@pytest.mark.asyncio
async def test_an_allow_entry_is_sent_audited_and_survives_a_restart(tmp_path: Path, clock: SimpleNamespace) -> None:
    fake = Fake(tmp_path)
    for seconds in (60.0, 600.0):
        await fake.ask(messages.AskAllow("Win.Bad-1", seconds, "r", "anna"))
    assert [(e.by, e.until) for e in fake.sent[-1].allowed] == [("anna", clock.now + 600)]
    assert Fake(tmp_path).glass.allowed() == fake.glass.allowed()
    assert isinstance(await fake.ask(messages.AskAllowEnd("Win.Bad-1.UNOFFICIAL")), messages.Ordered)
    assert fake.sent[-1].allowed == Fake(tmp_path).glass.allowed() == ()
    assert isinstance(await fake.ask(messages.AskAllowEnd("Win.Bad-1")), messages.Refused)
    audit = [json.loads(line)["event"] for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert audit == ["allow.begin", "allow.begin", "allow.end"]


@pytest.mark.asyncio
async def test_the_log_is_reminded_every_five_minutes(tmp_path: Path, clock: SimpleNamespace) -> None:
    fake = Fake(tmp_path)
    await fake.ask(messages.AskBypass(Scanner.CLAMD, 3600.0, "r"))

    def reminders() -> int:
        return sum(name == "bypass.active" for name, _ in fake.logged)

    running = asyncio.create_task(fake.glass.run())
    await asyncio.sleep(0)
    assert reminders() == 0, "it was said a moment ago"
    for count in (1, 2):
        clock.ticks += 300
        await until_true(lambda count=count: reminders() == count)
    running.cancel()


@pytest.mark.asyncio
async def test_a_disk_that_hangs_keeps_no_order_waiting(
    tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(tmp_path)
    monkeypatch.setattr(overrides, "SAVE_WAIT", 0.05)
    monkeypatch.setattr(overrides, "save", lambda *_: time.sleep(1))
    reply = await fake.ask(messages.AskBypass(Scanner.CLAMD, 600.0, "r"))
    assert isinstance(reply, messages.Ordered)
    assert "the disk does not answer" in reply.problems[0]
    assert len(fake.sent) == 1


@pytest.mark.asyncio
async def test_a_worker_that_does_not_follow_in_time_is_named(
    tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(tmp_path)
    monkeypatch.setattr(overrides, "TAKE_WAIT", 0.05)
    beat = messages.Heartbeat(1, 1, 0, 0.0, (), 3, {}, orders=1)
    starting, late, leaving = (
        SimpleNamespace(retiring=False, beat=None, slot=0, pid=10, ready=False),
        SimpleNamespace(retiring=False, beat=beat, slot=1, pid=11, ready=True),
        SimpleNamespace(retiring=True, beat=None, slot=2, pid=12, ready=False),
    )
    for process in (starting, late, leaving):
        fake.workers.add(process)  # type: ignore[arg-type]
    reply = await fake.ask(messages.AskDrain())
    assert isinstance(reply, messages.Ordered)
    assert [problem.split(" has")[0] for problem in reply.problems] == ["worker 0 (pid 10)", "worker 1 (pid 11)"]
    assert reply.in_flight == 3
