"""The soak's short form: every end of the daemon once under load. And that the soak would notice what it counts."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from lab.standin import Queued

from contentfilter.wire import envelope

SOAK = Path(__file__).resolve().parents[2] / "bench" / "soak.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_whatever_ends_the_daemon_nothing_is_lost_doubled_refused_or_deferred(soak, lab_directory: Path) -> None:
    outcome = soak.soak(lab_directory / "soak", rounds=1, every=0.3, clients=6)
    assert outcome.counts | {"messages": 0} == dict.fromkeys(("messages", *soak.FAULTS), 0), outcome.notes
    assert set(outcome.happened.values()) == {1}
    assert len(outcome.happened) == 7
    assert len(outcome.versions) == 2, "the upgrade was no upgrade"
    assert set(outcome.kinds) == {kind.name for kind in soak.KINDS}
    assert outcome.longest < 30


MESSAGE = b"Subject: soak\n\nbody\n"
BOTH = (b"marked@mixed.example", b"none@mixed.example")


def queued(*recipients: bytes, head: bytes = b"", message: bytes = MESSAGE) -> Queued:
    return Queued(1, 1, 0, head + message, envelope.build(b"s@example.net", recipients), (), {}, {})


@pytest.mark.parametrize(
    ("kind", "status", "text", "found", "fault"),
    [
        ("split", 0, b"", [queued(*BOTH)], None),
        ("split", 0, b"", [queued(BOTH[0]), queued(BOTH[1])], None),
        ("split", 0, b"", [queued(BOTH[0])], "lost"),
        ("letter", 0, b"", [], "lost"),
        ("split", 0, b"", [queued(*BOTH), queued(BOTH[1])], "doubled"),
        ("letter", 71, b"", [], "deferred"),
        ("letter", 31, b"", [], "refused"),
        ("letter", 82, b"Dvirus", [], "refused"),
        ("virus", 82, b"Dvirus", [], None),
        ("virus", 0, b"", [], "let in"),
        ("virus", 82, b"Dvirus", [queued(b"user@protected.example")], "let in"),
        ("virus", 82, b"", [], "wrong"),
        ("letter", 0, b"", [queued(b"user@protected.example", head=b"X: virus=unchecked\n")], "unchecked"),
        ("letter", 0, b"", [queued(b"user@protected.example", message=b"another\n")], "wrong"),
        ("letter", -9, b"", [queued(b"user@protected.example")], "doubled"),
    ],
)
def test_the_soak_notices_each_fault(soak, kind, status, text, found, fault) -> None:
    by_name = {each.name: each for each in soak.KINDS}
    faults = soak.judge(by_name[kind], MESSAGE, status, text, found)
    assert (faults[fault] >= 1) if fault else not faults
