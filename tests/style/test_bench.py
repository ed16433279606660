"""The arithmetic of bench/: what docs/performance.md states comes from here."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCH)
    import figures

    yield figures
    for name in ("figures", "plots", "make_signatures"):
        sys.modules.pop(name, None)


def test_ratios_are_taken_inside_a_round(figures: ModuleType) -> None:
    assert figures.ratio([2.0, 30.0, 1.0], [1.0, 10.0, 4.0]) == figures.Summary(2.0, 0.25, 3.0)


def test_a_target_is_met_everywhere_somewhere_or_missed(figures: ModuleType) -> None:
    def verdict(target: float | None, *medians: float, at_least: bool = False) -> str:
        values = {str(i): figures.Summary.of([value]) for i, value in enumerate(medians)}
        return figures.Figure("x", target, values, at_least=at_least).verdict

    assert verdict(1.6, 1.6, 0.2) == "met"
    assert verdict(1.6, 1.7, 1.5) == "met at 1"
    assert verdict(1.6, 1.61, 1.7) == "missed"
    assert verdict(0.97, 0.97, 1.2, at_least=True) == "met"
    assert verdict(0.97, 0.969, at_least=True) == "missed"
    assert verdict(None, 3.0) == ""


def test_the_table_is_one_row_for_each_figure(figures: ModuleType) -> None:
    figure = figures.Figure("rate", 2.0, {"": figures.Summary(2.5, 1.25, 123.4)}, at_least=True, unit="GB/s")
    assert figures.markdown([figure]).splitlines()[2] == "| rate | >= 2.00 GB/s | 2.50 [1.25-123] GB/s | met |"


def test_linear_growth_has_exponent_one_and_flat_has_none(figures: ModuleType) -> None:
    assert figures.exponent([(10, 3), (100, 30), (1000, 300)]) == pytest.approx(1)
    assert figures.exponent([(10, 3), (100, 3), (1000, 3)]) == pytest.approx(0)


def test_a_plot_as_text_has_each_curve_at_its_extremes(figures: ModuleType) -> None:
    import plots

    plot = plots.Plot("n", "Title", "bytes", "ms", {"one": [(1, 1), (100, 10)], "two": [(1, 5)]})
    lines = plots.text(plot).splitlines()
    assert lines[0] == "Title"
    assert (lines[2][12 + plots.WIDTH], lines[-4][12]) == ("*", "*")
    assert lines[-1] == "* one   o two"


def test_the_signatures_of_the_bench_are_the_same_each_time_and_as_many_as_they_say(figures: ModuleType) -> None:
    import make_signatures

    database = make_signatures.make_database()
    assert database == make_signatures.make_database()
    lines = {name: text.count("\n") for name, text in database.items()}
    assert lines == {"bench.ndb": 60_000, "bench.ldb": 5_000, "bench.hdb": 400_000}
