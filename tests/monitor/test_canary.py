"""What the canary makes of a hook's end and a worker's account, whichever way they fit or do not."""

import asyncio
import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from contentfilter.bus import messages
from contentfilter.bus.messages import CANARY_SEEN, CanarySeen
from contentfilter.doors.canary import answer_for
from contentfilter.log import make_logger
from contentfilter.model import Action
from contentfilter.monitor import canary
from contentfilter.monitor.canary import Canary, find_hook, judge, measured
from contentfilter.monitor.canary_hook import Ended
from contentfilter.monitor.metrics import CANARY_RESULTS
from contentfilter.monitor.samples import Sample
from contentfilter.settings import CanarySettings as CanarySettings
from contentfilter.settings import ServiceSettings, Settings
from contentfilter.verdict.record import ScanRecord

CLEAN = ScanRecord("clamd", "clean", 1.0, backend="unix:/c")
FOUND = ScanRecord("clamd", "found", 1.0, "Eicar", backend="unix:/c")
DOWN = ScanRecord("clamd", "unchecked", 1.0, cause="down", detail="nobody listens", backend="unix:/c")
SKIPPED = ScanRecord("clamd", "skipped", 1.0, detail="no rules")
BYPASSED = ScanRecord("clamd", "unchecked", 0.0, cause="bypassed", detail="by alice")
LET_THROUGH = ScanRecord("clamd", "clean", 1.0, detail="Eicar passed, allowed by alice: test")
SPAM = ScanRecord("spamd", "found", 1.0, score=1000.9, threshold=5.0)
FINE = ScanRecord("spamd", "clean", 1.0, score=1.0, threshold=5.0)
EICAR = Sample("eicar")


def word(status: int, *scans: ScanRecord) -> str:
    return judge(EICAR, Ended(status, ""), CanarySeen("n", "eicar", scans))[0]


@pytest.mark.parametrize(
    ("status", "scans", "result"),
    [
        (31, (FOUND,), "caught"),
        (31, (SPAM,), "caught"),
        (0, (CLEAN,), "passed"),
        (0, (LET_THROUGH,), "passed"),
        (71, (DOWN,), "unchecked"),
        (71, (BYPASSED,), "bypassed"),
        (71, (CLEAN, BYPASSED, DOWN), "bypassed"),
        (71, (CLEAN, DOWN), "unchecked"),
        (31, (FOUND, DOWN), "caught"),
        (0, (SKIPPED,), "unchecked"),
        (0, (), "unchecked"),
        # What the hook did is not what the worker answered.
        (0, (FOUND,), "failed"),
        (31, (CLEAN,), "failed"),
        (0, (DOWN,), "failed"),
        (1, (FOUND,), "failed"),
        (-9, (FOUND,), "failed"),
        (120, (FOUND,), "unknown"),
    ],
)
def test_every_end_has_its_word(status: int, scans: tuple[ScanRecord, ...], result: str) -> None:
    assert word(status, *scans) == result


@pytest.mark.parametrize("status", [0, 31, 71])
def test_without_a_workers_account_nothing_is_green(status: int) -> None:
    """Also not where the status alone would do: another daemon may have refused or dropped it."""
    for name in ("clean", "eicar"):
        assert judge(Sample(name), Ended(status, ""), None)[0] == "no-answer"


def test_every_word_is_one_of_the_metrics() -> None:
    scans = (CLEAN, FOUND, DOWN, SKIPPED, BYPASSED)
    told = {
        word(s, *some) for s in (0, 31, 71, 120, 1) for n in range(3) for some in itertools.product(scans, repeat=n)
    }
    assert told | {judge(EICAR, Ended(0, ""), None)[0]} == CANARY_RESULTS


def test_a_worker_never_has_a_sample_queued() -> None:
    scans = (CLEAN, FOUND, DOWN, SKIPPED, BYPASSED, LET_THROUGH, SPAM, FINE)
    answers = {answer_for(some) for n in range(4) for some in itertools.product(scans, repeat=n)}
    assert answers == {Action.DROP, Action.REJECT, Action.DEFER}


def test_what_let_it_through_is_told() -> None:
    assert judge(EICAR, Ended(0, ""), CanarySeen("n", "eicar", (LET_THROUGH,)))[1].endswith("allowed by alice: test")


def test_the_installed_hook_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(service=ServiceSettings(control=str(tmp_path / "control")))
    installed, packaged = tmp_path / "bin" / "qmail-queue", tmp_path / "scripts" / "contentfilter-queue"
    monkeypatch.setattr(canary, "packaged_hook", lambda given: packaged)
    assert find_hook(settings) == packaged
    installed.parent.mkdir()
    installed.write_bytes(b"the real qmail-queue")
    assert find_hook(settings) == packaged
    installed.write_bytes(b"contentfilter-queue 0.1.0 protocol 1\n")
    assert find_hook(settings) == installed
    named = msgspec.structs.replace(settings, canary=CanarySettings(hook="/named"))
    assert find_hook(named) == Path("/named")


def quiet(path: Path) -> tuple[Any, int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    return make_logger("json", "info", fd), fd


@pytest.mark.asyncio
async def test_no_hook_is_told_once_and_no_result_is_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, fd = quiet(tmp_path / "log")
    monkeypatch.setattr(canary, "find_hook", lambda settings: None)
    bird = Canary(log, lambda: (Settings(), (EICAR,)), lambda: "ready")
    for _ in range(3):
        said = await bird.round()
        assert (said.results, "hook install" in said.problem) == ((), True)
    os.close(fd)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["canary.off"]


@pytest.mark.asyncio
async def test_rounds_never_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, fd = quiet(tmp_path / "log")
    bird = Canary(log, lambda: (Settings(), (EICAR,)), lambda: "ready")
    running, most = 0, 0

    async def send(*_: object) -> dict[str, Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return {"eicar": ("caught", "it was", 0.1)}

    monkeypatch.setattr(canary, "find_hook", lambda settings: Path("/hook"))
    monkeypatch.setattr(bird, "_send", send)
    rounds = await asyncio.gather(*(bird.round() for _ in range(5)))
    os.close(fd)
    assert most == 1
    assert [said.results[0].runs for said in rounds] == [{"caught": count} for count in range(1, 6)]


def test_events_about_samples_go_no_further() -> None:
    bird = Canary(SimpleNamespace(), lambda: (Settings(), ()), lambda: "ready")  # type: ignore[arg-type]
    mail = messages.Event("mail.done", {})
    about = messages.Event(CANARY_SEEN, msgspec.to_builtins(CanarySeen("n", "eicar", (FOUND,))))
    broken = messages.Event(CANARY_SEEN, {"nonce": 7})
    assert list(bird.others([about, mail, broken, mail])) == [mail, mail]


def result(word: str, ok: bool | None, last: float | None = 7.0) -> messages.CanaryResult:
    return messages.CanaryResult("eicar", word, ok, "", 0.5, 9.0, last, {"caught": 3})


def test_what_was_switched_off_or_bypassed_has_no_result_to_ring_about() -> None:
    counted = ("contentfilter_canary_runs_total", ("eicar", "caught"), 3)
    for off in (result("skipped", None), result("bypassed", ok=False)):
        assert list(measured([off])) == [counted]
    assert list(measured([result("unchecked", ok=False)])) == [
        ("contentfilter_canary_result", ("eicar",), False),
        ("contentfilter_canary_seconds", ("eicar",), 0.5),
        ("contentfilter_canary_last_success_timestamp_seconds", ("eicar",), 7.0),
        counted,
    ]
