"""A new configuration reaches every worker; a bad one changes nothing and says why."""

import os
import signal
from collections.abc import Callable
from typing import Any

from lab.daemon import WAIT, Daemon
from lab.offer import Offer, offer

from contentfilter.bus import messages, sockets
from contentfilter.model import Action

Make = Callable[..., Daemon]


def budgets(running: Daemon, count: int = 8) -> set[str]:
    """The budgets in force in the workers that answered."""
    return {offer(running.socket, b"WHO\n").text.split()[1] for _ in range(count)}


def status(running: Daemon) -> messages.Status:
    reply = sockets.ask(str(running.directory), messages.AskStatus(), WAIT)
    assert isinstance(reply, messages.Status)
    return reply


def test_a_good_configuration_is_in_force_in_all_workers_when_ready_is_said_again(daemon: Make) -> None:
    with daemon({"service": {"budget": 100.0}}) as running:
        assert budgets(running) == {"100.0"}
        running.configure({"service": {"budget": 50.0}})
        running.reload()
        reloading = running.wait_notified("RELOADING", "1")
        assert int(reloading["MONOTONIC_USEC"]) > 0
        assert "configuration 2" in running.wait_notified("READY", "1")["STATUS"]
        assert budgets(running) == {"50.0"}
        assert {w.generation for w in status(running).workers} == {2}


def test_a_message_under_way_ends_under_the_configuration_it_began_with(daemon: Make, gate: Any) -> None:
    with daemon({"service": {"workers": 1}, "log": {"level": "debug"}}) as running, Offer(running.socket) as held:
        held.send(gate.message)
        gate.wait()
        running.reload()
        running.wait_for("worker.reload", where=lambda line: line.get("generation") == 2)
        assert offer(running.socket).action is Action.QUEUE
        assert not running.log("worker.reload")[-1].get("closed"), "the old one must stay open for the held message"
        gate.open()
        assert held.answer().action is Action.QUEUE
        running.wait_for("worker.reload", where=lambda line: line.get("closed", False))


def test_a_bad_configuration_keeps_the_old_one_and_says_why(daemon: Make) -> None:
    with daemon({"service": {"budget": 100.0}}) as running:
        pids = sorted(running.workers())
        running.configure({"service": {"budget": -5}})
        running.reload()
        running.wait_notified("RELOADING", "1")
        assert "configuration 1" in running.wait_notified("READY", "1")["STATUS"]
        problem = running.wait_for("service.problem")[0]
        assert (problem["path"], problem["line"]) == (str(running.config), 1)
        assert "budget" in problem["text"]
        assert running.wait_for("service.reload-failed")[0]["generation"] == 1
        assert budgets(running) == {"100.0"}
        assert sorted(running.workers()) == pids
        assert "budget" in status(running).problems[0]
        running.configure({"service": {"budget": 70.0}})
        running.reload()
        running.wait_notified("READY", "1")
        assert budgets(running) == {"70.0"}
        assert status(running).problems == ()


def test_a_worker_that_cannot_build_the_new_configuration_keeps_the_old(daemon: Make) -> None:
    with daemon({"service": {"budget": 100.0}}, tracebacks_allowed=True) as running:
        running.configure({"service": {"budget": 50.0}, "tables": {"extension": "!"}})
        running.reload()
        running.wait_notified("READY", "1")
        running.wait_for("worker.reload-failed", 2)
        assert budgets(running) == {"100.0"}
        assert {w.generation for w in status(running).workers} == {1}


def test_changed_tables_are_noticed_without_a_signal(daemon: Make) -> None:
    with daemon({"service": {"budget": 100.0}, "tables": {"refresh": 0.1}}) as running:
        running.configure({"service": {"budget": 50.0}, "tables": {"refresh": 0.1}})
        running.wait_for("worker.reload", 2)
        assert budgets(running) == {"50.0"}


def test_what_needs_a_restart_is_said(daemon: Make) -> None:
    with daemon() as running:
        running.configure({"listen": {"socket": str(running.directory / "other.sock")}})
        running.reload()
        assert running.wait_for("service.restart-needed")[0]["setting"] == "listen"
        assert offer(running.socket).action is Action.QUEUE


def test_a_worker_that_starts_after_a_reload_has_the_newest(daemon: Make) -> None:
    with daemon({"service": {"budget": 100.0, "workers": 1}}) as running:
        running.configure({"service": {"budget": 50.0, "workers": 1}})
        running.reload()
        running.wait_for("worker.reload")
        os.kill(running.workers()[0], signal.SIGKILL)
        running.wait_for("worker.ready", 2)
        assert budgets(running, 1) == {"50.0"}
