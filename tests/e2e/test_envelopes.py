"""Envelopes with too many recipients: refused with the reason, and neither worker nor receiver swells."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lab.envelopes import envelope
from lab.offer import MESSAGE, Offer, offer, sealed

from contentfilter.model import Action
from contentfilter.wire import hook

MIB = 1 << 20


def peaks(system: Any) -> int:
    """The largest peak of memory among the daemon's processes, in bytes."""
    pids = Path(f"/proc/{system.daemon.pid}/task/{system.daemon.pid}/children").read_text().split()
    texts = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
    return max(int(line.split()[1]) * 1024 for text in texts for line in text.splitlines() if line.startswith("VmHWM"))


@pytest.mark.parametrize("mib", [1, 16, 127])
def test_an_envelope_bomb_of_a_trusted_user_is_refused_with_the_reason(
    make_system: Callable[..., Any], mib: int
) -> None:
    system = make_system()
    assert system.deliver(b"Subject: x\n\nx\n").status == 0
    before = peaks(system)
    bomb = envelope("empty", mib)
    with ThreadPoolExecutor() as threads:
        said = list(threads.map(lambda _: offer(system.daemon.socket, MESSAGE, bomb), range(3)))
    assert {(answer.action, answer.text.split(" [")[0]) for answer in said if answer} == {
        (Action.REJECT, "too many recipients for one message")
    }
    assert all(said)
    (line, *_) = system.daemon.wait_for("mail.done", where=lambda each: each["decision"] == "reject")
    assert line["rule"] == "maxrecipients=100000"
    assert line["recipient_count"] == bomb.count(b"\0T")
    # One of them has the worker for itself: three would exceed max_in_flight_bytes.
    assert peaks(system) - before < (mib + 64) * MIB


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_an_envelope_bomb_of_another_user_is_refused_with_the_reason(make_system: Callable[..., Any]) -> None:
    system = make_system(settings={"listen": {"mode": "0666"}})
    os.chmod(system.directory, 0o755)
    assert system.deliver(b"Subject: x\n\nx\n").status == 0
    before, bomb = peaks(system), envelope("empty", 127)
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        answer = offer(system.daemon.socket, MESSAGE, bomb)
        os.write(writer, (f"{answer.action.value} {answer.text}" if answer else "closed").encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1000).startswith(b"reject too many recipients for one message [")
    os.close(reader)
    os.close(writer)
    assert peaks(system) - before < (127 + 64) * MIB


def test_an_envelope_above_the_limit_is_deferred_with_the_reason(make_system: Callable[..., Any]) -> None:
    system = make_system()
    with Offer(system.daemon.socket) as once:
        fds = [sealed(MESSAGE), sealed(b"F\0\0")]
        once.send_raw(hook.encode_request(hook.Request(0, 60.0, len(MESSAGE), (128 << 20) + 1, {})), fds)
        for fd in fds:
            os.close(fd)
        answer = once.answer()
    assert answer is not None
    assert answer.action is Action.DEFER
    assert answer.text.startswith("envelope is larger than the content filter takes")
