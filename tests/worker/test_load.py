"""Load report of a worker: one line when scans are skipped, one when that is over."""

import json
from pathlib import Path
from typing import Any

from contentfilter.log import make_logger
from contentfilter.worker.load import QUIET, Load


class Said:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.file = path.open("wb", buffering=0)
        self.load = Load(make_logger("json", "info", self.file.fileno()))

    def lines(self) -> list[tuple[Any, Any]]:
        found = [json.loads(line) for line in self._path.read_text().splitlines()]
        return [(line["event"], line["why"]) for line in found]


def test_shedding_is_logged_when_it_begins_and_when_it_has_been_over_for_a_while(tmp_path: Path) -> None:
    said = Said(tmp_path / "log")
    load = said.load
    load.look(0.0, busy=0)
    assert said.lines() == []
    load.shed["spamd"] += 3
    load.look(1.0, busy=2)
    assert said.lines() == [("load.shed", "spamd: 3, waiting: 2")]
    for second in range(2, 30):
        load.shed["clamd"] += 1
        load.look(float(second), busy=2)
    load.look(29.0 + QUIET / 2, busy=2)
    assert len(said.lines()) == 1
    load.look(29.0 + QUIET, busy=2)
    assert said.lines()[1:] == [("load.normal", "clamd: 28, spamd: 3, waiting: 2")]
    load.look(100.0, busy=3)
    assert said.lines()[2:] == [("load.shed", "waiting: 1")]
    said.file.close()


def test_the_heartbeat_gets_all_counts_once(tmp_path: Path) -> None:
    said = Said(tmp_path / "log")
    said.load.shed["spamd-large"] += 1
    said.load.look(0.0, busy=7)
    assert said.load.counters() == {"shed spamd-large": 1}, "busy is in the listener's counters"
    said.file.close()
