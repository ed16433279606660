"""Every seed and everything that fuzzing ever found goes through its target again; and targets notice what is wrong."""

import pytest
from fuzz.seeds import CORPUS, corpus, seeds
from fuzz.targets import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contentfilter.verdict import headers
from contentfilter.wire import envelope, hook


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_findings_break_no_promise(name: str) -> None:
    inputs = [*seeds()[name], *corpus(name)]
    assert inputs
    for data in inputs:
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_grows_from_the_seeds_breaks_no_promise(name: str, data: st.DataObject) -> None:
    """A seed, cut somewhere, with any bytes in place of some."""
    seed = data.draw(st.sampled_from(seeds()[name]))
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(seed))] * 2)))
    TARGETS[name](seed[:start] + data.draw(st.binary(max_size=60)) + seed[end:])


def test_every_target_has_seeds_and_the_corpus_no_other() -> None:
    assert set(seeds()) == set(TARGETS)
    assert {path.name for path in CORPUS.iterdir()} <= set(TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) < 200_000


def test_a_reader_that_takes_what_the_hook_refuses_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = seeds()["answer"]
    monkeypatch.setattr(envelope, "ADDRESS_MAX", 1003)
    with pytest.raises(AssertionError):
        TARGETS["envelopes"](b"F" + b"s" * 1003 + b"\0\0")
    monkeypatch.setattr(hook, "SUBMISSIONS_MAX", 1)
    with pytest.raises(AssertionError):
        TARGETS["answer"](answers[1])  # of two submissions


def test_a_line_end_that_gets_through_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "_NO_LINE_ENDS", bytes(range(256)))
    with pytest.raises(AssertionError):
        TARGETS["spam_fields"](b"X-Spam-Report: a\rX-Forged: b\n\n")
